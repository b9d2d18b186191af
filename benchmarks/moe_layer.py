"""Time one MoE layer against a dense layer of equal active FLOPs, and against the layers that others would install.

    python benchmarks/moe_layer.py [--quick] [--device cuda] [--dtype bf16] [--rounds 15] [--output results.md]

All layers see the same token states and the same gate, planted so that the routing is exactly balanced or skewed as the
table says. Within a round every layer runs once, in random order; a ratio is the median over the rounds of a layer's
time over the dense layer's time in the same round, which cancels the machine's drift.

Shapes: T tokens, D model width, H expert hidden width, E experts, K experts per token, A = T * K assignments.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from report import cpu_name
from torch import Tensor, nn

from evomoe.moe.experts import Experts
from evomoe.moe.kernels import Weights, loop_mix
from evomoe.moe.layer import MoELayer
from evomoe.routing.contract import SparseRouting
from evomoe.routing.methods.topk import TopK

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """One line of the experiment's grid."""

    batch: int
    sequence: int
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int

    @property
    def gated(self) -> int:
        """Hidden width of a gated expert (three matrices) with at most the FLOPs of ``d_expert``, a multiple of 8."""
        return self.d_expert * 2 // 3 // 8 * 8


@dataclass(frozen=True)
class Contender:
    """A layer, its input, and what its experts look like."""

    name: str
    form: str
    layer: Layer
    hidden: Tensor
    parameters: tuple[nn.Parameter, ...]


# ----------------------------------------------------------------------------------------------------------------------
# The planted routing
# ----------------------------------------------------------------------------------------------------------------------


def plan(size: Size, skewed: bool) -> Tensor:
    """Experts of each token, ``(T, K)``: round robin over shuffled tokens, or drawn with popularity 1 / (1 + e)."""
    tokens = size.batch * size.sequence
    if skewed:
        popularity = 1 / torch.arange(1, size.num_experts + 1)
        return torch.multinomial(popularity.expand(tokens, -1), size.top_k)
    return (torch.randperm(tokens)[:, None] * size.top_k + torch.arange(size.top_k)) % size.num_experts


def plant(experts: Tensor, size: Size) -> Tensor:
    """Token states ``(B, S, D)`` that a gate of unit vectors routes as planned, with logits 1 apart."""
    hidden = torch.randn(experts.shape[0], size.d_model) * 0.1
    hidden[:, : size.num_experts] *= 0.1
    for choice in range(size.top_k):
        hidden[torch.arange(experts.shape[0]), experts[:, choice]] += 4.0 - choice
    return hidden.view(size.batch, size.sequence, size.d_model)


def set_gate(weight: Tensor) -> None:
    """Make the rows ``(E, D)`` of a gate unit vectors."""
    with torch.no_grad():
        weight.copy_(torch.eye(*weight.shape))


# ----------------------------------------------------------------------------------------------------------------------
# The layers
# ----------------------------------------------------------------------------------------------------------------------


def ours(size: Size, activation: str, d_expert: int, backend: str) -> nn.Module:
    """``MoELayer`` with a Mixtral router."""
    router = partial(TopK, top_k=size.top_k, renormalize=size.top_k > 1)
    layer = MoELayer(size.d_model, d_expert, size.num_experts, router, activation=activation, backend=backend)
    set_gate(layer.router.gate.weight)
    return layer


