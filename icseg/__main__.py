"""`python -m icseg`: the `icseg` command."""

from icseg.cli import main

if __name__ == "__main__":
    main()
