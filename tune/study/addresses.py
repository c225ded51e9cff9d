"""Check the addresses of MLflow stores and Ray clusters."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from analysis.io.text import redact
from tune.errors import StudyError

ADDRESS = re.compile(r"auto|(?P<client>ray://)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")
TRACKING = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "file")


def check_tracking(uri: str, source: str, whole: bool = True) -> str:
    """Return `uri` if it is a tracking URI that MLflow accepts.

    Args:
        uri: The URI, or `none`.
        source: Key or option that `uri` comes from, for the message.
        whole: Refuse a URI whose credentials were replaced by `***`, as they are in a resolved study.

    Raises:
        StudyError: One line without the credentials.
    """
    allowed = "none, sqlite:///FILE, http(s)://HOST:PORT, or a database's or Databricks' URI"
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise StudyError(f"{source} '{redact(uri)}': {error}; allowed: {allowed}") from None
    known = uri in ("none", "databricks") or parts.scheme.split("+")[0] in TRACKING
    if not known or any(c.isspace() for c in uri) or (parts.scheme in ("http", "https") and not parts.hostname):
        raise StudyError(f"{source} '{redact(uri)}' is not a tracking URI; allowed: {allowed}")
    if whole and "***" in uri:
        raise StudyError(
            f"{source} '{uri}' lacks its credentials; give the whole URI with --tracking or MLFLOW_TRACKING_URI"
        )
    return uri


def check_address(address: str) -> str:
    """Return `address` if it has the form of a Ray cluster's address. Raises StudyError otherwise."""
    match = ADDRESS.fullmatch(address)
    if not match or (match["port"] and not 0 < int(match["port"]) < 1 << 16):
        raise StudyError(
            f"address '{address}' is not an address of a Ray cluster; allowed: auto, HOST:PORT, ray://HOST:PORT"
        )
    return address
