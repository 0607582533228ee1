"""`python -m epsim`: the `epsim` command."""

from epsim.cli import main

if __name__ == "__main__":
    main()
