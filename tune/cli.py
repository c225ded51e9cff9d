"""The command `pagating`. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Does an activation beat an equally tuned baseline, and how sure can you be?",
)
LOOPBACK = "127.0.0.1"
USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[2]  # ClickException, of click or of the copy that typer carries
BAD_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
MACHINE = ("StudyStopped", "TrackingError")  # the study's files are well, the machine is not
DONE, UNDECIDED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

Config = Annotated[Path, typer.Argument(help="The study file, such as configs/sweep.yaml.")]
Output = Annotated[Path, typer.Option(help="The folder of studies.")]
Name = Annotated[str, typer.Argument(help="Name of a study, or its folder.")]


def _folder(name: str, output: Path) -> Path:
    from tune.study import StudyError

    for folder in (Path(name), output / name):
        if os.path.isfile(folder / "study.yaml"):  # False also for a name that no file could have
            return folder
    raise StudyError(f"{name}: no study of that name in {output} and no folder with a study.yaml")


@app.command()
def sweep(
    config: Config,
    output: Output = Path("studies"),
    slots: Annotated[
        int | None, typer.Option(min=1, help="Trials side by side; as many as cores when not given.")
    ] = None,
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI, or 'none'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only continue: refuse a study that was not begun.")] = False,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster's address: auto, HOST:PORT or ray://HOST:PORT.")
    ] = None,
) -> None:
    """Run a study, or what is missing of it, and report the verdict.

    Safe to interrupt: the same command continues where it stopped. Example: pagating sweep configs/sweep.yaml
    """
    from tune.interrupt import Interruption
    from tune.mlflow_runs import default_uri
    from tune.study import StudyError, check_tracking, load

    study = load(config)
    if resume and not (output / study.name / "study.yaml").is_file():
        raise StudyError(f"{output / study.name}: no study was begun here; leave --resume out to begin it")
    uri = check_tracking(tracking or study.tracking or default_uri(output), "tracking")
    typer.echo(f"{study.name}: {study.question}")
    with Interruption(lambda line: typer.echo(line, err=True)) as interruption:
        try:
            code = _run(study, config.parent, output, slots, uri, interruption, address)
        except KeyboardInterrupt:  # while nothing was being trained
            code = None
    if code is None:
        typer.echo("Interrupted. What has ended is kept; the same command continues from there.", err=True)
        sys.stdout.flush()
        os._exit(interruption.exit_code)  # nothing is left to be done; the libraries' own ends take seconds
    raise typer.Exit(code)


def _run(
    study: Any, base: Path, output: Path, slots: int | None, uri: str, interruption: Any, address: str | None
) -> int | None:
    """Run a study and report it; its exit code, None where it was interrupted."""
    from tune import runner
    from tune.study import check_address
    from tune.tracking import finish

    tracking_uri = None if uri == "none" else uri
    run = runner.sweep(
        study,
        base,
        output,
        slots=slots,
        tracking_uri=tracking_uri,
        listen=_say,
        interruption=interruption,
        warn=lambda line: typer.echo(f"Warning: {line}", err=True),
        address=check_address(address) if address else None,
    )
    if not run.stages.finished:
        return None
    if run.stages.hopeless:
        reason = next(record.reason for record in run.records.values() if record.reason)
        typer.echo(
            f"No search trial could be trained, so there is nothing to compare. The first said: {reason}", err=True
        )
        return UNDECIDED
    verdict = _report(run.folder)
    if run.tracker and (owed := finish(run.tracker, verdict)):
        typer.echo(owed, err=True)
    typer.echo(f"Report:  {run.folder / 'report.html'}")
    typer.echo(f"Browse the trials: {_ui_command(uri)}" if tracking_uri else "The trials were not sent to MLflow.")
    return DONE if _concluded(verdict) else UNDECIDED


def _say(progress: Any) -> None:
    cell = progress.cell
    alpha = f" alpha={cell.config['alpha']:.2f}" if "alpha" in cell.config else ""
    left = f", about {progress.seconds_left / 60:.0f} min left" if progress.seconds_left > 60 else ""
    loss = f"val_nll {progress.loss:.4f}" if progress.loss < float("inf") else "no loss"
    outcome = "" if progress.outcome == "completed" else f", {progress.outcome.replace('_', ' ')}"
    what = f"{cell.stage} {cell.arm} lr={cell.config['lr']:.1e}{alpha} seed={cell.seed}"
    typer.echo(f"[{progress.ended}/{progress.total}] {what}: {loss}{outcome}{left}")


def _report(folder: Path) -> dict[str, Any]:
    from rich.console import Console

    from analysis import report as reports

    reports.build(folder)
    verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    Console().print(reports.terminal_table(verdict))
    return verdict


def _concluded(verdict: dict[str, Any]) -> bool:
    rows = [row for row in verdict["comparisons"] if row["arm"] != (verdict["sensitivity"] or {}).get("floor")]
    return not all(row["verdict"].startswith(("not testable", "undecided")) for row in rows)


def _ui_command(uri: str) -> str:
    from analysis.safe_text import redact

    own = f"sqlite:///{Path('mlflow.db').resolve()}"
    return "make ui" if uri == own else f"mlflow ui --backend-store-uri {redact(uri)}"


@app.command()
def plan(
    config: Config,
    output: Output = Path("studies"),
    slots: Annotated[
        int | None, typer.Option(min=1, help="Trials side by side; as many as cores when not given.")
    ] = None,
    hours_from: Annotated[
        str, typer.Option(help="'measure' (10 s of training here), or a device such as a100.")
    ] = "measure",
    utilisation: Annotated[float, typer.Option(help="Share of a named device's peak that is assumed.")] = 0.3,
    effect: Annotated[str, typer.Option(help="Difference to be seen, a percentage of the baseline's loss.")] = "0.5%",
    noise: Annotated[
        str | None, typer.Option(help="An earlier study, or a percentage: sd of paired differences.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """What a study will cost, before it runs: cells, tokens, FLOPs, hours, disk, memory, and the power it will have.

    Writes nothing but the shared token cache. Example: pagating plan configs/sweep.yaml
    """
    from tune import plan as plans

    text = plans.run(
        config,
        output,
        slots=slots,
        hours_from=hours_from,
        utilisation=utilisation,
        effect=effect,
        noise=noise,
        form=form,
    )
    typer.echo(text)


@app.command(name="try")
def try_(
    config: Config,
    output: Output = Path("studies"),
    steps: Annotated[int, typer.Option(min=1, help="Updates of each arm.")] = 3,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be given several times.")] = None,
) -> None:
    """Train a few steps of every arm at its real size: loss, memory, seconds a step. Writes only the token cache.

    Example: pagating try configs/published/fair.yaml
    """
    from tune import dry_run
    from tune.study import load

    failed = False
    for tried in dry_run.try_arms(load(config), config.parent, output, steps, arm or ()):
        failed |= not isinstance(tried, str) and tried.problem is not None
        typer.echo(dry_run.line(tried))
    raise typer.Exit(UNDECIDED if failed else DONE)


@app.command()
def report(study: Name, output: Output = Path("studies")) -> None:
    """Rebuild tables, verdict and report of a study from its ledger. Example: pagating report sweep"""
    from tune import ledger
    from tune.study import load

    folder = _folder(study, output)
    ledger.write_tables(load(folder / "study.yaml").name, ledger.read(folder / "ledger.jsonl"), folder)
    _report(folder)
    typer.echo(f"Report:  {folder / 'report.html'}")


@app.command()
def sync(
    study: Name,
    output: Output = Path("studies"),
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI.")] = None,
) -> None:
    """Fill MLflow from a study's ledger: what it missed, or all of it. Example: pagating sync sweep"""
    from analysis.safe_text import redact
    from tune import tracking as trackings
    from tune.mlflow_runs import default_uri
    from tune.study import StudyError, check_tracking, load

    folder = _folder(study, output)
    loaded = load(folder / "study.yaml")
    uri = check_tracking(tracking or loaded.tracking or default_uri(folder.parent), "tracking")
    if uri == "none":
        raise StudyError("tracking 'none': there is nothing to fill; name a store with --tracking")
    cells, written = trackings.sync(uri, loaded, folder)
    typer.echo(f"MLflow at {redact(uri)} has all {cells} cells of {loaded.name}; {written} were written now.")


