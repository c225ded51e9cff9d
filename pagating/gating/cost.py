"""Parameters and FLOPs per token of a model, patched or not.

A product of an `(m, k)` by a `(k, n)` matrix counts `2 m k n` FLOPs, as in torch's own counter. The count includes all
linear layers, the output projection, and the two products of attention over the full `n_ctx x n_ctx` square (kernels
that skip the masked half do half of that). It excludes embedding look-ups and elementwise operations, such as gates.
The time of a gate is measured instead (`benchmarks/gate_cost.py`).
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from pagating.limits import check_number

from .alpha import AlphaModule, alpha_parameters
from .discovery import features, is_linear
from .patch import count_parameters, unpatched


@dataclass(frozen=True)
class Cost:
    """Cost of a model: parameters (a shared one counts once), parameters that hold alpha, forward FLOPs per token."""

    parameters: int
    alpha_parameters: int
    flops_per_token: int

    @property
    def training_flops_per_token(self) -> int:
        """Return FLOPs of forward and backward: three times the forward (Kaplan et al. 2020, appendix B)."""
        return 3 * self.flops_per_token


@dataclass(frozen=True)
class CostRatio:
    """Cost of a patched model and of the same model unpatched."""

    patched: Cost
    stock: Cost

    @property
    def parameters(self) -> float:
        """Return parameters of the patched model divided by parameters of the stock model."""
        return self.patched.parameters / self.stock.parameters

    @property
    def flops_per_token(self) -> float:
        """Return forward FLOPs per token of the patched model divided by those of the stock model."""
        return self.patched.flops_per_token / self.stock.flops_per_token


def cost(model: nn.Module, n_ctx: int) -> Cost:
    """Compute the cost of a transformer at windows of `n_ctx` tokens.

    For an encoder-decoder, a token is one of each side, and both sides have `n_ctx` tokens. A head that reads one
    position of a sequence (a classifier, a pooler) is counted at every position. The convolution that makes ViT's
    patches is not counted. Raise ValueError if `model` has no config, or `n_ctx` is not a whole number above 0.
    """
    check_number("n_ctx", n_ctx, {"ge": 1}, whole=True)
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__}: cost per token needs the config of a transformers model")
    weights = sum(
        n_in * n_out
        for m in model.modules()
        if is_linear(m) and not hasattr(m, "base_layer")
        for n_in, n_out in [features(m)]
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * n_ctx * width * config.num_attention_heads * _attentions(config)
    # the product w.x of a token-dependent alpha
    scores = sum(m.get_parameter("alpha_weight").numel() for m in model.modules() if _is_token(m))
    return Cost(
        parameters=count_parameters(model),
        alpha_parameters=sum(a.parameter.numel() for a in alpha_parameters(model)),
        flops_per_token=2 * (weights + attention + scores),
    )


def cost_ratio(model: nn.Module, n_ctx: int) -> CostRatio:
    """Compare the cost of a patched model with the same model without its patch. The model does not change."""
    with unpatched(model):
        stock = cost(model, n_ctx)
    return CostRatio(cost(model, n_ctx), stock)


def _is_token(module: nn.Module) -> bool:
    return isinstance(module, AlphaModule) and module.spec.kind == "token"


def _attentions(config: Any) -> int:
    """Count attention layers: one per block, and one more (cross-attention) per decoder block with an encoder."""
    n_layer: int = config.num_hidden_layers
    if not getattr(config, "is_encoder_decoder", False):
        return n_layer
    # T5 and BART name the depth of their decoder differently
    n_decoder: int = config.num_decoder_layers if hasattr(config, "num_decoder_layers") else config.decoder_layers
    return n_layer + 2 * n_decoder
