"""The sizes of a GPT-2: their type, the published ones, and the stock activations by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pagating.limits import Limits, check_number

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new")  # their functions: `pagating.model.gpt2.ACTIVATION_FUNCTIONS`
PRESETS = {  # Radford et al. 2019, table 2
    "gpt2": {"n_layer": 12, "d_model": 768, "n_head": 12, "n_ctx": 1024},
    "gpt2-medium": {"n_layer": 24, "d_model": 1024, "n_head": 16, "n_ctx": 1024},
    "gpt2-large": {"n_layer": 36, "d_model": 1280, "n_head": 20, "n_ctx": 1024},
}
GPT2_VOCABULARY = 50_257  # of every published GPT-2
SIZE_LIMITS: dict[str, Limits] = {  # by field of `GPT2Size` that is a number
    "vocab_size": {"ge": 1, "le": 10**8},
    "n_ctx": {"ge": 2, "le": 1 << 17},
    "d_model": {"ge": 2, "le": 65536},
    "n_layer": {"ge": 1, "le": 200},
    "n_head": {"ge": 1, "le": 1024},
    "dropout": {"ge": 0, "lt": 1},
    "initializer_range": {"gt": 0, "le": 1},
}


@dataclass(frozen=True)
class GPT2Size:
    """Sizes and constants of a GPT-2. `n_ctx`: longest window. `dropout`: of embeddings, attention and residuals."""

    vocab_size: int
    n_ctx: int
    d_model: int
    n_layer: int
    n_head: int
    dropout: float = 0.0
    activation: str = "gelu_new"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name, limits in SIZE_LIMITS.items():
            check_number(name, getattr(self, name), limits, whole=name not in ("dropout", "initializer_range"))
        if self.d_model % self.n_head:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_head={self.n_head}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")


def stock_flops_per_token(size: GPT2Size) -> int:
    """Return the training FLOPs per token of GPT-2 without a unit: `6 * (12 L C^2 + V C + 2 n_ctx C L)`."""
    c, n_layer = size.d_model, size.n_layer
    return 6 * (12 * n_layer * c * c + size.vocab_size * c + 2 * size.n_ctx * c * n_layer)
