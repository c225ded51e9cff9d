"""Known activations as settings of the one unit: `pagating.patch(model, unit="relu2")`.

Each row holds arguments of `patch`; a row's `alpha` may be replaced by the caller's. A learnable strength that is
not a gate strength (Swish's beta, PReLU's slope as `1 - alpha`) uses the same parameter and the learning rate of
the model, as its paper does.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Competitor:
    """One known activation: its formula, the arguments of `patch` that make it, and where it comes from."""

    formula: str
    settings: dict[str, Any]
    paper: str


def _per_layer(init: float) -> dict[str, Any]:
    return {"learnable": {"init": init, "per": "layer", "range": "free", "lr_multiplier": 1.0}}


COMPETITORS: dict[str, Competitor] = {
    "gelu": Competitor(
        "x * Phi(x), tanh form", {"alpha": 0.0, "base": "gelu"}, "Hendrycks and Gimpel 2016, arXiv 1606.08415"
    ),
    "linear": Competitor("x", {"alpha": 0.0}, "the published baseline; the floor of a study"),
    "silu": Competitor("x * sigmoid(x)", {"alpha": 1.0}, "Elfwing et al. 2017, arXiv 1702.03118"),
    "relu": Competitor("max(x, 0)", {"gate": "step", "alpha": 1.0}, "Nair and Hinton 2010"),
    "relu2": Competitor("max(x, 0)^2", {"gate": "relu", "alpha": 1.0}, "So et al. 2021, arXiv 2109.08668"),
    "leaky_relu": Competitor(
        "max(x, 0) + (1 - alpha) * min(x, 0)", {"gate": "step", "alpha": 0.99}, "Maas et al. 2013"
    ),
    "prelu": Competitor(
        "max(x, 0) + (1 - alpha) * min(x, 0), alpha learned, slope 0.25 at the start",
        {"gate": "step", "alpha": _per_layer(0.75)},
        "He et al. 2015, arXiv 1502.01852",
    ),
    "swish": Competitor(
        "x * sigmoid(alpha * x), alpha (their beta) learned from 1",
        {"form": "scaled", "alpha": _per_layer(1.0)},
        "Ramachandran et al. 2017, arXiv 1710.05941",
    ),
    "xsilu": Competitor(
        "x * ((1 + 2 alpha) * sigmoid(x) - alpha), alpha learned from 0",
        {"form": "expanded", "alpha": _per_layer(0.0)},
        "Huang 2024, arXiv 2405.20768",
    ),
    "xielu": Competitor(
        "alpha_p x^2 + x / 2 for x > 0, else alpha_n (expm1(x) - x) + x / 2; transformers' own module",
        {"alpha": 0.0, "base": "xielu"},
        "Huang and Schlag 2024, arXiv 2411.13010",
    ),
    "swiglu": Competitor(
        "a * silu(b)", {"form": "glu", "gate": "silu", "alpha": 1.0}, "Shazeer 2020, arXiv 2002.05202"
    ),
    "geglu": Competitor("a * gelu(b)", {"form": "glu", "gate": "gelu", "alpha": 1.0}, "Shazeer 2020, arXiv 2002.05202"),
    "glu": Competitor("a * sigmoid(b)", {"form": "glu", "alpha": 1.0}, "Dauphin et al. 2017, arXiv 1612.08083"),
    "bilinear": Competitor("a * b", {"form": "glu", "gate": "linear", "alpha": 1.0}, "Shazeer 2020, arXiv 2002.05202"),
}


def settings(name: str) -> dict[str, Any]:
    """The arguments of `patch` for a known activation; ValueError naming the known ones otherwise."""
    if name not in COMPETITORS:
        raise ValueError(f"unit: {name!r} is not one of {', '.join(COMPETITORS)}")
    return dict(COMPETITORS[name].settings)
