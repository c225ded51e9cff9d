"""The error of a folder without a usable model. Imports neither torch nor transformers."""

import os
from typing import Any


class SavedModelError(ValueError):
    """A folder without a usable model. The message is one line with the folder and the reason."""

    exit_code = 2  # of a command: bad input


def require_path(folder: Any, key: str = "folder") -> None:
    """Raise SavedModelError if an argument is not a path."""
    if not isinstance(folder, str | os.PathLike):
        raise SavedModelError(f"{key}: {type(folder).__name__} is not a path")
