"""The command `python -m analysis.claims`; see `analysis.published.claims`."""

from analysis.io import command
from analysis.published.claims import main

if __name__ == "__main__":
    command.run(main)
