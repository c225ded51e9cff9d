"""GPT-2 in torch only, with the parameters, names and values of Hugging Face's `GPT2LMHeadModel`, without its overhead.

A state dict of one model loads into the other, patched or not (tested for each arm). This module does not import
transformers, so that the process of a trial starts as fast as torch.

Axes: B batch, T position, C d_model, F d_ff, H head, D width of a head, V vocabulary, N = B * T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagating.gating.alpha import AlphaModule, alpha_modules, parse
from pagating.gating.catalog import MODULE_BASES, settings
from pagating.gating.gates import Function
from pagating.gating.learned import POLYNOMIALS, XIELU
from pagating.gating.own_gate import load_own_of, make_unit
from pagating.gating.units import BASES, PaGLU, ProjectedGLU, SplitGLU
from pagating.model.size import GPT2Size

ACTIVATION_FUNCTIONS: dict[str, Function] = {
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": BASES["gelu"],
}


class Logits(NamedTuple):
    """Output of the model: `logits` (B, T, V), named as in transformers."""

    logits: Tensor


class Dense(nn.Module):
    """The linear layer `x @ weight + bias`, its weight stored as (inputs, outputs) like in GPT-2's checkpoints."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Stock(nn.Module):
    """The activation of GPT-2 without a gate: a row of `ACTIVATIONS`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATION_FUNCTIONS[self.name](x)


def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute causal softmax attention with scale 1/sqrt(D).

    It uses torch's fused kernel, except in bfloat16 on a CPU, where the kernel's backward pass is slower than separate
    products. There it uses separate products with the softmax in float32.
    """
    if q_BHTD.dtype != torch.bfloat16 or q_BHTD.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, dropout_p=dropout)
    n = q_BHTD.shape[-2]
    later_TT = torch.ones(n, n, dtype=torch.bool, device=q_BHTD.device).triu(1)
    scores_BHTT = (q_BHTD @ k_BHTD.transpose(-2, -1)).float() * q_BHTD.shape[-1] ** -0.5
    weights_BHTT = F.softmax(scores_BHTT.masked_fill(later_TT, -torch.inf), dim=-1).to(v_BHTD.dtype)
    return F.dropout(weights_BHTT, dropout) @ v_BHTD


