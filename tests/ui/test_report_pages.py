"""Check that all words and figures of the report can be seen on a phone, a desktop, a dark screen and paper."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.report import build

pytestmark = pytest.mark.slow
FINISHED = Path(__file__).parents[2] / "docs" / "results" / "laptop-wikitext-2"  # eight arms: the widest tables
LEAST = 4.5  # contrast of text, WCAG 2.1 level AA
PAPER = 718  # px between the margins of A4, upright
LOOKS = {
    "phone": ({"width": 390, "height": 844}, {"color_scheme": "light"}),
    "tablet": ({"width": 600, "height": 900}, {"color_scheme": "light"}),
    "window": ({"width": 900, "height": 900}, {"color_scheme": "light"}),
    "desktop": ({"width": 1280, "height": 800}, {"color_scheme": "light"}),
    "phone, dark": ({"width": 390, "height": 844}, {"color_scheme": "dark"}),
    "desktop, dark": ({"width": 1280, "height": 800}, {"color_scheme": "dark"}),
    "paper": ({"width": PAPER, "height": 1000}, {"color_scheme": "light", "media": "print"}),
}
# A page can be seen if its width, the contrast of its words and the size of its figures suffice
SEEN = """() => {
  const channels = colour => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const light = ([r, g, b]) => {
    const linear = [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const words = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, said = texts.currentNode.textContent.trim();
    if (!said || element.closest("style, script, svg defs") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), drawn = element.closest("svg");
    const ink = drawn ? style.fill : style.color;
    words.push([said.slice(0, 40), ink.startsWith("rgb") ? contrast(channels(ink), behind(element)) : 0]);
  }
  const figures = [...document.querySelectorAll("figure svg, figure img")].map(figure => {
    const {width, height} = figure.getBoundingClientRect();
    const loaded = figure.tagName === "IMG" ? figure.naturalWidth > 0 : figure.childElementCount > 0;
    return loaded ? Math.min(width, height) : 0;
  });
  const tables = [...document.querySelectorAll(".scroll")].map(each => each.scrollWidth - each.clientWidth);
  return {width: document.documentElement.scrollWidth, words, figures, tables};
}"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the report of a published study from its tables."""
    folder = tmp_path_factory.mktemp("report") / "laptop"
    folder.mkdir()
    for name in ("study.yaml", "trials.parquet", "curves.parquet", "provenance.json"):
        shutil.copy(FINISHED / name, folder)
    arms = pd.read_parquet(folder / "trials.parquet")["arm"].unique()
    texts = {"beginning": "In the", "text": "beginning", "greedy": "a" * 200, "sampled": "the the " * 40}
    pd.DataFrame({"arm": arms, "prompt": 0, **texts}).to_parquet(folder / "samples.parquet")
    return build.build(folder)


@pytest.fixture
def shown(page, built):
    """Return a function that opens the report as one of `LOOKS` shows it."""

    def opened(look):
        size, media = LOOKS[look]
        page.set_viewport_size(size)
        page.emulate_media(**media)
        page.goto(built.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
        return page

    return opened


def unseen(page):
    """Return one line for each element of the page that a reader cannot see."""
    found, window = page.evaluate(SEEN), page.viewport_size["width"]
    assert found["words"], "a page without words"
    wide = [f"{found['width']} px in a window of {window}"] if found["width"] > window else []
    faint = [f"{said!r}: contrast {contrast:.2f}" for said, contrast in found["words"] if contrast < LEAST]
    wide += [f"table {place}: {more} px hidden" for place, more in enumerate(found["tables"]) if more > 1]
    return wide + faint + [f"figure {place}: empty" for place, size in enumerate(found["figures"]) if size < 100]


@pytest.mark.parametrize("look", LOOKS)
def test_all_of_the_report_is_seen(shown, look):
    page = shown(look)
    assert unseen(page) == []
    assert page.locator(".samples").is_visible()
    assert len(page.evaluate(SEEN)["figures"]) == page.locator("figure").count() >= 5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    assert dark == ("dark" in look)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("document.body.innerHTML += '<div style=\"width: 2000px\">wide</div>'", "2000 px in a window of 390"),
        # contrast on white: #777777 has 4.48 and #767676 has 4.54, on both sides of the limit
        ("document.body.innerHTML += '<p style=\"background: #ffffff; color: #777777\">faint</p>'", "contrast 4.48"),
        ("document.querySelector('figure svg').style.display = 'none'", "figure 0: empty"),
        ("document.querySelector('figure svg').innerHTML = ''", "figure 0: empty"),
        ("document.querySelector('.scroll').innerHTML = '<p style=\"width: 900px\">wide</p>'", "table 0: "),
    ],
)
def test_what_cannot_be_seen_is_found(shown, spoil, said):
    page = shown("phone")
    page.evaluate(spoil)
    assert any(said in line for line in unseen(page))


@pytest.mark.parametrize("look", ["phone", "desktop"])
def test_the_first_screen_has_the_verdict_with_its_caveats_and_settings(shown, look):
    page = shown(look)
    box = page.locator(".verdict").bounding_box()
    assert box["y"] + box["height"] <= page.viewport_size["height"]
    said = page.locator(".verdict").inner_text()
    assert all(word in said for word in ("relu2: better", "n = 8", "lr 0.0", "The floor linear-floor loses by"))


def test_the_contents_lead_to_each_part(shown):
    page = shown("phone")
    parts = [part.inner_text() for part in page.locator("h2").all()]
    links = page.locator("nav a")
    assert [link.inner_text() for link in links.all()] == parts
    assert {"The verdict", "Methods", "The run"} <= set(parts)
    links.filter(has_text="Methods").click()
    assert abs(page.locator("h2", has_text="Methods").bounding_box()["y"]) < page.viewport_size["height"]


def test_a_contrast_just_enough_is_left_alone(shown):
    page = shown("desktop")
    page.evaluate("document.body.innerHTML += '<p style=\"background: #ffffff; color: #767676\">enough</p>'")
    assert unseen(page) == []
