"""Text to tokens to windows."""

from pagating.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
