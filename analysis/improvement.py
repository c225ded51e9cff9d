"""The command `python -m analysis.improvement`; see `analysis.describe.improvement`."""

from analysis.describe.improvement import main
from analysis.io import command

if __name__ == "__main__":
    command.run(main)
