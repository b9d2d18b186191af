"""The course of a run as a table: at each validation, what had been spent and what it had brought.

Shapes: E experts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from evomoe.models.flops import Work
from evomoe.routing import Routing, SparseRouting
from evomoe.routing.metrics import load_max_violation

HISTORY_FILE = "history.json"
LOSSES = {"val_loss": "val/loss", "val_loss_sparse": "val/loss_sparse"}


@dataclass
class Spent:
    """What training has cost since the run began, over all processes, each taken to do what this one does.

    Args:
        tokens: real tokens trained on.
        training_flops: see :class:`~evomoe.models.flops.Work`.
        seconds: wall-clock time of the training steps.
        cpu_seconds: time of all threads on the processor during the same steps.
    """

    tokens: int = 0
    training_flops: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Routed:
    """What the routers of one process did since the last row.

    Sums stay tensors on their device until someone asks, so that no training step waits for them.

    Args:
        batches: number of batches.
        rows: rows that experts computed, over all MoE layers.
        tokens: real tokens that reached an MoE layer, over all of them.
        load: tokens that the router chose for each expert, ``(E,)`` by layer.
        violation: MaxVio of each batch, summed, 0-dim by layer.
        metrics: further metrics of the routers by name, summed over layers and batches, 0-dim.
        measured: how many values each of these sums has.
    """

    batches: int = 0
    rows: int = 0
    tokens: Tensor = field(default_factory=lambda: torch.tensor(0))
    load: dict[str, Tensor] = field(default_factory=dict)
    violation: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)

    def add(self, layers: Iterable[str], routings: Sequence[Routing]) -> None:
        """Add one batch. The slots of a soft routing are equally loaded by construction, and have no load to add."""
        self.batches += 1
        for layer, routing in zip(layers, routings, strict=True):
            self.rows += routing.rows
            self.tokens = self.tokens.to(routing.num_tokens.device) + routing.num_tokens
            if isinstance(routing, SparseRouting):
                violation = load_max_violation(routing.load)
                known = layer in self.load
                self.load[layer] = self.load[layer] + routing.load if known else routing.load
                self.violation[layer] = self.violation[layer] + violation if known else violation
            for name, value in routing.metrics.items():
                self.metrics[name] = self.metrics[name] + value if name in self.metrics else value
                self.measured[name] = self.measured.get(name, 0) + 1

    def describe(self) -> dict[str, Any]:
        """Means in plain values."""
        tokens = int(self.tokens)
        load = {layer: counts.tolist() for layer, counts in self.load.items()}
        return {
            "active_experts": self.rows / tokens if tokens else None,
            "load": {layer: [count / max(sum(counts), 1) for count in counts] for layer, counts in load.items()},
            "load_max_violation": {layer: float(total) / self.batches for layer, total in self.violation.items()},
            "router_metrics": {name: float(total) / self.measured[name] for name, total in self.metrics.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums in plain values."""
        return {
            "batches": self.batches,
            "rows": self.rows,
            "tokens": int(self.tokens),
            "load": {layer: load.tolist() for layer, load in self.load.items()},
            "violation": {layer: float(total) for layer, total in self.violation.items()},
            "metrics": {name: float(total) for name, total in self.metrics.items()},
            "measured": dict(self.measured),
        }

    @classmethod
    def restore(cls, state: dict[str, Any], device: torch.device) -> Routed:
        """Inverse of :meth:`state_dict`."""
        return cls(
            batches=state["batches"],
            rows=state["rows"],
            tokens=torch.tensor(state["tokens"], device=device),
            load={layer: torch.tensor(load, device=device) for layer, load in state["load"].items()},
            violation={layer: torch.tensor(total, device=device) for layer, total in state["violation"].items()},
            metrics={name: torch.tensor(total, device=device) for name, total in state["metrics"].items()},
            measured=dict(state["measured"]),
        )


class History(L.Callback):
    """Keeps one row per validation: cost so far, loss under both rules, and what the routers did since the last row.

    A row has ``step``; ``tokens``, ``training_flops``, ``seconds`` and ``cpu_seconds`` (see :class:`Spent`) up to it;
    ``val_loss`` and ``val_loss_sparse``; and since the last row ``active_experts`` (rows that experts computed per real
    token, mean over the MoE layers, None without any), ``load`` (share of each expert by layer),
    ``load_max_violation`` (mean over the batches, by layer) and ``router_metrics`` (what a router says of itself, mean
    over layers and batches). Times are those of the steps alone: waiting for data,
    validation and saving are left out, and so is the spawn.

    The rows travel in the checkpoint: but for the times, a resumed run has those of one that was never stopped. When
    the fit ends they are written to ``history.json`` in the trainer's root folder, and once more with the metrics of a
    test; with ``steps``, the length of the run, and ``data``, the fingerprint of its data.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.spent = Spent()
        self._routed = Routed()
        self._restored: dict[str, Any] | None = None
        self._causal_in_train = True
        self._started = (0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from the sums of a checkpoint, on the device of this run."""
        if self._restored is not None:
            self._routed = Routed.restore(self._restored, pl_module.device)
            self._restored = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start both clocks."""
        self._started = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Charge one batch."""
        work: Work = outputs["work"]
        # First of all: a count on a GPU is waited for, and so is the optimizer step, which the clocks must see.
        self.spent.tokens += int(work.tokens) * trainer.world_size
        wall, cpu = self._started
        self.spent.seconds += time.perf_counter() - wall
        self.spent.cpu_seconds += (time.process_time() - cpu) * trainer.world_size
        self.spent.training_flops += work.training_flops * trainer.world_size
        self._routed.add(pl_module.model.moe_layers, outputs["routings"])  # type: ignore[union-attr,arg-type]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a row."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        losses = {key: trainer.callback_metrics.get(name) for key, name in LOSSES.items()}
        self.rows.append(
            {
                "step": trainer.global_step,
                **asdict(self.spent),
                **{key: None if loss is None else float(loss) for key, loss in losses.items()},
                **self._routed.describe(),
            }
        )
        self._routed = Routed()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows."""
        network: Any = pl_module.model
        of_causal = [name for name, block in network.named_blocks.items() if block.attention.causal]
        self._causal_in_train = all(
            layer.router.causal_in_train for name, layer in network.moe_layers.items() if name in of_causal
        )
        self._write(trainer, {})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write them again, with the metrics of the test."""
        metrics = trainer.callback_metrics
        self._write(trainer, {name: float(value) for name, value in metrics.items() if name.startswith("test/")})

    def state_dict(self) -> dict[str, Any]:
        """Rows and sums in plain values."""
        return {"rows": list(self.rows), "spent": asdict(self.spent), "routed": self._routed.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the earlier part of the run."""
        self.rows = list(state_dict["rows"])
        self.spent = Spent(**state_dict["spent"])
        self._restored = state_dict["routed"]

    def _write(self, trainer: L.Trainer, test: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        values = {
            "causal_in_train": self._causal_in_train,
            "data": getattr(trainer.datamodule, "fingerprint", None),  # type: ignore[attr-defined]
            "steps": trainer.global_step,
            "rows": self.rows,
            "test": test,
        }
        path = Path(trainer.default_root_dir) / HISTORY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
