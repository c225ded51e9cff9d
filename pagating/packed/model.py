"""K GPT-2s of one shape as one model: parameters have a leading axis K, products are batched.

Blocks, attention and units are those of `pagating.model.gpt2`; only modules with parameters of their own are replaced.
The batches of the K models are concatenated, so that the other code works on a batch of K * B windows.

Axes: K models, Q models of one kind of unit, B batch of each, T position, C d_model, F features, N = B * T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pagating.gating.alpha import AlphaModule
from pagating.gating.learned import XIELU
from pagating.gating.units import PaGLU, SplitGLU
from pagating.model.gpt2 import GPT2, Block, Head, Logits, Stock, Transformer
from pagating.packed.adamw import Rows


def _stack(tensors: Iterable[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))


class PackedDense(nn.Module):
    """The linear layer of each model: weight (K, inputs, outputs), bias (K, outputs), x (K * B, T, inputs)."""

    def __init__(self, each: Sequence[nn.Module]) -> None:
        super().__init__()
        self.weight, self.bias = (_stack(m.get_parameter(name) for m in each) for name in ("weight", "bias"))

    def forward(self, x: Tensor) -> Tensor:
        x_KNF = x.reshape(self.weight.shape[0], -1, x.shape[-1])
        return torch.baddbmm(self.bias[:, None], x_KNF, self.weight).view(*x.shape[:-1], -1)


class PackedNorm(nn.Module):
    """The LayerNorm of each model: gain and bias (K, C), x (K * B, T, C)."""

    def __init__(self, each: Sequence[nn.Module]) -> None:
        super().__init__()
        self.weight, self.bias = (_stack(m.get_parameter(name) for m in each) for name in ("weight", "bias"))

    def forward(self, x: Tensor) -> Tensor:
        normed_KNC = F.layer_norm(x, x.shape[-1:]).view(self.weight.shape[0], -1, x.shape[-1])
        return torch.addcmul(self.bias[:, None], normed_KNC, self.weight[:, None]).view(x.shape)


class PackedEmbedding(nn.Module):
    """The embedding of each model: weight (K, V, C), ids (K, N) -> (K, N, C)."""

    def __init__(self, each: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.weight = _stack([m.weight for m in each])

    def forward(self, ids_KN: Tensor) -> Tensor:
        n_model, n_row = self.weight.shape[:2]
        first_K1 = torch.arange(n_model, device=ids_KN.device)[:, None] * n_row
        return F.embedding(ids_KN + first_K1, self.weight.flatten(0, 1))


class PackedUnits(nn.Module):
    """The activations of one layer, with one call for all models with the same kind of unit.

    `sizes` has the number Q of models of each kind. A unit's alpha is a tensor (Q, 1, 1), or (Q, 1, F) if learned per
    channel, so that the unit's own code works for all its models.
    """

    def __init__(self, units: Sequence[nn.Module], sizes: Sequence[int], multipliers: Sequence[list[float]]) -> None:
        super().__init__()
        self.units, self.sizes, self.multipliers = nn.ModuleList(units), list(sizes), list(multipliers)

    def forward(self, x: Tensor) -> Tensor:
        parts_QNF = x.reshape(sum(self.sizes), -1, x.shape[-1]).split(self.sizes)
        done = [unit(part_QNF) for unit, part_QNF in zip(self.units, parts_QNF, strict=True)]
        return (torch.cat(done) if len(done) > 1 else done[0]).view(*x.shape[:-1], -1)

    def learned(self) -> Iterator[Rows]:
        """Yield the parameters of the units, with the models they belong to and their learning-rate multipliers."""
        start = 0
        for unit, size, multipliers in zip(self.units, self.sizes, self.multipliers, strict=True):
            if isinstance(unit, AlphaModule):
                own = [tensor for _, tensor in unit.named_own_alpha() if isinstance(tensor, nn.Parameter)]
                yield from (Rows(parameter, start, multipliers) for parameter in own)
                base = getattr(unit, "base", None)
                yield from (Rows(p, start) for p in (base.parameters() if isinstance(base, XIELU) else ()))
            start += size

    @torch.no_grad()
    def alphas(self) -> list[float | None]:
        """Return the effective alpha of each model in this layer, the mean over channels; None if it has no unit."""
        values: list[float | None] = []
        for unit, size in zip(self.units, self.sizes, strict=True):
            if isinstance(unit, AlphaModule):
                alpha = torch.as_tensor(unit.alpha(), dtype=torch.float64)
                alpha_Q11 = alpha if alpha.dim() else alpha.view(1, 1, 1)
                values += alpha_Q11.expand(size, -1, -1).mean((1, 2)).tolist()
            else:
                values += [None] * size
        return values


class PackedTransformer(Transformer):
    """The transformers of K models. Every parameter has a leading axis K."""

    def __init__(self, each: Sequence[Transformer], sizes: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.dropout = 0.0
        self.register_module("wte", PackedEmbedding([t.wte for t in each]))
        self.register_module("wpe", PackedEmbedding([t.wpe for t in each]))
        owners: list[AlphaModule | None] = [None] * len(sizes)
        blocks = zip(*[t.h for t in each], strict=True)
        self.h = nn.ModuleList(_pack_blocks(layer, sizes, owners) for layer in blocks)
        self.register_module("ln_f", PackedNorm([t.ln_f for t in each]))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        tokens_KBT = tokens_BT.unflatten(0, (self.wte.weight.shape[0], -1))
        x_KBTC = self.wte(tokens_KBT.flatten(1)).unflatten(1, tokens_KBT.shape[1:])
        return (x_KBTC + self.wpe.weight[:, None, : tokens_BT.shape[1]]).flatten(0, 1)


class PackedGPT2(GPT2):
    """K GPT-2s as one model.

    `hidden` takes tokens (K * B, T), model by model, and returns (K * B, T, C).

    Args:
        each: Models of one shape, without dropout, sorted by `unit_kind`. Their modules are reused, so they are
            unusable afterwards.

    Raises:
        ValueError: The models cannot be one pack (the message names the first parameter that differs), or a unit has no
            packed form.
    """

    def __init__(self, each: Sequence[GPT2]) -> None:
        nn.Module.__init__(self)
        _require_one_shape(each)
        self.config = each[0].config
        sizes = [len(list(alike)) for _, alike in groupby(each, unit_kind)]
        self.transformer = PackedTransformer([model.transformer for model in each], sizes)
        self.lm_head = Head(self.transformer.wte)

    def forward(self, input_ids: Tensor) -> Logits:
        n_model = self.lm_head.weight.shape[0]
        x_KBTC = self.hidden(input_ids).unflatten(0, (n_model, -1))
        return Logits((x_KBTC @ self.lm_head.weight.mT[:, None]).flatten(0, 1))

    def alphas(self) -> list[list[float]]:
        """Return the effective alphas of each model, one per layer; an empty list for a stock model."""
        layers = [module.alphas() for module in self.modules() if isinstance(module, PackedUnits)]
        return [[alpha for alpha in model if alpha is not None] for model in zip(*layers, strict=True)]


def unit_kind(model: GPT2) -> tuple[str, ...]:
    """Return a sort key that is equal for two models if and only if their units can be computed in one call.

    Per layer it has form, gate, base, and kind and options of alpha, without its start or fixed value. Fixed values 0
    and 1 are kinds of their own, because the unit then omits a term.
    """
    return tuple(_kind(module) for name, module in model.named_modules() if name.endswith(".mlp.act"))


def _kind(act: nn.Module) -> str:
    if isinstance(act, Stock):
        return f"stock {act.name}"
    if not isinstance(act, PaGLU | SplitGLU) or act.spec.kind == "token":
        kind = f", alpha {act.spec.kind}," if isinstance(act, AlphaModule) else ""
        raise ValueError(f"pack: {type(act).__name__}{kind} has no packed form; train it alone")
    base = getattr(act, "base", None)
    if isinstance(base, nn.Module) and not isinstance(base, Stock | XIELU):
        raise ValueError(f"pack: base {type(base).__name__} has no packed form; train it alone")
    options = {key: value for key, value in sorted(act.spec.options.items()) if key not in ("init", "lr_multiplier")}
    fixed = act.fixed if act.fixed in (None, 0.0, 1.0) else "between"
    name = base.name if isinstance(base, Stock) else "xielu" if isinstance(base, XIELU) else base
    return f"{type(act).__name__} {getattr(act, 'form', 'glu')} {act.gate} {name} {act.spec.kind} {options} {fixed}"


def parameter_shapes(model: GPT2) -> dict[str, Any]:
    """Return the shapes by name of the parameters in which the models of a pack must agree."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if ".alpha_" not in name}


