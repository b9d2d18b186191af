"""Reports after each validation how the final rule routed it.

Shapes: E experts, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from evomoe.callbacks.monitoring.routing_metrics import (
    CoActivation,
    ExpertLoad,
    RouterEntropy,
    WordExperts,
    active_experts,
)
from evomoe.callbacks.monitoring.routing_stability import ExpertSets, Stability
from evomoe.callbacks.tensorboard import find_tensorboard, write_bars
from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.routing import Router, SparseRouting, Words

FREQUENT = 10
"""Tokens of a word from which on it can be among the most specialised of an expert: a rare one is so by chance."""


class LayerReport:
    """The metrics of one MoE layer over one validation.

    Args:
        routing: its first routing, which tells the sizes.
        vocab_size: number of words V; None where tokens are no words.
        followed_tokens: real tokens of this process whose experts are compared between validations.
        device: of the routings.
    """

    def __init__(
        self, routing: SparseRouting, vocab_size: int | None, followed_tokens: int, device: torch.device
    ) -> None:
        num_experts = routing.tokens_per_expert.numel()
        self.load = ExpertLoad(num_experts).to(device)
        self.entropy = RouterEntropy(routing.scores.shape[1]).to(device)
        self.co_activation = CoActivation(num_experts).to(device)
        self.words = None if vocab_size is None else WordExperts(vocab_size, num_experts).to(device)
        self.sets = ExpertSets(followed_tokens, num_experts).to(device)

    def update(self, routing: SparseRouting, words_behind: Words) -> None:
        """Count one batch, given the words behind its tokens."""
        token_ids, valid = words_behind
        valid = None if valid is None else valid.flatten()
        active = active_experts(routing, valid)
        self.load.update(routing)
        self.entropy.update(routing)
        self.co_activation.update(active)
        if self.words is None or token_ids is None:
            words = torch.zeros(active.shape[0], dtype=torch.int64, device=active.device)
        else:
            words = token_ids.flatten() if valid is None else token_ids.flatten()[valid]
            self.words.update(active, words)
        self.sets.update(active, words)

    def compute(self) -> dict[str, Tensor]:
        """The values over all processes by name, those of the expert sets apart; every process must call it."""
        metrics: list[Metric | None] = [self.load, self.entropy, self.co_activation, self.words]
        return {name: value for metric in metrics if metric is not None for name, value in metric.compute().items()}


class RoutingReport(L.Callback):
    """Logs ``val_moe/<layer>/...``: what the final rule did over a validation, counted over all processes.

    The scalars are those of :mod:`~evomoe.callbacks.monitoring.routing_metrics`, under the names that
    :class:`~evomoe.callbacks.RoutingMonitor` uses for a training batch where both have them, and between validations of
    a fit those of :class:`~evomoe.callbacks.monitoring.routing_stability.Stability`: ``routing_fluctuation``, from the
    second one on; ``last_fluctuation``, the mean over the tokens; and, written to TensorBoard when the fit ends,
    ``saturation`` of every validation relative to the last. What they compare travels in the checkpoint.

    TensorBoard also gets histograms of the load and of the experts per token, and as text the most specialised words of
    each expert: those that go to it most often, of the words seen at least ten times.

    A layer in which one expert lives routes nothing and is not reported; neither is a soft routing. When the fit ends,
    a line tells of each layer that has fallen to one of its experts.

    Args:
        followed_tokens: real tokens whose experts are compared between validations, the first ones of the split, shared
            among the processes.
        words: words to show for each expert; 0 shows none.
        figures: also draw the load of all layers and each layer's co-activation; without matplotlib, histograms have to
            do.
    """

    def __init__(self, followed_tokens: int = 1024, words: int = 8, figures: bool = False) -> None:
        if followed_tokens < 2:
            raise ConfigError(
                f"callbacks.report.followed_tokens={followed_tokens}: expected at least 2 tokens, such as 1024"
            )
        if words < 0:
            raise ConfigError(f"callbacks.report.words={words}: expected 0 or more")
        self.followed_tokens = followed_tokens
        self.words = words
        self.figures = figures
        self.stability: dict[str, Stability] = {}
        self._reports: dict[str, LayerReport] = {}
        self._loads: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do without figures where they cannot be drawn."""
        if self.figures and find_spec("matplotlib") is None:
            rank_zero_warn(
                "callbacks.report.figures=true needs matplotlib (pip install matplotlib): none are drawn.",
                category=EvomoeWarning,
            )
            self.figures = False

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from nothing."""
        self._reports = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one batch."""
        if trainer.sanity_checking:
            return
        model: Any = pl_module.model
        layers = zip(model.moe_layers.items(), outputs["final_routings"], outputs["words"], strict=True)
        for (name, layer), routing, words in layers:
            if not (layer.routes and isinstance(routing, SparseRouting)):
                continue
            if name not in self._reports:
                followed = -(-self.followed_tokens // trainer.world_size)
                vocab_size = None if words.token_ids is None else model.vocab_size
                self._reports[name] = LayerReport(routing, vocab_size, followed, routing.token.device)
            self._reports[name].update(routing, words)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the validation."""
        computed = {name: report.compute() for name, report in self._reports.items()}
        scalars: dict[str, Tensor | float] = {
            f"val_moe/{layer}/{name}": value.float()
            for layer, values in computed.items()
            for name, value in values.items()
            if value.ndim == 0
        }
        if trainer.state.fn == TrainerFn.FITTING:
            self._loads = {name: values["load"] for name, values in computed.items()}
            scalars.update(self._compare(trainer.global_step))
        # Equal on all processes already; sync_dist keeps Lightning from doubting it.
        pl_module.log_dict(scalars, sync_dist=True)
        tensorboard = find_tensorboard(trainer)
        if computed and trainer.is_global_zero and tensorboard is not None:
            self._write(trainer, tensorboard.experiment, computed)
        self._reports = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write how near each validation was to the last one, which only now is known; tell of a collapse."""
        model: Any = pl_module.model
        for name, load in self._loads.items():
            if is_collapsed(load):
                rank_zero_info(_describe_collapse(name, load, model.moe_layers[name].router))
        tensorboard = find_tensorboard(trainer)
        if trainer.is_global_zero and tensorboard is not None:
            for layer, stability in self.stability.items():
                for step, value in stability.saturation().items():
                    tensorboard.experiment.add_scalar(f"val_moe/{layer}/saturation", value, step)

    def state_dict(self) -> dict[str, Any]:
        """The experts that the followed tokens have had."""
        return {layer: stability.state_dict() for layer, stability in self.stability.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the earlier part of the run."""
        self.stability = {layer: Stability.restore(state) for layer, state in state_dict.items()}

    def _compare(self, step: int) -> dict[str, float]:
        """Scalars of each layer's stability since the validation before."""
        scalars: dict[str, float] = {}
        for layer, report in self._reports.items():
            ids, active = report.sets.compute()
            known = self.stability.get(layer)
            if known is None or not known.follows(ids, active.shape[1]):
                known = self.stability[layer] = Stability(ids, active.shape[1])
            fluctuation = known.add(step, active)
            if fluctuation is not None:
                scalars[f"val_moe/{layer}/routing_fluctuation"] = fluctuation
                scalars[f"val_moe/{layer}/last_fluctuation"] = float(known.last_fluctuation.float().mean())
        return scalars

    def _write(self, trainer: L.Trainer, writer: Any, computed: dict[str, dict[str, Tensor]]) -> None:
        step = trainer.global_step
        for layer, values in computed.items():
            for name in ("load", "experts_per_token"):
                write_bars(writer, f"val_moe/{layer}/{name}", values[name], step)
            if self.words and "word_share" in values:
                tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
                lines = specialized_words(values["word_share"], values["word_count"], self.words, tokenizer.decode)
                # Indented: shown as typed, not as Markdown.
                writer.add_text(f"val_moe/{layer}/words", "\n".join(f"    {line}" for line in lines), step)
        if self.figures:
            from evomoe.callbacks.monitoring.routing_figures import draw_load, draw_matrix

            loads = {layer: values["load"] for layer, values in computed.items()}
            writer.add_figure("val_moe/load", draw_load(loads), step)
            for layer, values in computed.items():
                figure = draw_matrix(values["co_activation"], "P(column active | row active)")
                writer.add_figure(f"val_moe/{layer}/co_activation", figure, step)


def is_collapsed(load: Tensor) -> bool:
    """Whether one expert does more than half of the work, and all do that of one and a half, or of a quarter of them.

    Args:
        load: share of each expert in the assignments, ``(E,)``. Its perplexity is the number of balanced experts that
            it is worth.
    """
    worth = float(torch.special.entr(load).sum().exp())
    return load.numel() > 1 and float(load.max()) > 0.5 and worth < max(1.5, load.numel() / 4)


def _describe_collapse(name: str, load: Tensor, router: Router) -> str:
    remedy = (
        "more of router.loss_coefficients.balance spreads the load"
        if "balance" in router.loss_names
        else "routers with a balance loss, or router=loss_free, spread the load"
    )
    return (
        f"{name}: in the last validation one of {load.numel()} experts had {float(load.max()):.0%} of the tokens, so"
        f" that the others hardly learn; {remedy}"
    )


def specialized_words(
    share: Tensor, count: Tensor, number: int, decode: Callable[[list[int]], str], least: int = FREQUENT
) -> list[str]:
    """One line per expert with the words that go to it most often.

    Args:
        share: share of each word's tokens that go to each expert, ``(V, E)``.
        count: tokens of each word, ``(V,)``.
        number: words per expert; equal shares are ordered by count.
        decode: token ids to text.
        least: tokens from which on a word is shown.
    """
    share, count = share.cpu(), count.cpu()
    by_count = count.argsort(descending=True, stable=True)
    frequent = by_count[count[by_count] >= least]
    lines = []
    for expert, shares in enumerate(share[frequent].t()):
        best = shares.argsort(descending=True, stable=True)[:number].tolist()
        words = [
            f"{decode([int(frequent[index])])!r} {float(shares[index]):.0%}" for index in best if shares[index] > 0
        ]
        lines.append(f"expert {expert}: {', '.join(words) or '-'}")
    return lines
