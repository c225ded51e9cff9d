"""Share what every analysis script does: parse options, read the table, print the result, exit."""

import argparse
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any, NoReturn

from analysis.io import formats
from analysis.io.exits import Exit
from analysis.io.mlflow import load_mlflow
from analysis.io.study import CORRECTIONS, Study, TableError, load
from analysis.io.text import one_line, redact


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        # argparse would also print its usage
        self.exit(Exit.BAD_INPUT, f"{self.prog}: {one_line(redact(message))}\n")


def parser(prog: str, description: str | None, many: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options of every script, for `study` or `studies`.

    Args:
        prog: The command as the user types it, for usage lines and errors.
        description: Help text; its first line is shown.
        many: True if --study may be given several times.
    """
    p = Parser(prog=prog, description=(description or "").split("\n")[0])
    p.add_argument(
        "source", nargs="?", metavar="STUDY|CSV", help="a study folder, or a table of arm, seed and one loss"
    )
    p.add_argument("--mlflow", metavar="URI", help="read from this MLflow store instead (with --study)")
    p.add_argument(
        "--study",
        metavar="NAME",
        action="append" if many else "store",
        help="a study folder; with --mlflow: a study, its parent run's id, or an experiment",
    )
    p.add_argument("--baseline", help="the arm to compare with (a study folder names its own)")
    p.add_argument("--floor", help="the control arm that must lose")
    p.add_argument("--metric", help="the loss column (default: test_nll if there is one, else val_nll)")
    p.add_argument("--level", type=float, help="level of the tests, for a CSV (default 0.05)")
    p.add_argument("--margin", help="margin of TOST, for a CSV: nats, or a percentage (default 0.5%%)")
    p.add_argument("--correction", choices=CORRECTIONS, help="for a CSV (default holm)")
    p.add_argument("--format", choices=formats.FORMATS, default="terminal")
    return p


def study(options: argparse.Namespace) -> Study:
    """Load the study that the options name; raise TableError if the options or the tables are wrong."""
    if options.mlflow is not None:
        if options.study is None or options.source is not None:
            raise TableError("--mlflow URI; allowed: with --study NAME and no folder or CSV")
        named = {key: getattr(options, key) for key in ("baseline", "floor", "metric")}
        return load_mlflow(options.mlflow, options.study, **named)
    source = options.source if options.study is None else options.study
    if source is None:
        raise TableError("no source; allowed: a study folder, a CSV, or --mlflow URI --study NAME")
    if options.source is not None and options.study is not None:
        raise TableError(f"two sources, {options.source} and --study {options.study}; allowed: one")
    names = ("baseline", "floor", "metric", "level", "margin", "correction")
    return load(source, **{name: getattr(options, name) for name in names})


def studies(options: argparse.Namespace) -> list[Study]:
    """Load the studies that the options name, in their order; return none if none is named.

    Raises TableError as `study` does, or if two studies have the same name.
    """
    named = options.study or [None]
    if options.source is None and options.mlflow is None and named == [None]:
        return []
    if options.source is not None and options.study and options.mlflow is None:
        options, named = argparse.Namespace(**{**vars(options), "source": None}), [options.source, *options.study]
    found = [study(argparse.Namespace(**{**vars(options), "study": name})) for name in named]
    names = [each.name for each in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TableError(f"two studies are called {twice[0]!r}; allowed: studies of different names")
    return found


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script's main and exit with its code; bad input is one line and 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # do not fail on a terminal that cannot show a character
    try:
        code: int = main()
        sys.stdout.flush()
    except TableError as error:
        print(one_line(redact(str(error))), file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # the reader (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.DONE
    sys.exit(code)


def nothing_to_show(reason: str) -> Exit:
    """Print on standard error why a table has no rows; return the exit code, which is 0."""
    print(f"nothing to show: {one_line(reason)}", file=sys.stderr)
    return Exit.DONE


def emit_rows(rows: list[dict[str, Any]], columns: dict[str, Any], kind: str, *, title: str = "") -> None:
    """Print rows in one format.

    Args:
        rows: The rows; JSON shows all their keys.
        columns: Columns of the other formats.
        kind: One of `formats.FORMATS`.
        title: Heading on the terminal.
    """
    if kind == "json":
        print(formats.to_json(rows))
    elif kind == "terminal":
        formats.print_table(formats.table(rows, columns, title))
    else:
        print({"csv": formats.to_csv, "markdown": formats.to_markdown, "latex": formats.to_latex}[kind](rows, columns))
