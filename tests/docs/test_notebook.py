"""Run docs/notebook.md as a notebook: in a fresh process, and in a real kernel if one is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_blocks import ROOT, blocks

CELLS = [block.body for block in blocks((ROOT / "docs/notebook.md").read_text(encoding="utf-8"))]


def as_script(cells: list[str]) -> str:
    """Return the cells as a script. It writes the files of `%%writefile` and prints the last value of each cell."""
    lines = ["import ast, pathlib", "names = {'__name__': '__main__'}"]
    for cell in cells:
        head, _, rest = cell.partition("\n")
        if head.startswith("%%writefile "):
            lines.append(f"pathlib.Path({head.split()[1]!r}).write_text({rest!r})")
            continue
        lines += [
            f"tree = ast.parse({cell!r})",
            "last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None",
            "exec(compile(tree, 'cell', 'exec'), names)",
            "if last: print('OUT', repr(eval(compile(ast.Expression(last.value), 'cell', 'eval'), names)))",
        ]
    return "\n".join(lines)


def test_the_notebook_runs_in_a_fresh_process(tmp_path):
    (tmp_path / "notebook.py").write_text(as_script(CELLS), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "OUT True" in out
    assert "OUT ok      arm plain trains" in out
    assert "OUT noisy_line: expected (least - most)" in out
    assert "Power:" in out
    assert "run_study: unknown key 'confirm.seed'; did you mean 'seeds'?" in out
    assert "OUT differences: " in out
    assert "Traceback" not in done.stderr
    assert (tmp_path / "studies/noisy_line/report.html").is_file()


def test_a_cell_that_fails_fails(tmp_path):
    (tmp_path / "notebook.py").write_text(as_script(["a = 1\n", "assert a == 2\n"]), encoding="utf-8")
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
    """Run the page in Jupyter: a running event loop, and a standard output that is no terminal."""
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [[out.get("data", {}) for out in cell.outputs] for cell in book.cells]
    by_cell = dict(zip(CELLS, shown, strict=True))
    assert any("text/html" in data for data in by_cell["result = tune.run_study(question)\nresult.finished\n"])
    (verdict,) = by_cell["result.verdict\n"]
    assert "| momentum" in verdict["text/markdown"]
    (figure,) = by_cell['result.figures["differences"]\n']
    assert "<svg" in figure["text/html"]


@pytest.mark.slow
def test_an_interrupted_kernel_continues(tmp_path, monkeypatch):
    """Interrupt a kernel during a study; the next cell continues it."""
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    slow = CELLS[0].partition("\n")[2].replace("        x =", "        __import__('time').sleep(0.02)\n        x =")
    Path("noisy_line.py").write_text(slow, encoding="utf-8")
    km, kc = manager.start_new_kernel(kernel_name="python3")
    try:
        kc.execute_interactive(CELLS[1], timeout=120, store_history=False)
        told: list[dict] = []

        def watch(message):
            told.append(message)
            if message["msg_type"] == "update_display_data" and not any(m == "interrupted" for m in told):
                told.append("interrupted")
                km.interrupt_kernel()

        kc.execute_interactive("tune.run_study(question)", timeout=120, output_hook=watch)
        errors = [m["content"]["ename"] for m in told if m != "interrupted" and m["msg_type"] == "error"]
        assert errors == ["KeyboardInterrupt"]
        code = "part = tune.load_study('noisy_line'); assert not part.finished; print(len(part.trials))"
        reply = kc.execute_interactive(code, timeout=120)
        assert reply["content"]["status"] in ("ok", "error")  # no trial may have ended yet
        reply = kc.execute_interactive("assert tune.run_study(question).finished", timeout=300)
        assert reply["content"]["status"] == "ok"
    finally:
        kc.stop_channels()
        km.shutdown_kernel(now=True)
