"""The study: its file, its stages, who trains its trials, and its functions for Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune.api import StudyResult, check_study, load_study, plan_study, run_study

__all__ = ["StudyResult", "check_study", "load_study", "plan_study", "run_study"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tune import api  # loads pydantic and rich, which a worker does without

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
