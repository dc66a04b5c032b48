"""`python -m icseg.cli`."""

from icseg.cli import main

main()
