"""Search for the activation of every feed-forward layer (MLP) of a model of any architecture.

Such an activation has four properties. It is an activation of transformers or torch. It is inside a repeated block (a
`ModuleList`), so that poolers and heads are left out. Its parent has linear layers as direct children, which lead from
the model's width to another and back; or it has the weights of experts, each in one tensor, and reads the activation.
No name on its path says that it is something else: attention, a router, a norm, a position bias, an adapter, the gate
of per-layer embeddings. Token mixers (a `Conv1d` beside the linear layers, as in Mamba) are left out too.

A linear layer is known by its features, not by its class: quantised ones and those with an adapter count.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

Pattern = str | re.Pattern[str]
# the functions of one element among the modules of torch.nn.modules.activation
_TORCH = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip


def of_transformers(module: str, name: str) -> Any:
    """Return an object of a module of transformers, or None if that module has not been imported.

    No model contains an instance of a class whose module has not been imported. So transformers is never imported here,
    and need not be installed.
    """
    return getattr(sys.modules.get(f"transformers.{module}"), name, None)


def activation_types() -> tuple[type[nn.Module], ...]:
    """Return the activation classes of torch, and those of transformers if it has been imported."""
    rows = (of_transformers("activations", "ACT2CLS") or {}).values()
    return (*{row[0] if isinstance(row, tuple) else row for row in rows}, *_TORCH)


# words in a name on the path of an activation that is not one of a feed-forward layer
_ELSEWHERE = {
    "attention": "attn|attention|mlstm",
    "a router": "router",
    "a norm": "norm|layernorm",
    "a position bias": "position_bias|pos_bias|relative_position|rel_pos|position_embedding|pos_embed|cpb",
    "an adapter": "adapter",
    "the gate of per-layer embeddings": "ple",
}
_FUNCTIONS = {
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "prelu", "relu",
    "relu_", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh",
}  # fmt: skip
_LOOKS_ACTIVE = re.compile("[GS]elu|[Rr]e[Ll][Uu]|[Ss]i[Ll][Uu]|[GS]ELU|GLU|Swish|Activation")
_OPTIONS = ("not in include", "in exclude", "not in layers")
_PER_LAYER = "per_layer_"  # linear layers of per-layer embeddings (Gemma 3n)


@dataclass(frozen=True)
class Slot:
    """The position of an activation in a model.

    Attributes:
        prefix: Full name of the parent module.
        parent: The parent module.
        child: Name of the activation in its parent.
        width: Size of the last axis of the activation's input, or None if it is not known.
        activation: The activation module.
        why: Reason why this is not the activation of a feed-forward layer; empty if it is.
    """

    prefix: str
    parent: nn.Module
    child: str
    width: int | None
    activation: nn.Module
    why: str = ""

    @property
    def name(self) -> str:
        """Return the full name of the activation module."""
        return f"{self.prefix}.{self.child}" if self.prefix else self.child

    def linears(self) -> dict[str, nn.Module]:
        """Return the linear layers beside the activation, by name."""
        return _linears(self.parent)


def is_linear(module: nn.Module) -> bool:
    """Return True for a module with the features of a linear layer: two sizes, or a weight of two axes."""
    inside = getattr(module, "base_layer", module)  # an adapter of PEFT around another layer
    other = any(hasattr(inside, name) for name in ("num_embeddings", "kernel_size", "normalized_shape"))
    return not other and _sizes(inside) is not None


def is_conv1d(module: nn.Module) -> bool:
    """Return True for a `Conv1D` of transformers, a linear layer that stores its weight transposed."""
    conv1d = of_transformers("pytorch_utils", "Conv1D")
    return conv1d is not None and isinstance(module, conv1d)


def features(linear: Any) -> tuple[int, int]:
    """Return the input and output features of a linear layer."""
    sizes = _sizes(getattr(linear, "base_layer", linear))
    if sizes is None:
        raise ValueError(f"{type(linear).__name__} is not a linear layer")
    return sizes


def _sizes(module: Any) -> tuple[int, int] | None:
    # the sizes of a quantised layer are attributes, because its weight is packed
    for into, out in (("in_features", "out_features"), ("nx", "nf"), ("infeatures", "outfeatures")):
        sizes = getattr(module, into, None), getattr(module, out, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or any(True for _ in module.children()):
        return None
    n_out, n_in = weight.shape
    transposed = isinstance(bias, Tensor) and bias.shape == (n_in,) and n_in != n_out
    return (n_out, n_in) if transposed else (n_in, n_out)


def _linears(parent: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in parent._modules.items() if m is not None and is_linear(m)}


def find_activations(model: nn.Module) -> list[Slot]:
    """Return the activations of the feed-forward layers of `model` in layer order; an empty list if there are none."""
    return [slot for slot in all_activations(model) if not slot.why]


def all_activations(model: nn.Module) -> list[Slot]:
    """Return every activation of `model` in layer order; `why` says why one is not that of a feed-forward layer."""
    return list(_slots(model))


def choose_activations(
    model: nn.Module,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[list[Slot], dict[str, str]]:
    """Return the activations to replace in layer order, and the reason for each other one by its name.

    Args:
        model: The model.
        include: Patterns of names. Activations with such a name are chosen, whatever they belong to, and no others.
        exclude: Patterns of names. Activations with such a name are not chosen.
        layers: Indices of blocks: the first number in a name. Negative ones count from the end.

    Raises:
        ValueError: Nothing is chosen, or a pattern or an index fits nothing. The message names what was seen.
    """
    found = all_activations(model)
    wanted, unwanted = _patterns("include", include, found), _patterns("exclude", exclude, found)
    blocks = _blocks(layers, found)
    chosen: list[Slot] = []
    left: dict[str, str] = {}
    for slot in found:
        why = "" if wanted else slot.why
        if wanted and not any(matches(pattern, slot.name) for pattern in wanted):
            why = _OPTIONS[0]
        elif not why and any(matches(pattern, slot.name) for pattern in unwanted):
            why = _OPTIONS[1]
        elif not why and blocks is not None and _block(slot) not in blocks:
            why = _OPTIONS[2]
        if why:
            left[slot.name] = why
        else:
            chosen.append(slot)
    left |= _no_modules(model)
    if not chosen:
        raise ValueError(_nothing_found(model, left))
    return chosen, left


def matches(pattern: Pattern, name: str) -> bool:
    """Return True if a pattern fits the full name of an activation.

    A compiled regular expression is searched for. A string is a glob for the whole name (`*.mlp.act`), or whole
    components of it (`mlp`, `h.0`, `h.0.mlp.act`). The full name in a model around this one fits too.
    """
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}." or pattern.endswith(f".{name}")


def _patterns(option: str, given: Pattern | Sequence[Pattern] | None, found: list[Slot]) -> list[Pattern]:
    if given is None:
        return []
    patterns = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not patterns:
        raise ValueError(f"{option}: an empty list; leave it out, or name activations")
    for pattern in patterns:
        if not isinstance(pattern.pattern if isinstance(pattern, re.Pattern) else pattern, str):
            raise ValueError(f"{option}: {pattern!r} is neither a name, a glob nor a compiled regular expression")
        if not any(matches(pattern, slot.name) for slot in found):
            text = pattern if isinstance(pattern, str) else pattern.pattern
            raise ValueError(f"{option}: {text!r} fits no activation; the model has {_few(s.name for s in found)}")
    return patterns


def _blocks(layers: Sequence[int] | None, found: list[Slot]) -> set[int] | None:
    if layers is None:
        return None
    known = sorted({block for slot in found if (block := _block(slot)) is not None})
    given = list(layers) if isinstance(layers, Sequence | range) and not isinstance(layers, str) else [layers]
    for index in given:
        is_index = isinstance(index, int) and not isinstance(index, bool)
        if not is_index or not known or not -known[-1] - 1 <= index <= known[-1]:
            blocks = f"0 to {known[-1]}" if known else "none"
            raise ValueError(f"layers: {index!r} is not the index of a block; the model has {blocks}")
    return {index if index >= 0 else known[-1] + 1 + index for index in given}


def _block(slot: Slot) -> int | None:
    return next((int(part) for part in slot.name.split(".") if part.isdigit()), None)


def _nothing_found(model: nn.Module, left: dict[str, str]) -> str:
    known = ", ".join(sorted({cls.__name__ for cls in activation_types()}))
    seen = _few(f"{name} ({why})" for name, why in left.items()) or "no activation"
    if any(why in _OPTIONS for why in left.values()):
        return f"{type(model).__name__}: include, exclude and layers leave nothing to patch; seen: {seen}"
    return (
        f"{type(model).__name__}: no MLP activation found; looked for a child module of one of the types {known} "
        f"beside linear layers or the weights of experts, inside a ModuleList; seen: {seen}"
    )


def _few(texts: Iterable[str], most: int = 8) -> str:
    """Join texts that differ in more than numbers, at most `most` of them."""
    distinct = list({re.sub(r"\d+", "0", text): text for text in reversed(list(texts))}.values())[::-1]
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more


def _no_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield name and reason of activations that cannot be replaced, because they are no modules."""
    types = activation_types()
    for prefix, parent in model.named_modules():
        if isinstance(parent, types):
            continue
        for name, value in vars(parent).items():
            if re.match("act|nonlin", name) and callable(value) and not isinstance(value, nn.Module | type):
                called = getattr(value, "__name__", type(value).__name__)
                yield f"{prefix}.{name}", f"is the function {called}, no module"
        for name, module in parent._modules.items():
            own = not any(True for _ in module.children()) if module is not None else False
            if own and not isinstance(module, types) and _LOOKS_ACTIVE.search(type(module).__name__):
                yield f"{prefix}.{name}", f"{type(module).__name__} is no known type of activation"
        if any(isinstance(module, types) for module in parent.children()):
            continue
        kind = type(parent).__name__
        if _expert_width(parent):
            yield prefix, f"{kind} reads no activation module"
        elif (called := _called(parent)) and not _elsewhere(prefix.split(".")):
            sizes = [features(linear) for linear in _linears(parent).values()]
            if len(sizes) > 1 and _width(sizes):
                yield prefix, f"{kind} calls the function {called}, no module"


