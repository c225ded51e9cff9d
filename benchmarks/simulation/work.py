"""Worker processes of a simulation, and its end by Ctrl-C."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

INTERRUPTED = 128 + signal.SIGINT


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes. Ctrl-C ends them, with the parts that they compute."""
    with ProcessPoolExecutor(count, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def run(main: Callable[[], int]) -> int:
    """Return the exit code of a script. After Ctrl-C there is no traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        return INTERRUPTED
