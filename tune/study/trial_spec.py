"""The arguments of one trial, from a study, an arm and a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune.study.study import Study

TUNABLE = ("lr", "weight_decay", "warmup", "final_lr", "beta1", "beta2", "clip")


def trial_spec(study: Study, arm: str, config: dict[str, float], seed: int, corpus: Path, test: bool) -> dict[str, Any]:
    """Arguments of `pagating.train.Trial` for one cell of a study."""
    fixed = study.fixed.model_dump(exclude={"steps", "padding"})
    if study.corpus.rows == "lines":
        fixed["padding"] = study.fixed.padding or "counted"
    fixed.update({name: config[name] for name in TUNABLE if name in config and name != "lr"})
    return {
        **fixed,
        "corpus": str(corpus),
        "model": study.model.sizes(),
        "unit": study.arms[arm].arguments(config),
        "lr": config["lr"],
        "seed": seed,
        "test": test,
        "threads": study.resources.cpus,
        **({"pretrained": study.model.pretrained} if study.model.pretrained else {}),
        **({"task": study.task} if study.task != "causal" else {}),
        "device": "cuda" if study.resources.gpus else "cpu",
    }