def _called(parent: nn.Module) -> str | None:
    forward = getattr(type(parent), "forward", None)  # a program of torch.jit has none
    return next((name for name in _names_in(forward) if name in _FUNCTIONS), None)


def _names_in(method: Any) -> tuple[str, ...]:
    code = _code(method)
    return code.co_names if code else ()


def _code(method: Any) -> Any:
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return getattr(method, "__code__", None)


def _is_bypassed(parent: nn.Module, child: str) -> bool:
    """Return True if a module was given a forward of its own that does not read its activation, as Liger gives one."""
    given = _code(parent.__dict__.get("forward"))
    return given is not None and given is not _code(type(parent).forward) and child not in given.co_names


def _slots(model: nn.Module) -> Iterator[Slot]:
    types = activation_types()
    for prefix, parent in model.named_modules():
        for child, module in parent._modules.items():
            if isinstance(module, types):
                width, why = _judged(prefix, parent, child)
                yield Slot(prefix, parent, child, width, module, why)


def _judged(prefix: str, parent: nn.Module, child: str) -> tuple[int | None, str]:
    """Return the width of an activation, and why it is not that of a feed-forward layer."""
    linears = _linears(parent)
    sizes = [features(linear) for linear in linears.values()]
    width = (_width(sizes) if sizes else None) or _expert_width(parent)
    parts = prefix.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return width, "outside of the blocks"
    if any(isinstance(m, nn.Conv1d) for m in parent.children()):
        return width, "a Conv1d beside it mixes tokens"
    if elsewhere := _elsewhere([*parts[first:], child]):
        return width, f"belongs to {elsewhere}"
    if _is_bypassed(parent, child):
        return width, f"the forward that {type(parent).__name__} was given does not read it"
    if any(name.startswith(_PER_LAYER) for name in linears):
        return width, "belongs to the gate of per-layer embeddings"
    if not sizes:
        if width is None:
            return None, "no linear layer beside it"
        return width, "" if _reads(parent, child) else f"{type(parent).__name__} does not read it"
    if width is None:
        shapes = ", ".join(
            f"{name} {n_in} to {n_out}" for (name, _), (n_in, n_out) in zip(linears.items(), sizes, strict=True)
        )
        return None, f"the linear layers beside it do not lead to another width and back: {shapes}"
    if len(sizes) == 1 and _is_modulation(parent):
        return width, "one linear layer beside it, in a sequence or with a norm"
    if len(sizes) == 1 and sizes[0][0] == sizes[0][1] and parts[-1] != "intermediate":  # BERT's name of the module
        return width, "one linear layer beside it, which leads to the same width, as in a prediction head"
    return width, ""


