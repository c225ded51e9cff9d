"""The command `python -m analysis.ladder`; see `analysis.describe.ladder`."""

from analysis.describe.ladder import main
from analysis.io import command

if __name__ == "__main__":
    command.run(main)
