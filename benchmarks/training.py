"""Time whole training steps: every phase of an evolution, Lightning, monitoring, and Hugging Face's Trainer.

    python benchmarks/training.py [--quick] [--device cuda] [--precision bf16] [--output training.md]

A step is forward, backward, clipping and fused AdamW, on random tokens. What is compared takes turns, step by step or,
against Hugging Face, fit by fit, and a ratio is the median over the rounds of the ratio within a round, so that a drift
of the machine's speed reaches both sides.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from hugging_face import measure_hugging_face
from report import Check, Section, facts, median_ratio
from steps import LOG_EVERY, OPTIMIZATION, Batch, Setting, Size, bare_step, default_callbacks, fit

from evomoe.callbacks import Evolution
from evomoe.callbacks.console.summary import markdown
from evomoe.callbacks.evolution import Decay
from evomoe.routing import Routing, ScheduleValues
from evomoe.tasks import LanguageModeling

WARM_UP = 3
SIZES = {
    "quick": [Size("gpt_tiny", 32, 2, ("model=gpt_tiny",))],
    "cpu": [
        Size("gpt_mini (D=128)", 256, 8, ("model=gpt_mini",)),
        Size("gpt_mini with D=256", 256, 8, ("model=gpt_mini", "model.d_model=256")),
    ],
    "cuda": [Size("gpt_small (D=768)", 1024, 16, ("model=gpt_small",))],
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# ----------------------------------------------------------------------------------------------------------------------
# Phases
# ----------------------------------------------------------------------------------------------------------------------


def measure_phases(setting: Setting) -> Section:
    """Dense, Switch, and DTS with the schedule values of ``evolution=dts``, in a loop without any framework."""
    late = ScheduleValues(temperature=0.05, noise_scale=0.0)
    hardened = ScheduleValues(temperature=0.05, noise_scale=0.0, hardened=True)
    tasks = {
        "dense": setting.task("gpt_dense"),
        "Switch, capacity factor 1.25": setting.task("gpt_switch"),
        "Switch, dropless": setting.task("gpt_switch", "router.gate.capacity_factor=null"),
        "DTS, diversify": put(setting.task("gpt_dts"), ScheduleValues(), live=1),
        "DTS, sparsify, temperature 2": put(setting.task("gpt_dts"), ScheduleValues(temperature=2.0)),
        "DTS, sparsify, temperature 0.05": put(setting.task("gpt_dts"), late),
        "DTS, hardened": put(setting.task("gpt_dts"), hardened),
    }
    batch = setting.batch()
    routings: dict[str, list[Routing]] = {}

    def step_of(name: str, task: LanguageModeling) -> Callable[[], None]:
        optimizer = OPTIMIZATION.optimizer(task)

        def step() -> None:
            routings[name] = bare_step(task, optimizer, batch, setting)

        return step

    times = take_turns({name: step_of(name, task) for name, task in tasks.items()}, setting)
    dense, switch = times["dense"], times["Switch, dropless"]
    dense_flops = tasks["dense"].model.flops_per_token(setting.size.context)
    rows = []
    for name, took in times.items():
        active = [float(routing.active_experts) for routing in routings[name]]  # type: ignore[union-attr]
        flops = tasks[name].model.flops_per_token(setting.size.context, active)
        rows.append(
            [
                name,
                f"{statistics.mean(active):.2f}" if active else "-",
                *speed(took, setting),
                f"{flops / dense_flops:.2f}",
                f"{median_ratio(took, dense):.2f}",
                f"{median_ratio(took, switch):.2f}",
            ]
        )
    header = ["step", "active experts", *SPEED, "FLOPs to dense", "time to dense", "time to dropless Switch"]
    name = setting.size.name
    checks = [
        Check("diversify phase to dense", name, median_ratio(times["DTS, diversify"], dense), 1.10),
        Check("hardened phase to dropless Switch", name, median_ratio(times["DTS, hardened"], switch), 1.15),
    ]
    return Section(f"### Phases, bare PyTorch loop, {name}\n\n{markdown(header, rows)}", checks)


def put(task: LanguageModeling, values: ScheduleValues, live: int | None = None) -> LanguageModeling:
    """Set every MoE layer to a phase; ``live=None`` for all experts."""
    for layer in task.model.moe_layers.values():
        layer.live_experts = live or layer.num_experts
        layer.router.set_schedule(values)
    return task


def take_turns(steps: Mapping[str, Callable[[], object]], setting: Setting) -> dict[str, list[float]]:
    """Milliseconds of each step by round, in random order; a step before each brings its own weights to the cache."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + setting.rounds):
        for name in random.sample(list(steps), len(steps)):
            steps[name]()
            start = setting.now()
            steps[name]()
            stop = setting.now()
            if turn >= WARM_UP:
                times[name].append(stop - start)
    return times


