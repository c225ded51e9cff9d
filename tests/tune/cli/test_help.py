"""The --help of every command, the answers to typing errors, and the shell's completion."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.main import get_command

import pagating as package
from tests.studies import TINY, yaml_of
from tests.tune.helpers import write_ledger
from tune.cli import main
from tune.cli.analyses import ANALYSES
from tune.cli.common import complete_config, studies_in

BIN = Path(sys.executable).parent
NAMES = [name for name, _, _ in main.COMMANDS]


def pagating(monkeypatch, capsys, *words, columns=200):
    """Run the command in this process; return its exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("TERMINAL_WIDTH", raising=False)
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", None)
    monkeypatch.setattr(sys, "argv", ["pagating", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    out, err = capsys.readouterr()
    return ended.value.code, re.sub(r"\x1b\[[0-9;]*m", "", out), err


def test_every_command_has_an_example_that_it_understands():
    group = get_command(main.app)
    assert sorted(group.commands) == sorted([*NAMES, "train", *(name for name, _, _ in ANALYSES)])
    for name, _, examples in main.COMMANDS:
        command = group.commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        assert examples
        for example in examples:
            words = example.partition(" > ")[0].split()
            assert words[0] == name
            assert {word for word in words if word.startswith("--")} <= options
            command.make_context(name, words[1:], resilient_parsing=True)


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_shows_the_examples_on_lines_of_their_own(name, monkeypatch, capsys):
    code, out, _ = pagating(monkeypatch, capsys, *([name] if name else []), "--help", columns=80)
    lines = [line.strip() for line in out.splitlines()]
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    wanted = next((examples for command, _, examples in main.COMMANDS if command == name), [])
    assert all(f"pagating {example}" in lines for example in wanted)
    assert pagating(monkeypatch, capsys, *([name] if name else []), "-h", columns=80) == (0, out, "")


@pytest.mark.parametrize(("name", "module", "text"), ANALYSES)
def test_a_command_for_tables_has_the_help_and_the_errors_of_its_script(name, module, text, monkeypatch, capsys):
    assert f"│ {name} " in pagating(monkeypatch, capsys, "--help")[1]
    code, out, err = pagating(monkeypatch, capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: pagating {name} [-h]")
    assert text.rstrip(".") in out
    script = f"analysis.{name}"
    code, out, err = pagating(monkeypatch, capsys, name, "--", "--none.csv", "x")
    assert (code, out) == (2, "")
    assert err.startswith("pagating: --none.csv: no such file" if name == "ladder" else f"pagating {name}: ")
    assert err.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        import_module(module).main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {script} [-h]")


def test_help_is_a_command_too(monkeypatch, capsys):
    assert pagating(monkeypatch, capsys, "help")[:2] == pagating(monkeypatch, capsys, "--help")[:2]
    assert pagating(monkeypatch, capsys, "help", "plan")[:2] == pagating(monkeypatch, capsys, "plan", "--help")[:2]
    code, out, err = pagating(monkeypatch, capsys, "help", "paln")
    assert (code, out, err) == (2, "", "pagating: No such command 'paln'. Did you mean 'plan'?\n")


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    root = Path(__file__).parents[3]
    assert pagating(monkeypatch, capsys, "--version") == (0, f"pagating {package.__version__}\n", "")
    assert f"version: {package.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"({package.__version__})" in (root / "CHANGELOG.md").read_text()


def test_help_version_and_status_load_no_heavy_library(tmp_path):
    folder = tmp_path / "studies" / "x"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml_of(TINY, name="x", stages=["search"]))
    write_ledger(folder)
    program = (
        "import sys, tune.cli.main as m\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pandas', 'numpy', 'scipy', 'pydantic', 'matplotlib'}\n"
        "for words in (['--help'], ['--version'], ['status', 'x']):\n"
        "    sys.argv = ['pagating', *words]\n"
        "    try: m.main()\n"
        "    except SystemExit as ended: assert not ended.code\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "[]\n[]\n['pydantic']\n")


def test_help_stays_narrow_in_a_wide_terminal():
    shown = subprocess.run(
        [sys.executable, "-m", "tune.cli", "plan", "--help"],
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert 70 < max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["stauts", "x"], "No such command 'stauts'. Did you mean 'status'?"),
        (["sweep", "x.yaml", "--slot", "3"], "No such option: --slot (Possible options: --json, --slots)"),
        (["sweep", "mine.yaml", "--slots", "1000000"], "'--slots': Input should be less than or equal to 4096"),
        (["plan", "mine.yaml", "--slots", "0"], "'--slots': Input should be greater than or equal to 1"),
        (["status", "smoek"], "did you mean 'smoke'?"),
        (["report", "smoke2"], "did you mean 'smoke'?"),
        (["report"], "Missing argument 'studies'. Studies in studies: other, smoke."),
        (["rm", "--output", "none"], "Missing argument 'studies'. There are no studies in none."),
        (["sweep"], "Missing argument 'config'. A study file is meant, such as configs/sweep.yaml."),
        (["sweep", "mien.yaml"], "mien.yaml: No such file or directory; did you mean mine.yaml?"),
        (["plan", "mine"], "mine: No such file or directory; did you mean mine.yaml?"),
    ],
)
def test_a_typing_error_is_answered_with_what_was_meant(words, hint, monkeypatch, capsys, tmp_path):
    begun(tmp_path, "smoke", "other")
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = pagating(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("pagating: ")
    assert hint in err
    assert err.count("\n") == 1


def test_a_name_like_no_study_gets_no_hint(monkeypatch, capsys, tmp_path):
    begun(tmp_path, "smoke")
    monkeypatch.chdir(tmp_path)
    assert "did you mean" not in pagating(monkeypatch, capsys, "status", "wikitext")[2]


# --- completion ------------------------------------------------------------------------------------------------------


def begun(folder, *names):
    for name in names:
        (folder / "studies" / name).mkdir(parents=True)
        (folder / "studies" / name / "study.yaml").touch()


def test_studies_and_study_files_are_found(tmp_path, monkeypatch):
    begun(tmp_path, "smoke", "sweep")
    (tmp_path / "studies" / ".cache").mkdir()
    for name in ("own.yaml", "other.yml", "notes.txt", ".hidden.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert studies_in(Path("studies")) == ["smoke", "sweep"]
    assert studies_in(Path("none")) == []
    assert complete_config("") == ["other.yml", "own.yaml", "studies/"]
    assert complete_config("ow") == ["own.yaml"]
    assert complete_config(".h") == [".hidden.yaml"]
    assert complete_config("studies/sm") == ["studies/smoke/"]
    assert complete_config("studies/smoke/") == ["studies/smoke/study.yaml"]
    assert complete_config("none/") == []


def bash(script, folder):
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not on this machine")
def test_bash_completes_a_command_and_a_study_after_install(tmp_path):
    begun(tmp_path, "smoke", "sweep")
    said = bash("pagating --install-completion; true", tmp_path)
    assert "bash completion installed in" in said
    assert (tmp_path / ".bash_completions" / "pagating.sh").is_file()

    def completed(*words):
        typed = " ".join(f"'{word}'" for word in words)
        script = f"source ~/.bashrc; COMP_WORDS=(pagating {typed}); COMP_CWORD={len(words)}"
        return bash(f'{script}; _pagating_completion pagating; printf "%s\\n" "${{COMPREPLY[@]}}"', tmp_path).split()

    assert completed("st") == ["status"]
    assert completed("status", "sw") == ["sweep"]


def test_zsh_completes_a_command_and_a_study(tmp_path):
    begun(tmp_path, "smoke", "sweep")

    def completed(typed):
        return bash(f"_PAGATING_COMPLETE=complete_zsh _TYPER_COMPLETE_ARGS='{typed}' pagating", tmp_path)

    assert '"status"' in completed("pagating st")
    assert completed("pagating report s").strip() == """_arguments '*: :(("smoke"\n"sweep"))'"""
    shown = bash("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 pagating --show-completion zsh", tmp_path)
    assert shown.startswith("#compdef pagating")
    assert "_PAGATING_COMPLETE=complete_zsh" in shown
