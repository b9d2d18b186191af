"""How a run begins with a pretrained encoder: which one, what is taken from it, and what a run may still choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from evomoe.callbacks import HeldEvolution
from evomoe.checkpointing import load_checkpoint, newest_checkpoint
from evomoe.data import Tokenizer
from evomoe.data.corpus import flatten
from evomoe.errors import ConfigError
from evomoe.models.roberta import Encoder
from evomoe.restoring import FREE_KEYS, check_targets, config_of, resolve_checkpoint, runs_below, trained_evolution
from evomoe.tasks import MaskedLanguageModeling, SequenceClassification

OF_HEAD = ("_target_", "num_classes", "head_dropout")
"""Further keys of the model that a pretrained one does not decide."""


@dataclass
class Pretrained:
    """A pretrained encoder, of which another run takes model, router, the state of their evolution, and tokenizer.

    Args:
        path: its checkpoint.
        checkpoint: the loaded file.
        config: its configuration.
        evolution: configuration of the schedule of the run that takes it.
        replaced: what that run had set otherwise before :meth:`configure`, as ``key=value``.
    """

    path: Path
    checkpoint: Mapping[str, Any]
    config: DictConfig
    evolution: DictConfig | None
    replaced: Sequence[str] = ()

    @property
    def tokenizer(self) -> Tokenizer:
        """With which it was trained."""
        return Tokenizer.from_checkpoint(self.checkpoint)

    def describe(self) -> str:
        """What is taken, and in place of what, in one line."""
        gate = OmegaConf.select(self.config, "router.gate._target_")
        router = "no router" if gate is None else f"{gate.rpartition('.')[2]}"
        phase = f", {self.evolution.phase} for good" if self.evolution else ""
        replaced = f"; its own values replace {', '.join(self.replaced)}" if self.replaced else ""
        step = self.checkpoint["global_step"]
        return f"Starting from {self.path} (step {step}): its encoder with {router}{phase}{replaced}"

    def configure(self, config: DictConfig, overrides: Sequence[str] = ()) -> None:
        """Give a run the model, router and schedule, but for its own dropout, kernels and head.

        Args:
            config: of the run.
            overrides: that its user typed. Options of the router among them win over the pretrained ones.

        Raises:
            ConfigError: the run is of another method, wants more context than the model has, or a size or schedule of
                its own.
        """
        gates = [OmegaConf.select(node, "router.gate._target_") for node in (self.config, config)]
        if gates[0] != gates[1]:
            there, here = ("no router" if gate is None else gate.rpartition(".")[2] for gate in gates)
            raise ConfigError(
                f"init_from={self.path} was trained with {there} and this run has {here}: choose the experiment of the"
                " same method, such as experiment=glue_dts for experiment=mlm_dts"
            )
        if config.data.context > self.config.model.context:
            raise ConfigError(
                f"data.context={config.data.context} is more than the {self.config.model.context} tokens that"
                f" init_from={self.path} reads: set data.context={self.config.model.context}"
            )
        typed = {override.partition("=")[0].lstrip("+~"): override for override in overrides}
        for key, override in typed.items():
            group, _, name = key.partition(".")
            if group == "evolution" or (group == "model" and name and name not in (*FREE_KEYS, *OF_HEAD)):
                raise ConfigError(
                    f"{override} cannot be chosen with init_from={self.path}, which brings its own: leave it out"
                )
        of_router = {key: OmegaConf.select(config, key) for key in typed if key.startswith("router.")}
        theirs, before = (_method(node) for node in (self.config, config))
        if theirs.get("evolution._target_") != before.get("evolution._target_"):
            # Of a fine-tuned model, whose schedule stands still already: there is nothing to compare.
            before = {key: value for key, value in before.items() if not key.startswith("evolution.")}
        with open_dict(config):
            for key, value in self.config.model.items():
                if key not in (*FREE_KEYS, *OF_HEAD):
                    config.model[key] = value
            config.router = self.config.router
            config.evolution = self.evolution
            for key, value in of_router.items():
                OmegaConf.update(config, key, value)
        taken = _method(config) | {key: value for key, value in theirs.items() if key.startswith("evolution.")}
        self.replaced = [f"{key}={value}" for key, value in before.items() if taken.get(key) != value]

    def initialize(self, task: SequenceClassification) -> None:
        """Load the weights of the encoder.

        Raises:
            ConfigError: they are of another model than that of the task.
        """
        try:
            task.load_pretrained(self.checkpoint["state_dict"])
        except RuntimeError as error:
            raise ConfigError(
                f"the weights of init_from={self.path} do not fit this run's model: leave out router.gate.*, or choose"
                " another checkpoint"
            ) from error


def _method(config: DictConfig) -> dict[str, Any]:
    """What a pretrained model decides, by key, without what follows other keys, as the context follows that of data."""
    groups: Any = {name: OmegaConf.to_container(config[name]) for name in ("model", "router")}
    if config.evolution is not None:
        groups["evolution"] = OmegaConf.to_container(config.evolution)
    free = {f"model.{key}" for key in (*FREE_KEYS, *OF_HEAD)}
    return {key: value for key, value in flatten(groups).items() if key not in free and "${" not in str(value)}


def find_pretrained(config: DictConfig, resume_from: Path | None) -> Pretrained | None:
    """What ``init_from`` names; None without it. A run that goes on finds all of it in its own checkpoint.

    Afterwards ``init_from`` is the file.

    Args:
        config: of the run.
        resume_from: checkpoint from which it goes on.

    Raises:
        ConfigError: there is no such checkpoint, it is of another kind, or the run cannot begin with any.
    """
    if not issubclass(hydra.utils.get_class(config.task._target_), SequenceClassification):
        if config.init_from is not None:
            raise ConfigError(f"init_from={config.init_from} is for fine-tuning: use it with experiment=glue_dts")
        return None
    if resume_from is not None:
        checkpoint = load_checkpoint(resume_from)
        there = config_of(checkpoint, resume_from)
        if there.get("init_from") is None and config.init_from is not None:
            raise ConfigError(
                f"cannot resume from {resume_from}: it began from scratch and this run has"
                f" init_from={config.init_from}; leave that out, or start a new run with another run_name"
            )
        config.init_from = there.get("init_from")
        if config.init_from is None:
            return None
        check_targets(there, resume_from)
        return Pretrained(resume_from, checkpoint, there, there.evolution)
    if config.init_from is None:
        if config.task.get("freeze_routers"):
            raise ConfigError(
                "task.freeze_routers=true keeps routers as they were pretrained, and these would stay as they are"
                " drawn: add init_from=last, or leave it out"
            )
        return None
    if not isinstance(config.init_from, str):
        raise ConfigError(f"init_from={config.init_from}: expected a file, a run's folder, or last")
    logs = Path(config.paths.log_dir)
    path = (
        _last_masked_lm(logs) if config.init_from == "last" else resolve_checkpoint(config.init_from, logs, "init_from")
    )
    checkpoint = load_checkpoint(path)
    there = config_of(checkpoint, path)
    check_targets(there, path)
    if not issubclass(hydra.utils.get_class(there.model._target_), Encoder):
        raise ConfigError(
            f"init_from={path} is a run of {there.task._target_.rpartition('.')[2]}: expected one of masked language"
            " modelling, such as experiment=mlm_dts leaves it"
        )
    config.init_from = str(path)
    return Pretrained(path, checkpoint, there, _hold(checkpoint, there))


def _hold(checkpoint: Mapping[str, Any], config: DictConfig) -> DictConfig | None:
    """The configuration of a schedule that stands still where that of the checkpoint does."""
    evolution = trained_evolution(checkpoint, config)
    if evolution is None or evolution.plan is None:
        return None
    # In its last step, not in the next one: that might spawn experts, of which the checkpoint holds none.
    values = asdict(evolution.plan.at(max(checkpoint["global_step"] - 1, 0)))
    return OmegaConf.create({"_target_": f"{HeldEvolution.__module__}.{HeldEvolution.__name__}", **values})


def _last_masked_lm(logs: Path) -> Path:
    """The newest checkpoint of the run of masked language modelling below ``logs`` that saved last."""
    for run in runs_below(logs):
        path = newest_checkpoint(run)
        if path is None:
            continue
        config = load_checkpoint(path, "meta").get("evomoe", {}).get("config", {})
        if config.get("task", {}).get("_target_", "").endswith(f".{MaskedLanguageModeling.__name__}"):
            return path
    raise ConfigError(
        f"init_from=last: there is no run of masked language modelling below {logs}; train one with experiment=mlm_dts,"
        " or give a file"
    )
