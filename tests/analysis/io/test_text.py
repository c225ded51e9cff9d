import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.io.plain_yaml import PlainYamlError, parse
from analysis.io.text import amount, duration, markdown, one_line, readable, redact


@given(st.text())
def test_one_line_is_one_line_that_can_be_printed(text):
    shown = one_line(text, 80)
    assert shown.isprintable()
    assert len(shown) <= 80


def test_one_line_keeps_what_can_be_read():
    assert one_line("é β\n  x") == "é β x"
    assert one_line("\x1b[2J\u202e\ud800") == r"\x1b[2J\u202e\ud800"
    assert one_line("a" * 50 + "b" * 50, 25) == "aaaaaaaaaa ... bbbbbbbbbb"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h:5000/x", "http://***@h:5000/x"),
        ("http:/u:p@[::1: No such file", "http:/***@[::1: No such file"),  # taken for a path
        ("file:/folder@work/x", "file:/folder@work/x"),
        ("https://token@h", "https://***@h"),
        ("http://u:p@ss@h", "http://***@h"),
        ("postgresql+psycopg2://u:p/a@h/d", "postgresql+psycopg2://***@h/d"),
        ("request to http://u:p@h/api?k=v&token=t#f failed", "request to http://***@h/api?k=***&token=*** failed"),
        (
            "Max retries exceeded with url: /?token=t/api (Caused by",
            "Max retries exceeded with url: /?token=*** (Caused by",
        ),
        ("'http://u:p@h', \"http://u:q@i\"", "'http://***@h', \"http://***@i\""),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("mail me@work: a = b?", "mail me@work: a = b?"),
    ],
)
def test_redact_takes_credentials_and_leaves_the_rest(text, shown):
    assert redact(text) == shown
    assert redact(redact(text)) == shown


WORD = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-._~%!$()*+,;:@/"), min_size=8)


@given(st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]), WORD.map("s3".__add__), st.text(max_size=9))
def test_no_password_passes_whatever_stands_in_it(scheme, password, after):
    assert password not in redact(f"{after} {scheme}://user:{password}@host:5000/path {after}").replace(after, "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script\\>alert(1)&lt;/script\\>"),
        ("[x](javascript:alert(1))", "[x\\](javascript:alert(1))"),
        ("a\n# b", "a \\# b"),
        ("&lt;", "&amp;lt;"),
        ("`a` *b* _c_ | ~d~ ![e](f)", "\\`a\\` \\*b\\* \\_c\\_ \\| \\~d\\~ \\![e\\](f)"),
        ("[x]: javascript:1", "[x\\]: javascript:1"),
        ("[x] [y] (z)", "[x\\] [y\\] (z)"),
        ("test_nll of paglu: [+0.37, +0.63], n = 8", "test_nll of paglu: [+0.37, +0.63], n = 8"),
        ("paglu-searched 0.5% (n = 6)", "paglu-searched 0.5% (n = 6)"),
    ],
)
def test_markdown_shows_text_as_it_is(text, shown):
    assert markdown(text) == shown


def test_plain_yaml_is_data():
    assert parse("{a: [1, 2.5, text, true, null, 1_000], b: -3}") == {"a": [1, 2.5, "text", True, None, 1000], "b": -3}
    assert parse("a: 2020-01-01") == {"a": "2020-01-01"}
    assert parse("a: 1.0e-4") == {"a": 1e-4}
    for text, message in (("a: {", "line"), ("a: 1\na: 2", "key 'a' is given twice"), ("a: !!int 1", "tag")):
        with pytest.raises(PlainYamlError, match=message):
            parse(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (200_000, "2.3 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (20_480, "20.5k"), (2e13, "20T"), (3e20, "300E")])
def test_amounts(value, text):
    assert amount(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB")]
)
def test_bytes(size, text):
    assert readable(size) == text
