"""Write a student with more blocks: each new one begins as the identity, so the student computes what it did.

python scripts/add_blocks.py STUDENT OUTPUT --after 1 2

A new block is a copy of the block before it with noise on its matrices. Those that add to the residual stream are 0.
"""

import argparse
import re

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ADD_TO_RESIDUAL = ("self_attn.o", "cross_attn.o", "ffn.2")
NOISE = 0.3
"""Standard deviation of the noise, in that of the matrix. Without it, the two blocks would learn the same."""
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def with_blocks(weights: dict[str, torch.Tensor], after: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in Wan's layout with a new block after each of these blocks."""
    generator = torch.Generator().manual_seed(seed)
    longer = {}
    for name, value in weights.items():
        if not (found := BLOCK.fullmatch(name)):
            longer[name] = value
            continue
        block, rest = int(found[1]), found[2]
        place = block + sum(earlier < block for earlier in after)
        longer[f"blocks.{place}.{rest}"] = value
        if block not in after:
            continue
        if rest.rpartition(".")[0] in ADD_TO_RESIDUAL:
            value = torch.zeros_like(value)
        elif value.ndim == 2:
            value = value + NOISE * value.std() * torch.randn(value.shape, generator=generator)
        longer[f"blocks.{place + 1}.{rest}"] = value.clone()
    return longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("output")
    parser.add_argument("--after", type=int, nargs="+", required=True)
    options = parser.parse_args()
    with safe_open(options.student, "pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(with_blocks(weights, options.after), options.output, metadata=metadata)


if __name__ == "__main__":
    main()
