"""Cleaning of text from other sources for display: one line, without credentials and without Markdown."""

import re
from collections.abc import Mapping

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


# --- numbers with a unit ---------------------------------------------------------------------------------------------


def amount(value: float) -> str:
    """Return a large number with a unit: k, M, G, T, P, E (powers of 1,000)."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.0f}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}E"


def percent(share: float) -> str:
    """Return a share in percent with at most one decimal: 95%, 98.3%; a smaller one than 1% with three digits."""
    value = 100 * share
    return f"{value:.3g}%" if value < 1 else f"{round(value, 1):g}%"


def readable(size: float) -> str:
    """Return bytes with a unit: B, KiB, MiB, GiB, TiB (powers of 1,024)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration(seconds: float) -> str:
    """Return seconds with a unit: 119 s, 2.0 min, 3.4 h, 2.5 days."""
    for size, unit, below in ((1, "s", 120), (60, "min", 7_200), (3_600, "h", 172_800)):
        if seconds < below:
            return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86_400:.1f} days"


MOST_LAYERS = 4  # layers whose alphas are listed one by one


def values_line(values: Mapping[str, float]) -> str:
    """Return the chosen values of one arm as text: `lr 0.0021, alpha 1.3`; those of many layers as a range."""
    layers = {name: value for name, value in values.items() if name.startswith("alpha_") and name[6:].isdigit()}
    many = layers if len(layers) > MOST_LAYERS else {}
    said = [f"{name} {value:.4g}" for name, value in values.items() if name not in many]
    if many:
        said.append(f"alpha {min(many.values()):.4g} to {max(many.values()):.4g} by layer")
    return ", ".join(said)


def chosen_line(chosen: Mapping[str, Mapping[str, float]]) -> str:
    """Return the chosen values of each arm as one line, or "" if no arm tuned anything but its learning rate."""
    if not any(set(values) - {"lr"} for values in chosen.values()):
        return ""
    return f"Chosen: {'; '.join(f'{arm}: {values_line(values)}' for arm, values in chosen.items())}"