def _require_one_shape(each: Sequence[GPT2]) -> None:
    first = parameter_shapes(each[0])
    if each[0].config.dropout:
        raise ValueError(f"pack: dropout={each[0].config.dropout}; a pack has no dropout: its masks would differ")
    for model in each[1:]:
        for name, shape in parameter_shapes(model).items():
            if first.get(name) != shape:
                raise ValueError(f"pack: {name} is {shape} in one trial and {first.get(name)} in another")


PACKED: dict[str, Callable[[Sequence[nn.Module]], nn.Module]] = {
    "ln_1": PackedNorm,
    "ln_2": PackedNorm,
    "attn.c_attn": PackedDense,
    "attn.c_proj": PackedDense,
    "mlp.c_fc": PackedDense,
    "mlp.c_proj": PackedDense,
}


def _pack_blocks(each: Sequence[Block], sizes: Sequence[int], owners: list[AlphaModule | None]) -> Block:
    """Pack one block of all models into the first model's block. Add units whose alpha all layers share to `owners`."""
    block, units, multipliers, start = each[0], [], [], 0
    acts = [b.mlp.act for b in each]
    for i, size in enumerate(sizes):
        alike = acts[start : start + size]
        multipliers.append(
            [act.spec.options.get("lr_multiplier", 1.0) for act in alike if isinstance(act, AlphaModule)]
        )
        unit = _pack_units(alike, owners[i])
        if isinstance(unit, AlphaModule) and unit.spec.options.get("per") == "model":
            owners[i] = owners[i] or unit
        units.append(unit)
        start += size
    for path, packed in PACKED.items():
        holder, _, name = path.rpartition(".")
        block.get_submodule(holder).register_module(name, packed([b.get_submodule(path) for b in each]))
    block.mlp.act = PackedUnits(units, sizes, multipliers)
    return block


def _pack_units(acts: Sequence[nn.Module], owner: AlphaModule | None) -> nn.Module:
    unit = acts[0]
    if not isinstance(unit, AlphaModule):
        return unit
    if unit.fixed is not None and unit.fixed not in (0.0, 1.0):
        fixed = torch.tensor([act.fixed for act in acts], dtype=torch.float64)
        del unit.__dict__["fixed"]  # a buffer moves with the model
        unit.register_buffer("fixed", fixed[:, None, None])
    names = [name for name, tensor in unit.named_own_alpha() if isinstance(tensor, nn.Parameter)]
    if owner is not None:
        for name in names:
            unit.register_parameter(name, owner.get_parameter(name))
        names = []
    if isinstance(getattr(unit, "base", None), XIELU):
        names += ["base.alpha_p", "base.alpha_n"]
    for path in names:
        stacked = torch.stack([act.get_parameter(path).detach() for act in acts])
        holder, _, name = path.rpartition(".")
        unit.get_submodule(holder).register_parameter(name, nn.Parameter(stacked.view(len(acts), 1, -1)))
    return unit
