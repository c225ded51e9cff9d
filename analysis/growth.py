"""The command `python -m analysis.growth`; see `analysis.describe.growth`."""

from analysis.describe.growth import main
from analysis.io import command

if __name__ == "__main__":
    command.run(main)
