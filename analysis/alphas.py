"""The command `python -m analysis.alphas`; see `analysis.describe.alphas`."""

from analysis.describe.alphas import main
from analysis.io import command

if __name__ == "__main__":
    command.run(main)
