"""Run the examples of a user's own training as whole studies, and write what they took into docs/own-training.md.

    python benchmarks/examples.py [NAME ...] [--output docs]

Without names, all of them. An example needs `scikit-learn`, and `accelerate` for Hugging Face's Trainer.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from simulation.page import between

from analysis.io.write import write_whole

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml") if "trial" in yaml.safe_load(path.read_text()))


def digest(name: str) -> str:
    """Return the SHA-256 of the files of an example, of which the measured numbers are."""
    both = [path.read_bytes() for path in (EXAMPLES / f"{name}.py", EXAMPLES / f"{name}.yaml")]
    return hashlib.sha256(b"\n".join(both)).hexdigest()


def measure(name: str) -> dict[str, Any]:
    """Run an example with Ray in a process of its own; return its time, its trials and its verdicts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tune.cli", "sweep", str(EXAMPLES / f"{name}.yaml"), "--output", folder]
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        verdict = json.loads((Path(folder) / name / "verdict.json").read_text())
        trials = pd.read_parquet(Path(folder) / name / "trials.parquet")
    kinds = {row["arm"]: row["kind"] for row in verdict["comparisons"]}
    return {"seconds": seconds, "trials": len(trials), "kinds": kinds, "cores": os.cpu_count(), "files": digest(name)}


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of the examples."""
    lines = ["| example | trials | minutes | verdicts |", "| --- | ---: | ---: | --- |"]
    for name, row in sorted(found.items()):
        question = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["question"]
        kinds = ", ".join(f"{arm}: {kind.replace('_', ' ')}" for arm, kind in row["kinds"].items())
        lines.append(
            f"| [{name}](examples/{name}.yaml): {question} | {row['trials']} | {row['seconds'] / 60:.1f} | {kinds} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure the examples, and write their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs", help="folder of examples.json and own-training.md"
    )
    options = parser.parse_args(arguments)
    kept = options.output / "examples.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.names or NAMES:
        found[name] = measure(name)
        print(markdown({name: found[name]}).splitlines()[2], flush=True)
        write_whole(kept, json.dumps(found, indent=1, sort_keys=True) + "\n")
    between(options.output / "own-training.md", "examples", markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
