"""Start Ray on this machine, or join a cluster. A local Ray is quiet, listens on loopback only and is retried."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from analysis.io.names import STAGES
from pagating.hardware import usable_cores
from tune.backend.cluster import ALLOCATOR, connected
from tune.backend.preflight import (
    local_slots,
    store_bytes,
    temporary_folder,
)
from tune.backend.ray_private import GUARDED, LOADED, PRESTART, serve_prestarted, shut_down
from tune.backend.ray_watch import announced
from tune.errors import StudyStopped
from tune.study.sizes import side_by_side
from tune.study.study import Study

OPEN = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: listen on loopback only; 1: accept other machines too
GIVES_UP = (ConnectionError, RuntimeError, TimeoutError)  # raised if Ray's processes do not answer
TRIES = 3  # Ray fails if its processes do not answer within 30 s, also on a machine that is only busy
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    OPEN: "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_THRESHOLD_S": "1000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # no limit of Tune's: the stages limit the number of trials
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "6",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def _private_token() -> None:
    """Give Ray a token of this process if it cannot write its own under HOME. Without a token it does not start."""
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        return
    try:
        kept = Path.home() / ".ray"
        kept.mkdir(exist_ok=True)
        writable = os.access(kept, os.W_OK)
    except (RuntimeError, OSError):  # the user has no home, or it does not exist or is not writable
        writable = False
    if not writable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _prestart_settings(slots: int | None, study: Study) -> dict[str, str]:
    """Return Ray's settings for early workers: import a trial's modules early, or start no worker early.

    Ray starts one early worker per core, and each takes memory. So none is started if a stage has fewer trials than
    slots. With GPUs none is started either, because a worker must know its GPU before it imports torch.
    """
    used = min(side_by_side(study, stage) for stage in STAGES)
    alike = study.resources.cpus == 1 and not study.resources.gpus
    return LOADED if alike and (slots or local_slots(study)) <= used else {PRESTART: "0", **GUARDED}


def _start(slots: int | None, study: Study, load: bool, folder: str) -> None:
    _private_token()
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    settings = _prestart_settings(slots, study) if load else {PRESTART: "0", **GUARDED}
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(settings)
    try:
        _init((slots or local_slots(study)) * study.resources.cpus, folder)
    finally:
        for name in settings:
            del os.environ[name]  # the next Ray of this process may need other settings


def _init(cpus: int, folder: str) -> None:
    import ray

    for attempt in range(1, TRIES + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=store_bytes(),
                _temp_dir=folder,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
            )
            return
        except Exception as error:
            shut_down()
            cause = " ".join(str(error).split()) or type(error).__name__
            # Ray raises a bare Exception if its processes do not answer; another attempt changes no other error
            if type(error) is not Exception and not isinstance(error, GIVES_UP):
                raise StudyStopped(f"Ray did not start: {type(error).__name__}: {cause}{own_settings()}") from error
            if attempt == TRIES:
                raise StudyStopped(
                    f"Ray did not start ({TRIES} attempts; a busy machine?): {cause}{own_settings()}"
                ) from error


def own_settings() -> str:
    """Return a note that names the user's own settings of Ray, which may be the cause, or an empty text."""
    ours = {*QUIET, *LOADED, *GUARDED, PRESTART, "RAY_AUTH_TOKEN"}
    own = sorted(name for name in os.environ if name.startswith("RAY_") and name not in ours)
    return f"; set in the environment: {', '.join(own)}" if own else ""


def open_warning() -> str | None:
    """Return a line that warns that the Ray of this machine listens to other machines, or None if it does not."""
    if os.environ.get(OPEN, "0").lower() not in ("1", "true"):
        return None
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        who = "anyone who reaches its ports and has Ray's token (~/.ray/auth_token, RAY_AUTH_TOKEN)"
    else:
        who = "anyone who reaches its ports, without any token (RAY_AUTH_MODE),"
    return f"{OPEN}={os.environ[OPEN]} lets Ray listen to other machines: {who} can run any code here as you; unset it"


@contextmanager
def started(
    slots: int | None,
    study: Study,
    address: str | None,
    warn: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
    beside: Callable[[], None] = lambda: None,
    load: bool = False,
) -> Iterator[None]:
    """Start Ray on this machine or join the cluster at `address`; at exit stop Ray or leave the cluster.

    If this process has already joined a Ray, that one is used and stays.

    Args:
        slots: Number of trials that run in parallel. None means as many as fit on the cores.
        study: The study.
        address: Address of the cluster. None starts Ray on this machine.
        warn: Called with one line if other users can reach this Ray.
        say: Called with a line if the start takes long, and at its end.
        beside: Called while Ray starts, which is seconds of waiting. An error that it raises stops that Ray.
        load: Let workers import a trial's modules before the first trial.

    Raises:
        StudyStopped: Ray did not start.
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
        with connected(address, study, warn, say):
            yield
        return
    if line := open_warning():
        warn(line)
    try:
        with ThreadPoolExecutor(1) as thread:  # for `beside`: Ray's processes end with the thread that starts them
            done = thread.submit(beside)
            line = f"Ray is starting, which takes longer on a busy machine; it may use {usable_cores():g} cores here."
            with announced(say, line, "Ray has started"):
                _start(slots, study, load, temporary_folder(warn))
            done.result()
        if load:
            serve_prestarted()
        yield
    finally:
        shut_down()
