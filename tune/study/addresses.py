"""Check the addresses of MLflow stores and Ray clusters."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from analysis.io.text import redact
from tune.errors import StudyError

ADDRESS = re.compile(r"auto|(?P<client>ray://)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")


TRACKING = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "file")


def check_tracking(uri: str, source: str, whole: bool = True) -> str:
    """`uri` where MLflow can make something of it. Raises StudyError, in a line without its credentials.

    `whole`: refuse one whose credentials were left out, as they are in a resolved study.
    """
    allowed = "none, sqlite:///FILE, http(s)://HOST:PORT, or a database's or Databricks' URI"
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise StudyError(f"{source} '{redact(uri)}': {error}; allowed: {allowed}") from None
    known = uri in ("none", "databricks") or parts.scheme.split("+")[0] in TRACKING
    if not known or any(c.isspace() for c in uri) or (parts.scheme in ("http", "https") and not parts.hostname):
        raise StudyError(f"{source} '{redact(uri)}' is no tracking URI; allowed: {allowed}")
    if whole and "***" in uri:
        raise StudyError(f"{source} '{uri}' is without its credentials; give it whole: --tracking, MLFLOW_TRACKING_URI")
    return uri


def check_address(address: str) -> str:
    """`address` where it has the form of a Ray cluster's. Raises StudyError."""
    match = ADDRESS.fullmatch(address)
    if not match or (match["port"] and not 0 < int(match["port"]) < 1 << 16):
        raise StudyError(f"address '{address}' is none of a Ray cluster; allowed: auto, HOST:PORT, ray://HOST:PORT")
    return address
