"""Starting a Ray of one's own, or joining a cluster: quiet, on loopback only, and patient with a busy machine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from analysis.io.names import STAGES
from tune.backend.cluster import ALLOCATOR, connected
from tune.backend.ray_private import LOADED, PRESTART, serve_prestarted
from tune.errors import StudyStopped
from tune.study.sizes import side_by_side
from tune.study.study import Study

OPEN = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's name for: listen on loopback only (0), or to other machines too (1)
GIVES_UP = (ConnectionError, RuntimeError, TimeoutError)
TRIES = 3  # a Ray whose processes do not answer within its own 30 s gives up, however busy the machine is
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    OPEN: "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # start the actors of all slots at once; the stages say how many there are
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "6",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def _private_token() -> None:
    """Give Ray a token of this process where it cannot keep its own under HOME: it would not start."""
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        return
    try:
        kept = Path.home() / ".ray"
        kept.mkdir(exist_ok=True)
        writable = os.access(kept, os.W_OK)
    except (RuntimeError, OSError):  # a user without a home, or with one that is not there or not writable
        writable = False
    if not writable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _loaded(slots: int | None, study: Study) -> dict[str, str]:
    """What Ray is told of workers before any is asked for: that they load what a trial needs, or that there are none.

    One is started for each core, and takes memory: none where a stage would leave one without a trial. On a GPU a
    worker is told its card before anything is loaded.
    """
    used = min(side_by_side(study, stage) for stage in STAGES)
    alike = study.resources.cpus == 1 and not study.resources.gpus
    return LOADED if alike and (slots or os.cpu_count() or 1) <= used else {PRESTART: "0"}


def _start(slots: int | None, study: Study, load: bool) -> None:
    _private_token()
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    told = _loaded(slots, study) if load else {PRESTART: "0"}
    told = {name: value for name, value in told.items() if name not in os.environ}
    os.environ.update(told)
    try:
        _init(slots * study.resources.cpus if slots else None)
    finally:
        for name in told:
            del os.environ[name]  # the next Ray of this process may be told another thing


def _init(cpus: int | None) -> None:
    import ray

    for attempt in range(1, TRIES + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
            )
            return
        except Exception as error:
            ray.shutdown()
            # Ray raises a bare Exception where its processes do not answer; anything more specific is passed on
            if type(error) is not Exception and not isinstance(error, GIVES_UP):
                raise
            if attempt == TRIES:
                said = " ".join(str(error).split())
                raise StudyStopped(f"Ray did not start ({TRIES} attempts; a busy machine?): {said}") from error


def opening() -> str | None:
    """What it means that the Ray of this machine listens to others, where it does: one line."""
    if os.environ.get(OPEN, "0").lower() not in ("1", "true"):
        return None
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        who = "whoever reaches its ports and has Ray's token (~/.ray/auth_token, RAY_AUTH_TOKEN)"
    else:
        who = "whoever reaches its ports, without any token (RAY_AUTH_MODE),"
    return f"{OPEN}={os.environ[OPEN]} lets Ray listen to other machines: {who} can run any code here as you; unset it"


@contextmanager
def started(
    slots: int | None,
    study: Study,
    address: str | None,
    warn: Callable[[str], None] = lambda line: None,
    beside: Callable[[], None] = lambda: None,
    load: bool = False,
) -> Iterator[None]:
    """A Ray on this machine, ended with all its processes; or the cluster of that address; or one that is joined.

    `warn` is told, in a line, where that lets others in. `beside` is called while Ray starts, which for seconds is
    waiting; what it raises is raised here, and ends that Ray. `load`: whether workers load what a trial needs before
    there is one. Raises StudyStopped where Ray does not start.
    """
    left_out = {OPEN} if address else set()
    os.environ.update({name: value for name, value in QUIET.items() if name not in {*os.environ, *left_out}})
    import ray

    if ray.is_initialized():
        beside()
        yield
        return
    if address:
        beside()
        with connected(address, study, warn):
            yield
        return
    if line := opening():
        warn(line)
    try:
        with ThreadPoolExecutor(1) as thread:  # Ray itself in this one: its processes end with the thread they are of
            done = thread.submit(beside)
            _start(slots, study, load)
            done.result()
        if load:
            serve_prestarted()
        yield
    finally:
        ray.shutdown()
