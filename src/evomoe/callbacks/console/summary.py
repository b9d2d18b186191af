"""What a run did, phase by phase: the closing table, and ``summary.json`` and ``summary.md`` in its folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evomoe.callbacks.console.status import phase_of, shorten
from evomoe.callbacks.tensorboard import find_tensorboard
from evomoe.checkpointing import newest_checkpoint
from evomoe.models.flops import Work

LOSS_WINDOW = 50
FETCH_BATCHES = 100


@dataclass
class PhaseTotals:
    """Sums over one phase, in plain values.

    Args:
        phase: its name.
        first_step: optimizer step at which it began, counted from 0.
        steps: optimizer steps.
        seconds: wall-clock time without validation.
        tokens: real tokens trained on, by all processes.
        training_flops: of all processes, each taken to do what the first one does.
        rows: rows that experts computed, summed over the MoE layers of the first process.
        routed_tokens: real tokens that reached an MoE layer, summed alike.
        losses: training losses of the last 50 batches.
        validation: last validation metrics by name.
    """

    phase: str
    first_step: int
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    training_flops: float = 0.0
    rows: int = 0
    routed_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)


class RunSummary(L.Callback):
    """Collects steps, time, work and losses of every phase; a resumed run reports all of its parts as one.

    Active experts per token are the rows that experts computed over the real tokens, both summed over MoE layers and
    batches. Speed and FLOPs are those of real tokens too, which bear the FLOPs of the padding beside them. Counts and
    losses stay on the device and are fetched every 100 batches, so that no step waits for them.
    When the fit ends, ``summary.json`` and ``summary.md`` are written to the trainer's root folder.
    """

    def __init__(self) -> None:
        self.phases: list[PhaseTotals] = []
        self._tokens: list[Tensor] = []  # of the current phase, not fetched yet, as are the two below
        self._routed_tokens: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._batches = 0
        self._world_size = 1
        self._last_step = 0
        self._clock: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, at the step of the checkpoint if the run continues one."""
        self._last_step = trainer.global_step
        self._clock = time.monotonic()
        self._world_size = trainer.world_size

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add one batch to its phase."""
        name = phase_of(trainer)
        if not self.phases or self.phases[-1].phase != name:
            self._fetch()
            self.phases.append(PhaseTotals(name, first_step=self._last_step))
        phase = self.phases[-1]

        now = time.monotonic()
        if self._clock is not None:
            phase.seconds += now - self._clock
        self._clock = now
        phase.steps += trainer.global_step - self._last_step
        self._last_step = trainer.global_step

        work: Work = outputs["work"]
        phase.training_flops += work.training_flops * trainer.world_size
        phase.rows += sum(routing.rows for routing in outputs["routings"])
        self._routed_tokens.extend(routing.num_tokens for routing in outputs["routings"])
        self._tokens.append(torch.as_tensor(work.tokens))
        self._losses.append(outputs["task_loss"])
        self._batches += 1
        if self._batches == FETCH_BATCHES:
            self._fetch()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._clock = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics as those of the phase that trained last; start the clock again."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        if self.phases:
            found = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
            self.phases[-1].validation = found
        self._clock = time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary."""
        if trainer.is_global_zero:
            self.write(trainer.default_root_dir)

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        self._fetch()
        return {"phases": [asdict(phase) for phase in self.phases]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the sums of the run's earlier part."""
        self.phases = [PhaseTotals(**phase) for phase in state_dict["phases"]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: ``phases``, a list in order, and ``whole_run``, whose losses are those at its end."""
        self._fetch()
        phases = [self._describe(phase) for phase in self.phases]
        return {"phases": phases, "whole_run": self._describe_whole(phases)}

    def render(self) -> Table:
        """The table of the terminal: a column for each phase and one for the whole run."""
        header, *rows = table_of(self.as_dict())
        table = Table(title="What the run did", title_justify="left", title_style="bold")
        table.add_column(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        return table

    def write(self, folder: str | Path) -> None:
        """Write ``summary.json`` and ``summary.md`` to ``folder``."""
        values = self.as_dict()
        header, *rows = table_of(values)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / "summary.md").write_text(markdown(header, rows), encoding="utf-8")

    def _fetch(self) -> None:
        """Bring the counts and losses of the current phase to the host."""
        if self._batches:
            phase = self.phases[-1]
            phase.tokens += self._world_size * int(torch.stack(self._tokens).sum())
            if self._routed_tokens:
                phase.routed_tokens += int(torch.stack(self._routed_tokens).sum())
            losses = torch.stack(self._losses[-LOSS_WINDOW:]).tolist()
            phase.losses = (phase.losses + losses)[-LOSS_WINDOW:]
        self._tokens, self._routed_tokens, self._losses, self._batches = [], [], [], 0

    def _describe(self, phase: PhaseTotals) -> dict[str, Any]:
        active = phase.rows / phase.routed_tokens if phase.routed_tokens else None
        return {
            "phase": phase.phase,
            "first_step": phase.first_step,
            "steps": phase.steps,
            "seconds": phase.seconds,
            "tokens": phase.tokens,
            "tokens_per_second": phase.tokens / phase.seconds if phase.seconds else None,
            "active_experts": active,
            "training_flops_per_token": phase.training_flops / phase.tokens if phase.tokens else None,
            "train_loss": sum(phase.losses) / len(phase.losses) if phase.losses else None,
            "validation": phase.validation,
        }

    def _describe_whole(self, phases: list[dict[str, Any]]) -> dict[str, Any]:
        whole = PhaseTotals("whole run", first_step=0)
        for phase in self.phases:
            whole.steps += phase.steps
            whole.seconds += phase.seconds
            whole.tokens += phase.tokens
            whole.training_flops += phase.training_flops
            whole.rows += phase.rows
            whole.routed_tokens += phase.routed_tokens
            whole.losses = phase.losses
            whole.validation = phase.validation or whole.validation
        return self._describe(whole)


def table_of(values: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the summary as words, header first; quantities that no phase has are left out."""
    columns = [*values["phases"], values["whole_run"]]
    quantities: list[tuple[str, str, Callable[[Any], str]]] = [
        ("optimizer steps", "steps", str),
        ("time without validation", "seconds", lambda seconds: str(timedelta(seconds=round(seconds)))),
        ("tokens", "tokens", shorten),
        ("tokens per second", "tokens_per_second", shorten),
        ("active experts per token", "active_experts", "{:.2f}".format),
        ("training FLOPs per token", "training_flops_per_token", shorten),
        (f"train loss, last {LOSS_WINDOW} batches", "train_loss", "{:.4f}".format),
    ]
    rows = [["", *(column["phase"] for column in columns)]]
    for title, key, words in quantities:
        if any(column[key] is not None for column in columns):
            rows.append([title, *("-" if column[key] is None else words(column[key]) for column in columns)])
    measured = [column["validation"] for column in columns]
    for name in dict.fromkeys(name for values in measured for name in values):
        form = ".4f" if "loss" in name else ".5g"
        cells = [format(values[name], form) if name in values else "-" for values in measured]
        rows.append([_in_words(name, measured), *cells])
    return rows


def _in_words(name: str, measured: Sequence[Mapping[str, float]]) -> str:
    """``val/loss_sparse`` as ``val loss, sparse rule``; a metric without a twin needs no rule."""
    known = {name for values in measured for name in values}
    plain = name.removesuffix("_sparse")
    rule = ", sparse rule" if name != plain else ", training rule" if f"{name}_sparse" in known else ""
    return plain.replace("/", " ").replace("_", " ") + rule


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_closing(
    summary: RunSummary, trainer: L.Trainer, values: Mapping[str, float], console: Console | None = None
) -> None:
    """Print the table of the run, its test metrics, where its files lie, and the command that shows its curves.

    Args:
        summary: callback of the run.
        trainer: of the run.
        values: last value of every metric by name; those under ``test/`` are printed.
        console: where to print; stdout by default.
    """
    console = console or Console()
    console.print(summary.render())
    folder = Path(trainer.default_root_dir)
    test = [f"{name.removeprefix('test/')} {value:.5g}" for name, value in values.items() if name.startswith("test/")]
    checkpoint = newest_checkpoint(folder)
    lines = {
        "test": ", ".join(test),
        "checkpoint": _shown(checkpoint) if checkpoint else "",
        "run folder": _shown(folder),
        "curves": f"{_tensorboard()} --logdir {_shown(folder)}" if find_tensorboard(trainer) else "",
    }
    for title, text in lines.items():
        if text:  # one unbroken line each: it is there to be copied
            console.print(f"{title:<12}{text}", soft_wrap=True, markup=False, highlight=False)


def _shown(path: str | Path) -> str:
    """A path as short as it can be from here, quoted where a shell would need it."""
    relative = os.path.relpath(path)
    text = str(path) if relative.startswith("..") else relative
    return shlex.quote(text)


def _tensorboard() -> str:
    """TensorBoard's command; it lies beside the interpreter when its environment is not activated."""
    beside = Path(sys.executable).parent / "tensorboard"
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else _shown(beside)
