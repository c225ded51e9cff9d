"""Errors of a study. The message of each is one line that a user can act on."""

from __future__ import annotations


class StudyError(ValueError):
    """Bad input of a study. The message names the file, the key, the value and what is allowed."""


class LedgerError(ValueError):
    """A ledger that cannot be used. The message names the file, the line and the condition."""


class TrackingError(ValueError):
    """An MLflow store that cannot be written. The message names the store and the cause."""


NODE_LOST = "its node was lost"  # start of the reason of a cell that failed because its node died


SHORT_OF_MEMORY = "running low on memory"  # Ray's text when it kills a worker to keep the node running


class StudyStopped(ValueError):
    """A study that cannot continue, for example on a full disk. The cells that have ended are kept."""
