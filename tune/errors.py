"""Errors of a study. The message of each is one line that a user can act on."""

from __future__ import annotations

from analysis.io.exits import Exit

NODE_LOST = "its node was lost"  # start of the reason of a cell that failed because its node died
SHORT_OF_MEMORY = "running low on memory"  # Ray's text when it kills a worker to keep the node running


class PagatingError(ValueError):
    """Base class of this wing's errors. A command that one of them ends exits with its `exit_code`.

    `CorpusError` of pagating and `TableError` of analysis, which cannot import this class, have the same attribute.
    """

    exit_code = Exit.BAD_INPUT


class StudyError(PagatingError):
    """Bad input of a study. The message names the file, the key, the value and what is allowed."""


class LedgerError(PagatingError):
    """A ledger that cannot be used. The message names the file, the line and the condition."""


class LedgerWriteError(LedgerError):
    """A ledger that cannot be written, for example on a full disk. The events in it are kept."""

    exit_code = Exit.COULD_NOT


class TrackingError(PagatingError):
    """An MLflow store that cannot be written. The message names the store and the cause."""

    exit_code = Exit.COULD_NOT


class StudyStopped(PagatingError):
    """A study that cannot continue, for example on a full disk. The cells that have ended are kept."""

    exit_code = Exit.COULD_NOT
