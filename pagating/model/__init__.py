"""GPT-2 and its fast paths."""

from pagating.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
