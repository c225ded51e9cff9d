"""Cells of a study as files: trials to train on a machine without Ray, and their results."""

from pagating.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
