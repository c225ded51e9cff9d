"""The command `python -m analysis.budget`; see `analysis.describe.budget`."""

from analysis.describe.budget import main
from analysis.io import command

if __name__ == "__main__":
    command.run(main)