@app.command()
def repair(study: Name, output: Output = Path("studies")) -> None:
    """Keep the undamaged lines of a damaged ledger; what the others held is trained again by the next sweep.

    The damaged file is kept beside it. Example: pagating repair sweep
    """
    from tune import repair as repairs
    from tune.study import load

    folder = _folder(study, output)
    typer.echo(repairs.repair(load(folder / "study.yaml"), folder))


@app.command()
def status(study: Name, output: Output = Path("studies")) -> None:
    """Where a study stands, also while it runs. Example: pagating status sweep"""
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from tune import ledger

    folder = _folder(study, output)
    found = ledger.records(ledger.read(folder / "ledger.jsonl")).values()
    table = Table(title=f"{folder.name}: cells")
    outcomes = ["running", *ledger.OUTCOMES]
    for column in ("stage", "arm", *(name.replace("_", " ") for name in outcomes), "best val_nll"):
        table.add_column(column, justify="left" if column in ("stage", "arm") else "right")
    for stage, arm in dict.fromkeys((record.cell.stage, record.cell.arm) for record in found):
        mine = [record for record in found if (record.cell.stage, record.cell.arm) == (stage, arm)]
        counts = Counter(record.outcome or "running" for record in mine)
        losses = [record.final["val_nll"] for record in mine if record.outcome == "completed"]
        best = f"{min(losses):.4f}" if losses else ""
        table.add_row(stage, arm, *(str(counts[outcome]) for outcome in outcomes), best)
    Console().print(table)


