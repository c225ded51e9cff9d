"""The command `pagating`. The commands import heavy libraries when they run, so that --help is instant."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated, Any

import typer

import pagating
from analysis.io.exits import Exit, drop_output, prepare_streams
from tune.cli import ahead, cells, export, folders, studies, sweep, ui
from tune.cli.analyses import ANALYSES, Forwarded, forwarded, train_module
from tune.cli.common import INTERRUPTED, missing_hint

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)
USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[2]  # ClickException of click, or of typer's copy of click
BAD_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
HELP_WIDTH = 80
TRAIN = "Run the trial of a JSON file, as printed by `pagating trial`, without Ray."

# in the order of --help: name, function, examples
COMMANDS: list[tuple[str, Any, list[str]]] = [
    (
        "sweep",
        sweep.sweep,
        ["sweep configs/sweep.yaml", "sweep my.yaml --slots 4", "sweep my.yaml --address 10.0.0.7:6379"],
    ),
    ("plan", ahead.plan, ["plan configs/laptop.yaml", "plan my.yaml --hours-from a100 --noise studies/sweep"]),
    ("check", ahead.check, ["check docs/examples/numpy_command.yaml", "check my.yaml --share 0.02"]),
    ("try", ahead.try_, ["try configs/published/fair.yaml", "try my.yaml --steps 10 --arm gelu"]),
    ("ls", folders.ls, ["ls", "ls docs/results", "ls --json"]),
    ("status", studies.status, ["status sweep", "status sweep --output ~/studies"]),
    ("report", studies.report, ["report sweep", "report sweep laptop", "report sweep --require-verdict"]),
    ("ui", ui.ui, ["ui", "ui --port 5001"]),
    ("dashboard", ui.dashboard, ["dashboard sweep", "dashboard --port 8081"]),
    ("trial", studies.trial, ["trial sweep", "trial sweep confirm/gelu/0123456789ab/101 > trial.json"]),
    ("cells", cells.cells, ["cells my.yaml", "cells my.yaml --into /shared/cells --limit 64"]),
    ("take", cells.take, ["take my.yaml studies/my/cells", "take my /shared/cells"]),
    ("sync", studies.sync, ["sync sweep", "sync sweep --tracking http://127.0.0.1:5000"]),
    ("repair", studies.repair, ["repair sweep"]),
    ("export", export.export, ["export sweep gelu --to onnx", "export sweep paglu --to hf --into my-model"]),
    ("rm", folders.rm, ["rm sweep", "rm old older --yes"]),
]

for name, function, examples in COMMANDS:
    lines = ["Example:" if len(examples) == 1 else "Examples:", *(f"pagating {example}" for example in examples)]
    app.command(name=name, epilog="\n\n".join(lines))(function)
app.command(name="train", cls=Forwarded)(forwarded("train", train_module, TRAIN))
for name, module, text in ANALYSES:
    app.command(name=name, cls=Forwarded, rich_help_panel="Tables")(forwarded(name, module, text))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pagating {pagating.__version__}")
        raise typer.Exit


@app.callback()
def pagating_(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Does an idea beat an equally tuned baseline, and how sure can you be?"""


def _to_utf8() -> None:
    """Start this command again in Python's UTF-8 mode if the locale has another encoding, such as C with ASCII.

    Libraries write paths and files in UTF-8, whatever the locale says. The output keeps the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode:
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{getattr(sys.stdout, 'encoding', None) or 'ascii'}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Run `pagating`. Bad input is one line on standard error and exit code 2. Without a command it shows the help."""
    _to_utf8()
    prepare_streams()
    if shutil.get_terminal_size().columns > HELP_WIDTH:
        os.environ.setdefault("TERMINAL_WIDTH", str(HELP_WIDTH))  # typer's limit for the width of --help
    words = sys.argv[1:]
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    try:
        here = os.getcwd()
    except FileNotFoundError:
        sys.exit(_bad_input("the working directory was removed; change to one that exists"))
    for word in (*words, here):
        if not word.isprintable() and word != word.encode("utf-8", "replace").decode("utf-8"):
            sys.exit(_bad_input(f"{os.fsencode(word)!r}: not UTF-8; rename the file or folder"))
    try:
        code = app(words, standalone_mode=False, prog_name="pagating")
        sys.stdout.flush()
    except typer.Abort:
        code = INTERRUPTED
    except USAGE_ERROR as error:
        if not error.format_message():
            error.show()
            sys.exit(Exit.BAD_INPUT)
        code = _bad_input(error.format_message() + missing_hint(error))
    except BrokenPipeError:  # the reader (head, less) has gone
        drop_output()
        code = Exit.DONE
    except BAD_PATH as error:
        reason = "is a file where a folder belongs" if isinstance(error, FileExistsError) else error.strerror
        code = _bad_input(f"{error.filename2 or error.filename}: {reason}")
    except RuntimeError as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 wraps one that strikes `__set_name__`
            raise
        code = INTERRUPTED
    except ValueError as error:
        if not hasattr(error, "exit_code"):
            raise
        _bad_input(str(error))
        code = error.exit_code
    except OSError as error:
        _bad_input(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
        drop_output()
        code = Exit.COULD_NOT
    sys.exit(code or Exit.DONE)


def _bad_input(message: str) -> int:
    from analysis.io.text import one_line, redact

    print(f"pagating: {one_line(redact(message))}", file=sys.stderr)
    return Exit.BAD_INPUT
