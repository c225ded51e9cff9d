"""The catalogue of gates, forms, bases, kinds of alpha and known activations: names, formulas, ranges, papers.

Nothing here imports torch: the study file, the documentation and the tests read their names from these tables. The
functions are attached by name in `gates`, `units` and `patch`. In a formula, what follows `; ` is a note.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GateRow:
    """A gate `g` without its functions; the fields are those of `pagating.gating.gates.Gate`."""

    formula: str
    range: tuple[float, float]
    limits: tuple[float, float]
    unit: str
    paper: str
    attained: bool = False


_INF = float("inf")
# minima of z * Phi(z), z * tanh(softplus(z)) and z * sigmoid(z)
_GELU_MIN, _MISH_MIN, _SILU_MIN = -0.16997120747990369, -0.3088434130172504, -0.27846454276107379

GATE_ROWS: dict[str, GateRow] = {
    "sigmoid": GateRow(
        "1 / (1 + exp(-x))", (0.0, 1.0), (0.0, _INF), "paGLU",
        "Dauphin et al. 2017, arXiv 1612.08083; x * sigmoid(x): Elfwing et al. 2017, arXiv 1702.03118",
    ),
    "tanh": GateRow(
        "tanh(x)", (-1.0, 1.0), (_INF, _INF), "paGTU", "van den Oord et al. 2016, arXiv 1606.05328",
    ),
    "relu": GateRow(
        "max(x, 0)", (0.0, _INF), (0.0, _INF), "paReGLU",
        "Shazeer 2020, arXiv 2002.05202; x * relu(x): So et al. 2021, arXiv 2109.08668", attained=True,
    ),
    "gelu": GateRow(
        "x * Phi(x); Phi is the normal distribution function", (_GELU_MIN, _INF), (0.0, _INF), "paGELU",
        "Hendrycks and Gimpel 2016, arXiv 1606.08415", attained=True,
    ),
    "mish": GateRow(
        "x * tanh(log(1 + exp(x)))", (_MISH_MIN, _INF), (0.0, _INF), "paMishU",
        "Misra 2019, arXiv 1908.08681", attained=True,
    ),
    "silu": GateRow(
        "x / (1 + exp(-x))", (_SILU_MIN, _INF), (0.0, _INF), "paSiLU",
        "Elfwing et al. 2017, arXiv 1702.03118", attained=True,
    ),
    "step": GateRow(
        "1 if x > 0, else 0", (0.0, 1.0), (0.0, _INF), "leaky ReLU of slope 1 - alpha",
        "Maas et al. 2013; He et al. 2015, arXiv 1502.01852", attained=True,
    ),
    "normal": GateRow(
        "Phi(x); Phi is the normal distribution function", (0.0, 1.0), (0.0, _INF), "GELU",
        "Hendrycks and Gimpel 2016, arXiv 1606.08415",
    ),
    "arctan": GateRow(
        "1/2 + arctan(x) / pi", (0.0, 1.0), (-0.3183098861837907, _INF), "ATLU", "Huang 2024, arXiv 2405.20768",
    ),
    "linear": GateRow(
        "x", (-_INF, _INF), (_INF, _INF), "bilinear, as a gated linear unit",
        "Dauphin et al. 2017, arXiv 1612.08083",
    ),
}  # fmt: skip
STUDY_GATES = tuple(GATE_ROWS)[:6]  # the published gates; the others make known activations rows of the same table
OWN_CODE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")  # a gate or an activation of the user's own
OWN_UNITS: dict[
    str, Callable[[int], Any]
] = {}  # registered activations: a function of the number of features makes one


@dataclass(frozen=True)
class Form:
    """A form in which a gate `g` enters an MLP. An arm of a study may name it if `in_study` is true."""

    formula: str
    extra_parameters: str
    in_study: bool = True


FORMS: dict[str, Form] = {
    "pointwise": Form("alpha * x * g(x) + (1 - alpha) * base(x)", "0"),
    "scaled": Form("x * g(alpha * x)", "0", in_study=False),
    "expanded": Form("x * ((1 + 2 alpha) * g(x) - alpha)", "0", in_study=False),
    "squared": Form("(alpha * x * g(x) + (1 - alpha) * x)^2", "0", in_study=False),
    "glu": Form(
        "a * (alpha * g(b) + (1 - alpha)); two projections `a`, `b` of width `round(2/3 * d_ff)`",
        "0 within 0.1% at GPT-2's sizes",
    ),
    "projected": Form("A(x) * (alpha * g(B(x)) + (1 - alpha)); `A`, `B` dense, `d_ff x d_ff`", "`2 * (d_ff^2 + d_ff)`"),
}
BASES = ("identity", "gelu")  # functions of x alone
MODULE_BASES = ("stock", "xielu", "polyrelu", "polynorm")  # modules: the activation that was there, and learned ones
DEFAULTS: dict[str, Any] = {"gate": "sigmoid", "alpha": 0.5, "base": "identity", "form": "pointwise"}  # of `patch`

LARGEST_ALPHA = 2.0  # an expanded gate; the published range ends at 1
LAYER_BOUND = 10.0  # of either sign, in a list: a pattern that free alphas learned
PER = ("model", "layer", "channel")
RANGES = ("unit", "free")
# the kinds of alpha that are no number, with their options and defaults
# AdamW moves a logit by about the learning rate a step: at the model's own rate 1,000 steps hardly change it.
ALPHA_KINDS: dict[str, dict[str, Any]] = {
    "learnable": {"init": 0.5, "per": "model", "range": "unit", "lr_multiplier": 10.0},
    "schedule": {"kind": "linear", "from": 0.0, "to": 1.0},
    "token": {"init": 0.5, "lr_multiplier": 1.0},
}


@dataclass(frozen=True)
class Competitor:
    """One known activation: its formula, the arguments of `patch` that make it, and its source.

    The caller may replace the `alpha` of the settings. A learnable strength that is not a gate strength (Swish's beta,
    PReLU's slope as `1 - alpha`) uses the same parameter and the model's learning rate, as its paper does.
    """

    formula: str
    settings: dict[str, Any]
    paper: str
    learns: str = ""  # what it learns beside an alpha

    @property
    def is_glu(self) -> bool:
        """True for a gated linear unit, which replaces the linear layers of the MLP too."""
        return bool(self.settings.get("form") == "glu")

    @property
    def has_alpha(self) -> bool:
        """True if its formula has an alpha that a caller may set."""
        return self.settings["alpha"] not in (0.0, 1.0)

    @property
    def learns_alpha(self) -> bool:
        """True if it learns its alpha when none is given."""
        return isinstance(self.settings["alpha"], dict)


def _per_layer(init: float) -> dict[str, Any]:
    return {"learnable": {"init": init, "per": "layer", "range": "free", "lr_multiplier": 1.0}}


COMPETITORS: dict[str, Competitor] = {
    "gelu": Competitor(
        "x * Phi(x); its tanh form, as in GPT-2",
        {"alpha": 0.0, "base": "gelu"},
        "Hendrycks and Gimpel 2016, arXiv 1606.08415",
    ),
    "linear": Competitor("x", {"alpha": 0.0}, "the published baseline; the floor of a study"),
    "silu": Competitor("x * sigmoid(x)", {"alpha": 1.0}, "Elfwing et al. 2017, arXiv 1702.03118"),
    "relu": Competitor("max(x, 0)", {"gate": "step", "alpha": 1.0}, "Nair and Hinton 2010"),
    "relu2": Competitor("max(x, 0)^2", {"gate": "relu", "alpha": 1.0}, "So et al. 2021, arXiv 2109.08668"),
    "leaky_relu2": Competitor(
        "(max(x, 0) + (1 - alpha) * min(x, 0))^2",
        {"form": "squared", "gate": "step", "alpha": 0.5},
        "openai/parameter-golf, pull request 549, 2026",
    ),
    "leaky_relu": Competitor(
        "max(x, 0) + (1 - alpha) * min(x, 0)", {"gate": "step", "alpha": 0.99}, "Maas et al. 2013"
    ),
    "prelu": Competitor(
        "max(x, 0) + (1 - alpha) * min(x, 0); slope 0.25 at the start",
        {"gate": "step", "alpha": _per_layer(0.75)},
        "He et al. 2015, arXiv 1502.01852",
    ),
    "swish": Competitor(
        "x * sigmoid(alpha * x); alpha is their beta",
        {"form": "scaled", "alpha": _per_layer(1.0)},
        "Ramachandran et al. 2017, arXiv 1710.05941",
    ),
    "xsilu": Competitor(
        "x * ((1 + 2 alpha) * sigmoid(x) - alpha)",
        {"form": "expanded", "alpha": _per_layer(0.0)},
        "Huang 2024, arXiv 2405.20768",
    ),
    "xgelu": Competitor(
        "x * ((1 + 2 alpha) * Phi(x) - alpha)",
        {"form": "expanded", "gate": "normal", "alpha": _per_layer(0.0)},
        "Huang 2024, arXiv 2405.20768",
    ),
    "xatlu": Competitor(
        "x * ((1 + 2 alpha) * (1/2 + arctan(x) / pi) - alpha)",
        {"form": "expanded", "gate": "arctan", "alpha": _per_layer(0.0)},
        "Huang 2024, arXiv 2405.20768",
    ),
    "xielu": Competitor(
        "alpha_p x^2 + x / 2 for x > 0, else alpha_n (expm1(x) - x) + x / 2; transformers' own module",
        {"alpha": 0.0, "base": "xielu"},
        "Huang and Schlag 2024, arXiv 2411.13010",
        "two scalars per layer",
    ),
    "polyrelu": Competitor(
        "b + w_1 r + w_2 r^2 + w_3 r^3; `r` is `max(x, 0)`",
        {"alpha": 0.0, "base": "polyrelu"},
        "Zhuo et al. 2024, arXiv 2411.03884",
        "four scalars per layer",
    ),
    "polynorm": Competitor(
        "b + w_1 n(x) + w_2 n(x^2) + w_3 n(x^3); `n(u)` is `u` divided by its root mean square over the features",
        {"alpha": 0.0, "base": "polynorm"},
        "Zhuo et al. 2024, arXiv 2411.03884",
        "four scalars per layer",
    ),
    "swiglu": Competitor(
        "a * silu(b)", {"form": "glu", "gate": "silu", "alpha": 1.0}, "Shazeer 2020, arXiv 2002.05202"
    ),
    "geglu": Competitor("a * gelu(b)", {"form": "glu", "gate": "gelu", "alpha": 1.0}, "Shazeer 2020, arXiv 2002.05202"),
    "glu": Competitor("a * sigmoid(b)", {"form": "glu", "alpha": 1.0}, "Dauphin et al. 2017, arXiv 1612.08083"),
    "bilinear": Competitor("a * b", {"form": "glu", "gate": "linear", "alpha": 1.0}, "Shazeer 2020, arXiv 2002.05202"),
}


def require_known(where: str, key: Any, allowed: Iterable[str]) -> None:
    """Raise ValueError, which names the nearest allowed key, if `key` is unknown. `where` is the mapping's name."""
    allowed = list(allowed)
    if key not in allowed:
        near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.0)
        raise ValueError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}? allowed: {', '.join(allowed)}")


def settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return gate, alpha, base and form from arguments of `patch`: the defaults and a known activation filled in.

    Raises ValueError, one line, for an unknown key, activation, form or base, and for arguments that contradict each
    other. The gate and the alpha are not checked here.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(f"unit: {arguments!r} is not a mapping; its keys are {', '.join(DEFAULTS)}, unit")
    for key in arguments:
        require_known("unit", key, (*DEFAULTS, "unit"))
    given = {key: value for key, value in arguments.items() if value is not None}
    for key, value in given.items():
        if key != "alpha" and not isinstance(value, str):
            own = f"; register it with pagating.register_{key}" if callable(value) and key in ("gate", "unit") else ""
            raise ValueError(f"{key}: {value!r} is not a name, such as {DEFAULTS.get(key, 'relu2')!r}{own}")
    known = given.pop("unit", None)
    if known is not None:
        if clash := [key for key in given if key != "alpha" or known not in COMPETITORS]:
            raise ValueError(f"unit: {known!r} settles {', '.join(clash)}; give one or the other")
        given = _known_settings(known) | given
    chosen = DEFAULTS | given
    for key, allowed in {"base": (*BASES, *MODULE_BASES, *([known] if known else [])), "form": FORMS}.items():
        if chosen[key] not in allowed:
            raise ValueError(f"{key}: {chosen[key]!r} is not one of {', '.join(allowed)}")
    if chosen["form"] != "pointwise" and chosen["base"] != "identity":
        raise ValueError(f"base: {chosen['base']!r} has no meaning for form {chosen['form']}; allowed: identity")
    return chosen


def _known_settings(unit: str) -> dict[str, Any]:
    """Return the arguments that make an activation. One of the user's own is the base of a gate that is off."""
    if unit in COMPETITORS:
        return COMPETITORS[unit].settings
    if unit in OWN_UNITS or OWN_CODE.fullmatch(unit):
        return {"alpha": 0.0, "base": unit}
    raise ValueError(f"unit: {unit!r} is not one of {', '.join((*COMPETITORS, *OWN_UNITS))}")


@dataclass(frozen=True)
class OwnCode:
    """The user's own code in the arguments of `patch`: its key (`gate` or `unit`), its file and the name in it."""

    key: str
    file: str
    name: str

    @property
    def reference(self) -> str:
        """The name of the code, `FILE.py:NAME`."""
        return f"{self.file}:{self.name}"


def own_code(unit: Mapping[str, Any] | None) -> OwnCode | None:
    """Return the gate or the activation that the arguments of `patch` name as `FILE.py:NAME`, if there is one."""
    for key in ("gate", "unit"):
        if match := OWN_CODE.fullmatch(str((unit or {}).get(key))):
            return OwnCode(key, match["file"], match["name"])
    return None