def _elsewhere(parts: list[str]) -> str | None:
    for where, words in _ELSEWHERE.items():
        if any(re.search(rf"(^|_)({words})s?(_|$)", part) for part in parts):
            return where
    return None


def _is_modulation(parent: nn.Module) -> bool:
    is_sequence = isinstance(parent, nn.Sequential | nn.ModuleList)
    return is_sequence or any("Norm" in type(module).__name__ for module in parent.children())


def _width(sizes: list[tuple[int, int]]) -> int | None:
    """Return the width between linear layers into it and out of it, or None if they do not fit.

    One layer, or several of one shape, lead into it: the layer out of it is in another module (BERT).
    """
    if len(set(sizes)) == 1 and (len(sizes) == 1 or sizes[0][0] != sizes[0][1]):
        return sizes[0][1]
    for i, (n_in, n_out) in enumerate(sizes):
        for back_in, back_out in reversed(sizes[:i] + sizes[i + 1 :]):
            # one projection may hold gate and value side by side (Phi-3, GLM, ModernBERT)
            if back_out == n_in and n_out in (back_in, 2 * back_in):
                return back_in
    return None


def _expert_width(parent: nn.Module) -> int | None:
    """Return the width inside experts that keep their weights in tensors (E, ., .), or None for another module."""
    if any(True for m in parent.children() if isinstance(m, nn.modules.conv._ConvNd)):
        return None
    shapes = [tuple(p.shape) for p in parent._parameters.values() if p is not None and p.dim() == 3]
    if len(shapes) < 2 or len({shape[0] for shape in shapes}) != 1:
        return None
    for ways in (shapes, [(e, b, a) for e, a, b in shapes]):  # (E, out, in), or transposed
        if width := _width([(n_in, n_out) for _, n_out, n_in in ways]):
            return width
    return None


def _reads(parent: nn.Module, child: str) -> bool:
    """Return True if experts read their activation by its name, so that another one takes effect.

    The gate of an expert is a method of its own, which every implementation of the products calls.
    """
    method = getattr(type(parent), "_apply_gate", None) if getattr(parent, "has_gate", True) else None
    return child in _names_in(method or type(parent).forward)
