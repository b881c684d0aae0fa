"""scripts/add_blocks.py writes a larger student that computes what the smaller one does."""

import runpy
import sys
from pathlib import Path

import torch

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.model.checkpoints.student import StudentSource
from context_forcing.model.config import StudentCard

SCRIPT = Path(__file__).parents[2] / "scripts" / "add_blocks.py"


def test_a_student_with_more_blocks_computes_the_same(tmp_path, make_net, make_sampler, save_student, monkeypatch):
    card = StudentCard(name="small", base="demo")
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    save_student(small, make_net(num_layers=3), card)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(small), str(large), "--after", "0", "1"])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    student = StudentSource(str(large)).open()
    assert student.card.name == "small"
    net = make_net(num_layers=5)
    net.load_state_dict({name: student.tensor(name) for name in student.named.tensors})
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    flows = []
    for each in (make_net(num_layers=3), net):
        sampler = make_sampler(each)
        attend = sampler.network.attend(sampler.view(empty_memory(MemoryConfig(), (16, 4, 6))), 3, (16, 4, 6))
        flows.append(sampler.network.flow(latents, 0.5, sampler.text, attend))
    assert torch.equal(*flows)
    new, copied = (dict(net.blocks[block].named_parameters()) for block in (1, 0))
    assert not new["ffn.2.weight"].any() and not torch.equal(new["ffn.0.weight"], copied["ffn.0.weight"])
