"""Compilation of a trial: `torch.compile` for the body of the model, not for loss and optimiser.

The decision to compile depends only on the trial's specification, so that its bits depend neither on the load of the
machine nor on earlier trials. Compiled code is kept on disk beside the packed corpus. Processes and trials share it, so
that a machine compiles a model's shape once. Alphas are tensors in the graph: one graph serves all their values, except
0 and 1, which have graphs of their own because the unit then omits a term.
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
GRAPHS = 256  # model shapes that one process may compile; more are an error


def is_compiled(choice: str, training_flops: float, dropout: float) -> bool:
    """Return True if a trial is compiled.

    Args:
        choice: `always`, `never`, or `auto`, which compiles trials of at least `LEAST_FLOPS` without dropout.
        training_flops: FLOPs of the whole training.
        dropout: Dropout rate. A compiled graph draws other masks than torch.
    """
    return choice == "always" or (choice == "auto" and training_flops >= LEAST_FLOPS and not dropout)


def _hidden(model: Any, tokens_BT: Tensor) -> Tensor:
    hidden: Tensor = model.hidden(tokens_BT)
    return hidden


@functools.cache
def _compiled_hidden(device: str) -> Callable[[Any, Tensor], Tensor]:
    import torch._dynamo
    import torch._inductor.config

    # raise at the limit; otherwise dynamo would go on uncompiled, and the bits would depend on what ran before
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device == "cpu":  # a trial owns one core; more compilers would use other trials' cores
        torch._inductor.config.compile_threads = 1
    compiled: Callable[[Any, Tensor], Tensor] = torch.compile(_hidden, fullgraph=True, dynamic=False)
    return compiled


def fix_alphas_as(model: nn.Module, convert: Callable[[Any], Any]) -> None:
    """Convert fixed alphas other than 0 and 1 to 0-dim tensors, so that no graph contains their value, or back."""
    for module in alpha_modules(model):
        pack = isinstance(module.fixed, Tensor) and module.fixed.dim() > 0  # one alpha per model, already a tensor
        if module.fixed is not None and not pack and module.fixed not in (0.0, 1.0):
            module.__dict__["fixed"] = convert(module.fixed)


def compile_hidden(model: nn.Module, tokens_BT: Tensor, cache: Path) -> Callable[[Any, Tensor], Tensor] | None:
    """Compile `hidden(model, tokens)` of a `pagating.model.gpt2.GPT2`.

    The graph is made during this call, so that errors occur here.

    Args:
        model: The model.
        tokens_BT: A batch of the shape that will be used.
        cache: Folder for the compiled code, unless TORCHINDUCTOR_CACHE_DIR names another.

    Returns:
        The compiled function, or None, after one line to stderr, if there is no compiler.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    compiled = _compiled_hidden(tokens_BT.device.type)
    fix_alphas_as(model, lambda alpha: torch.tensor(alpha, dtype=torch.float64, device=tokens_BT.device))
    try:
        compiled(model, tokens_BT)
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).strip().splitlines()[0]
        fix_alphas_as(model, float)
        print(f"pagating: torch.compile does not work here ({reason}); the trial runs uncompiled", file=sys.stderr)
        return None
    return compiled
