"""Time the routers themselves: the balanced assignment against SciPy, and each router's share of its layer.

    python benchmarks/routing.py [--shape vision] [--quick] [--output routing.md]

The vision shape has the six routers of images (arXiv 2401.15969), with the same rows of experts for each, and
soft-moe-pytorch, if it is installed, as a peer of the Soft MoE layer.

Contenders take turns within a round, in random order; a figure is the median over the rounds.

Shapes: T tokens, D model width, H expert hidden width, E experts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from report import facts
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evomoe.callbacks.console.summary import markdown
from evomoe.instantiation import instantiate
from evomoe.moe import MoELayer
from evomoe.routing import Routing, RoutingInput, ScheduleValues, SoftRouting
from evomoe.routing.assignment import balanced_assignment

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VOCABULARY = 4096
VISION = ("softmax_tc", "sinkhorn_tc", "softmax_ec", "sinkhorn_ec", "sparse_ot_ec", "soft")
PEER = "soft-moe-pytorch"


@dataclass(frozen=True)
class Shape:
    """What is routed.

    Args:
        batch: sequences or images.
        sequence: tokens of each.
        d_model: width D.
        d_expert: hidden width H.
        num_experts: number of experts E.
    """

    batch: int
    sequence: int
    d_model: int
    d_expert: int
    num_experts: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.sequence} tokens, D={self.d_model}, H={self.d_expert}, E={self.num_experts}"


SHAPES = {"language": Shape(8, 256, 256, 1024, 8), "vision": Shape(64, 196, 384, 1536, 32)}
QUICK = {"language": Shape(2, 256, 32, 64, 8), "vision": Shape(4, 196, 384, 1536, 32)}


def take_turns(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name in random.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Balanced assignment
# ----------------------------------------------------------------------------------------------------------------------


def scipy_assignment(scores: Tensor) -> Tensor:
    """The same optimum by the linear assignment of tokens to places; E must divide T."""
    tokens, num_experts = scores.shape
    places = tokens // num_experts
    _, columns = linear_sum_assignment(np.repeat(scores.numpy(), places, axis=1), maximize=True)
    return torch.from_numpy(columns // places)


def compare_solvers(tokens: int, rounds: int) -> str:
    """Both solvers on scores without and with a preference that all tokens share."""
    rows = []
    for num_experts in (8, 64):
        for name, shared in (("independent", 0.0), ("shared preference", 1.0)):
            scores = torch.randn(tokens, num_experts) + shared * torch.randn(num_experts)
            found = {solve: solve(scores) for solve in (balanced_assignment, scipy_assignment)}
            totals = [float(scores.double().gather(1, expert[:, None]).sum()) for expert in found.values()]
            ours = take_turns({"ours": lambda s=scores: balanced_assignment(s)}, rounds)["ours"]
            scipy = take_turns({"scipy": lambda s=scores: scipy_assignment(s)}, max(rounds // 5, 1))["scipy"]
            gap = (totals[1] - totals[0]) / abs(totals[1])
            rows.append(
                [f"E={num_experts}, {name}", f"{ours:.1f}", f"{scipy:.0f}", f"{scipy / ours:.0f}", f"{gap:.1e}"]
            )
    header = [f"T={tokens}", "ours ms", "SciPy ms", "SciPy to ours", "gap to SciPy's optimum"]
    return f"### Balanced assignment\n\n{markdown(header, rows)}"


# ----------------------------------------------------------------------------------------------------------------------
# Routers
# ----------------------------------------------------------------------------------------------------------------------


def routers(names: Sequence[str], shape: Shape) -> dict[str, Any]:
    """The gates of these files in configs/router, with fresh weights.

    One with a schedule is there in each of its phases. One that may stop its iterations early, as it does with the even
    logits of fresh weights, is there a second time with all of them: the most that sharper logits can cost.
    """
    found = {}
    for name in names:
        gate = compose_gate(name, shape)
        if gate is None:
            continue
        torch.manual_seed(0)
        router = instantiate(gate)
        if router(shape.d_model, shape.num_experts).scheduled:
            for phase, values in (
                ("sparsify", ScheduleValues(0.5, 0.5)),
                ("hardened", ScheduleValues(0.05, 0.0, True)),
            ):
                found[f"{name}, {phase}"] = (router, values)
        else:
            found[name] = (router, ScheduleValues())
        if "tolerance" in gate:
            exhaustive = instantiate(compose_gate(name, shape, "router.gate.tolerance=0"))
            found[f"{name}, all iterations"] = (exhaustive, ScheduleValues())
    return found


def compose_gate(name: str, shape: Shape, *overrides: str) -> Any:
    """The gate of a file in configs/router; None if it has none."""
    sizes = [f"model.vocab_size={VOCABULARY}", f"model.num_experts={shape.num_experts}"]
    if name == "soft":
        sizes.append(f"router.gate.slots={round(shape.sequence / shape.num_experts)}")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", overrides=[f"router={name}", *sizes, *overrides]).router.gate


def compare_routers(names: Sequence[str], shape: Shape, rounds: int) -> str:
    """Forward and backward of each router alone, and of the layer around it."""
    hidden = torch.randn(shape.batch, shape.sequence, shape.d_model)
    token_ids = torch.randint(VOCABULARY, hidden.shape[:2])
    previous_ids = torch.nn.functional.pad(token_ids[:, :-1], (1, 0), value=-1)
    contenders: dict[str, Callable[[], Any]] = {}
    active = {}
    for name, (factory, values) in routers(names, shape).items():
        layer = MoELayer(shape.d_model, shape.d_expert, shape.num_experts, factory)
        layer.router.set_schedule(values)

        def run_router(layer: MoELayer = layer) -> None:
            flat = hidden.flatten(0, 1).requires_grad_()
            inputs = RoutingInput(
                hidden=flat,
                batch=shape.batch,
                sequence=shape.sequence,
                token_ids=token_ids.flatten(),
                previous_ids=previous_ids.flatten(),
            )
            finish(layer.router(inputs), flat.new_zeros(()))

        def run_layer(layer: MoELayer = layer) -> None:
            output, routing = layer(hidden.clone().requires_grad_(), token_ids=token_ids, previous_ids=previous_ids)
            finish(routing, output.sum())

        contenders[f"{name}/router"], contenders[f"{name}/layer"] = run_router, run_layer
        with torch.no_grad():
            routing = layer(hidden, token_ids=token_ids, previous_ids=previous_ids)[1]
        active[name] = float(routing.active_experts)
    if "soft" in names and find_spec("soft_moe_pytorch"):
        peer = soft_moe_peer(shape)
        contenders[PEER] = lambda: peer(hidden.clone().requires_grad_()).sum().backward()
    took = take_turns(contenders, rounds)
    rows = [
        [
            name,
            f"{number:.2f}",
            f"{took[f'{name}/router']:.2f}",
            f"{took[f'{name}/layer']:.1f}",
            f"{took[f'{name}/router'] / took[f'{name}/layer']:.1%}",
        ]
        for name, number in active.items()
    ]
    if PEER in took:
        rows.append([PEER, f"{active['soft']:.2f}", "", f"{took[PEER]:.1f}", ""])
    header = [str(shape), "active experts", "router ms", "layer ms", "share"]
    return f"### Routers, forward and backward, with fresh weights\n\n{markdown(header, rows)}"


def soft_moe_peer(shape: Shape) -> torch.nn.Module:
    """Soft MoE of another package, with as many slots and as wide experts."""
    from soft_moe_pytorch import SoftMoE

    return SoftMoE(
        shape.d_model,
        num_experts=shape.num_experts,
        num_slots=round(shape.sequence / shape.num_experts),
        expert_mult=shape.d_expert // shape.d_model,
    )


def finish(routing: Routing, total: Tensor) -> None:
    """The backward pass of a routing's weights and losses, and of ``total``."""
    weights = [routing.dispatch, routing.combine] if isinstance(routing, SoftRouting) else [routing.weight]
    total = total + sum(weight.sum() for weight in weights) + sum(routing.losses.values(), torch.zeros(()))
    if total.requires_grad:
        total.backward()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="language")
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="also write the Markdown here")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    rounds = 2 if args.quick else args.rounds
    shape = (QUICK if args.quick else SHAPES)[args.shape]
    sections = []
    if args.shape == "vision":
        names: Sequence[str] = VISION
    else:
        files = sorted(path.stem for path in (CONFIGS / "router").glob("*.yaml"))
        names = [name for name in files if name not in VISION]
        sections.append(compare_solvers(256 if args.quick else 4096, rounds))
    sections.append(compare_routers(names, shape, rounds))
    text = "\n".join(["## Routing\n", facts("cpu", f"fp32, {rounds} rounds"), *sections])
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
