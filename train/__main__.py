"""`python -m context_forcing.train STAGE ...`, for torchrun: an alias of `python -m context_forcing.cli train STAGE ...`."""

import runpy
import sys

sys.argv.insert(1, "train")
runpy.run_module(f"{__package__.rpartition('.')[0]}.cli", run_name="__main__", alter_sys=True)
