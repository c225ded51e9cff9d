"""The command `python -m tune.cli`, the same as `pagating`."""

from tune.cli.main import main

if __name__ == "__main__":
    main()