# ----------------------------------------------------------------------------------------------------------------------
# Lightning and monitoring
# ----------------------------------------------------------------------------------------------------------------------


class Alternation:
    """A loader that makes the even steps of a fit plain and the odd ones monitored, with a bare step before each.

    All three are steps of the same model and optimizer. Lightning's step lasts from handing out a batch to being asked
    for the next one; a plain one has no callbacks and no logger.

    Args:
        task: what is trained.
        steps: of the fit.
        setting: of the measurement.
    """

    def __init__(self, task: LanguageModeling, steps: int, setting: Setting) -> None:
        self.task = task
        self.steps = steps
        self.setting = setting
        self.bare: list[float] = []
        self.fitted: list[float] = []

    def __len__(self) -> int:  # so that Lightning fetches no batch ahead
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        trainer, now, batch = self.task.trainer, self.setting.now, self.setting.batch()
        watching = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
        for step in range(self.steps):
            trainer.callbacks, trainer.loggers = watching if step % 2 else ([], [])  # type: ignore[attr-defined]
            start = now()
            bare_step(self.task, trainer.optimizers[0], batch, self.setting)
            middle = now()
            yield batch
            self.bare.append(middle - start)
            self.fitted.append(now() - middle)


def measure_lightning(setting: Setting) -> Section:
    """What Lightning costs, and what monitoring costs on top, late in the sparsify phase."""
    window = 2 * LOG_EVERY  # every other step is monitored, the last of them with a log
    steps = window * (1 + setting.rounds) + 1  # the first window warms up; the end of the last step is not seen
    evolution = Evolution(temperature=Decay(0.06, 0.05, steps), noise=Decay(0.0, 0.0, steps))
    task = setting.task("gpt_dts")
    turns = Alternation(task, steps, setting)
    fit(task, turns, steps, default_callbacks(evolution), window, setting)

    bare, fitted = turns.bare[window:], turns.fitted[window : steps - 1]
    ratios = [a / b for a, b in zip(fitted, bare, strict=False)]  # each to the bare step right before it
    lightning = statistics.median(ratios[::2])
    quiet = statistics.median(ratio for step, ratio in enumerate(ratios) if step % 2 and (step + 1) % window)
    logging_step = statistics.median(ratios[window - 1 :: window])
    monitored = (quiet * (LOG_EVERY - 1) + logging_step) / LOG_EVERY
    rows = [
        ["bare loop", *speed(bare, setting), "1.000"],
        ["Lightning", *speed(fitted[::2], setting), f"{lightning:.3f}"],
        ["Lightning, monitored, without a log", *speed(fitted[1::2], setting), f"{quiet:.3f}"],
        ["Lightning, monitored, with a log", *speed(fitted[window - 1 :: window], setting), f"{logging_step:.3f}"],
    ]
    header = ["step", *SPEED, "time to bare"]
    name = setting.size.name
    checks = [
        Check("Lightning to the bare loop", name, lightning, 1.03),
        Check("monitored to plain Lightning", name, monitored / lightning, 1.02),
    ]
    return Section(f"### Lightning and monitoring, {name}\n\n{markdown(header, rows)}", checks)


# ----------------------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------------------

SPEED = ["ms", "minimum", "tokens/s"]
PARTS = {"phases": measure_phases, "lightning": measure_lightning, "hugging_face": measure_hugging_face}


def speed(times: Sequence[float], setting: Setting) -> list[str]:
    """Median and minimum of the milliseconds, and tokens per second by the median."""
    middle = statistics.median(times)
    return [f"{middle:.1f}", f"{min(times):.1f}", f"{setting.size.tokens / middle * 1e3:,.0f}"]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: does it run?")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write the Markdown here")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="cpu: processor time of this process, for a machine shared with others; wants OMP_NUM_THREADS=1",
    )
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    random.seed(0)

    rounds = 2 if args.quick else args.rounds
    sizes = SIZES["quick" if args.quick else args.device]
    sections = []
    for size in sizes:
        setting = Setting(size, torch.device(args.device), args.precision, rounds, CLOCKS[args.clock])
        for part in args.parts:
            sections.append(PARTS[part](setting))
            print(sections[-1].text, flush=True)
    checks = [check.row() for section in sections for check in section.checks]
    head = (
        "## Whole training steps\n\n"
        + facts(args.device, f"lightning {L.__version__}", f"{args.precision}, {args.clock} time, {rounds} rounds")
        + "".join(f"- {size.name}: {size.batch} sequences of {size.context} tokens a step\n" for size in sizes)
        + "\n"
        + markdown(["ratio of times", "size", "measured", "target", ""], checks)
    )
    print(head)
    if args.output:
        args.output.write_text("\n".join([head, *(section.text for section in sections)]))


if __name__ == "__main__":
    main()
