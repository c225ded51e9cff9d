"""Export a language model, patched or not, to `torch.export` and ONNX, and compare the result with the eager model.

Exported models take token ids `(B, T)` of any batch size and any length up to the model's, and return logits
`(B, T, V)`. A model with an encoder and a decoder takes the ids of both, `(B, S)` and `(B, U)`, and returns
`(B, U, V)`. A scheduled alpha is exported at its present value, a learnable or token-dependent one as trained. The ONNX
functions require the packages onnx, onnxscript and onnxruntime (the extra `export`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .alpha import require_module

Run = Callable[..., Tensor]
IDS = ("input_ids", "decoder_input_ids")


class _Logits(nn.Module):
    """A model that returns only logits: no cache, no loss, no optional output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        more = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **more).logits
        return logits


def export_program(model: nn.Module, example_BT: Tensor | None = None) -> ExportedProgram:
    """Export the graph of a model from token ids `(B, T)` to logits, with dynamic batch size and length.

    Args:
        model: A language model of transformers, in evaluation mode.
        example_BT: Token ids to trace; 2 x 8 zeros by default.

    Raises:
        ValueError: A size of `example_BT` is below 2 (it would become a constant), or the model is in training mode
            (its dropout would become part of the graph).
    """
    require_module(model)
    if example_BT is None:
        example_BT = torch.zeros(2, 8, dtype=torch.long, device=next(model.parameters()).device)
    if example_BT.dim() != 2 or min(example_BT.shape) < 2:
        raise ValueError(f"example: shape {tuple(example_BT.shape)} is not (B, T) with both at least 2")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call eval() before an export")
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in IDS[: 1 + both]}
    examples = (example_BT, example_BT[:, :-1].contiguous()) if both else (example_BT,)
    with torch.no_grad():
        return torch.export.export(_Logits(model).eval(), examples, dynamic_shapes=shapes, strict=False)


def run_program(program: ExportedProgram) -> Run:
    """Return the exported program as a function of token ids."""
    module = program.module()
    return lambda *ids: module(*ids)


def export_onnx(program: ExportedProgram, path: str | Path) -> Path:
    """Write an exported program as ONNX to `path` and return it. The file holds the weights; nothing is pickled."""
    written = torch.onnx.export(program, dynamo=True, verbose=False)
    if written is None:
        raise RuntimeError(f"torch.onnx returned no program to write to {path}")
    written.save(str(path))
    return Path(path)


def run_onnx(path: str | Path) -> Run:
    """Return an ONNX file as a function of token ids that onnxruntime computes on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return lambda *ids: torch.from_numpy(
        session.run(None, {name: each.numpy() for name, each in zip(names, ids, strict=True)})[0]
    )


@torch.no_grad()
def max_difference(model: nn.Module, run: Run, inputs: Iterable[Tensor | tuple[Tensor, ...]]) -> float:
    """Return the largest absolute difference of logits between the eager model and `run`.

    `inputs` are token ids `(B, T)`, or those of an encoder and of a decoder.
    """
    each = [ids if isinstance(ids, tuple) else (ids,) for ids in inputs]
    return max(float((run_eager(model)(*ids) - run(*ids)).abs().max()) for ids in each)


def run_eager(model: nn.Module) -> Run:
    """Return a model as a function of token ids."""
    return lambda *ids: model(**dict(zip(IDS, ids, strict=False))).logits
