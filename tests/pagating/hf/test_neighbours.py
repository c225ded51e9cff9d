"""Gates beside PEFT, accelerate, bitsandbytes and torchao. The test installs them.

It also runs the tests that are skipped without them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NEIGHBOURS = ("peft", "accelerate", "bitsandbytes", "torchao")


@pytest.mark.slow
def test_gates_work_beside_other_libraries(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "neighbours")]
    done = subprocess.run([*pip, "-c", "constraints.txt", *NEIGHBOURS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = os.pathsep.join([str(ROOT), str(tmp_path / "neighbours")])
    cases = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("neighbours.py"))],
        env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert cases.returncode == 0, cases.stderr
    errors = json.loads(cases.stdout.splitlines()[-1])
    assert len(errors) >= 19
    assert {name: error for name, error in errors.items() if error} == {}
    needs = re.compile(r'importorskip\("(peft|accelerate)"\)')
    tests = sorted((ROOT / "tests" / "pagating").rglob("test_*.py"))
    files = [path for path in tests if needs.search(path.read_text())]
    assert len(files) >= 3
    skipping = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert skipping.returncode == 0, skipping.stdout
    assert re.search(r"\d+ passed", skipping.stdout)
    assert "skipped" not in skipping.stdout
