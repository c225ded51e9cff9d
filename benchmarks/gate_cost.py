"""Cost of a gate: time and saved bytes of the pointwise unit against GELU, forward and backward.

    python benchmarks/gate_cost.py [--output DIR] [--compile] [--device cpu] [--threads 1]

All variants run interleaved in one run, so that other load on the machine slows them alike. The table has medians and
quartiles over rounds, and the ratio to `torch.nn.functional.gelu(approximate="tanh")` in the same round. Saved bytes
are those of the distinct tensors that autograd saves for the backward pass, per element of the input.
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import performance
import torch
import torch.nn.functional as F
from common import machine
from torch import Tensor

from pagating.gating.units import pointwise

SHAPES = [(8, 128, 512), (8, 1024, 3072)]
DTYPES = [torch.float32, torch.bfloat16]
REFERENCE = "gelu, fused"
Function = Callable[[Tensor], Tensor]


def gelu_new(x: Tensor) -> Tensor:
    """Compute GELU as transformers composes it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def naive(x: Tensor, alpha: Tensor | float) -> Tensor:
    """Compute the published formula, written literally."""
    return alpha * x * torch.sigmoid(x) + (1 - alpha) * x


def variants(device: str, compiled: bool) -> dict[str, tuple[Function, list[Tensor]]]:
    """Return name -> function of x, and the parameters that it also differentiates."""
    alpha = torch.nn.Parameter(torch.tensor(0.5, device=device))
    rows: dict[str, tuple[Function, list[Tensor]]] = {
        REFERENCE: (lambda x: F.gelu(x, approximate="tanh"), []),
        "gelu_new, composed": (gelu_new, []),
        "silu, fused": (F.silu, []),
        "formula, composed, alpha fixed": (lambda x: naive(x, 0.5), []),
        "formula, composed, alpha learnable": (lambda x: naive(x, alpha.to(x.dtype)), [alpha]),
    }
    for base in ("identity", "gelu"):
        rows[f"unit, base {base}, alpha fixed"] = (_unit(pointwise, 0.5, base), [])
        rows[f"unit, base {base}, alpha learnable"] = (_unit(pointwise, alpha, base), [alpha])
        if compiled:
            unit = torch.compile(pointwise, fullgraph=True)
            rows[f"unit compiled, base {base}, alpha fixed"] = (_unit(unit, 0.5, base), [])
            rows[f"unit compiled, base {base}, alpha learnable"] = (_unit(unit, alpha, base), [alpha])
    return rows


def _unit(function: Callable[..., Tensor], alpha: Any, base: str) -> Function:
    return lambda x: function(x, alpha, base=base)


def kept_bytes(function: Function, x: Tensor) -> int:
    """Return the bytes of the distinct storages that autograd saves for the backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(x)  # keep it until the count is done, or its tensors would be freed
    assert result.requires_grad
    return sum(storages.values())


def seconds(function: Function, x: Tensor, grad: Tensor, parameters: list[Tensor]) -> float:
    """Return the seconds of one forward and backward pass."""
    for tensor in (x, *parameters):
        tensor.grad = None
    _wait(x)
    start = time.perf_counter()
    function(x).backward(grad)
    _wait(x)
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(shape: tuple[int, ...], dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one shape and dtype; return one row per variant."""
    torch.compiler.reset()  # compile for each shape and dtype anew, not one general version
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(options.device, dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(options.device, dtype)
    rows = variants(options.device, options.compile)
    times: dict[str, list[float]] = {name: [] for name in rows}
    # as many rounds as fit in the time of a shape; the first one is a warm-up
    rounds, begun = 0, time.perf_counter()
    order, drawn = list(rows), random.Random(0)  # each round in another order, as in `common.interleave`
    while rounds < 4 or (time.perf_counter() - begun < options.seconds and rounds < 101):
        drawn.shuffle(order)
        for name in order:
            function, parameters = rows[name]
            times[name].append(seconds(function, x, grad, parameters))
        rounds += 1
        if rounds == 1:
            times = {name: [] for name in rows}
            begun = time.perf_counter()
    result = []
    for name, (function, _) in rows.items():
        ratios = [t / r for t, r in zip(times[name], times[REFERENCE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result.append(
            {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "variant": name,
                "milliseconds": 1e3 * statistics.median(times[name]),
                "ratio": middle,
                "ratio_low": low,
                "ratio_high": high,
                "kept_bytes_per_element": kept_bytes(function, x) / x.numel(),
                "rounds": len(ratios),
            }
        )
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text, one block per shape and dtype."""
    lines, block = [], None
    for row in rows:
        if block != (row["shape"], row["dtype"]):
            block = (row["shape"], row["dtype"])
            lines += ["", f"{tuple(row['shape'])} {row['dtype']}, {row['rounds']} rounds"]
            lines += [f"  {'variant':<46}{'ms':>9}{'ratio':>8}{'quartiles':>15}{'kept bytes/element':>20}"]
        spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        lines += [
            f"  {row['variant']:<46}{row['milliseconds']:>9.2f}{row['ratio']:>8.2f}{spread:>15}"
            f"{row['kept_bytes_per_element']:>20.2f}"
        ]
    return "\n".join(lines).strip()


def main(arguments: list[str] | None = None) -> int:
    """Measure every shape and dtype, print the table, and write the rows as JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder in which performance.md and .json are updated")
    parser.add_argument("--compile", action="store_true", help="also use torch.compile (needs a C++ compiler)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds per shape and dtype")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where = machine()
    rows = [row for dtype in DTYPES for shape in SHAPES for row in measure(shape, dtype, options)]
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s); ratio: to {REFERENCE}\n")
    print(table(rows))
    if options.output:
        performance.keep(options.output, "gates", {"machine": where, "order": "shuffled", "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
