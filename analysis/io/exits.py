"""The exit codes and the standard streams of every command."""

import os
import sys
from enum import IntEnum
from io import TextIOWrapper


class Exit(IntEnum):
    """Exit code of a command. A process that a signal n ends has 128 + n instead."""

    DONE = 0  # it did what it was asked; an undecided or untestable result is a result
    COULD_NOT = 1  # the machine or the disk did not let it, or the study has not finished
    BAD_INPUT = 2
    NO_VERDICT = 3  # only with --require-verdict: the study finished without a verdict on every arm


def prepare_streams() -> None:
    """Open the standard streams that the caller closed (`>&-`), on the null device, and let no letter fail.

    Otherwise the next file that is opened, such as a ledger, would get the number of a standard stream, and a library
    that prints would write into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (for as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack it


def drop_output() -> None:
    """Send output that cannot be written to the null device, or Python's own exit code (120) would replace ours."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
