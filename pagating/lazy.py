"""Sub-modules as attributes of their package, imported on first use."""

import pkgutil
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy(package: str, homes: dict[str, str] | None = None) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose sub-modules are imported when they are named.

    Args:
        package: Full name of the package.
        homes: Further names of the package, each with the sub-module that defines it.
    """
    homes = homes or {}

    def get(name: str) -> Any:
        if name in homes:
            try:
                return getattr(import_module(f"{package}.{homes[name]}"), name)
            except ModuleNotFoundError as error:
                if error.name != "transformers":
                    raise
                need = f"{package}.{name} needs transformers 5: pip install transformers"
                raise ModuleNotFoundError(need, name="transformers") from None
        full = f"{package}.{name}"
        if name.isidentifier() and not name.startswith("__"):
            try:
                return import_module(full)
            except ModuleNotFoundError as error:
                if error.name != full:  # the sub-module exists, but something that it imports does not
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        module = sys.modules[package]
        found = {each.name for each in pkgutil.iter_modules(module.__path__)} - {"__main__"}
        shown = getattr(module, "__all__", homes)
        return sorted(
            {*found, *shown, *(name for name in vars(module) if name.startswith("__") and name != "__main__")}
        )

    return get, names