def mixtral(size: Size, implementation: str) -> nn.Module:
    """The sparse block of transformers' Mixtral."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=size.d_model,
        intermediate_size=size.gated,
        num_local_experts=size.num_experts,
        num_experts_per_tok=size.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02)
    set_gate(block.gate.weight)
    return block


def st_moe(size: Size) -> nn.Module:
    """st-moe-pytorch, with the capacity 1.25 counted per assignment as elsewhere."""
    from st_moe_pytorch import MoE

    layer = MoE(
        dim=size.d_model,
        num_experts=size.num_experts,
        expert_hidden_mult=size.d_expert / size.d_model,
        gating_top_n=size.top_k,
        capacity_factor_train=1.25 * size.top_k,
    )
    set_gate(layer.gate.to_gates.weight)
    return layer


def mixture_of_experts(size: Size) -> nn.Module:
    """mixture-of-experts, with the capacity 1.25 counted per assignment as elsewhere."""
    from mixture_of_experts import MoE

    layer = MoE(
        dim=size.d_model,
        num_experts=size.num_experts,
        hidden_dim=size.d_expert,
        experts=None,
        activation=nn.GELU,
        capacity_factor_train=1.25 * size.top_k,
    )
    set_gate(layer.gate.w_gating.t())
    return layer


def contenders(size: Size, hidden: Tensor) -> Iterator[Contender]:
    """The dense layer first, then ours, then the peers that are installed and can do this ``top_k``."""
    plain, gated = f"gelu, 2 x {size.d_expert}", f"swiglu, 3 x {size.gated}"
    choices: list[tuple[str, str, Callable[[], nn.Module], Callable[[object], Tensor]]] = [
        ("evomoe", plain, lambda: ours(size, "gelu", size.d_expert, "auto"), first),
        ("evomoe", gated, lambda: ours(size, "swiglu", size.gated, "auto"), first),
        ("evomoe grouped_mm", plain, lambda: ours(size, "gelu", size.d_expert, "grouped_mm"), first),
        ("transformers Mixtral eager", gated, lambda: mixtral(size, "eager"), whole),
        ("transformers Mixtral grouped_mm", gated, lambda: mixtral(size, "grouped_mm"), whole),
    ]
    if size.top_k > 1:  # both are top-2 at least
        geglu = f"geglu, 3 x {size.d_expert * 2 // 3}, capacity 1.25"
        choices += [
            ("st-moe-pytorch", geglu, lambda: st_moe(size), first),
            ("mixture-of-experts", f"{plain}, capacity 1.25", lambda: mixture_of_experts(size), first),
        ]
    rows = hidden.flatten(0, 1).repeat(size.top_k, 1)  # (A, D)
    dense = nn.Sequential(nn.Linear(size.d_model, size.d_expert), nn.GELU(), nn.Linear(size.d_expert, size.d_model))
    yield contender("dense, A rows", plain, dense, whole, rows)
    for name, form, build, output in choices:
        try:
            layer = build()
        except ImportError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
            continue
        yield contender(name, form, layer, output, hidden)


def first(result: object) -> Tensor:
    """The output of a layer that returns more than its output."""
    return result[0]  # type: ignore[index, no-any-return]


def whole(result: object) -> Tensor:
    """The output of a layer that returns just that."""
    assert isinstance(result, Tensor)
    return result


def contender(name: str, form: str, module: nn.Module, output: Callable[[object], Tensor], hidden: Tensor) -> Contender:
    """A contender on the device and in the type of ``hidden``."""
    module = module.to(hidden)
    return Contender(
        name, form, lambda x: output(module(x)), hidden.clone().requires_grad_(), tuple(module.parameters())
    )


# ----------------------------------------------------------------------------------------------------------------------
# The clock
# ----------------------------------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Milliseconds, after the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def run_once(entry: Contender) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of the backward pass after it."""
    device = entry.hidden.device
    start = now(device)
    out = entry.layer(entry.hidden)
    middle = now(device)
    out.backward(out.detach())
    stop = now(device)
    for tensor in (entry.hidden, *entry.parameters):
        tensor.grad = None
    return middle - start, stop - middle


def measure(entries: list[Contender], rounds: int) -> list[list[tuple[float, float]]]:
    """Times of each entry in each round, after two rounds of warming up."""
    times: list[list[tuple[float, float]]] = [[] for _ in entries]
    for turn in range(rounds + 2):
        for index in random.sample(range(len(entries)), len(entries)):
            took = run_once(entries[index])
            if turn >= 2:
                times[index].append(took)
    return times


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, as in a training process.

    There the optimizer's state lies above the gradients on the heap, so that nothing returns to the system between two
    steps; in a process without optimizer each step would pay for page faults instead, in any layer.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold, largest_allowed = -1, -3, 32 << 20
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, largest_allowed)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


# ----------------------------------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------------------------------


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def compare_layers(size: Size, skewed: bool, rounds: int, hidden: Tensor, experts: Tensor) -> str:
    """The layer, its router included, against the dense layer and the peers."""
    entries = list(contenders(size, hidden))
    times = measure(entries, rounds)
    dense = [sum(took) for took in times[0]]
    lines = []
    for entry, took in zip(entries, times, strict=True):
        total = [sum(pair) for pair in took]
        ratio = statistics.median(mine / base for mine, base in zip(total, dense, strict=True))
        forward = statistics.median(pair[0] for pair in took)
        lines.append(
            [
                entry.name,
                entry.form,
                f"{forward:.1f}",
                f"{statistics.median(total):.1f}",
                f"{min(total):.1f}",
                f"{ratio:.2f}",
            ]
        )
    load = torch.bincount(experts.flatten(), minlength=size.num_experts)
    title = f"E={size.num_experts}, K={size.top_k}, {'skewed' if skewed else 'balanced'} routing"
    title += f" (largest load {load.max() / load.float().mean():.1f} x the mean)"
    head = ["layer", "experts", "forward ms", "forward + backward ms", "its minimum", "ratio to dense"]
    return f"### {title}\n\n{table(head, lines)}\n"


