"""Find the columns of a table that hold arm, seed, metric, task, step and outcome, also in exports of trackers."""

import difflib
import re
from dataclasses import dataclass, fields

import pandas as pd

from analysis.io.files import TableError
from analysis.io.tables import metrics


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PREFIX = re.compile(
    r"^(?:(?:params?|parameters|metrics?|config|summary|tags?|hparams|hyperparameters|args|attributes|final|results?|info)"
    r"\s*[./:]\s*|(?:params|user_attrs|system_attrs)_)",
    re.IGNORECASE,
)
_GIVEN = re.compile(
    r"^(?:params?|parameters|config|tags?|hparams|hyperparameters|args|system_attrs)[./:_]", re.IGNORECASE
)
# names that are suggested for a role, and never taken for it unasked
LIKELY = {
    "arm": "method model variant algorithm algo optimizer condition group treatment approach system activation "
    "experiment name config run_name setting ablation variable run",
    "seed": "random_seed random_state rng run rep repeat replicate repetition trial init number id index",
    "task": "dataset benchmark env environment corpus domain language problem game",
}
STEPS = ("step", "_step", "global_step", "trainer/global_step", "training_iteration", "iteration", "epoch")
_STEP = _words("step iteration iter epoch timestep")  # plurals may be a setting of the run
_STEP_LIKE = _STEP | _words("steps iterations iters epochs timesteps update updates round checkpoint tokens samples")
STATES = ("outcome", "status", "state")
# words of numbers that describe a run and are no result
_ASIDE = _words(
    "lr learning epoch epochs step steps iter iteration iterations time runtime seconds minutes hours "
    "timestamp timestep timesteps duration tokens params parameters flops memory mem gpu gpus batch size depth width "
    "layers dim id index number created started ended datetime start complete end wall alpha beta dropout decay date "
    "trial run"
)
SUMMARY = _words(  # columns that are computed from others
    "mean avg average median std sd stdev stderr sem var min max n diff delta difference improvement p p_value pvalue"
)
OWN = frozenset(("study", "stage", "config_key", "outcome", "reason", "chosen", "overlap"))


@dataclass(frozen=True)
class Options:
    """Options of the command line for a table. None is found from the table itself."""

    arm: str | None = None
    seed: str | None = None
    task: str | None = None
    step: str | None = None
    wide: str | None = None  # names of the columns that are arms, separated by commas
    higher_is_better: bool | None = None
    unpaired: bool = False
    decimal: str | None = None
    sheet: str | None = None
    unit: str | None = None
    size: str | None = None  # column that makes a ladder of the rows
    resampled: float | None = None  # share of the data in the test set, if seeds split one data set

    def named(self) -> str:
        """Return the first option that was given, as it is typed."""
        given = next(f for f in fields(self) if getattr(self, f.name) != f.default)
        name = given.name if self.higher_is_better is not False else given.name.replace("higher", "lower")
        return "--" + name.replace("_", "-")


def bare(name: str) -> str:
    """Return a column's name without the prefix of a tracker, without a unit in brackets, and in lower case."""
    short = name
    while (cut := _PREFIX.sub("", short, count=1)) != short and cut:
        short = cut
    return re.sub(r"\s*[(\[][^)\]]*[)\]]\s*$", "", short).strip().casefold() or name.casefold()


def find(source: str, table: pd.DataFrame, role: str, named: str | None) -> str | None:
    """Return the column of a role: the one named, else the one that is called like the role; None if there is none.

    A name matches exactly, else without the prefixes of trackers, units and case.

    Args:
        source: Name of the input in error messages.
        table: The table.
        role: Option that names the column: arm, seed, task, step or metric.
        named: Name from the command line, or None.

    Raises:
        TableError: If no column has the name that was given, or several have it.
    """
    columns = [str(c) for c in table.columns]
    wanted = role if named is None else named.strip()
    if wanted in columns:
        return wanted
    found = [c for c in columns if bare(c) == bare(wanted)] or [c for c in columns if bare(c) == wanted.casefold()]
    if role == "metric" and len(found) > 1:
        found = [c for c in found if not _GIVEN.match(c)] or found
    if len(found) > 1 and not all(table[c].equals(table[found[0]]) for c in found):
        raise TableError(
            f"{source}: columns {', '.join(found)} are all called {wanted!r}; name one: --{role} {found[0]}"
        )
    if found:
        return found[0]
    if named is None:
        return None
    raise TableError(
        f"{source}: no column {wanted!r} for --{role}; it has {listed(columns)}{nearest(table, role, wanted)}"
    )


