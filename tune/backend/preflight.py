"""Check before Ray starts that this machine can run it: resources, limits, network and temporary folder.

Without these checks Ray waits for minutes, and then does not name the cause.
"""

from __future__ import annotations

import math
import os
import resource
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from analysis.io.text import readable
from pagating.hardware import process_limit, usable_cores
from tune.backend.ray_private import gpus_of_this_machine
from tune.errors import StudyError, StudyStopped
from tune.study.study import Study

INLINE = "--inline trains without Ray"
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # longest path of a socket
SESSION_BYTES = len("/session_2026-11-27_06-30-00_123456_4194304/sockets/plasma_store")
FREE_BYTES = 64 << 20  # least room in the folder of Ray's files
STORE_BYTES = 256 << 20  # size of Ray's object store if a limit leaves no room for Ray's default; a study needs less


# --- resources -------------------------------------------------------------------------------------------------------


def local_slots(study: Study) -> int:
    """Return the number of trials that run in parallel on this machine: as many as fit on the usable cores."""
    return max(1, int(usable_cores() // study.resources.cpus))


def check_granted(study: Study, slots: int | None) -> None:
    """Raise StudyError if this machine can never run a trial of the study.

    Args:
        study: The study.
        slots: The user's number of slots, which lets trials share cores. None means as many as fit on the cores.
    """
    wanted, cores = study.resources, usable_cores()
    if slots is None and wanted.cpus > max(1.0, cores):
        raise StudyError(
            f"resources.cpus: a trial asks for {wanted.cpus} cores, and this machine has {cores:g}: lower it, give "
            "--slots 1 to let the threads of a trial share the cores, or --address of a cluster"
        )
    if wanted.gpus > (found := gpus_of_this_machine() if wanted.gpus else 0):
        raise StudyError(
            f"resources.gpus: a trial asks for {wanted.gpus:g}, and Ray sees {found or 'no'} GPUs on this machine"
            f"{hidden_gpus()}: lower it, or give --address of a cluster"
        )


def hidden_gpus() -> str:
    """Return a note if the environment hides GPUs from programs, else an empty text."""
    name = "CUDA_VISIBLE_DEVICES"
    return f" ({name}='{os.environ[name]}')" if name in os.environ else ""


# --- limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """A limit of the shell (`ulimit`) that Ray needs to be higher.

    Attributes:
        kind: Constant of the module `resource`.
        option: Option of `ulimit`.
        unit: Bytes or numbers per unit of `ulimit`.
        what: The thing that is limited.
        least: Least value for a number of slots, in bytes or numbers.
        used: Function that returns how much of it is used already. None means that only this process counts.
    """

    kind: int
    option: str
    unit: int
    what: str
    least: Callable[[int], int]
    used: Callable[[], int] | None = None


def _threads_of_user() -> int:
    """Return the number of threads of all processes of this user."""
    found = 0
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid():
                found += process.num_threads()
        except psutil.Error:
            continue  # it has ended
    return found


def _threads(slots: int) -> int:
    """Return the threads and processes of Ray and its workers, measured with Ray 2.60 and rounded up."""
    return 180 + 40 * slots


LIMITS = (
    Limit(resource.RLIMIT_NOFILE, "-n", 1, "open files", lambda slots: 256 + 16 * slots),
    Limit(resource.RLIMIT_AS, "-v", 1 << 10, "memory addresses per process", lambda slots: (4 << 30) + STORE_BYTES),
    Limit(resource.RLIMIT_DATA, "-d", 1 << 10, "memory per process", lambda slots: 4 << 30),
    Limit(resource.RLIMIT_FSIZE, "-f", 1 << 10, "the size of a file", lambda slots: 2 * STORE_BYTES),
    Limit(resource.RLIMIT_NPROC, "-u", 1, "processes and threads", _threads, _threads_of_user),
)


def check_limits(slots: int) -> None:
    """Raise soft limits that are too low for Ray, if the hard limits allow it.

    Raises:
        StudyStopped: A limit stays too low.
    """
    for limit in LIMITS:
        if limit.kind == resource.RLIMIT_NPROC and os.geteuid() == 0:
            continue  # the kernel does not apply it to root
        soft, hard = resource.getrlimit(limit.kind)
        if soft == resource.RLIM_INFINITY or soft >= 1 << 40:
            continue
        least = limit.least(slots) + (limit.used() if limit.used else 0)
        if soft >= least:
            continue
        if hard == resource.RLIM_INFINITY or hard >= least:
            resource.setrlimit(limit.kind, (least, hard))
            continue
        value, needed = (math.ceil(number / limit.unit) for number in (hard, least))
        raise StudyStopped(
            f"ulimit {limit.option} {value}: Ray cannot start with this limit on {limit.what}; it needs about {needed} "
            f"for {slots} slots: raise the limit, or {INLINE}"
        )
    left = process_limit()
    if left is not None and left < _threads(slots):
        raise StudyStopped(
            f"the control group (a container's --pids-limit) allows {left} more processes and threads, and Ray needs "
            f"about {_threads(slots)} for {slots} slots: raise the limit, or {INLINE}"
        )


def store_bytes() -> int | None:
    """Return a small size for Ray's object store if a limit may forbid Ray's default size, else None."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE))
    return STORE_BYTES if any(soft != resource.RLIM_INFINITY and soft < 1 << 40 for soft in limits) else None


# --- network ---------------------------------------------------------------------------------------------------------


def check_loopback() -> None:
    """Raise StudyStopped if this machine cannot connect to itself, as Ray's processes do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5.0):
            pass
    except OSError as error:
        raise StudyStopped(
            f"no connection to 127.0.0.1 ({error.strerror or error}): Ray's processes talk over the loopback network, "
            f"which is down here; bring it up (ip link set lo up), or {INLINE}"
        ) from error


# --- temporary folder ------------------------------------------------------------------------------------------------


def temporary_folder(warn: Callable[[str], None]) -> str:
    """Return the folder for Ray's files, as Ray chooses it if that is good: in `RAY_TMPDIR`, else `TMPDIR`, else /tmp.

    Args:
        warn: Called with one line if the user's folder cannot be used.

    Raises:
        StudyStopped: No folder can be used.
    """
    names = ("RAY_TMPDIR",) if sys.platform == "darwin" else ("RAY_TMPDIR", "TMPDIR")
    name = next((name for name in names if os.environ.get(name)), None)
    own = Path(os.environ[name] if name else "/tmp").absolute()
    problem = unfit(own / "ray")
    if problem is None:
        return str(own / "ray")
    label = f"{name}={os.environ[name]}" if name else str(own)
    user = os.getuid()
    others = ["/tmp/ray", f"/tmp/ray-{user}", "/var/tmp/ray", f"/var/tmp/ray-{user}", f"/dev/shm/ray-{user}"]
    for other in others:
        if unfit(Path(other)) is None:
            warn(f"{label}: Ray cannot use it for its files, because {problem}; they go to {other}")
            return other
    raise StudyStopped(
        f"{label}: Ray cannot use it for its files, because {problem}; /tmp, /var/tmp and /dev/shm cannot be used "
        f"either: set RAY_TMPDIR to a short folder that can be written, or {INLINE}"
    )


def unfit(folder: Path) -> str | None:
    """Return the reason why a folder, which is made if needed, cannot hold Ray's files and sockets, or None."""
    if not str(folder).isascii():
        return "Ray needs a path of ASCII letters"
    if (length := len(str(folder)) + SESSION_BYTES) > SOCKET_BYTES:
        return f"the path is {length - SOCKET_BYTES} letters too long for a socket"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if len(made) > 1 and os.environ.get("RAY_TMPDIR") != str(folder.parent):
        return "it is not there"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="check-", dir=folder) as scratch:
            Path(scratch, "file").write_bytes(bytes(4096))
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(str(Path(scratch, "s")))
    except FileExistsError:
        return "it is a file"
    except NotADirectoryError:
        return "it is a file"
    except OSError as error:
        return f"it cannot be written ({error.strerror or error})"
    free = psutil.disk_usage(str(folder)).free
    return f"only {readable(free)} are free there" if free < FREE_BYTES else None
