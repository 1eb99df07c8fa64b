"""`python -m graphlocal`: the command line."""

from graphlocal.cli import main

main()
