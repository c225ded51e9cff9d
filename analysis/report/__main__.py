"""The command `python -m analysis.report`; see `analysis.report.build`."""

from analysis.io import command
from analysis.report.build import main

if __name__ == "__main__":
    command.run(main)
