"""The command that writes a kept model in another form: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tune.cli.common import Name, Output, study_folder


def export(
    study: Name,
    arm: Annotated[str, typer.Argument(help="Arm whose kept model is written.")],
    to: Annotated[str, typer.Option(help="hf (folder of Hugging Face), onnx or torch (torch.export).")] = "hf",
    into: Annotated[
        Path | None, typer.Option(help="File or folder to write. Default: STUDY-ARM, with the suffix of its form.")
    ] = None,
    output: Output = Path("studies"),
) -> None:
    """Write the kept model of an arm as a Hugging Face folder, ONNX or torch.export, and compare it with the original.

    It prints the largest difference of logits. ONNX needs the extra `export`.
    """
    from pagating.export_model import FORMS, export_model
    from pagating.gating.catalog import own_code
    from tune.errors import StudyError
    from tune.run.kept.models import models_folder, read_facts
    from tune.study.files import load

    folder = study_folder(study, output)
    loaded = load(folder / "study.yaml")
    if arm not in loaded.arms:
        raise StudyError(f"arm '{arm}': {loaded.name} has {', '.join(loaded.arms)}")
    if to not in FORMS:
        raise StudyError(f"--to '{to}': allowed are {', '.join(FORMS)}")
    model = models_folder(loaded, folder) / arm
    if not (facts := read_facts(model)):
        raise StudyError(f"{model}: the study has no kept model of this arm")
    own = own_code(facts.get("unit"))
    code = {own.key: str(folder / "gates" / own.reference)} if own else {}
    target = into or Path(f"{loaded.name}-{arm}{FORMS[to]}")
    difference = export_model(model, to, target, **code)
    typer.echo(f"{target}: its logits differ from those of {model} by at most {difference:.2g}")