@app.command()
def trial(
    study: Name,
    cell: Annotated[str | None, typer.Argument(help="Key of a cell; without it the cells are listed.")] = None,
    output: Output = Path("studies"),
) -> None:
    """Print one cell as the trial.json that `python -m pagating.train` runs without Ray.

    Example: pagating trial sweep confirm/gelu/0123456789ab/101 > trial.json
    """
    from tune import ledger, runner
    from tune.own_gates import place_gate
    from tune.study import StudyError, load, trial_spec
    from tune.weights import place_weights

    folder = _folder(study, output)
    found = ledger.records(ledger.read(folder / "ledger.jsonl"))
    if cell is None:
        for key, record in found.items():
            typer.echo(f"{key}\t{record.outcome or 'running'}\t{record.final.get('val_nll', '')}")
        return
    if cell not in found:
        raise StudyError(f"{folder}: no cell '{cell}'; `pagating trial {study}` lists them")
    loaded, mine = load(folder / "study.yaml"), found[cell].cell
    corpus = runner.begun_corpus(loaded, folder)
    spec = trial_spec(loaded, mine.arm, mine.config, mine.seed, corpus, test=loaded.tests(mine.stage))
    typer.echo(json.dumps(place_weights(place_gate(spec, folder), folder), indent=1))


@app.command()
def ui(
    output: Output = Path("studies"),
    tracking: Annotated[str | None, typer.Option(help="MLflow tracking URI.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback lets others in.")] = LOOPBACK,
) -> None:
    """Open the MLflow UI on what was logged, on this machine's loopback address only. Example: pagating ui"""
    from ipaddress import ip_address

    from tune.mlflow_runs import default_uri
    from tune.study import StudyError, check_tracking

    uri = check_tracking(tracking or default_uri(output), "tracking")
    if uri == "none":
        raise StudyError("tracking 'none': nothing is logged there; allowed: the tracking URI of a sweep")
    try:
        open_to_others = host != "localhost" and not ip_address(host).is_loopback
    except ValueError:
        raise StudyError(f"--host '{host}': allowed: localhost or an IP address of this machine") from None
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise StudyError(f"{uri}: nothing was logged here yet; run a sweep first")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    shown = f"[{host}]" if ":" in host else host
    page = f"http://{shown}:{port}/#/experiments?workflowType=machine_learning"  # else it opens on pages for agents
    typer.echo(f"MLflow UI: {page} (Ctrl-C ends it)")
    if open_to_others:
        typer.echo(
            f"Warning: with --host {host} whoever reaches port {port} of this machine can read, change and delete all "
            "that was logged, without a password. To look from another machine, keep the default and use: "
            f"ssh -L {port}:{LOOPBACK}:{port} THIS_MACHINE",
            err=True,
        )
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not an argument: a list of processes would show its password
    server = [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, server)


def main() -> None:
    """Entry point: bad input is one line on standard error and exit code 2; no command at all shows the help."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter is no reason to fail
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = INTERRUPTED
    except USAGE_ERROR as error:
        if not error.format_message():
            error.show()
            sys.exit(BAD_INPUT)
        code = _bad_input(error.format_message())
    except BAD_PATH as error:
        code = _bad_input(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        if type(error).__name__ not in ("StudyError", "CorpusError", "LedgerError", "TableError", *MACHINE):
            raise
        code = _bad_input(str(error))
        code = UNDECIDED if type(error).__name__ in MACHINE else code
    except OSError as error:
        _bad_input(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        code = UNDECIDED
    sys.exit(code or DONE)


def _bad_input(message: str) -> int:
    from analysis.safe_text import one_line, redact

    print(f"pagating: {one_line(redact(message))}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    main()