class Attention(nn.Module):
    """Causal self-attention of all heads, (B, T, C) -> (B, T, C), with dropout on its weights and its output."""

    def __init__(self, size: GPT2Size) -> None:
        super().__init__()
        self.n_head, self.dropout = size.n_head, size.dropout
        self.c_attn, self.c_proj = Dense(size.d_model, 3 * size.d_model), Dense(size.d_model, size.d_model)

    def forward(self, x_BTC: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        parts = self.c_attn(x_BTC).split(x_BTC.shape[-1], dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in parts)
        y_BTC = self.c_proj(attend(q, k, v, dropout).transpose(1, 2).flatten(2))
        return F.dropout(y_BTC, dropout) if dropout else y_BTC


class MLP(nn.Module):
    """The MLP `c_proj(act(c_fc(x)))`. A gated linear unit has two projections of `round(2/3 * d_ff)`, stored as one."""

    def __init__(self, size: GPT2Size, act: nn.Module) -> None:
        super().__init__()
        d_ff = 4 * size.d_model
        into, out = (2 * act.width, act.width) if isinstance(act, SplitGLU) else (d_ff, d_ff)
        self.dropout = size.dropout
        self.c_fc, self.c_proj, self.act = Dense(size.d_model, into), Dense(out, size.d_model), act

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC = self.c_proj(self.act(self.c_fc(x_BTC)))
        return F.dropout(y_BTC, self.dropout) if self.training and self.dropout else y_BTC


class Block(nn.Module):
    """A block of GPT-2: attention, then the MLP, each applied after a LayerNorm and added to its input."""

    def __init__(self, size: GPT2Size, act: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(size.d_model), Attention(size)
        self.ln_2, self.mlp = nn.LayerNorm(size.d_model), MLP(size, act)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.attn(self.ln_1(x_BTC)) + x_BTC
        return x_BTC + self.mlp(self.ln_2(x_BTC))


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm, named `transformer.` in a checkpoint of GPT-2."""

    def __init__(self, size: GPT2Size, acts: list[nn.Module]) -> None:
        super().__init__()
        self.wte = nn.Embedding(size.vocab_size, size.d_model, _weight=torch.empty(size.vocab_size, size.d_model))
        self.wpe = nn.Embedding(size.n_ctx, size.d_model, _weight=torch.empty(size.n_ctx, size.d_model))
        self.h = nn.ModuleList(Block(size, act) for act in acts)
        self.ln_f = nn.LayerNorm(size.d_model)
        self.dropout = size.dropout

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return the sum of token embedding and position embedding, (B, T, C)."""
        x_BTC: Tensor = self.wte(tokens_BT) + self.wpe.weight[: tokens_BT.shape[1]]
        return x_BTC

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT)
        if self.training and self.dropout:
            x_BTC = F.dropout(x_BTC, self.dropout)
        for block in self.h:
            x_BTC = block(x_BTC)
        return self.ln_f(x_BTC)


class Head(nn.Module):
    """The output projection `x @ weight.T`, weight (V, C), tied to the token embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.linear(x_BTC, self.weight)


class GPT2(nn.Module):
    """GPT-2 with a tied output projection (Radford et al. 2019) and a unit in place of its MLP activation.

    `unit` has arguments of `pagating.patch` (gate, alpha, base, form, unit); None is the stock activation. Alphas hold
    their start values. Matrices hold uninitialised memory until `pagating.model.initialise.initialise_gpt2` fills them.
    """

    def __init__(self, size: GPT2Size, unit: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = size
        self.transformer = Transformer(size, activations(size, unit))
        self.lm_head = Head(self.transformer.wte)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Return the input of the output projection, (B, T, C), for tokens (B, T) with T at most `n_ctx`."""
        x_BTC: Tensor = self.transformer(tokens_BT)
        return x_BTC

    def forward(self, input_ids: Tensor) -> Logits:
        return Logits(self.lm_head(self.hidden(input_ids)))


def activations(size: GPT2Size, unit: Mapping[str, Any] | None) -> list[nn.Module]:
    """Make the activation of each block. `gate` may also be `FILE.py:NAME`.

    Raise ValueError for a key or value that `pagating.patch` does not accept.
    """
    if unit is None:
        return [Stock(size.activation) for _ in range(size.n_layer)]
    row = settings(unit)
    load_own_of(unit)
    spec = parse(row["alpha"], size.n_layer)
    owner: AlphaModule | None = None
    acts: list[nn.Module] = []
    for layer in range(size.n_layer):
        act = _unit(size, row, layer, owner)
        if spec.options.get("per") == "model" and owner is None:
            owner = act
        acts.append(act)
    return acts


def _unit(size: GPT2Size, row: Mapping[str, Any], layer: int, owner: AlphaModule | None) -> AlphaModule:
    d_ff, alpha, gate, form = 4 * size.d_model, row["alpha"], row["gate"], row["form"]
    if form == "glu":
        return SplitGLU(alpha, gate, round(2 / 3 * d_ff), layer, owner)
    if form == "projected":
        return ProjectedGLU(alpha, gate, d_ff, layer, owner)
    base, values = row["base"], parse(alpha).values
    off = bool(values) and values[layer if len(values) > 1 else 0] == 0.0
    if base == "xielu":
        return PaGLU(alpha, gate, XIELU(), d_ff, layer, owner, form)
    if base in POLYNOMIALS:
        return PaGLU(alpha, gate, POLYNOMIALS[base](), d_ff, layer, owner, form)
    if base not in (*BASES, *MODULE_BASES):
        return PaGLU(alpha, gate, make_unit(base, d_ff), d_ff, layer, owner, form)
    # a gate that is off becomes the stock activation, for the same bits
    stock = base == "stock" or (base == "gelu" and off)
    return PaGLU(alpha, gate, Stock(size.activation) if stock else base, d_ff, layer, owner, form)


def training_flops_per_token(model: GPT2) -> int:
    """Return forward and backward FLOPs per token at windows of `n_ctx`, counted as in `pagating.gating.cost.cost`."""
    size = model.config
    dense = [m for m in model.modules() if isinstance(m, Dense | nn.Linear | Head)]
    weights = sum(m.weight.numel() for m in dense)
    attention = 2 * size.n_ctx * size.d_model * size.n_layer
    scores = sum(m.get_parameter("alpha_weight").numel() for m in alpha_modules(model) if m.spec.kind == "token")
    return 6 * (weights + attention + scores)
