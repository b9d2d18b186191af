"""The schedule of an evolving mixture: one expert, then many under an ever sparser gate.

Everything here is a pure function of the optimizer step. The one thing that is remembered, how many experts live, is a
buffer of the MoE layers and is saved with the weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.moe import MoELayer, Spawn, spawn_experts
from evomoe.routing import Schedule, ScheduleValues
from evomoe.run_length import to_steps, total_steps

PHASES = ("diversify", "sparsify", "hardened")
"""Logged as ``evolution/phase`` by their index."""

UNSCHEDULED = Schedule(1.0, 1.0, 0)
"""Of a value that has no decay."""


@dataclass(frozen=True)
class Decay:
    """A schedule value on its way, its length counted from the spawn.

    Args:
        start: value at the spawn.
        end: value after ``length``.
        length: optimizer steps (int) or share of the run (float in [0, 1]).
        shape: ``linear``, ``exponential`` or ``cosine``.
    """

    start: float
    end: float
    length: int | float
    shape: str = "linear"


@dataclass(frozen=True)
class EvolutionState:
    """Where a run stands at one optimizer step."""

    phase: str
    temperature: float
    noise_scale: float

    @property
    def hardened(self) -> bool:
        """Whether the final sparse rule holds in training."""
        return self.phase == "hardened"


@dataclass(frozen=True)
class EvolutionPlan:
    """The phases in optimizer steps.

    Args:
        spawn_at: first step with all experts; 0 when there is no diversify phase.
        harden_at: first step under the final sparse rule; None for never.
        total: length of the run.
        temperature: schedule since the spawn.
        noise_scale: schedule since the spawn.
    """

    spawn_at: int
    harden_at: int | None
    total: int
    temperature: Schedule
    noise_scale: Schedule

    def at(self, step: int) -> EvolutionState:
        """State during optimizer step ``step``, counted from 0."""
        since = step - self.spawn_at
        if since < 0:
            phase = "diversify"
        elif self.harden_at is not None and step >= self.harden_at:
            phase = "hardened"
        else:
            phase = "sparsify"
        return EvolutionState(phase, self.temperature.at(since), self.noise_scale.at(since))

    def describe(self) -> str:
        """The plan in one line."""
        parts = [f"diversify [0, {min(self.spawn_at, self.total)})"] if self.spawn_at else []
        sparsify = f"sparsify [{self.spawn_at}, {self.total if self.harden_at is None else self.harden_at})"
        if self.temperature.length:
            sparsify += (
                f", temperature {self.temperature.start:g} to {self.temperature.end:g} "
                f"({self.temperature.shape}) over {self.temperature.length}"
            )
        elif self.temperature != UNSCHEDULED:
            sparsify += f", temperature {self.temperature.end:g}"
        if self.spawn_at < self.total and self.spawn_at != self.harden_at:
            parts.append(sparsify)
        if self.harden_at is not None:
            parts.append(f"hardened [{self.harden_at}, {self.total})")
        return "; ".join(parts)


class Evolution(L.Callback):
    """Schedules diversify, sparsify and harden for every MoE layer of the task's model.

    Steps may be given as optimizer steps (int) or as a share of the run (float in [0, 1]). Any router can follow the
    diversify phase; routers without a temperature ignore it.

    Args:
        diversify: length of the first phase, in which one expert trains; 0 starts with all experts as initialised (the
            first version of the paper, "DTS only").
        harden: when the final sparse rule begins, counted from the start of the run; None keeps the gate adaptive.
        temperature: decay of the gate's temperature, counted from the spawn; None keeps 1.
        noise: decay of the gate's noise scale, counted from the spawn; None keeps 1, as published.
        spawn: how the experts are born.
        seed: of the spawn.
    """

    def __init__(
        self,
        *,
        diversify: int | float = 0,
        harden: int | float | None = None,
        temperature: Decay | None = None,
        noise: Decay | None = None,
        spawn: Spawn | None = None,
        seed: int = 0,
    ) -> None:
        self.diversify = diversify
        self.harden = harden
        self.temperature = temperature
        self.noise = noise
        self.spawn = spawn or Spawn()
        self.seed = seed
        self.plan: EvolutionPlan | None = None
        self.state: EvolutionState | None = None
        self._restored_step: int | None = None
        self._layers: list[tuple[str, MoELayer]] = []

    def make_plan(self, total: int) -> EvolutionPlan:
        """Turn shares of the run into steps, and refuse a plan that cannot happen.

        Args:
            total: optimizer steps of the run.
        """
        spawn_at = to_steps("evolution.diversify", self.diversify, total)
        harden_at = None
        if self.harden is not None:
            harden_at = to_steps("evolution.harden", self.harden, total)
            if isinstance(self.diversify, float) and isinstance(self.harden, float) and self.diversify < self.harden:
                harden_at = max(harden_at, spawn_at + 1)  # not rounded together
        if harden_at is not None and harden_at <= spawn_at:
            raise ConfigError(
                f"evolution.harden={self.harden} is step {harden_at}, not after the spawn at step {spawn_at} "
                f"(evolution.diversify={self.diversify}): harden later or diversify shorter"
            )
        for name, at in (("diversify", spawn_at), ("harden", harden_at)):
            if at is not None and at >= max(total, 1):
                raise ConfigError(
                    f"evolution.{name}={getattr(self, name)} is step {at}, past the end of a run of {total} optimizer "
                    f"steps: choose an earlier step or a longer run (trainer.max_steps)"
                )
        temperature = self._schedule("temperature", self.temperature, spawn_at, total)
        if min(temperature.start, temperature.end) <= 0:
            raise ConfigError(f"evolution.temperature ends at {temperature.end}: expected temperatures above 0")
        noise_scale = self._schedule("noise", self.noise, spawn_at, total)
        if min(noise_scale.start, noise_scale.end) < 0:
            raise ConfigError(f"evolution.noise ends at {noise_scale.end}: expected noise scales of at least 0")
        return EvolutionPlan(spawn_at, harden_at, total, temperature, noise_scale)

    def _schedule(self, name: str, decay: Decay | None, spawn_at: int, total: int) -> Schedule:
        if decay is None:
            return UNSCHEDULED
        length = to_steps(f"evolution.{name}.length", decay.length, total)
        shares = isinstance(self.diversify, float) and isinstance(decay.length, float)
        if shares and self.diversify + decay.length <= 1:
            length = min(length, max(total, 1) - spawn_at)  # not rounded past the end together
        if spawn_at + length > max(total, 1):
            raise ConfigError(
                f"evolution.{name}.length={decay.length} is {length} steps from the spawn at step {spawn_at}, past the "
                f"end of a run of {total} optimizer steps: choose a shorter one or a longer run (trainer.max_steps)"
            )
        return Schedule(decay.start, decay.end, length, decay.shape)

    def _overrides_of(self, plan: EvolutionPlan) -> str:
        """What a command line needs to have ``plan`` whatever the length of the run."""
        steps = {"diversify": plan.spawn_at, "harden": plan.harden_at}
        if self.temperature is not None:
            steps["temperature.length"] = plan.temperature.length
        if self.noise is not None:
            steps["noise.length"] = plan.noise_scale.length
        return " ".join(f"evolution.{key}={'null' if at is None else at}" for key, at in steps.items())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a model without MoE layers, and put a fresh one into the diversify phase.

        A resumed run restores its weights, and with them the number of live experts, after this hook. A second fit in
        the same process goes on with the experts that it has.
        """
        layers = moe_layers(pl_module)
        if not layers:
            raise ConfigError("evolution needs a model with MoE layers: set evolution=none or model.moe_every=2")
        if stage == "fit" and self.diversify > 0 and self.plan is None:
            for _, layer in layers:
                layer.live_experts = 1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resolve the plan, and refuse one that cannot happen before any training."""
        plan = self.make_plan(total_steps(trainer))
        if self.plan is not None and replace(self.plan, total=plan.total) != plan:
            step = trainer.global_step if self._restored_step is None else self._restored_step
            before, after = (PHASES.index(of.at(step).phase) for of in (self.plan, plan))
            if after < before:
                raise ConfigError(
                    f"the checkpoint at step {step} is {PHASES[before]} ({self.plan.describe()}), and this plan would"
                    f" take it back to {PHASES[after]} ({plan.describe()}): keep the plan of the checkpoint, with"
                    f" {self._overrides_of(self.plan)}"
                )
            keeping = self._overrides_of(self.plan)
            rank_zero_warn(
                f"The checkpoint was trained under another plan ({self.plan.describe()})"
                + (f", which {keeping} would keep." if keeping else "."),
                category=EvomoeWarning,
            )
        idle = [name for name in ("temperature", "noise", "harden") if getattr(self, name) is not None]
        deaf = {type(layer.router).__name__ for _, layer in moe_layers(pl_module) if not layer.router.scheduled}
        if idle and deaf:
            rank_zero_warn(
                f"{', '.join(deaf)} has no schedule: evolution.{', evolution.'.join(idle)} do nothing.",
                category=EvomoeWarning,
            )
        self.plan = plan
        rank_zero_info(f"Evolution: {self.plan.describe()}")
        self.state = None
        self._layers = moe_layers(pl_module)
        self.apply(pl_module, trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Spawn when it is time, and tell every router the values of this optimizer step."""
        assert self.plan is not None
        if trainer.global_step >= self.plan.spawn_at:
            unborn = [(name, layer) for name, layer in self._layers if not layer.routes]
            if unborn:
                spawn_experts(unborn, self.spawn, self.seed, trainer.optimizers[0])
                number = unborn[0][1].num_experts
                rank_zero_info(
                    f"Step {trainer.global_step}: one expert became {number} in {len(unborn)} layers "
                    f"(method {self.spawn.method}, ratio {self.spawn.ratio:g})"
                )
        self.apply(pl_module, trainer.global_step)
        assert self.state is not None
        # Only in the steps that Lightning passes on to the loggers: a call of log() costs a good part of a millisecond.
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            pl_module.log_dict(
                {
                    "evolution/phase": float(PHASES.index(self.state.phase)),
                    "evolution/temperature": self.state.temperature,
                    "evolution/noise_scale": self.state.noise_scale,
                }
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on the trainer's own step counts."""
        self._restored_step = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate under the values of the last step, or of that of the checkpoint that was loaded for it."""
        self.state = None
        self.apply_last(pl_module, trainer.global_step if self._restored_step is None else self._restored_step)

    on_test_start = on_validation_start

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step of the weights: Lightning restores it for a fit only."""
        self._restored_step = checkpoint["global_step"]

    def apply_last(self, module: nn.Module, steps: int) -> None:
        """Set every router of ``module`` to the values under which the last of ``steps`` optimizer steps was taken.

        Not to those of the next one: a validation where a phase ends tells of the rule that has trained so far.
        """
        self.apply(module, max(steps - 1, 0))

    def apply(self, module: nn.Module, step: int) -> None:
        """Set every router of ``module`` to the values of optimizer step ``step``."""
        if self.plan is None:
            raise RuntimeError("the plan is not known yet: fit, or load a checkpoint of this callback, first")
        state = self.plan.at(step)
        if state == self.state:
            return
        self.state = state
        values = ScheduleValues(state.temperature, state.noise_scale, state.hardened)
        for _, layer in moe_layers(module):
            layer.router.set_schedule(values)

    def state_dict(self) -> dict[str, Any]:
        """The plan in plain values, so that a checkpoint can be evaluated without its data."""
        return {} if self.plan is None else {"plan": asdict(self.plan)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the plan under which the weights were trained."""
        if state_dict:
            plan = state_dict["plan"]
            schedules = {name: Schedule(**plan[name]) for name in ("temperature", "noise_scale")}
            self.plan = EvolutionPlan(**{**plan, **schedules})


def moe_layers(module: nn.Module) -> list[tuple[str, MoELayer]]:
    """The MoE layers of a module by their qualified names, in order."""
    return [
        (name.replace("_orig_mod.", ""), layer)  # a compiled module's layers keep their names
        for name, layer in module.named_modules()
        if isinstance(layer, MoELayer)
    ]
