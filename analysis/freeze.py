"""The command `python -m analysis.freeze`; see `analysis.published.freeze`."""

from analysis.io import command
from analysis.published.freeze import main

if __name__ == "__main__":
    command.run(main)
