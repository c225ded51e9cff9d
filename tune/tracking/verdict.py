"""Verdict of a study in MLflow: the description of its experiment and run, its metrics and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.io.names import PRELIMINARY
from analysis.io.text import markdown, one_line
from tune.run import ledger
from tune.study.study import Study
from tune.tracking.views import NOTE, OPENS, name_of, show, view_link, view_tags, views_of

ROOM = 7000  # characters of a verdict in the description of a run, which MLflow cuts at 8,000
OWN_METRICS = ("mean_difference", "training_percent", "training_low", "training_high")  # of an arm, in its verdict
FILES = ("report.html", "verdict.md", "verdict.json", "study.yaml")
LINE = 110  # characters of the verdict in the first line of a description, beside its links
ORDER = {"better": "than", "worse": "than", "no difference": "from"}  # of verdicts, by their first word
ORDER |= dict.fromkeys(("holds", "grows", "shrinks", "turns", "undecided", ""), "against")


def headline(verdict: dict[str, Any]) -> str:
    """Return a verdict in a few words, which the list of experiments shows: the arms by what was found of them.

    Args:
        verdict: Content of `verdict.json`.
    """
    asked = [row for row in verdict["comparisons"] if row["arm"] != verdict["floor"]]
    found = [(row["trend"], row) for row in verdict.get("trends") or []]
    found = found or [(row["verdict"].partition(" (")[0], row) for row in asked]
    words = [word for word, _ in found]
    if not found:
        return verdict["summary"].partition(". ")[0].rstrip(".") + "."
    if words[0].startswith("not testable: ") and len(set(words)) == 1:
        return f"{words[0][0].upper()}{words[0][1:]}."
    over = f" over {len(verdict['rungs'])} sizes," if verdict.get("trends") else ""
    said = _sentences(found, over, numbers=True)
    said = said if len(said) <= LINE else _sentences(found, over, numbers=False)
    return f"{PRELIMINARY}. {said}" if verdict["summary"].startswith(PRELIMINARY) else said


def _sentences(found: list[tuple[str, dict[str, Any]]], over: str, numbers: bool) -> str:
    """Return a sentence for each verdict, with its arms. The best verdict comes first."""
    groups: dict[str, list[str]] = {}
    for start in ORDER:
        for word, row in found:
            if start == next(each for each in ORDER if word.startswith(each)):
                change = row.get("improvement_percent") if numbers else None
                arm = row["arm"] if change is None else f"{row['arm']} ({change:+.2f}%)"
                said = f"{word[:1].upper()}{word[1:]}{over} {ORDER[start]} {row['baseline']}"
                groups.setdefault(said, []).append(arm)
    return " ".join(f"{said}: {', '.join(arms)}." for said, arms in groups.items())


def note(
    study: Study, experiment: str, parent: str | None, verdict: dict[str, Any] | None = None, more: str = ""
) -> str:
    """Return the description of a study in Markdown: its verdict, its question and links.

    The runs page shows only the first line until the user opens the rest. The list of experiments shows the first
    words as they are, with their markup.

    Args:
        study: The study.
        experiment: Id of the experiment.
        parent: Id of the study's parent run for links, or None.
        verdict: Content of `verdict.json`. None means that there is none yet.
        more: What follows the question, in Markdown.
    """
    first, files = [markdown(one_line(headline(verdict), 900)) if verdict else "Running: no verdict yet."], ""
    if parent:
        own = f"#/experiments/{experiment}/runs/{parent}"
        first += [f"[Report]({own}/artifacts/report.html)"] if verdict else []
        first += [f"[Run of the whole study]({own})"]
        files = f"Files: {', '.join(f'[{name}]({own}/artifacts/{name})' for name in FILES)}" if verdict else ""
    question = f"**{markdown(one_line(study.question, 500))}**"
    links = [f"- [{name_of(study, view)}]({view_link(experiment, view)})" for view in views_of(study)]
    parts = [" · ".join(first), question, more.strip(), "\n".join(links), files]
    return "\n\n".join(part for part in parts if part)


def _fitting(text: str) -> str:
    """Return the first whole lines of a text that fit into the description of a run."""
    lines: list[str] = []
    used = 0
    for line in text.splitlines():
        used += len(line) + 1
        if used > ROOM:
            return "\n".join([*lines, "", "The rest is in the report."])
        lines.append(line)
    return text


def log_verdict(uri: str, study: Study, parent_id: str, folder: Path, verdict: dict[str, Any]) -> None:
    """Write the verdict to the parent run: a description, metrics per arm and rung, and the report as an artifact."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=uri)
    table = (folder / "verdict.md").read_text(encoding="utf-8").split("\n", 4)[4]  # after the name and the question
    events = ledger.read(folder / "ledger.jsonl")
    now = round(1000 * max(event["time"] for event in events))
    parts = enumerate(verdict.get("rungs") or [verdict], int("rungs" in verdict))  # a rung is a step
    metrics = [Metric(name, value, now, step) for step, part in parts for name, value in _metrics(study, part).items()]
    client.log_batch(parent_id, metrics=metrics)
    experiment = client.get_run(parent_id).info.experiment_id
    client.set_tag(parent_id, NOTE, note(study, experiment, parent_id, verdict, _fitting(table)))
    summary = table.strip().split("\n", 1)[0]
    client.set_experiment_tag(experiment, NOTE, note(study, experiment, parent_id, verdict, summary))
    confirms = [r for r in ledger.records(events).values() if r.cell.stage == "confirm" and r.outcome == "completed"]
    ends = [record.curve[-1] for record in confirms if record.curve]
    show(client, experiment, view_tags(study, ends) | ({OPENS: "arms"} if confirms else {}))
    for name in FILES:
        client.log_artifact(parent_id, str(folder / name))
    client.set_terminated(parent_id)


def _metrics(study: Study, part: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of the parent run: of a plain study, or of a rung."""
    means = [(row[arm], row[f"{arm}_mean"]) for row in part["comparisons"] for arm in ("baseline", "arm")]
    found = {f"{part['metric']}/{arm}": mean for arm, mean in means}
    contrasts = [{**row, "arm": f"{row['arm']} against {row['baseline']}"} for row in part.get("contrasts", [])]
    for name in ("improvement_percent", *(OWN_METRICS if study.shown else ())):
        found |= {f"{name}/{row['arm']}": row.get(name) for row in [*part["comparisons"], *contrasts]}
    return {name: value for name, value in found.items() if value is not None}
