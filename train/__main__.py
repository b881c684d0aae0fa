"""`python -m context_forcing.train STAGE ...`, for torchrun: `python -m context_forcing.cli train STAGE ...`."""

import runpy
import sys

sys.argv.insert(1, "train")
runpy.run_module((__package__ or "").removesuffix("train") + "cli", run_name="__main__", alter_sys=True)
