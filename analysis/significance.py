"""The command `python -m analysis.significance`; see `analysis.verdict.decide`."""

from analysis.io import command
from analysis.verdict.decide import main

if __name__ == "__main__":
    command.run(main)
