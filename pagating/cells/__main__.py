"""The command `python -m pagating.cells`; see `pagating.cells.runner`."""

import sys

from pagating.cells.runner import main

if __name__ == "__main__":
    sys.exit(main())
