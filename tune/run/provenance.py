"""Provenance of a study's numbers: code, data and machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from analysis.io.files import read_json
from analysis.io.write import write_whole
from pagating import __version__
from tune.study.study import Study
from tune.subject.check import recorded


def git_commit() -> str | None:
    """Return the commit of the running code, or None if it is not in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # installed without git; the version of the package identifies the code


def write_provenance(folder: Path, study: Study, events: list[dict[str, Any]], slots: int) -> None:
    """Write `provenance.json`, which helps to repeat a study: corpus digest, formulas, commit, versions, machine."""
    begun = next(event for event in events if event["event"] == "study")
    found = {
        **(
            {"code": begun["code"], "check": recorded(folder, begun)}
            if "code" in begun
            else {"corpus_digest": begun["corpus"]}
        ),
        **({"precision": begun["precision"]} if "precision" in begun else {}),  # of a study that asked for `auto`
        "formulas": {name: study.resolved(name).formula for name in study.arms},
        "git_commit": git_commit(),
        "versions": {"pagating-study": __version__} | _versions(("torch", "transformers", "ray", "optuna")),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "slots": slots,
        "begun": _moment(events[0]["time"]),
        "ended": _moment(events[-1]["time"]),
        "trial_seconds": round(
            sum(event["final"].get("seconds", 0.0) for event in events if event["event"] == "ended"), 1
        ),
    }
    devices = Counter(event["final"]["device"] for event in events if "device" in event.get("final", {}))
    if devices:  # number of cells by card or processor, of those that were taken or packed
        found["devices"] = dict(devices)
    write_whole(folder / "provenance.json", json.dumps(found, indent=1) + "\n")


def renew_check(folder: Path, events: list[dict[str, Any]]) -> None:
    """Write what the last check of the user's own training found into `provenance.json`, if the study has both."""
    kept = read_json(folder / "provenance.json")
    begun = next((event for event in events if event["event"] == "study"), {})
    if "check" in kept and "code" in begun:
        found = {**kept, "check": recorded(folder, begun)}
        write_whole(folder / "provenance.json", json.dumps(found, indent=1) + "\n")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):  # a machine without Ray
            found[name] = version(name)
    return found
