"""The process of one trial of the user's own code: start it, read its lines, and end it whatever happens."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tune.subject.own_worker import status_mb

# replaces itself by its arguments after it has asked Linux to be killed with its parent (PR_SET_PDEATHSIG)
WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
IN_TRIAL = "PAGATING_TRIAL"  # set in the environment of every trial's process
TICK_SECONDS = 0.5  # between two looks at a process that says nothing
GRACE_SECONDS = 1.0  # for its last lines, after it has ended
LONGEST_LINE = 1 << 20


class TrialFailed(OSError):
    """A trial of the user's own code failed. The message says why, in one line."""


def words(command: Sequence[str], folder: Path) -> list[str]:
    """Return a command that ends with this process. Raises FileNotFoundError if there is no such program."""
    program = command[0] if os.path.basename(command[0]) == command[0] else str(folder / command[0])
    if shutil.which(program, path=search_path()) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    return [sys.executable, "-S", "-P", "-c", WITH_PARENT, *command] if sys.platform == "linux" else list(command)


def search_path() -> str:
    """Return the folders of programs: those of PATH, then that of this Python, which nobody may have activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])


class Process:
    """A process of the user's code, with the processes that it starts.

    Args:
        command: Words of the command line. `{channel}` is replaced by the number of the file descriptor of its lines.
        folder: Working directory.
        output: File that gets what the process prints; an attribute, because another trial has another file.
        cpus: Number of threads that numerical libraries may use.
        timeout: Seconds without a line after which the process is killed.
        own_channel: Read the lines from a pipe of their own. Otherwise they are those of standard output.
        environment: Further variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        output: Path,
        cpus: int,
        timeout: float,
        own_channel: bool,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.output, self._timeout = output, timeout
        self.again = False  # it waits for another trial
        self._resident_mb, self._looked = 0.0, 0.0  # memory when it was last looked at, and when that was
        self._reader, writer = os.pipe()
        threads = {f"{library}_NUM_THREADS": str(cpus) for library in ("OMP", "MKL", "OPENBLAS")}
        try:
            with open(output, "ab") as log:
                self._process = subprocess.Popen(
                    [word.replace("{channel}", str(writer)) for word in command]
                    if own_channel
                    else words(command, folder),
                    cwd=folder,
                    env={
                        **os.environ,
                        **threads,
                        "PATH": search_path(),
                        "PYTHONHASHSEED": "0",
                        IN_TRIAL: "1",
                        **(environment or {}),
                    },
                    stdin=subprocess.PIPE if own_channel else subprocess.DEVNULL,
                    stdout=log if own_channel else writer,
                    stderr=log,
                    pass_fds=[writer] if own_channel else [],
                    start_new_session=True,
                )
        except OSError as error:
            os.close(self._reader)
            raise TrialFailed(f"{command[0]}: {error.strerror}") from error
        finally:
            os.close(writer)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """True if the process has not ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, with all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, with all that it started
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        os.close(self._reader)

    def send(self, line: str) -> None:
        """Send a line to the process. One that has ended does not get it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def lines(self) -> Iterator[str | None]:
        """Yield the lines of the process, and None for every half a second without one, until it has ended.

        Raises:
            TrialFailed: The process said nothing for longer than the timeout.
        """
        rest, heard, ended = b"", time.monotonic(), 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            while True:
                self._look()
                if selector.select(TICK_SECONDS):
                    piece = os.read(self._reader, 1 << 16)
                    *whole, rest = (rest + piece).split(b"\n")
                    for line in whole:
                        heard = time.monotonic()
                        yield line.decode(errors="replace")
                        heard = time.monotonic()  # the time in which nobody asked does not count
                    if not piece:
                        break
                    if len(rest) > LONGEST_LINE:
                        raise TrialFailed(f"it printed a line of more than {LONGEST_LINE:,} bytes")
                    continue
                if self._process.poll() is not None:  # a process that it started may keep the pipe open
                    ended = ended or time.monotonic()
                    if time.monotonic() - ended > GRACE_SECONDS:
                        break
                if time.monotonic() - heard > self._timeout:
                    raise TrialFailed(f"no report for {self._timeout:g} s (resources.stall_timeout)")
                yield None
        if rest:
            yield rest.decode(errors="replace")

    def _look(self) -> None:
        """Note the resident memory of the process, at most once per tick and if the system tells it."""
        if sys.platform == "linux" and time.monotonic() - self._looked > TICK_SECONDS:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError, StopIteration):  # it has ended
                self._resident_mb = status_mb("VmRSS", self._process.pid)

    def exit_code(self) -> int:
        """Wait for the end of the process; return its exit code, negative for a signal."""
        try:
            return self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed its output, and goes on
            return 0

    def why_ended(self, beside: Path | None = None) -> TrialFailed:
        """Return the error of a process that ended without its result.

        `beside` is a file whose last line says more if the process printed nothing to `output`.
        """
        code, last = self.exit_code(), _last_line(self.output)
        last = last or (_last_line(beside) if beside and beside.exists() else "")
        said = f"; its last line: {last}" if last else ""
        seen = f"; it had {self._resident_mb:,.0f} MB" if self._resident_mb else ""
        short = f" (the system sends it when memory is short{seen})" if code == -signal.SIGKILL else ""
        how = f"by signal {-code}{short}" if code < 0 else f"with exit code {code}"
        return TrialFailed(f"its process ended {how}{said}")


def _last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
