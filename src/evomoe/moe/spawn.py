"""Expert-diversify: many different experts from one trained expert (EvoMoE, arXiv 2112.14397, phase 1).

The paper says that diverse experts are spawned from the base expert; how, and what becomes of the optimizer's state, no
readable text of it says. Everything below is our reading, each choice an option.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.moe.experts import Experts
from evomoe.moe.layer import MoELayer

METHODS = ("mask", "noise", "copy", "reinit")


@dataclass(frozen=True)
class Spawn:
    """How the experts are born.

    Args:
        method: ``mask`` sets a random share of the weights to zero, independently per weight and expert; ``noise``
            adds Gaussian noise; ``copy`` clones; ``reinit`` draws a random share of the hidden units anew, with the
            mean and deviation of the weights they replace (Drop-Upcycling, arXiv 2502.19261).
        ratio: share of masked weights, share of redrawn units, or the noise's deviation in units of the weight's own.
        rescale: ``mask`` only: divide the surviving weights by ``1 - ratio``.
        keep_first: leave expert 0 as it was trained.
        moments: ``carry`` gives every expert the Adam moments of expert 0, the first one zero where its weights are
            masked or redrawn; ``reset`` starts all experts' moments at zero. The second moment is carried whole: at
            zero in the middle of a run, where Adam no longer corrects its bias, it would make the next steps several
            times too long.
    """

    method: str = "mask"
    ratio: float = 0.5
    rescale: bool = False
    keep_first: bool = False
    moments: str = "carry"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"spawn method={self.method!r} is unknown: expected one of {', '.join(METHODS)}")
        upper_open = self.method == "mask"
        if self.ratio < 0 or (self.method in ("mask", "reinit") and self.ratio > 1) or (upper_open and self.ratio == 1):
            bounds = {"mask": "[0, 1)", "reinit": "[0, 1]"}.get(self.method, "[0, inf)")
            raise ConfigError(f"spawn ratio={self.ratio} with method={self.method}: expected a value in {bounds}")
        if self.moments not in ("carry", "reset"):
            raise ConfigError(f"spawn moments={self.moments!r} is unknown: expected carry or reset")
        if self.rescale and self.method != "mask":
            raise ConfigError(f"spawn rescale=true does nothing with method={self.method}: expected method=mask")


def spawn_experts(
    layers: Sequence[tuple[str, MoELayer]],
    spawn: Spawn,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write all experts of every layer from its expert 0, itself last, in place, and let all of them live.

    Only the experts' parameters (and their optimizer state) change. The draws depend on ``seed``, the layer's name and
    the expert's index alone, so every process and every resumed run spawns the same experts.

    Args:
        layers: the MoE layers by name.
        spawn: how.
        seed: of the draws.
        optimizer: whose state of expert 0 is carried over; None where there is none yet.
    """
    with torch.no_grad():
        for name, layer in layers:
            order = range(layer.num_experts - 1, -1, -1)  # expert 0 last: the others read it
            for expert in order:
                if not (expert == 0 and spawn.keep_first):
                    _bear(layer.experts, expert, spawn, _generator(seed, name, expert), optimizer)
            if optimizer is not None and spawn.moments == "reset":
                for expert in order:
                    for parameter in layer.experts.expert_parameters(expert).values():
                        optimizer.state.pop(parameter, None)
            layer.live_experts = layer.num_experts


def _bear(
    experts: Experts, expert: int, spawn: Spawn, generator: torch.Generator, optimizer: torch.optim.Optimizer | None
) -> None:
    base, child = experts.expert_parameters(0), experts.expert_parameters(expert)
    units = _redrawn_units(experts, spawn, generator) if spawn.method == "reinit" else None
    for name, source in base.items():
        keep = torch.ones_like(source)
        value = source.clone()
        is_matrix = source.dim() == 2
        if spawn.method == "mask" and is_matrix:
            keep = _draw(torch.rand, source, generator).ge(spawn.ratio).to(source.dtype)
            value = value * keep / (1 - spawn.ratio if spawn.rescale else 1)
        elif spawn.method == "noise" and is_matrix:
            value = value + spawn.ratio * source.std() * _draw(torch.randn, source, generator)
        elif units is not None and name != "b_out":
            chosen = _unit_mask(name, source, units)
            parts = len(units) if name.endswith("_in") else len(source)  # swiglu holds two matrices in one
            halves = zip(source.split(parts), chosen.split(parts), strict=True)
            value = torch.cat([_redraw(half, mask, generator) for half, mask in halves])
            keep = (value == source).to(source.dtype)
        child[name].copy_(value)
        if optimizer is not None and source in optimizer.state:
            optimizer.state[child[name]] = {
                key: state * keep if key == "exp_avg" else _clone(state)
                for key, state in optimizer.state[source].items()
            }


def _redraw(weights: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the chosen entries anew, with their mean and deviation."""
    replaced = weights[chosen]
    if replaced.numel() < 2:
        return weights
    return torch.where(chosen, _draw(torch.randn, weights, generator) * replaced.std() + replaced.mean(), weights)


def _redrawn_units(experts: Experts, spawn: Spawn, generator: torch.Generator) -> Tensor:
    hidden = experts.expert_parameters(0)["w_out"].shape[1]
    chosen = torch.zeros(hidden, dtype=torch.bool)
    chosen[torch.randperm(hidden, generator=generator)[: round(spawn.ratio * hidden)]] = True
    return chosen  # (H,)


def _unit_mask(name: str, parameter: nn.Parameter, units: Tensor) -> Tensor:
    """Which entries of a parameter belong to the hidden units ``(H,)``."""
    units = units.to(parameter.device)
    if name == "w_out":  # (D, H)
        return units.expand_as(parameter)
    repeated = units.repeat(parameter.shape[0] // units.numel())  # twice for the two halves of swiglu
    return repeated[:, None].expand_as(parameter) if parameter.dim() == 2 else repeated


def _draw(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise drawn on the CPU, so that it is the same on every device."""
    return draw(like.shape, generator=generator).to(like)


def _generator(seed: int, name: str, expert: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _clone(state: object) -> object:
    return state.clone() if isinstance(state, Tensor) else state
