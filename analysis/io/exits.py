"""The exit codes of every command."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit code of a command. A process that a signal n ends has 128 + n instead."""

    DONE = 0  # it did what it was asked; an undecided or untestable result is a result
    COULD_NOT = 1  # the machine or the disk did not let it, or the study has not finished
    BAD_INPUT = 2
    NO_VERDICT = 3  # only with --require-verdict: the study finished without a verdict on every arm
