"""Several small trials, trained as one batched model."""

from pagating.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
