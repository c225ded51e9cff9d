"""Compute the disk space and the memory that a study needs from its sizes, and check the free disk space.

The bytes of our own records are counted on one sample of each. The bytes that other libraries write (MLflow's store,
Ray's logs, the figures) come from `measured.json`, which `benchmarks/plan_accuracy.py --record` writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from analysis.io.text import readable
from pagating.model.size import GPT2Size
from tune.errors import StudyError
from tune.plan.work import Model, arm_model
from tune.study.arm import Arm
from tune.study.cell import COST, FINAL, Cell
from tune.study.ladder import parameters, vocabulary_of
from tune.study.sizes import all_trials, confirm_seeds, evaluations, example, grid_points, largest_batch, steps
from tune.study.study import Study, digest

WEIGHT, MOMENTS, GRADIENT = 4, 8, 4  # bytes per parameter: float32, AdamW's two moments, the gradient
CHECKPOINTS = 2  # kept per running trial; a third exists while it is written
PARQUET_COLUMN = 400  # bytes of a column beside its values: schema, statistics, page headers, repeated values


@cache
def measured() -> dict[str, Any]:
    """Return the benchmark's record: seconds, MiB and bytes of the parts that no formula gives."""
    return json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))


def vocabulary(study: Study) -> int:
    """Return the vocabulary's size from the study file alone. A tokenizer that is not trained counts as GPT-2's."""
    return vocabulary_of(study.tokenizer)


NO_MODEL = Model(0, 0, 0)  # of the user's own training, whose files nobody knows


def largest(study: Study, vocab_size: int) -> Model:
    """Return the model of the arm with the most parameters."""
    return max((arm_model(study, arm, vocab_size) for arm in study.arms), key=lambda model: model.parameters)


def most_cells(study: Study) -> int:
    """Return the number of cells of a study whose grid is fully extended and whose rule goes to its last look."""
    if study.scales:
        return sum(map(most_cells, study.rungs))
    grid = grid_points(study)[2] * study.calibrate.seeds
    return all_trials(study) + len(study.arms) * (int(grid) + int(confirm_seeds(study)[2]))


# --- disk ------------------------------------------------------------------------------------------------------------

NUMBER = 0.12345678901234567  # as long as any float in JSON without an exponent


def ledger_cell_bytes(study: Study) -> float:
    """Return the ledger's bytes for one completed cell (suggestion, start, reports, end), as the mean over arms.

    An arm that learns its alphas writes one per layer into each report.
    """
    total = 0
    for arm, settings in study.arms.items():
        config = dict.fromkeys(example(study, arm), NUMBER)
        cell = Cell("calibrate", arm, 0, 11, config, digest(config))
        row: dict[str, Any] = {"step": steps(study), "tokens": study.fixed.tokens}
        row |= dict.fromkeys(("val_nll", "train_nll", "lr", "grad_norm", "tokens_per_second"), NUMBER)
        if study.corpus.rows == "lines":
            row["padded_nll"] = NUMBER
        row["alpha"] = [NUMBER] * (study.mlps if settings.learns_alpha else 0)
        final = dict.fromkeys((*FINAL, "alpha", "test_nll", *COST), NUMBER)
        base = {"time": 1234567890.123, "cell": cell.key}
        events = [
            {"event": "suggested", **base, "stage": cell.stage, "arm": arm, "index": 0, "seed": cell.seed}
            | {"config": config, "config_key": cell.config_key},
            {"event": "started", **base},
            {"event": "ended", **base, "outcome": "completed", "final": final, "reason": None},
        ]
        reports = evaluations(study) * _line_bytes({"event": "report", **base, "row": row})
        total += reports + sum(_line_bytes(event) for event in events)
    return total / len(study.arms)


def _line_bytes(event: dict[str, Any]) -> int:
    return len(json.dumps(event, separators=(",", ":"))) + len(',"crc":"01234567"') + len("\n")


def disk_parts(study: Study, cells: float, slots: int, model: Model) -> dict[str, float]:
    """Return the bytes of `cells` trained cells, by part. `checkpoints` exist only while trials run, unless kept."""
    looks = evaluations(study)
    reports = cells * looks
    learning = [arm for arm in study.arms.values() if arm.learns_alpha]
    layers = study.mlps if learning else 0
    alphas = layers * len(learning) / len(study.arms)
    finals = len(FINAL) + len(COST)
    found = measured()
    metrics = reports * (5 + alphas) + cells * (finals + 3)
    return {
        "ledger": cells * ledger_cell_bytes(study),
        "tables": 8 * (reports * (5 + alphas) + cells * finals) + PARQUET_COLUMN * (36 + finals + 2 * layers),
        "report": len(study.arms) * found["report_arm_bytes"],
        "ray": cells * found["ray_cell_bytes"],
        "mlflow": found["mlflow_schema_bytes"]
        + metrics * found["mlflow_metric_bytes"]
        + cells * found["mlflow_run_bytes"],
        "models": _models_kept(study, cells, slots) * WEIGHT * model.parameters,
        "checkpoints": ((CHECKPOINTS + 1) * slots + CHECKPOINTS * cells * study.keep.checkpoints)
        * (WEIGHT + MOMENTS)
        * model.parameters,
    }


