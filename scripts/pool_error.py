"""Experiment: error of memory columns (recall_error) of a student: pool_error.py STUDENT 1,2 (values of memory.slow_pool)."""

import sys, torch, time, dataclasses, os

torch.set_num_threads(1)
from context_forcing.train.presets import load_config
from context_forcing.train.stages.pretrain import PretrainStage
from context_forcing.train.stages.forced_loss import mean_recall_error
from context_forcing.train.parallel import start_parallel
from context_forcing.memory.config import MemoryConfig

init = sys.argv[1]
pools = [int(p) for p in sys.argv[2].split(",")]
c = load_config(
    "pretrain",
    "demo",
    [
        "data_seed=%s" % os.environ.get("SEED", "99"),
        "seed=0",
        "long_trips=0.5",
        "batch=4",
        "num_chunks=20",
        f"init={init}",
    ],
)
s = PretrainStage(c, start_parallel("cpu"))
batches = s.batches
v = batches._make(0, 0, 8, 20, 0.0, long_trips=0.5)
for pool in pools:
    m = dataclasses.replace(c.memory, slow_pool=pool)
    t = time.time()
    e = mean_recall_error(s.network, c, m, dataclasses.replace(v, memory=m), s.parallel)
    print(
        os.path.basename(os.path.dirname(init)) or init,
        "pool",
        pool,
        os.environ.get("POOL_VARIANT"),
        os.environ.get("POOL_BIAS"),
        {k: round(x, 4) for k, x in e.items()},
        f"{time.time() - t:.1f}s",
        flush=True,
    )
