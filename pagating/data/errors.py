"""Errors of a corpus, and lines for the user. Each is one line."""

from __future__ import annotations

import sys


class CorpusError(ValueError):
    """An unusable corpus. The message is one line with source, condition and value."""

    exit_code = 2  # of a command that it ends


class NotDownloaded(CorpusError):
    """A dataset or tokenizer of the hub without a copy on this machine. It may still exist."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, preceded by its type unless it is an OSError or ValueError."""
    said = (str(error).strip().splitlines() or [""])[0]
    return said if said and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}".strip(": ")


def note(line: str) -> None:
    """Print a line for the user about the text that is used."""
    print(f"pagating: {line}", file=sys.stderr)
