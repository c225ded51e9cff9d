"""The losses: causal, masked and span."""

from pagating.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
