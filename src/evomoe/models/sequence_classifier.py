"""A head on the encoder of RoBERTa that reads the first token: classification and regression of sequences.

Shapes: B batch, S sequence, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.models.flops import matrix_flops
from evomoe.models.initialization import draw_normal_
from evomoe.models.network import INIT_STD, check_sizes
from evomoe.models.roberta import Encoder
from evomoe.routing import Routing


class SequenceClassifier(Encoder):
    """The encoder of :class:`~evomoe.models.roberta.RoBERTa` under RoBERTa's head for sentences.

    The state of the first token goes through dropout, a dense layer, tanh and dropout to the outputs (the released code
    of arXiv 1907.11692).

    Args:
        vocab_size: number of token ids V, as in pretraining.
        context: most tokens per sequence.
        d_model: width D.
        num_layers: blocks L.
        num_heads: attention heads; divides D.
        num_classes: outputs C; 1 for a number.
        head_dropout: dropout before both layers of the head.
        options: further ones of :class:`~evomoe.models.roberta.Encoder`.

    Raises:
        ConfigError: for sizes that do not fit together.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        *,
        num_classes: int,
        head_dropout: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(vocab_size, context, d_model, num_layers, num_heads, **options)
        check_sizes({"num_classes": num_classes})
        if not 0 <= head_dropout < 1:
            raise ConfigError(f"head_dropout={head_dropout}: expected a probability in [0, 1)")
        self.dense = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, num_classes)
        self.head_dropout = nn.Dropout(head_dropout)
        self.init_weights(torch.initial_seed())

    def forward(
        self, tokens: Tensor, *, valid: Tensor | None = None, final_rule: bool = False
    ) -> tuple[Tensor, list[Routing]]:
        """Classify sequences.

        Args:
            tokens: ``(B, S)`` token ids.
            valid: ``(B, S)`` bool, False at right padding. None if all are real.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            ``(B, C)`` logits, or the numbers of a regression, and the routings of the MoE layers.
        """
        hidden, routings = self.encode(tokens, valid=valid, final_rule=final_rule)
        pooled = torch.tanh(self.dense(self.head_dropout(hidden[:, 0])))  # (B, D)
        return self.out(self.head_dropout(pooled)), routings

    def forward_flops(self, sequences: int, length: int, active_experts: float | Sequence[float] = 1.0) -> float:
        """FLOPs of a forward pass; times ``TRAINING_FACTOR`` for a training step.

        Args:
            sequences: B.
            length: S, padding included.
            active_experts: mean experts per position, one number for all MoE layers or one for each, in order.
        """
        per_token = self.block_flops(self._stack, length, self.spread(active_experts))
        return sequences * (length * per_token + matrix_flops([self.dense.weight, self.out.weight]))

    def load_encoder(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of another model's encoder, and its number of live experts; keep the own head.

        Args:
            weights: ``state_dict()`` of any :class:`~evomoe.models.roberta.Encoder` of the same sizes and router.

        Raises:
            RuntimeError: they are of another encoder.
        """
        own = ("dense.", "out.")
        encoder = {name for name in self.state_dict() if not name.startswith(own)}
        if missing := sorted(encoder - weights.keys()):
            raise RuntimeError(f"missing {missing[0]}")
        self.load_state_dict({name: weights[name] for name in encoder}, strict=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """See :meth:`Encoder.init_weights`; the head is drawn too."""
        super().init_weights(seed)
        for name, layer in (("dense", self.dense), ("out", self.out)):
            draw_normal_(layer.weight, INIT_STD, seed, f"classifier/{name}")
            layer.bias.zero_()
