"""Text that comes from elsewhere, made safe to show: one line, without credentials, without Markdown of its own."""

import re

# with one slash as a path shows it: there it takes a password to be one
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?:/[^\s'\"<>]+|[^\s'\"<>/@:]+:[^\s'\"<>]*@[^\s'\"<>]*)")
_VALUE = re.compile(r"([?&][^\s=&?'\"<>]+=)[^\s&'\"<>]+")  # also in a bare path, as HTTP libraries report it
# of _ and ] only those that emphasise and link: names and intervals stay as they are
_MARKDOWN = re.compile(r"([\\`*<>|~#]|!(?=\[)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=\s*[\[(:]))")


def one_line(text: str, width: int = 1000) -> str:
    """`text` on one line of at most `width` characters; what cannot be printed (terminal codes too) as \\x1b."""
    flat = " ".join(text.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in flat)
    if len(shown) <= width:
        return shown
    half = (width - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


def redact(text: str) -> str:
    """`text` with user, password and query values of every URI in it as ***.

    All before the last @ of a URI counts as credentials, because a database URI may have a / in its password; a URI
    without a host, such as sqlite:///folder@work/mlflow.db, has none.
    """
    return _VALUE.sub(r"\1***", _URI.sub(_bare, text))


def _bare(found: re.Match[str]) -> str:
    scheme, slashes, rest = re.split(r"(:/{1,2})", found[0], maxsplit=1)
    return found[0] if rest.startswith("/") or "@" not in rest else f"{scheme}{slashes}***@{rest.rpartition('@')[2]}"


def markdown(text: str) -> str:
    """`text` as one line of Markdown that shows it as it is: no link, image, heading, table or HTML comes of it."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;").replace("\\<", "&lt;")
