"""Initialisation of GPT-2 in which no parameter depends on another."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator seeded by (seed, name), so that a parameter of that name has the same stream in every arm."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise_gpt2(model: Any, seed: int) -> None:
    """Initialise a model by GPT-2's rule (Radford et al. 2019, section 2.3), with one generator per parameter.

    Matrices ~ N(0, std^2), the projections into the residual stream (`c_proj`) ~ N(0, std^2 / (2 n_layer)), biases 0,
    LayerNorm gains 1; std is the config's `initializer_range` (0.02 as published). Parameters with the same name and
    shape start from the same bits in every arm. Alphas, and parameters of a user's activation, do not change. Raise
    ValueError for a parameter without a rule.
    """
    n_layer, std = model.config.n_layer, model.config.initializer_range
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.startswith("alpha") or ".mlp.act.base." in name:
            continue
        if parameter.dim() >= 2:
            scale = std / math.sqrt(2 * n_layer) if "c_proj" in name else std
            parameter.normal_(0.0, scale, generator=named_generator(seed, name))
        elif leaf == "bias":
            parameter.zero_()
        elif ".ln_" in f".{name}":
            parameter.fill_(1.0)
        else:
            raise ValueError(f"parameter '{name}' of shape {tuple(parameter.shape)} has no stated initialisation")