def compare_parts(size: Size, rounds: int, hidden: Tensor, experts: Tensor) -> str:
    """Where the time goes, and what the kernels and the separate parameters are worth."""
    tokens = experts.shape[0]
    flat_expert = experts.flatten()
    order = flat_expert.argsort(stable=True)
    routing = SparseRouting(
        token=(order // size.top_k).to(hidden.device),
        weight=torch.rand(order.numel()).to(hidden.device),
        tokens_per_expert=torch.bincount(flat_expert, minlength=size.num_experts).to(hidden.device),
        scores=torch.zeros(tokens, size.num_experts, device=hidden.device),
        num_tokens=torch.tensor(tokens),
        dropped=torch.tensor(0),
    )
    flat = hidden.flatten(0, 1)
    rows = flat[routing.token]

    def build(backend: str) -> Experts:
        return Experts(size.num_experts, size.d_model, size.d_expert, backend=backend).to(hidden)

    loop, grouped = build("loop"), build("grouped_mm")
    stacked = tuple(
        nn.Parameter(torch.stack(list(matrix))) for matrix in (loop.w_in, loop.w_out, loop.b_in or (), loop.b_out or ())
    )

    def mix_stacked(x: Tensor) -> Tensor:
        weights = Weights(*(matrix.unbind(0) for matrix in stacked))
        return loop_mix(x, routing.token, routing.weight, routing.tokens_per_expert, weights, loop.activation)

    def combine(x: Tensor) -> Tensor:
        return torch.zeros_like(flat).index_add(0, routing.token, x * routing.weight.unsqueeze(1).to(x.dtype))

    def entry(name: str, layer: Layer, x: Tensor, parameters: tuple[nn.Parameter, ...] = ()) -> Contender:
        return Contender(name, "", layer, x.clone().requires_grad_(), parameters)

    per_loop, per_grouped = tuple(loop.parameters()), tuple(grouped.parameters())
    entries = [
        entry("gather alone", lambda x: x.index_select(0, routing.token), flat),
        entry("experts alone, loop", lambda x: loop(x, routing.tokens_per_expert), rows, per_loop),
        entry("experts alone, grouped_mm", lambda x: grouped(x, routing.tokens_per_expert), rows, per_grouped),
        entry("combine alone", combine, rows),
        entry("`mix`, loop (fused)", lambda x: loop.mix(x, routing), flat, per_loop),
        entry("`mix`, loop (fused), over one stacked parameter per matrix", mix_stacked, flat, stacked),
        entry("`mix`, grouped_mm", lambda x: grouped.mix(x, routing), flat, per_grouped),
    ]
    lines = []
    for item, took in zip(entries, measure(entries, rounds), strict=True):
        total = [sum(pair) for pair in took]
        lines.append(
            [
                item.name,
                f"{statistics.median(pair[0] for pair in took):.1f}",
                f"{statistics.median(total):.1f}",
                f"{min(total):.1f}",
            ]
        )
    head = ["part", "forward ms", "forward + backward ms", "its minimum"]
    return f"### Parts at E={size.num_experts}, K={size.top_k}, balanced routing\n\n{table(head, lines)}\n"


def header(args: argparse.Namespace, size: Size) -> str:
    """Where, when and on what the numbers were taken."""
    cuda = args.device == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    tokens = size.batch * size.sequence
    return f"""## One MoE layer, forward and backward

- {datetime.date.today().isoformat()}, {machine}, {versions}
- {args.dtype}, T={tokens} ({size.batch} x {size.sequence}), D={size.d_model}, H={size.d_expert}; {args.rounds} rounds
- The dense layer is Linear, GELU, Linear on A = T * K rows: the FLOPs of the experts alone, without router, gather and
  combine.
- Gated experts have three matrices of two thirds the width, hence the same FLOPs. A capacity of 1.25 computes 1.25
  times the rows when balanced and drops tokens when skewed; all other layers drop none.
- A ratio is the median over the rounds of the time over the dense layer's time in the same round.
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and three rounds: does it run?")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="also write the Markdown here")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 3
    keep_freed_memory()
    torch.manual_seed(0)
    random.seed(0)
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16

    def grid(num_experts: int, top_k: int) -> Size:
        return Size(4, 32, 64, 96, num_experts, top_k) if args.quick else Size(8, 256, 256, 1024, num_experts, top_k)

    sections = [header(args, grid(8, 1))]
    for num_experts in (8, 64):
        for top_k in (1, 2):
            size = grid(num_experts, top_k)
            for skewed in (False, True):
                experts = plan(size, skewed)
                hidden = plant(experts, size).to(args.device, dtype)
                sections.append(compare_layers(size, skewed, args.rounds, hidden, experts))
                print(sections[-1], flush=True)
        experts = plan(size, False)
        hidden = plant(experts, size).to(args.device, dtype)
        sections.append(compare_parts(size, args.rounds, hidden, experts))
        print(sections[-1], flush=True)
    print(sections[0])
    if args.output:
        args.output.write_text("\n".join(sections))


if __name__ == "__main__":
    main()
