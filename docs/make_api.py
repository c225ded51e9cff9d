"""Build the API pages of the three packages.

    python docs/make_api.py [FOLDER]        # build/api when not given

A public name that does not resolve is an error. Types of other libraries that pdoc cannot describe are left out.
"""

import sys
import warnings
from pathlib import Path

import pdoc

import pagating


def main(folder: Path) -> None:
    """Write the pages into `folder`."""
    for name in pagating.__all__:  # they are imported on first use, which pdoc does not see
        setattr(pagating, name, getattr(pagating, name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error parsing type annotation", module="pdoc")
        warnings.filterwarnings("error", message=".*(does not resolve|Error importing|Error loading)", module="pdoc")
        pdoc.pdoc("pagating", "tune", "analysis", output_directory=folder)
    print(f"API pages: {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
