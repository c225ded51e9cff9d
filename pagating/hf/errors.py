"""The error of a folder without a usable model. Imports neither torch nor transformers."""


class SavedModelError(ValueError):
    """A folder without a usable model. The message is one line with the folder and the reason."""

    exit_code = 2  # of a command: bad input
