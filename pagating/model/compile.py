"""When a trial is compiled, and how: the body of the model by `torch.compile`, loss and optimiser as they are.

Whether a trial is compiled follows from its specification alone, so that its bits do not depend on how busy the machine
is or what ran before it. The code that the compiler writes is kept on disk beside the packed corpus and shared by
processes and trials: a machine pays for a model's shape once. Alphas are tensors in the graph, so that one graph
serves every value of them; exactly 0 and 1 are other graphs, because there the unit leaves a term out.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pagating.gating.alpha import alpha_modules

# a process spends some seconds on a graph that the cache holds: `auto` compiles trials that run for minutes on a core
LEAST_FLOPS = 1e13
GRAPHS = 256  # shapes of model that one process may meet before it refuses to go on


def is_compiled(choice: str, training_flops: float, dropout: float) -> bool:
    """Whether a trial of so many FLOPs is compiled: `always`, `never`, or by its size (`auto`).

    A model with dropout is not compiled by `auto`: the compiled graph draws other masks than torch does.
    """
    return choice == "always" or (choice == "auto" and training_flops >= LEAST_FLOPS and not dropout)


def _hidden(model: Any, tokens_BT: Tensor) -> Tensor:
    hidden: Tensor = model.hidden(tokens_BT)
    return hidden


@functools.cache
def _compiled_hidden() -> Callable[[Any, Tensor], Tensor]:
    import torch._dynamo
    import torch._inductor.config

    # past the limit dynamo would go on uncompiled, and the bits would depend on what ran before: raise instead
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.compile_threads = 1  # a trial owns one core; a pool of compilers would take the neighbours'
    compiled: Callable[[Any, Tensor], Tensor] = torch.compile(_hidden, fullgraph=True, dynamic=False)
    return compiled


def fix_alphas_as(model: nn.Module, convert: Callable[[Any], Any]) -> None:
    """Convert each fixed alpha other than 0 and 1: to a 0-dim tensor, whose value is no part of a graph, or back."""
    for module in alpha_modules(model):
        pack = isinstance(module.fixed, Tensor) and module.fixed.dim() > 0  # one alpha a model, a tensor already
        if module.fixed is not None and not pack and module.fixed not in (0.0, 1.0):
            module.__dict__["fixed"] = convert(module.fixed)


def compile_hidden(model: nn.Module, tokens_BT: Tensor, cache: Path) -> Callable[[Any, Tensor], Tensor] | None:
    """`hidden(model, tokens)` of a `pagating.model.gpt2.GPT2`, compiled; None, and one line, without a compiler.

    `tokens_BT` is a batch of the shape that will be used; the code is kept under `cache`, unless
    TORCHINDUCTOR_CACHE_DIR names another place. The graph is made here, so that what fails, fails here.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    compiled = _compiled_hidden()
    fix_alphas_as(model, lambda alpha: torch.tensor(alpha, dtype=torch.float64, device=tokens_BT.device))
    try:
        compiled(model, tokens_BT)
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).strip().splitlines()[0]
        fix_alphas_as(model, float)
        print(f"pagating: torch.compile does not work here ({reason}); the trial runs uncompiled", file=sys.stderr)
        return None
    return compiled
