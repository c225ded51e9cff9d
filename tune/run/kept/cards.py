"""The card of a kept model: README.md in its folder, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.io.text import markdown
from pagating.gating.catalog import own_code
from tune.study.study import Study

CARD = "README.md"
PIPELINES = {"causal": "text-generation", "masked": "fill-mask"}  # transformers 5 has none for a span model
USE = """```python
import pagating
from transformers import AutoTokenizer

model = pagating.from_pretrained("{folder}"{own})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


def card(study: Study, facts: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> str:
    """Return the card of an arm's kept model.

    Args:
        study: The study.
        facts: Content of its `model.json`.
        verdict: Content of the study's `verdict.json`, if there is one.
    """
    arm, final, trial = facts["arm"], facts["final"], facts.get("trial", {})
    rows = {
        "question": study.question,
        "study": study.name,
        "arm": f"{arm}: {study.arms[arm].formula}",
        "verdict": _verdict(study, arm, verdict),
        "validation loss": f"{final['val_nll']:.4f} nats per target",
        "test loss": f"{final['test_nll']:.4f} nats per target" if "test_nll" in final else "not computed",
        "trained with": f"seed {trial.get('seed')}, learning rate {trial.get('lr')}, {trial.get('tokens')} tokens",
        "cell": facts["cell"],
        "commit": facts.get("commit") or "unknown",
    }
    if summary := (verdict or {}).get("summary"):
        rows["verdict of the study"] = summary
    pipeline = PIPELINES.get(facts.get("task", "causal"))
    head = ["---", "library_name: transformers", *([f"pipeline_tag: {pipeline}"] if pipeline else [])]
    head += ["tags: [pagating]", "---", "", f"# {study.name}: {arm}", "", "| | |", "| --- | --- |"]
    table = [f"| {key} | {markdown(str(value))} |" for key, value in rows.items()]
    note = "It is the best seed of its arm by validation loss. The verdict is about all seeds, not about this model."
    code = own_code(facts.get("unit"))
    own = f', {code.key}="{code.reference}"' if code else ""
    return "\n".join([*head, *table, "", note, "", USE.format(folder="FOLDER", own=own), ""])


def _verdict(study: Study, arm: str, verdict: Mapping[str, Any] | None) -> str:
    rows = {row["arm"]: row for row in (verdict or {}).get("comparisons", [])}
    if study.arms[arm].baseline:
        return "the baseline"
    if arm not in rows:
        return "none yet"
    return f"{rows[arm]['verdict']} against {rows[arm]['baseline']}: {rows[arm]['why']}"
