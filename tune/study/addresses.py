"""Check the addresses of MLflow stores and Ray clusters."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from analysis.io.text import redact
from tune.errors import StudyError

ADDRESS = re.compile(r"auto|(?P<client>ray://)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")
TRACKING = ("http", "https", "postgresql", "mysql", "mssql")
SQLITE = re.compile(r"sqlite(?:\+pysqlite)?:///(?P<path>.+)", re.DOTALL)


def check_tracking(uri: str, source: str, whole: bool = True) -> str:
    """Return `uri` if it is a tracking URI that MLflow accepts.

    Args:
        uri: The URI, or `none`.
        source: Key, option or variable that `uri` comes from, for the message.
        whole: Refuse a URI whose credentials were replaced by `***`, as they are in a resolved study.

    Raises:
        StudyError: One line without the credentials.
    """
    allowed = "none, sqlite:///FILE, http(s)://HOST:PORT, or a database's or Databricks' URI"
    if match := SQLITE.fullmatch(uri):
        if match["path"].startswith(":memory:"):
            raise StudyError(f"{source} '{uri}': a store in memory keeps nothing; allowed: {allowed}")
        return uri
    if folder := _folder(uri):
        wanted = folder if folder.endswith(".db") else f"{folder.rstrip('/')}.db"
        raise StudyError(
            f"{source} '{uri}': MLflow has ended its support for stores that are folders; give a database file, such "
            f"as sqlite:///{wanted}, or leave out {source}"
        )
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise StudyError(f"{source} '{redact(uri)}': {error}; allowed: {allowed}") from None
    known = uri in ("none", "databricks") or parts.scheme.split("+")[0] in (*TRACKING, "databricks")
    if not known or any(c.isspace() for c in uri) or (parts.scheme in ("http", "https") and not parts.hostname):
        raise StudyError(f"{source} '{redact(uri)}' is not a tracking URI; allowed: {allowed}")
    if whole and "***" in uri:
        raise StudyError(
            f"{source} '{uri}' lacks its credentials; give the whole URI with --tracking or MLFLOW_TRACKING_URI"
        )
    return uri


def _folder(uri: str) -> str | None:
    """Return the path of a store that is a folder: a `file:` URI or a plain path. Return None for another URI."""
    if uri.lower().startswith("file:"):
        return unquote(re.sub(r"^file:(//localhost(?=/)|//)?", "", uri, flags=re.IGNORECASE)) or "mlruns"
    path = uri.startswith(("/", "./", "../", "~")) or uri in (".", "mlruns") or uri.endswith((".db", "/"))
    return uri if path and ":" not in uri else None


def check_address(address: str) -> str:
    """Return `address` if it has the form of a Ray cluster's address. Raises StudyError otherwise."""
    match = ADDRESS.fullmatch(address)
    if not match or (match["port"] and not 0 < int(match["port"]) < 1 << 16):
        raise StudyError(
            f"address '{address}' is not an address of a Ray cluster; allowed: auto, HOST:PORT, ray://HOST:PORT"
        )
    return address
