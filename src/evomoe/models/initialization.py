"""Initial weights that depend on a seed and on the parameter's name, not on what was drawn before.

So two models that differ in one layer share the initial weights of all the others: what a fair comparison needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def seed_of(seed: int, name: str) -> int:
    """A 64-bit seed of its own for every name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def draw_normal_(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill ``parameter`` in place with a normal draw of mean 0.

    It is drawn on the CPU in fp32, so that every device and precision gets the same numbers.
    """
    if parameter.is_meta:
        return
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, name))
    parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(std=std, generator=generator))


@contextmanager
def seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Seed the global generator of ``device`` for the body, and give it its former state back afterwards."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        # Not torch.manual_seed: where CUDA is not in use yet, it would queue this seed for all GPUs.
        torch.default_generator.manual_seed(seed_of(seed, name))
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed_of(seed, name))
        yield
