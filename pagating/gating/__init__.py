"""The gates: units, strengths, and the patch of a Hugging Face model."""

from pagating.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
