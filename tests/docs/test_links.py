"""Check every link of the docs: files and headings are looked up, and outside addresses are checked for form only."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} (.+?) *$", prose(text), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return set(found)


def prose(text: str) -> str:
    """Return a page without its code."""
    return re.sub(r"`[^`\n]+`", "code", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def broken(page: Path) -> list[str]:
    """Return the links of a page that lead nowhere."""
    found = []
    for target in [match["target"] for match in LINK.finditer(prose(page.read_text()))]:
        parts = urlsplit(target)
        if parts.scheme:
            well_formed = parts.scheme == "https" and "." in parts.netloc
            found += [] if well_formed else [target]
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        if not file.exists() or (parts.fragment and parts.fragment not in anchors(file.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_broken(page):
    assert broken(page) == []


def test_every_page_of_the_docs_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= {match["target"] for match in LINK.finditer(index)}


def test_what_is_broken_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# One two\n## One two\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#one-two) [b](other.md#one-two-1) [c](#here) [d](https://example.org/x) ![e](other.md)\n# Here\n"
        "[f](none.md) [g](other.md#no-heading) [h](http://example.org) [i](https:///x) `[j](none.md)`\n"
    )
    assert broken(page) == ["none.md", "other.md#no-heading", "http://example.org", "https:///x"]
