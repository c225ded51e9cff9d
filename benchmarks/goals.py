"""Judge the speed goals: the first table of `docs/performance.md`.

The goals are fixed here. Every figure comes from `performance.json`, at its median if it has a spread. A goal is
neither met nor missed if its figure was not taken, or cannot be judged on the machine where it was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Kept = Mapping[str, Any]
TRAINER, TRAINER_COMPILED, NANO = "HF Trainer, defaults", "HF Trainer, torch_compile", "nanoGPT's loop"
ENGINE, COMPILED = "this engine", "this engine, compiled"
NARROW = ("NO AVX", "DEFAULT", "AVX2")  # instruction sets without bfloat16 products
UNJUDGED, UNMEASURED = "not judged", "not measured"


@dataclass(frozen=True)
class Goal:
    """A row of the table.

    Args:
        goal: the promise.
        part: the part of `performance.json` that has its figure.
        measured: the figure, in words.
        judged: met, missed, not judged or not measured.
        obstacle: the reason if it is missed, and what was tried.
    """

    goal: str
    part: str
    measured: str
    judged: str
    obstacle: str = ""


BOUND = (
    "on a core, matrix products take most of a step, and the Trainer and the engine use the same library for them. "
    "The last column of the table of steps says how near the engine is to the speed of the products alone. Tried: the "
    'table "What was tried".'
)
DEARER = (
    "an arm whose gate and base each need an exponential or an error function computes two where GELU computes one. "
    'Tried: one pass over the memory for the whole unit ("The units alone"), torch.compile (the rows `compiled`). A '
    "study's report has the speed of each arm beside the baseline's."
)
ACTIVATIONS = (
    "the backward pass keeps activations of 1,024 tokens and a chunk of logits. Tried: logits in chunks, the softmax "
    'in the place of the logits, smaller chunks ("What was tried").'
)
HAND_OVER = (
    "trials of equal length end together. The driver records them and hands out the next ones one after the other, on "
    "the cores that the simulated slots share. Tried: idle actors kept through the stages, two trials of an arm side "
    "by side in the search, and removing what Ray did for every past trial at each event."
)
STORE = (
    "the time goes into the SQL statements of MLflow's own store, in a thread that no trial waits for. Tried: one "
    "request per cell for its rows, requests only when the thread has caught up."
)
COMING_UP = (
    "Ray's own processes take about a third of it, and Python, torch and Ray of the first worker another. Tried: the "
    "check of the disk without torch; workers that load what a trial needs while the driver loads its own, and "
    "nothing of the compiler; MLflow after the first report."
)
DRAWING = (
    "a profile gives half of it to drawing six figures, as SVG and as PDF, and a third to importing SciPy, pandas and "
    "Matplotlib."
)
STARTS = (  # figure, what is timed, its limit in seconds, and the obstacle
    ("start_seconds", "`pagating sweep` to the end of its first evaluation, warm", 8.0, COMING_UP),
    ("help_seconds", "`pagating --help`", 0.5, ""),
    ("status_seconds", "`pagating status`", 0.5, ""),
    ("report_seconds", "`pagating report` of the laptop study", 3.0, DRAWING),
)
CONFIRMING = (
    "two thirds of what is left is the confirm stage, and its seeds follow from the noise and the test. Tried: one "
    "standard deviation for all arms, which needs fewer seeds and errs in a study whose arms differ in noise; "
    "calibrate trials of half the tokens, which err if the best rates of the arms move apart "
    '([LOG](results/LOG.md)); the other rows of "H".'
)
SMALL_ON_GPU = (
    "the engine keeps weights, norms and residuals in float32 and casts them for each product, and its steps of single "
    "operations read and write the activations many times. Tried: larger batches, which change little; chunks of "
    "logits of 512 MiB instead of 8. Compiled, a pack of small models is about twice as fast; GPT-2 small compiled "
    "was not measured."
)


def emulates_bfloat16(where: Mapping[str, Any]) -> bool:
    """Return whether a machine has no bfloat16 products; by its instruction set if it does not say."""
    return not where.get("bfloat16", where["instructions"] not in NARROW)


def judge(holds: bool) -> str:
    """Return the word for a goal that can be judged."""
    return "met" if holds else "missed"


def short(row: Mapping[str, Any]) -> str:
    """Return a shape in a few words."""
    return f"d_model {row['d_model']}, T {row['n_ctx']}, V {row['vocab_size']:,}"


def by_shape(rows: Iterable[Kept], precision: str) -> dict[str, dict[str, Kept]]:
    """Return the rows of the training steps in one precision, by shape and variant."""
    found: dict[str, dict[str, Kept]] = {}
    for row in rows:
        if row["precision"] == precision:
            found.setdefault(short(row), {})[row["variant"]] = row
    return found


def best(variants: Mapping[str, Kept], figure: str) -> float:
    """Return the larger figure of the engine, compiled or not: a trial takes the faster path."""
    return max(variants[name][figure]["median"] for name in (ENGINE, COMPILED) if name in variants)


def _headline(kept: Kept) -> Iterator[Goal]:
    rows = kept["headline"]["rows"]
    share = rows[-1]["core_hours"] / rows[0]["core_hours"]
    goal = "H, core-hours to a verdict: half of what they were"
    yield Goal(goal, "headline", f"{share:.2f} of them", judge(share <= 0.5 and rows[-1]["counts"]), CONFIRMING)


def _step(kept: Kept) -> Iterator[Goal]:
    rows, emulated = kept["trial"]["speed"], emulates_bfloat16(kept["trial"]["machine"])
    for precision, figure, limit, words in (
        ("bfloat16", "ratio", 3.0, "tokens/s at least 3x the HF Trainer's at its defaults"),
        ("bfloat16", "of_gemm", 0.5, "at least 0.5 of the GEMM ceiling"),
        ("float32", "ratio", 1.5, "tokens/s at least 1.5x the HF Trainer's at its defaults"),
    ):
        shapes = by_shape(rows, precision)
        if figure == "ratio":  # without the Trainer, the table's reference is the plain loop
            shapes = {name: variants for name, variants in shapes.items() if TRAINER in variants}
        found = {name: best(variants, figure) for name, variants in shapes.items()}
        measured = "; ".join(f"{value:.2f} ({name})" for name, value in found.items()) or "-"
        judged = judge(min(found.values()) >= limit) if found else UNMEASURED
        if found and precision == "bfloat16" and emulated:
            judged = f"{UNJUDGED}: bfloat16 is emulated on this processor"
        yield Goal(f"{precision}: {words}", "trial", measured, judged, BOUND)


def _arms(kept: Kept) -> Iterator[Goal]:
    rows = [row for row in kept["trial"]["arms"] if row["arm"] != "gelu"]
    slower = [row for row in rows if row["ratio"]["median"] < 0.98]
    sure = [row for row in slower if row["ratio"]["high"] < 0.98]
    measured = f"{len(slower)} of {len(rows)} rows slower at the median, {len(sure)} of them at the upper quartile too"
    if slower:
        least = min(slower, key=lambda row: row["ratio"]["median"])
        measured += f"; slowest: {least['arm']} {least['ratio']['median']:.2f}"
    judged = judge(not slower) if rows else UNMEASURED
    yield Goal("no arm over 2% slower than GELU", "trial", measured, judged, DEARER)


def _memory(kept: Kept) -> Iterator[Goal]:
    found = kept["trial"]["memory"]
    goal = "V 50,257: peak memory of a step at most 1.3x the model's own (weights, gradients, moments)"
    if "V 50,257, logits in chunks" in found:
        row = found["V 50,257, logits in chunks"]
        share = row["peak of a step"] / row["model and optimiser"]
        yield Goal(goal, "trial", f"{share:.2f}x", judge(share <= 1.3), ACTIVATIONS)
    if "200 trials in one process" in found:
        row = found["200 trials in one process"]
        first, last = row["after 20 trials"], row["after 200 trials"]
        measured = f"{first:,.0f} MiB after 20, {last:,.0f} after 200"
        yield Goal("no growth over 200 trials of one process (1%)", "trial", measured, judge(last <= 1.01 * first))


def _precision(kept: Kept) -> Iterator[Goal]:
    rows = kept["trial"]["precision"]
    if rows:
        change = max(max(abs(row["difference_low"]), abs(row["difference_high"])) for row in rows)
        noise = min(row["seed_sd"] for row in rows)
        measured = f"at most {change:.4f} nats apart, where a seed changes {noise:.4f} or more"
        goal = "bfloat16 and float32 agree within seed noise"
        yield Goal(goal, "trial", measured, f"{judge(change <= noise)}, on a tiny model only")


def _study(kept: Kept) -> Iterator[Goal]:
    found = kept["study"]
    for name, row in found.items():
        if name.startswith("occupancy"):
            goal = f"{row['slots']} slots, trials of {found['trial_seconds']:g} s: occupied at least 0.95"
            yield Goal(goal, "study", f"{row['occupancy']:.3f}", judge(row["occupancy"] >= 0.95), HAND_OVER)
    rows = [found[name] for name in ("tracking_sqlite", "tracking_dead_server")]
    for key, words in (
        ("calls_ms", "the driver's calls"),
        ("processor_ms", "the driver's processor time, all threads"),
    ):
        worst, goal = max(row[key] for row in rows), f"tracking: at most 1 ms per report, in {words}"
        yield Goal(goal, "study", f"{worst:.2f} ms", judge(worst <= 1), STORE)
    for key, words, limit, obstacle in STARTS:
        goal = f"{words}: under {limit:g} s"
        if key in found:
            yield Goal(goal, "study", f"{found[key]:.2f} s", judge(found[key] < limit), obstacle)
        else:
            yield Goal(goal, "study", "-", UNMEASURED)


def _packed(kept: Kept) -> Iterator[Goal]:
    rows = kept["packed"]["rows"]
    gpu = [row["ratio"]["median"] for row in rows if row["device"] == "cuda"]
    if "gpu" in kept:
        tokens = {(row["part"], row.get("what")): row["tokens_per_second"] for row in kept["gpu"]["rows"]}
        alone = tokens["turn", "4 x 128"]
        gpu += [row["tokens_per_second"] / alone for row in kept["gpu"]["rows"] if row["part"] == "goal"]
    goal = "GPU: packed trials at least 4x as fast as one after the other"
    if gpu:
        yield Goal(goal, "gpu" if "gpu" in kept else "packed", f"{max(gpu):.3g}x", judge(max(gpu) >= 4))
    else:
        cpu = max(row["ratio"]["median"] for row in rows)
        yield Goal(goal, "packed", f"on the CPU {cpu:.2f}", f"{UNMEASURED}: no GPU was available")


def _gpu(kept: Kept) -> Iterator[Goal]:
    goal = "GPT-2 small on one Hopper card: at least 45% of its bfloat16 peak"
    found = [row["utilisation"] for row in kept.get("gpu", {}).get("rows", []) if row["part"] == "small"]
    if found:
        yield Goal(goal, "gpu", f"{max(found):.0%}, not compiled", judge(max(found) >= 0.45), SMALL_ON_GPU)
    else:
        yield Goal(goal, "gpu", "-", f"{UNMEASURED}: no GPU was available")


SOURCES: tuple[tuple[str | None, Callable[[Kept], Iterator[Goal]]], ...] = (
    ("headline", _headline),
    ("trial", _step),
    ("trial", _arms),
    ("trial", _memory),
    ("trial", _precision),
    ("study", _study),
    ("packed", _packed),
    (None, _gpu),
)


def goals(kept: Kept) -> list[Goal]:
    """Return every goal whose part of the figures is there."""
    return [goal for part, found in SOURCES if part is None or part in kept for goal in found(kept)]


def section(kept: Kept) -> list[str]:
    """Return the lines of the table, with a sentence that counts."""
    rows = goals(kept)
    count = {word: sum(row.judged.startswith(word) for row in rows) for word in ("met", "missed")}
    lines = [
        "## Goals",
        "",
        f"Of {len(rows)} goals {count['met']} are met and {count['missed']} missed; {len(rows) - sum(count.values())} "
        "could not be judged on the machines that were available. A goal is judged at the median, and the engine by "
        "the faster of its two paths, compiled or not. A goal for several shapes is missed if one shape misses it. "
        "`load` is the number of processes that ran or waited at the start, of the number of cores. If it exceeds the "
        "cores, absolute figures are low.",
        "",
        "| goal | measured | load | |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        where = kept[row.part]["machine"] if row.part in kept else None
        load = f"{where['load']} of {where['cores']}" if where and "load" in where else "-"
        lines.append(f"| {row.goal} | {row.measured} | {load} | {row.judged} |")
    missed = [row for row in rows if row.judged.startswith("missed") and row.obstacle]
    if missed:
        lines += ["", "Why goals are missed, and what was tried:", ""]
        lines += [f"- {row.goal}: {row.obstacle}" for row in missed]
    return lines
