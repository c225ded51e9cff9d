"""Write a kept model in another form, and compare that form with the model that `load_model` loads."""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagating.gating.export import export_onnx, export_program, max_difference, run_eager, run_onnx, run_program
from pagating.hf.errors import SavedModelError, require_path
from pagating.saved_model import load_model, read_facts, write_hf

FORMS = {"hf": "", "onnx": ".onnx", "torch": ".pt2"}  # and the suffix of the file; `hf` is a folder
ONNX = ("onnx", "onnxscript", "onnxruntime")  # packages of the extra `export`
SHAPES = ((1, 1), (2, 8), (3, 5))  # rows and lengths of the token ids that are compared
ALLOWED = 1e-3  # largest difference of logits; rounding stays far below it


class NotExported(SavedModelError):
    """A model that this machine cannot export."""

    exit_code = 1


def export_model(
    folder: str | Path, form: str, target: str | Path, gate: str | None = None, unit: str | None = None
) -> float:
    """Write a kept model to `target` and return the largest absolute difference of its logits from the eager model.

    Args:
        folder: The folder of the model, of any version.
        form: Key of `FORMS`.
        target: The file or folder to write. It must not exist.
        gate: FILE.py:NAME of the user's gate, as for `load_model`.
        unit: The same for an activation of the user's own.

    Raises:
        SavedModelError: There is no such model, `target` exists, or the arguments are not allowed.
        NotExported: Packages are missing, or the written form computes something else.
    """
    require_path(folder)
    require_path(target, "--into")
    target = Path(target)
    if form not in FORMS:
        raise SavedModelError(f"--to {form}: is not one of {', '.join(FORMS)}")
    if target.exists():
        raise SavedModelError(f"{target}: exists; remove it, or name another place with --into")
    if form == "onnx" and (missing := [name for name in ONNX if find_spec(name) is None]):
        raise NotExported(
            f"--to onnx needs {', '.join(missing)}, not installed here: pip install 'pagating-study[export]'"
        )
    eager = load_model(folder, gate, unit)
    from pagating.hf.loading import from_pretrained, quiet  # imports transformers, which takes seconds

    with tempfile.TemporaryDirectory() as scratch, quiet():
        written = write_hf(folder, eager, Path(scratch) / "hf", gate, unit)
        model = from_pretrained(written, gate=gate, unit=unit, trust_remote_code=False)
        path = written if form == "hf" else Path(scratch) / f"model{FORMS[form]}"
        run = run_eager(model) if form == "hf" else _program(model, form, path)
        difference = max_difference(eager, run, _inputs(folder))
        if not difference <= ALLOWED:
            raise NotExported(f"{folder}: as {form}, its logits differ by {difference:.2g}; nothing is written")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    return difference


def _program(model: Any, form: str, path: Path) -> Any:
    """Write a graph of the model and return the written one as a function of token ids."""
    if form == "onnx" and model.config.is_encoder_decoder:
        model.set_attn_implementation("eager")  # ONNX's form of the fused attention has other strides, which T5 refuses
    program = export_program(model)
    if form == "onnx":
        return run_onnx(export_onnx(program, path))
    torch.export.save(program, path)
    return run_program(torch.export.load(path))


def _inputs(folder: str | Path) -> list[tuple[Tensor, ...]]:
    """Return token ids of several shapes, drawn from the vocabulary of the corpus, up to the longest window."""
    facts = read_facts(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, min(length, facts["model"]["n_ctx"])) for rows, length in (*SHAPES, (1, facts["model"]["n_ctx"]))]
    sides = 2 if facts["task"] == "span" else 1
    draw = facts["vocab_size"]
    return [tuple(torch.randint(0, draw, shape, generator=generator) for _ in range(sides)) for shape in shapes]
