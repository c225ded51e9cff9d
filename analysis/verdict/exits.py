"""End a command that shows a verdict: choose its exit code and print the reason."""

import argparse
import sys

from analysis.io.exits import Exit
from analysis.io.text import one_line
from analysis.verdict.kinds import Result

REQUIRE_VERDICT = "exit with 3 if any arm but the floor is undecided or not testable"


def add_require_verdict(parser: argparse.ArgumentParser) -> None:
    """Add the option --require-verdict to the parser of a script."""
    parser.add_argument("--require-verdict", action="store_true", help=REQUIRE_VERDICT)


def exit_code(result: Result, require_verdict: bool = False) -> Exit:
    """Decide the exit code of every command that shows a verdict.

    An unfinished study gives 1, a finished one 0. With `require_verdict` a finished study gives 3 if it has no arm to
    decide, or if an arm other than the floor is undecided or not testable. Worse, no difference and identical give 0.
    """
    if result.unfinished:
        return Exit.COULD_NOT
    rows = result.in_question
    settled = bool(rows) and all(row.kind.settled for row in rows)
    return Exit.NO_VERDICT if require_verdict and not settled else Exit.DONE


def end(result: Result, require_verdict: bool) -> Exit:
    """Return `exit_code`; print on standard error why it is not 0, or that there is no arm to compare."""
    code = exit_code(result, require_verdict)
    missing = [f"{row.label}: {row.verdict}" for row in result.in_question if not row.kind.settled]
    if code is Exit.COULD_NOT:
        return could_not(result.unfinished)
    if code is Exit.NO_VERDICT or not result.comparisons:
        _say(f"no verdict: {'; '.join(missing) or 'no treatment runs'}")
    return code


def could_not(missing: str) -> Exit:
    """Print on standard error what an unfinished study lacks; return the exit code, which is 1."""
    _say(f"unfinished: {missing}")
    return Exit.COULD_NOT


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr)
