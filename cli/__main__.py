"""`python -m context_forcing.cli ...`: the same as `context-forcing ...`."""

from . import main

main()
