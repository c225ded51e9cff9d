"""Cleaning of text from other sources for display: one line, without credentials and without Markdown."""

import re

# A path shows only one slash after the scheme. Then a URI counts only if it contains a password.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?:/[^\s'\"<>]+|[^\s'\"<>/@:]+:[^\s'\"<>]*@[^\s'\"<>]*)")
_VALUE = re.compile(r"([?&][^\s=&?'\"<>]+=)[^\s&'\"<>]+")  # also in a bare path, as HTTP libraries report it
# Escape _ and ] only if they emphasise or link, so that names and intervals stay as they are.
_MARKDOWN = re.compile(r"([\\`*<>|~#]|!(?=\[)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=\s*[\[(:]))")


def one_line(text: str, width: int = 1000) -> str:
    """Return `text` on one line of at most `width` characters; unprintable ones become escapes such as \\x1b."""
    flat = " ".join(text.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in flat)
    if len(shown) <= width:
        return shown
    half = (width - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


def redact(text: str) -> str:
    """Return `text` with user, password and query values of every URI replaced by ***.

    Everything before the last @ of a URI counts as credentials, because a database URI may have a / in its password.
    A URI without a host, such as sqlite:///folder@work/mlflow.db, has no credentials.
    """
    return _VALUE.sub(r"\1***", _URI.sub(_without_credentials, text))


def _without_credentials(found: re.Match[str]) -> str:
    scheme, slashes, rest = re.split(r"(:/{1,2})", found[0], maxsplit=1)
    return found[0] if rest.startswith("/") or "@" not in rest else f"{scheme}{slashes}***@{rest.rpartition('@')[2]}"


def markdown(text: str) -> str:
    """Return `text` as one line of Markdown that shows it literally: no link, image, heading, table or HTML."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;").replace("\\<", "&lt;")
