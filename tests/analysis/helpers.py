"""A simulated study folder: a bowl of the loss over the learning rate, noise of seeds, curves and learned alphas."""

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ARMS = {
    "gelu": {"baseline": True},
    "linear-floor": {"gate": "sigmoid", "alpha": 0.0, "floor": True},
    "paglu-searched": {"gate": "sigmoid", "alpha": {"search": {"uniform": [0.0, 2.0]}}},
    "paglu-per-layer": {"gate": "sigmoid", "alpha": {"learnable": {"init": 0.5, "per": "layer"}}},
}
GAPS = {"gelu": 0.0, "linear-floor": 0.16, "paglu-searched": -0.02, "paglu-per-layer": 0.002}
LAYERS = 4


def simulate(folder: Path, *, gaps: dict[str, float] | None = None, seeds: int = 8, arms: dict | None = None) -> Path:
    """Write study.yaml, trials.parquet and curves.parquet of a study whose true gaps (nats) are known."""
    gaps, arms, rng = gaps or GAPS, arms or ARMS, np.random.default_rng(7)
    rows, curves = [], []
    shared = {seed: rng.normal(0, 0.012) for seed in range(1000)}

    def cell(stage: str, arm: str, seed: int, lr: float, key: str) -> None:
        loss = 3.3 + gaps[arm] + 0.06 * np.log(lr / 2e-3) ** 2 + shared[seed] + rng.normal(0, 0.004)
        outcome = "infeasible" if lr > 8e-3 else "completed"
        if stage == "search" and outcome == "completed" and loss > 3.55 + gaps[arm]:
            outcome, loss = "stopped_early", loss + 0.1
        bad = outcome == "infeasible"
        alphas = {
            f"alpha_layer_{i}": 0.3 + 0.3 * i + rng.normal(0, 0.05) if arm == "paglu-per-layer" else np.nan
            for i in range(LAYERS)
        }
        value = np.nan if bad else loss
        rows.append(
            {"study": "demo", "stage": stage, "arm": arm, "seed": seed, "config_key": key, "outcome": outcome}
            | {"reason": "loss is not finite at step 40" if bad else None}
            | {
                "test_nll": value + 0.05 if stage == "confirm" else np.nan,
                "val_nll": value,
                "val_ppl": np.exp(value),
            }
            | {
                "val_bpb": value / np.log(2) / 3.6,
                "train_nll": value - 0.1,
                "lr": lr,
                "alpha": 0.5,
                "tokens": 400_000,
            }
            | {"steps": 200, "seconds": 20.0, "tokens_per_second": 20_000.0, "peak_rss_mb": 700.0}
            | {"parameters": 1_100_000, "flops_per_token": 6_600_000.0}
            | alphas
        )
        for step in range(0 if bad else 20, 201, 20):
            value = np.nan if bad else loss + 4.0 * np.exp(-step / 30) - gaps[arm] * (1 - step / 200)
            curves.append(
                {"study": "demo", "stage": stage, "arm": arm, "seed": seed, "config_key": key, "step": step}
                | {
                    "tokens": step * 2000,
                    "val_nll": value,
                    "train_nll": value - 0.1,
                    "lr": lr,
                    "grad_norm": 0.8,
                }
                | alphas
            )

    for arm in arms:
        for i in range(6):
            cell("search", arm, 0, float(10 ** rng.uniform(-4, -2)), f"s{arm}{i}")
        for lr in (1e-3, 2e-3, 4e-3):
            for seed in (1, 2):
                cell("calibrate", arm, seed, lr, f"c{arm}{lr}")
        for seed in range(100, 100 + seeds):
            cell("confirm", arm, seed, 2e-3, f"f{arm}")
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "trials.parquet")
    pd.DataFrame(curves).to_parquet(folder / "curves.parquet")
    settings = {
        "name": "demo",
        "question": "Does a parameterised gate lower the loss against an equally tuned GPT-2?",
        "corpus": {"source": "builtin"},
        "model": {"n_layer": LAYERS, "d_model": 128},
        "arms": arms,
        "search": {"trials_per_arm": 6, "sampler": "tpe", "pruner": "asha"},
        "calibrate": {"points": 3, "seeds": 2},
        "confirm": {"seeds": seeds, "level": 0.05, "correction": "holm", "margin": "0.5%"},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


RUNGS = ({"d_model": 32, "n_layer": 2}, {"d_model": 64, "n_layer": 2}, {"d_model": 128, "n_layer": 2})
COMPUTE = (1.0e12, 8.0e12, 64.0e12)  # FLOPs of the baseline's training on each rung


def climb(
    folder: Path,
    improvements: dict[str, tuple[float, ...]],
    *,
    seeds: int | tuple[int, ...] = 8,
    rungs: int | None = None,
    level: float = 0.05,
    confirm: dict | None = None,
    ladder: dict | None = None,
    floor: float = -6.0,
    planned: int | None = None,
) -> Path:
    """Write the folder of a ladder whose true improvements (percent) are known: gelu, a floor and the arms given.

    Args:
        folder: The folder.
        improvements: Arm -> its improvement on each rung that it runs.
        seeds: Confirm seeds, of all rungs or of each.
        rungs: Rungs that have run; None for all.
        level: Level of the whole ladder.
        confirm: Further keys of the section `confirm`.
        ladder: Section `ladder`.
        floor: Improvement of the floor.
        planned: Rungs of the ladder; None: as many as the arm that runs the most.
    """
    rng = np.random.default_rng(11)
    planned = planned or max(map(len, improvements.values()))
    every = {"gelu": (0.0,) * planned, "linear-floor": (floor,) * planned, **improvements}
    rows, curves = [], []
    for rung in range(1, (rungs or planned) + 1):
        n = seeds if isinstance(seeds, int) else seeds[rung - 1]
        compute, loss = COMPUTE[0] * 8.0 ** (rung - 1), 4.0 * 0.9 ** (rung - 1)
        shared = rng.normal(0, 0.012, n)
        for arm, gains in every.items():
            for i in range(n if rung <= len(gains) else 0):
                value = loss * (1 - gains[rung - 1] / 100) + shared[i] + rng.normal(0, 0.004)
                cell = {"study": "climb", "rung": rung, "stage": "confirm", "arm": arm, "seed": 1000 * rung + i}
                cell |= {"config_key": f"{arm}{rung}"}
                rows.append(
                    cell
                    | {"outcome": "completed", "reason": None, "chosen": True, "test_nll": value, "val_nll": value}
                    | {"lr": 2e-3, "tokens": 1_000_000, "steps": 200, "seconds": 20.0, "parameters": 50_000 * 3**rung}
                    | {"flops_per_token": compute / 1e6}
                )
                for step in range(20, 201, 20):
                    point = {"step": step, "tokens": 5000 * step, "val_nll": value + 3 * np.exp(-step / 30)}
                    curves.append(cell | point | {"train_nll": value})
    arms = {"gelu": {"baseline": True}, "linear-floor": {"floor": True, "gate": "sigmoid", "alpha": 0.0}}
    arms |= {arm: {"unit": "relu2"} for arm in improvements}
    first = seeds if isinstance(seeds, int) else seeds[0]
    settings = {
        "name": "climb",
        "question": "Does the gain last?",
        "model": {"n_layer": 2, "d_model": 32, "n_ctx": 32},
        "fixed": {"tokens": 1_000_000, "batch_tokens": 64},
        "nuisance": {"lr": {"loguniform": [1e-4, 1e-2]}},
        "arms": arms,
        "stages": ["confirm"],
        "scales": [{"d_model": 32 * 2**i, "tokens": 1_000_000} for i in range(planned)],
        "ladder": {"search": "lowest", "drop": False, **(ladder or {})},
        "confirm": {"seeds": first, "level": level, "correction": "holm", "margin": "0.5%", **(confirm or {})},
    }
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "trials.parquet")
    pd.DataFrame(curves).to_parquet(folder / "curves.parquet")
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder
