"""Logs how alike the experts still are: copies at their birth, perhaps different later.

Shapes: n tokens, D model width, E experts.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from evomoe.moe import Experts

SAMPLE = 256
"""Most tokens of a process that all experts compute."""


class OutputSimilarity(Metric):
    """Cosine similarity of the experts' outputs, mean over tokens, ``(E, E)``; an output of zero is similar to none.

    Args:
        num_experts: number of experts E.
    """

    similarity: Tensor
    tokens: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.add_state("similarity", torch.zeros(num_experts, num_experts), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor) -> None:
        """Add tokens.

        Args:
            outputs: of every expert for the same tokens, ``(E, n, D)`` fp32.
        """
        directions = F.normalize(outputs, dim=2).flatten(1)  # (E, n * D)
        self.similarity += directions @ directions.t()
        self.tokens += outputs.shape[1]

    def compute(self) -> Tensor:
        """See the class."""
        return self.similarity / self.tokens.clamp(min=1)


class ExpertSimilarity(L.Callback):
    """Logs ``evolution/expert_similarity`` after each validation: mean cosine of the outputs of two different experts.

    All experts of an MoE layer compute the states that reach the layer in the first validation batch, at most 256 real
    tokens of each process: the same words at every validation. 1 for copies; it falls as the experts diverge. Logged
    for each layer under ``evolution/<layer>/expert_similarity``, and the mean over the layers. A layer with one
    expert, or in which one lives, has nothing to compare.
    """

    def __init__(self) -> None:
        self._similarity: dict[str, OutputSimilarity] = {}
        self._inputs: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen at the MoE layers during the first batch."""
        if batch_idx > 0 or dataloader_idx > 0 or trainer.sanity_checking:
            return
        # A compiled model would be compiled together with the hooks, and keep them.
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        layers: Any = pl_module.model.moe_layers  # type: ignore[union-attr]
        for name, layer in layers.items():
            if layer.routes and layer.num_experts > 1:
                hook = layer.register_forward_pre_hook(self._keeper(name), with_kwargs=True)
                self._hooks.callback(hook.remove)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Let all experts compute what was heard."""
        self._hooks.close()
        layers: Any = pl_module.model.moe_layers  # type: ignore[union-attr]
        for name, hidden in self._inputs.items():
            metric = OutputSimilarity(layers[name].num_experts).to(hidden.device)
            metric.update(outputs_of_all(layers[name].experts, hidden))
            self._similarity[name] = metric
        self._inputs = {}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log."""
        means = {name: mean_of_pairs(metric.compute()) for name, metric in self._similarity.items()}
        if means:
            values = {f"evolution/{name}/expert_similarity": mean for name, mean in means.items()}
            values["evolution/expert_similarity"] = torch.stack(list(means.values())).mean()
            # Equal on all processes already; sync_dist keeps Lightning from doubting it.
            pl_module.log_dict(values, sync_dist=True)
        self._similarity = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._hooks.close()

    def _keeper(self, name: str) -> Any:
        def keep(_: Any, arguments: tuple[Tensor], options: dict[str, Any]) -> None:
            if name in self._inputs:  # the batch goes through the model once more, under the final rule
                return
            hidden, valid = arguments[0].flatten(0, 1), options.get("valid")  # (T, D), (B, S)
            self._inputs[name] = (hidden if valid is None else hidden[valid.flatten()])[:SAMPLE].detach()

        return keep


@torch.no_grad()
def outputs_of_all(experts: Experts, hidden: Tensor) -> Tensor:
    """What every expert would answer every token, ``(E, n, D)`` fp32, computed in the precision of their weights.

    Args:
        experts: of one layer.
        hidden: ``(n, D)``.
    """
    number, tokens = experts.num_experts, hidden.shape[0]
    counts = torch.full((number,), tokens, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.to(experts.w_in[0].dtype).repeat(number, 1)
        return experts(rows, counts).float().view(number, tokens, -1)


def mean_of_pairs(matrix: Tensor) -> Tensor:
    """Mean of ``(E, E)`` off the diagonal, a 0-dim tensor."""
    number = matrix.shape[0]
    return (matrix.sum() - matrix.diagonal().sum()) / (number * (number - 1))
