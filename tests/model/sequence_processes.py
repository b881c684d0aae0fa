"""What each of the processes of tests/model/test_sequence.py computes: `torchrun` starts it.

Arguments: a file for the main process's results. Alone, it computes the same without sharing.
"""

import dataclasses
import sys

import torch
import torch.nn.functional as F

from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.model.config import WanConfig
from context_forcing.model.network import Network
from context_forcing.model.sampler import CausalSampler, seeded_noise
from context_forcing.model.sequence import joined
from context_forcing.model.wan import WanModel
from context_forcing.train.stages.score import flow_given_context
from context_forcing.train.stages.student import Student

LATENT_SIZE = (16, 4, 8)
SIGMAS = (1.0, 0.5)


def make_network(processes):
    sizes = dict(dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_dim=32, text_len=16)
    net = WanModel(WanConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    net.reset_parameters(generator)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    network = Network(net, torch.device("cpu"), torch.float32)
    return network.shared_by(processes) if processes else network


def roll_out(network, text, **settings):
    """A film of 8 chunks, long enough that slow memory chooses and forgets."""
    memory = empty_memory(MemoryConfig(sink=2, slow=3, fast=4, slow_similarity_threshold=0.99, **settings), LATENT_SIZE)
    sampler = CausalSampler(network=network, text=network.embed_text(text))
    with torch.inference_mode():
        for memory in sampler.rollout(memory, 8, sigmas=SIGMAS, noise=seeded_noise(3, LATENT_SIZE)):
            pass
        again = sampler.recache(memory)
    return memory, again


def gradients(network, text, processes):
    """Of every weight, for a loss on the target of a rollout and on its score: two chunks after a long context."""
    memory = empty_memory(MemoryConfig(sink=2, slow=3, fast=4), LATENT_SIZE)
    student, noise = Student(network, text), seeded_noise(5, LATENT_SIZE)
    context = student.rollout(memory, 4, SIGMAS, noise)
    rollout = student.target(context, 2, 1, SIGMAS, noise, has_grad=True)
    remembered = context.latents_of(context.slots.all)
    flow = flow_given_context(network, remembered, text, rollout.target_BCTHW, 0.7, text)
    loss = F.mse_loss(flow, torch.ones_like(flow))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in network.net.named_parameters()}
    return loss.detach(), {name: processes.add_up(grad) if processes else grad for name, grad in grads.items()}


def main(path):
    torch.set_num_threads(1)
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    with joined(torch.device("cpu")) as processes:
        network = make_network(processes)
        found = {}
        for policy in ("novel", "recall"):
            memory, again = roll_out(network, text, policy=policy)
            found[policy] = {
                "film": torch.cat(memory.latent_chunks, dim=2),
                "slots": dataclasses.astuple(memory.slots)[:3],
                "similarities": [decision.similarity for decision in memory.decisions],
                "heads": [kv.keys.shape[-2] for _, kv in memory.store.frame_kvs()],
                "recached": [kv.values.mean().item() for _, kv in again.store.frame_kvs()],
            }
        loss, grads = gradients(network, text, processes)
        if processes is None or processes.is_main:
            torch.save({**found, "loss": loss, "grads": grads}, path)


if __name__ == "__main__":
    main(sys.argv[1])