def _models_kept(study: Study, cells: float, slots: int) -> float:
    """Return the largest number of models at a time: per arm one in the folder and one in MLflow, and one per slot."""
    if study.keep.models == "none" or not cells:
        return 0.0
    return min(len(study.arms), cells) + len(study.arms) + slots


def disk_needed(
    study: Study, slots: int = 1, *, vocab_size: int | None = None, cells: int | None = None, rough: bool = False
) -> int:
    """Return the most bytes that a study may still write, with 3 checkpoints per slot and without the packed corpus.

    Args:
        study: The study.
        slots: Number of slots.
        vocab_size: Vocabulary of the packed corpus; None for that of the study file.
        cells: Cells that remain; None for all, with the grid fully extended and every look of the rule.
        rough: Take an upper bound of the model's size, which needs no torch.
    """
    cells = most_cells(study) if cells is None else cells
    study = study.rungs[-1]  # the largest model and the longest trials of a ladder
    vocab_size = vocab_size or vocabulary(study)
    bound = rough and not study.shown and most_parameters(study, vocab_size)
    model = NO_MODEL if study.shown else Model(bound, 0, 0) if bound else largest(study, vocab_size)
    return round(sum(disk_parts(study, cells, slots, model).values()))


def most_parameters(study: Study, vocab_size: int) -> int:
    """Return at least as many parameters as an arm's model has, without torch; 0 if that is not known.

    It is four times the stock GPT-2: a layer with a projected gate has 44 d_model^2 parameters instead of 12. An arm's
    own code may have any number, and BERT and T5 are built by transformers.
    """
    if study.task != "causal" or any(arm.own_code for arm in study.arms.values()):
        return 0
    return 4 * parameters(GPT2Size(vocab_size, **study.model.sizes()))


def check_space(folder: Path, *needed: Callable[[], int]) -> None:
    """Raise StudyError if the file system of `folder` has too few bytes free. Write nothing.

    Args:
        folder: The study's folder.
        needed: Functions that return the bytes. The next one is called only if those of the last one are not free.
    """
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not any(free >= (least := bytes_()) for bytes_ in needed):
        raise StudyError(
            f"{folder}: the study may need {readable(least)}, but {readable(free)} are free there; "
            "free some space or give another --output"
        )


# --- memory ----------------------------------------------------------------------------------------------------------

GATE_VALUES = {"pointwise": 4, "glu": 6, "projected": 12}  # by form


def gate_values(arm: Arm) -> int:
    """Return the values per token and layer that the backward pass needs of an arm's gate, in multiples of d_model.

    pointwise: the gate. glu: its two inputs of 2/3 d_ff, the gate and the product, less the stock MLP's 8.
    projected: both projections and the gate, d_ff each.
    """
    if arm.gate is None and arm.unit is None:
        return 0
    return GATE_VALUES["glu" if arm.is_glu else arm.form]


def memory_parts(study: Study, model: Model, vocab_size: int, base_mb: float) -> dict[str, float]:
    """Return the peak memory of a trial's process in bytes, by part. Compiled trials need less.

    - base: the interpreter with its libraries, `base_mb` MiB.
    - state: weights, gradient and two moments, 16 bytes per parameter.
    - activations, in float32, of the N tokens whose gradient is computed at once. Per layer the backward pass needs 18
      d_model values (norms 3, query, key and value 3, attention 3, MLP 9: 1 in, 4 before and 4 after the gate) and
      `gate_values`. The gradients of one layer are added. Attention that is written out (bfloat16 on a CPU, T5) needs
      3 squares n_ctx x n_ctx per head.
    - logits: three copies of a chunk and the gradient of its inputs. In BERT and T5 about a sixth of the positions has
      logits, in one chunk.
    - embedding: the matrix is both the first and the last layer. Its second gradient exists until the two are added.
      If the gradients of several micro-batches are summed, both exist beside the sum.
    """
    from pagating.model.fused_loss import chunk_rows

    batch = largest_batch(study)
    size, tokens = study.model, study.fixed.micro_batch_tokens or batch
    layer = (18 + max(map(gate_values, study.arms.values()))) * size.d_model * tokens
    written_out = study.fixed.precision == "bfloat16" or study.task == "span"
    square = 3 * tokens * size.n_ctx * size.n_head if written_out else 0
    rows = chunk_rows(tokens, vocab_size) if study.task == "causal" else tokens // 5
    more = 2 if tokens < batch else 1
    return {
        "base": base_mb * (1 << 20),
        "state": float((WEIGHT + GRADIENT + MOMENTS) * model.parameters),
        "activations": 4.0 * ((size.n_layer + 1) * layer + size.n_layer * square + 4 * size.d_model * tokens),
        "logits": 4.0 * (3 * rows * vocab_size + 2 * size.d_model * tokens),
        "embedding": 4.0 * more * vocab_size * size.d_model,
    }
