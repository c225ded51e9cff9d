"""Make the trial of one cell from a study, an arm and a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagating.trial import Trial
from tune.study.sections import MODEL_KEYS, TRIAL_KEYS
from tune.study.sizes import batch, interval
from tune.study.study import Study


def trial_spec(study: Study, arm: str, config: dict[str, float], seed: int, corpus: Path, test: bool) -> Trial:
    """Return the trial of one cell of a study.

    Args:
        study: the study.
        arm: name of the arm.
        config: values of the tuned hyperparameters, always with `lr`.
        seed: seed of the trial.
        corpus: folder of the packed corpus.
        test: evaluate the test split at the last step.
    """
    fixed = study.fixed.model_dump(exclude={"steps", "padding"})
    tuned: dict[str, Any] = {name: config[name] for name in TRIAL_KEYS if name in config}
    if "batch_tokens" in tuned:
        tuned |= {"batch_tokens": batch(study, config)}
        tuned |= {"eval_every": interval(study, config)} if study.fixed.eval_every else {}
    return Trial(
        **{**fixed, **tuned},
        padding=(study.fixed.padding or "counted") if study.corpus.rows == "lines" else None,
        corpus=str(corpus),
        model={**study.model.sizes(), **{name: config[name] for name in MODEL_KEYS if name in config}},
        unit=study.arms[arm].arguments(config),
        seed=seed,
        test=test,
        threads=study.resources.cpus,
        pretrained=study.model.pretrained,
        task=study.task,
        device="cuda" if study.resources.gpus else "cpu",
    )
