"""`python -m context_forcing.train STAGE ...`: the same as `context-forcing train STAGE ...`."""

from ..cli import train_main

train_main()
