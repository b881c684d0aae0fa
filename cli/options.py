"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

from typer import Option

Student = Annotated[str, Option(help="`demo` (built in), a student file, or its name in --models-dir.")]
Vae = Annotated[
    str | None, Option(help="VAE of a Wan student: a file, a diffusers folder, or its name in --models-dir.")
]
Decoder = Annotated[
    str | None, Option(help="Tiny decoder, in place of the VAE: taew2_1, lighttaew2_1, or its name in --models-dir.")
]
TextEncoder = Annotated[str | None, Option(help="UMT5-XXL of a Wan student: a file, or its name in --models-dir.")]
ModelsDir = Annotated[Path | None, Option(help="ComfyUI's folder `models`. Default: $COMFYUI_PATH/models, if set.")]
Weights = Annotated[str, Option(help="Weights of a training checkpoint: auto, generator or generator_ema.")]
Card = Annotated[str, Option(help="The published student: self-forcing, longlive, ... auto: read from the file.")]
Settings = Annotated[list[str] | None, Option("--set", help="Replace a field of the card: shift=3. Repeatable.")]
Loras = Annotated[list[str] | None, Option(help="LoRA to merge, FILE or FILE:strength. Repeatable.")]
Device = Annotated[str, Option(help="auto, cuda or cpu.")]
Dtype = Annotated[str, Option(help="auto, bf16 or fp32. auto: bf16 on CUDA, fp32 on the CPU.")]
