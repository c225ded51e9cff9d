"""Share what every analysis script does: parse options, read the table, print the result, exit."""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NoReturn

from analysis.io import formats
from analysis.io.assemble import CORRECTIONS, Study
from analysis.io.exits import Exit, drop_output, prepare_streams
from analysis.io.files import TableError
from analysis.io.mlflow import load_mlflow
from analysis.io.study import load, located, one_rung, together
from analysis.io.tables.columns import Options
from analysis.io.text import one_line, redact


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        # argparse would also print its usage
        self.exit(Exit.BAD_INPUT, f"{self.prog}: {one_line(redact(message))}\n")


def parser(
    prog: str, description: str | None, many: bool = False, tables: bool = True, sources: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options of every script, for `study`, `studies` or `ladder`.

    Args:
        prog: The command as the user types it, for usage lines and errors.
        description: Help text; its first line is shown.
        many: True if --study may be given several times.
        tables: True if the script reads tables from elsewhere too.
        sources: True if several sources may be given.
    """
    p = Parser(prog=prog, description=(description or "").split("\n")[0])
    p.add_argument(
        "source",
        nargs="*" if sources else "?",
        metavar="STUDY|TABLE",
        help="a study folder, the name of one in studies, or a table of runs (- for stdin)",
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
    p.add_argument("--metric", help="the metric's column (default: test_nll if there is one, else val_nll)")
    if sources:  # several sources are the rungs themselves
        p.set_defaults(rung=None)
    else:
        p.add_argument("--rung", type=int, metavar="N", help="of a ladder: this rung alone")
    p.add_argument("--format", choices=formats.FORMATS, default="terminal")
    p.set_defaults(tables=tables)
    if not tables:
        p.set_defaults(level=None, margin=None, correction=None)
        return p
    t = p.add_argument_group("for a table (docs/tables.md)")
    t.add_argument("--level", type=float, help="level of the tests (default 0.05)")
    t.add_argument("--margin", help="margin of TOST: in the metric's unit, or a percentage (default 0.5%%)")
    t.add_argument("--correction", choices=CORRECTIONS, help="for several arms and tasks (default holm)")
    way = t.add_mutually_exclusive_group()
    way.add_argument("--higher-is-better", action="store_true", default=None, help="the metric is no loss")
    way.add_argument("--lower-is-better", action="store_false", dest="higher_is_better", default=None)
    t.add_argument("--unpaired", action="store_true", help="runs are no pairs: Welch's test instead of the paired one")
    t.add_argument(
        "--resampled",
        type=float,
        metavar="SHARE",
        help="seeds split one data set, with this share of it in the test set: a corrected variance",
    )
    for role in ("arm", "seed", "task", "step"):
        t.add_argument(f"--{role}", metavar="COLUMN", help=f"the column of the {role} (default: {role})")
    t.add_argument("--size", metavar="COLUMN", help="the column of model sizes or compute: a ladder of the rows")
    t.add_argument("--wide", metavar="ARM,ARM", help="these columns are arms")
    t.add_argument("--unit", metavar="UNIT", help="unit of the metric; nats gives a perplexity too")
    t.add_argument("--decimal", choices=(".", ","), help="decimal sign of the numbers")
    t.add_argument("--sheet", metavar="NAME", help="sheet of a spreadsheet")
    return p


def study(options: argparse.Namespace, every_rung: bool = False) -> Study:
    """Load the study that the options name; raise TableError if the options or the tables are wrong.

    Of a ladder it is the study of one rung. A note says which, unless the caller shows every rung.
    """
    found = _study(options)
    if found.ladder and not every_rung:
        say([f"{found.name} is a ladder, and this is its rung {found.rung} of {found.ladder.planned} (--rung N)"])
    return found


def _study(options: argparse.Namespace) -> Study:
    if options.mlflow is not None:
        if options.study is None or options.source is not None:
            raise TableError("--mlflow URI; allowed: with --study NAME and no folder or table")
        named = {key: getattr(options, key) for key in ("baseline", "floor", "metric")}
        if (of_table := _of_table(options)) != Options():
            raise TableError(f"{of_table.named()} is an option of tables; allowed: --mlflow without it")
        found = load_mlflow(options.mlflow, options.study, **named)
        return found if options.rung is None else one_rung(options.study, found, options.rung)
    source = options.source if options.study is None else options.study
    if source is None:
        raise TableError("no source; allowed: a study folder, a table, or --mlflow URI --study NAME")
    if options.source is not None and options.study is not None:
        raise TableError(f"two sources, {options.source} and --study {options.study}; allowed: one")
    names = ("baseline", "floor", "metric", "level", "margin", "correction", "rung")
    return load(located(source), options=_of_table(options), **{name: getattr(options, name) for name in names})


def _of_table(options: argparse.Namespace) -> Options:
    return Options(**{f.name: getattr(options, f.name) for f in fields(Options)}) if options.tables else Options()


def ladder(options: argparse.Namespace) -> Study:
    """Load the ladder that the options name: the folder of one, a table with sizes, or a folder for each size.

    Raises TableError as `study` does, if the source has one size, or if the studies do not fit together.
    """
    given = options.source
    if len(given) > 1 and (options.study or options.mlflow or options.rung):
        raise TableError("several sources; allowed: without --study, --mlflow and --rung")
    if len(given) > 1:
        return together([_study(argparse.Namespace(**{**vars(options), "source": each})) for each in given])
    found = study(argparse.Namespace(**{**vars(options), "source": next(iter(given), None)}), every_rung=True)
    if found.ladder is None:
        raise TableError(
            f"{found.folder or found.name}: has one size; allowed: the folder of a study with `scales`, several study "
            "folders, or a table with --size COLUMN"
        )
    return found


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
    prepare_streams()
    try:
        code: int = main()
        sys.stdout.flush()
    except TableError as error:
        print(one_line(redact(str(error))), file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # the reader (head, less) has gone
        drop_output()
        code = Exit.DONE
    except OSError as error:  # the disk below the output is full
        print(one_line(str(error)), file=sys.stderr)
        drop_output()
        code = Exit.COULD_NOT
    sys.exit(code)


def nothing_to_show(reason: str) -> Exit:
    """Print on standard error why a table has no rows; return the exit code, which is 0."""
    print(f"nothing to show: {one_line(reason)}", file=sys.stderr)
    return Exit.DONE


def say(notes: Iterable[str]) -> None:
    """Print notes on standard error, one line each."""
    for note in notes:
        print(f"note: {one_line(note)}", file=sys.stderr)


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
