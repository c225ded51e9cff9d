"""Models as folders of Hugging Face: patched ones loaded, and the models of a study written."""

from pagating.lazy import lazy

__getattr__, __dir__ = lazy(__name__)
