"""`context-forcing train`."""

from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from .console import is_main, say


def train(
    stage: Annotated[str, Argument(help="vae, pretrain, teacher, local, contextual, in this order; export.")],
    overrides: Annotated[list[str] | None, Argument(help="key=value, for example steps=100.")] = None,
    config: Annotated[str, Option(help="demo, smoke, wan2.1-1.3b (all but vae), or a YAML file.")] = "demo",
    resume: Annotated[bool, Option("--resume", help="Continue from the last checkpoint of the run.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the settings and the costs; do not train.")] = False,
    tflops: Annotated[
        float | None, Option(min=1e-9, help="Measured TFLOP/s of a GPU, for the GPU hours of --dry-run.")
    ] = None,
) -> None:
    """Train the demo codec (`vae`), a causal student (`pretrain`), a `teacher` that continues from memory, and the
    student by distribution matching on its own short (`local`) and long (`contextual`) rollouts.

    Several processes: `torchrun --nproc-per-node 8 -m context_forcing.train STAGE ...`.
    """
    from ..train import plan_stage, run_stage

    if dry_run:
        for part in plan_stage(stage, config, overrides or [], tflops):
            # Settings contain brackets of their own; those of tables are rich's.
            Console().print(part, highlight=False, markup=not isinstance(part, str))
        return
    path = run_stage(stage, config, overrides or [], resume)
    if is_main():
        say(f"written to {path}")
