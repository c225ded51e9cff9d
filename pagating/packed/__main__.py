"""The command `python -m pagating.packed`; see `pagating.packed.loop`."""

import sys

from pagating.packed.loop import main

if __name__ == "__main__":
    sys.exit(main())