def is_step(name: str) -> bool:
    """Check by its name if a column counts the steps of a run."""
    words = metrics.words(bare(name))
    return bare(name) in STEPS or bool(
        words and words[-1] in _STEP and not {"best", "max", "min", "num", "n", "warmup", "per", "total"} & set(words)
    )


def like_step(name: str) -> bool:
    """Check by its name if a column may count the steps of a run, so that `--step` is suggested."""
    return bool(_STEP_LIKE & set(metrics.words(bare(name))))


def step_order(name: str) -> int:
    """Return the place of a column of steps among others."""
    return STEPS.index(bare(name)) if bare(name) in STEPS else len(STEPS)


def is_aside(name: str) -> bool:
    """Check by its name if a column describes a run instead of holding results."""
    likely = {word for words in LIKELY.values() for word in words.split()} - {"model", "name"}
    return bool(_ASIDE & set(metrics.words(name))) or bare(name) in likely


def listed(names: list[str]) -> str:
    """Return the first names as one text."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def nearest(table: pd.DataFrame, role: str, wanted: str) -> str:
    """Return the end of an error message: the option with the column that fits best, else with a placeholder."""
    columns = [str(c) for c in reversed(list(table.columns))]
    names = {re.split(r"[./]", bare(c))[-1]: c for c in columns} | {bare(c): c for c in columns}
    close = difflib.get_close_matches(wanted.casefold(), names, n=1, cutoff=0.6)
    likely = close or [word for word in LIKELY.get(role, "").split() if word in names]
    value = names[likely[0]] if likely else "Unnamed: 0" if role == "arm" and "Unnamed: 0" in columns else "COLUMN"
    return f": {option(role, value)}"


def option(role: str, value: str) -> str:
    """Return an option with its value as it is typed."""
    typed = value if re.fullmatch(r"[-.:/@%+=,\w]+", value) else repr(value)
    return f"--{role}{'=' if value.startswith('-') else ' '}{typed}"


def missing(source: str, table: pd.DataFrame, role: str) -> TableError:
    """Return the error that no column has a role."""
    columns = listed([str(c) for c in table.columns])
    return TableError(f"{source}: column {role} is missing; it has {columns}{nearest(table, role, role)}")


def metric(source: str, table: pd.DataFrame, named: str | None, taken: set[str], preferred: tuple[str, ...]) -> str:
    """Return the column of the metric: the one named, a preferred one, or the only one that can be it.

    Args:
        source: Name of the input in error messages.
        table: The table.
        named: Name from the command line, or None.
        taken: Columns that have another role.
        preferred: Names that are taken before all others if they hold values.

    Raises:
        TableError: If the column cannot be told.
    """
    free = [str(c) for c in table.columns if c not in taken and str(c) not in OWN]
    if named is not None:
        if not free:
            raise TableError(f"{source}: no column {named!r} for the metric; it has no column left for it")
        try:
            found = find(source, table[free], "metric", named)
        except TableError as error:
            if "no column" not in str(error):
                raise
            close = difflib.get_close_matches(named.casefold(), free, n=1, cutoff=0)
            end = option("metric", next(iter(close), free[0]))
            raise TableError(f"{source}: no column {named!r} for the metric; allowed: {listed(free)}: {end}") from None
        assert found is not None
        return found
    held = [c for c in free if not _GIVEN.match(c) and not _empty(table[c])]
    for name in preferred:
        if found_all := [c for c in held if bare(c) == name]:
            return found_all[0]
    known = [c for c in held if metrics.higher_is_better(bare(c)) is not None]
    numeric = [c for c in held if _mostly_numbers(table[c]) and not _ASIDE & set(metrics.words(c))]
    candidates = list(dict.fromkeys([*known, *numeric])) or [c for c in free if not _GIVEN.match(c)]
    if len(candidates) == 1:
        return candidates[0]
    shown = candidates or free
    trained = [c for c in known if not {"val", "valid", "validation", "test", "eval"} & set(metrics.words(c))]
    first = next((c for c in known if c not in trained), next(iter(candidates), "COLUMN"))
    end = option("metric", first)
    raise TableError(f"{source}: which column is the metric? {listed(shown) or 'There is none left'}: {end}")


def _empty(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column) and not (column.str.strip() != "").any()


def _mostly_numbers(column: pd.Series) -> bool:
    if pd.api.types.is_numeric_dtype(column):
        return True
    head = column[column.str.strip() != ""].head(100)
    return bool(len(head)) and head.str.contains(r"^[\s+-]*[\d.,]+").mean() > 0.5
