"""Vision Transformer with Mixture-of-Experts in its last blocks: an encoder of images for classification.

Shapes: B batch, C channels, P side of a patch, N patches of an image, S tokens (patches and the class token, where
there is one), D model width, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evomoe.errors import ConfigError
from evomoe.models.blocks import Block
from evomoe.models.conv_stem import GELU_RMS, ConvStem
from evomoe.models.flops import matrix_flops
from evomoe.models.initialization import draw_normal_
from evomoe.models.network import BlockOptions, Network, check_sizes
from evomoe.routing import Routing

POOLS = ("gap", "cls")
STEM_DEPTHS = {"patch": 0, "conv": 1, "deep_conv": 2}
"""Convolutions in each stage of the stem, by its name."""
EMBEDDING_STD = 0.5


class ViT(Network):
    """Vision Transformer (arXiv 2010.11929) in which every token sees its whole image.

    Any router may be used but those by word (hash layers, StableMoE), which refuse to route tokens that are no words.

    Routers in Vision MoE (arXiv 2401.15969) and Soft MoE (arXiv 2308.00951) put the experts into the last half of the
    blocks: ``moe_every=1`` and ``moe_last`` L / 2. For the same seed, models that differ in router, experts,
    ``moe_every`` or ``moe_last`` start from the same shared weights, as GPT does.

    Args:
        image_size: height and width of the images.
        patch_size: side P of a patch; divides ``image_size``.
        channels: of the images, C.
        num_classes: of the images.
        d_model: width D.
        num_layers: blocks L.
        num_heads: attention heads; divides D.
        moe_last: how many blocks, the last ones, ``moe_every`` is about, counted from the first of them; None for all.
        pool: what is classified: the mean of the patches (``gap``), or a token of its own before them (``cls``).
        stem: what the patch embedding, a linear layer, is given: the pixels of each patch (``patch``), or what
            convolutions make of them (``conv``, or ``deep_conv`` with two in each stage, see
            :class:`~evomoe.models.conv_stem.ConvStem`).
        dropout: dropout of embeddings and residual branches.
        checkpoint_activations: recompute the stem and each block in the backward pass, instead of storing what they
            compute.
        options: of the blocks, see :class:`~evomoe.models.network.BlockOptions`.

    Raises:
        ConfigError: for sizes that do not fit together.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        num_classes: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        *,
        moe_last: int | None = None,
        pool: str = "gap",
        stem: str = "patch",
        dropout: float = 0.1,
        checkpoint_activations: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint_activations)
        sizes = {"image_size": image_size, "patch_size": patch_size, "channels": channels, "num_classes": num_classes}
        check_sizes({**sizes, "num_layers": num_layers})
        if image_size % patch_size:
            raise ConfigError(
                f"image_size={image_size} is not divisible by patch_size={patch_size}: choose a model.patch_size that "
                "divides it, or images of another size"
            )
        if pool not in POOLS:
            raise ConfigError(f"pool={pool!r} is unknown: expected gap, the mean of the patches, or cls, a class token")
        if stem not in STEM_DEPTHS:
            raise ConfigError(f"stem={stem!r} is unknown: expected patch, the pixels of each patch, conv or deep_conv")
        if moe_last is not None and not 1 <= moe_last <= num_layers:
            raise ConfigError(
                f"moe_last={moe_last} of num_layers={num_layers} blocks: expected 1 to {num_layers}, or null for all; "
                "moe_every=0 makes a dense model"
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = channels
        self.num_classes = num_classes
        self.num_layers = num_layers
        self.pool = pool
        self.num_patches = (image_size // patch_size) ** 2
        self.num_tokens = self.num_patches + (pool == "cls")

        blocks = BlockOptions(d_model=d_model, num_heads=num_heads, dropout=dropout, **options)
        depth = STEM_DEPTHS[stem]
        self.stem = ConvStem(image_size, patch_size, channels, d_model, depth) if depth else None
        self.patch_embedding = nn.Linear(channels * patch_size**2 if self.stem is None else d_model, d_model)
        self.class_token = nn.Parameter(torch.zeros(d_model)) if pool == "cls" else None
        self.position_embedding = nn.Embedding(self.num_tokens, d_model)
        self.dropout = nn.Dropout(dropout)
        dense = num_layers - (num_layers if moe_last is None else moe_last)
        build = partial(BlockOptions.build, causal=False, padded=False)
        self.blocks = build(blocks, num_layers - dense)
        if dense:
            self.blocks = nn.ModuleList([*build(replace(blocks, moe_every=0), dense), *self.blocks])
        self.norm = nn.LayerNorm(d_model, bias=blocks.bias)
        self.head = nn.Linear(d_model, num_classes)
        self.init_weights(torch.initial_seed())

    def features(
        self, images: Tensor, *, valid: Tensor | None = None, final_rule: bool = False
    ) -> tuple[Tensor, list[Routing]]:
        """What the head classifies.

        1. Embed the patches and their positions.
        2. Apply the blocks.
        3. Normalise, and take the mean of the patches or the class token.

        Args:
            images: ``(B, C, image_size, image_size)``, normalised.
            valid: ``(B,)`` bool, False for an image that is padding, which changes nothing for the others. None if all
                are real.
            final_rule: route by the final sparse rule instead of the training rule.

        Returns:
            ``(B, D)``, and the routings of the MoE layers in the order of :attr:`moe_layers`.

        Raises:
            ConfigError: if the images have another size.
        """
        if images.shape[1:] != (self.channels, self.image_size, self.image_size):
            raise ConfigError(
                f"images of {' x '.join(map(str, images.shape[1:]))}, but the model is built for {self.channels} x "
                f"{self.image_size} x {self.image_size}: build it with these sizes"
            )
        hidden = self.patch_embedding(self._look_at(images))  # (B, N, D)
        if self.class_token is not None:
            hidden = torch.cat([self.class_token.expand(len(hidden), 1, -1), hidden], dim=1)  # (B, S, D)
        hidden = self.dropout(hidden + self.position_embedding.weight)
        tokens_valid = None if valid is None else self.spread_over_tokens(valid)
        hidden, routings = self.apply_blocks(self._stack, hidden, valid=tokens_valid, final_rule=final_rule)
        hidden = self.norm(hidden)
        return hidden.mean(dim=1) if self.pool == "gap" else hidden[:, 0], routings

    def forward(
        self, images: Tensor, *, valid: Tensor | None = None, final_rule: bool = False
    ) -> tuple[Tensor, list[Routing]]:
        """Logits ``(B, num_classes)`` and the routings of the MoE layers; for the arguments see :meth:`features`."""
        features, routings = self.features(images, valid=valid, final_rule=final_rule)
        return self.head(features), routings

    @property
    def named_blocks(self) -> dict[str, Block]:
        """The blocks as ``block_0``, ``block_1`` and so on."""
        return {f"block_{index}": block for index, block in enumerate(self._stack)}

    def spread_over_tokens(self, per_image: Tensor) -> Tensor:
        """``(B,)`` to ``(B, S)``: what holds for an image, for each of its tokens."""
        return per_image[:, None].expand(-1, self.num_tokens)

    def flops_per_image(self, active_experts: float | Sequence[float] = 1.0) -> float:
        """FLOPs of a forward pass per image; times ``TRAINING_FACTOR`` for a training step.

        The first layer's gradient of its input, which no image needs, is counted all the same.

        Args:
            active_experts: mean experts per token, one number for all MoE layers or one for each, in order.
        """
        embedding = self.num_patches * matrix_flops([self.patch_embedding.weight])
        blocks = self.num_tokens * self.block_flops(self._stack, self.num_tokens, self.spread(active_experts))
        stem = 0 if self.stem is None else self.stem.flops_per_image
        return stem + embedding + blocks + matrix_flops([self.head.weight])

    def _look_at(self, images: Tensor) -> Tensor:
        """What the patch embedding is given: ``(B, N, C * P * P)``, or ``(B, N, D)`` of a stem."""
        if self.stem is None:
            return to_patches(images, self.patch_size)
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.stem, images, use_reentrant=False)
        return self.stem(images)

    @property
    def _stack(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all parameters anew, each from its own generator, as :meth:`evomoe.models.gpt.GPT.init_weights` does.

        Matrices into a branch have Xavier's deviation D^-0.5, as in the first ViT, those out of a branch this over
        sqrt(2 L). GPT's constant 0.02, which is about that of the largest ViTs, trains a narrow one very slowly. The
        embedded patches of normalised images, or of what the stem makes of them, and the positions have the deviation
        0.5 both, as what stands in a small patch means little without its place. The head starts at 0.

        Args:
            seed: of the draws.
        """
        std = self.head.in_features**-0.5
        output_std = std * (2 * self.num_layers) ** -0.5
        patch_std = EMBEDDING_STD * self.patch_embedding.in_features**-0.5
        if self.stem is not None:
            patch_std /= GELU_RMS
            self.stem.init_weights(seed, "stem")
        draw_normal_(self.patch_embedding.weight, patch_std, seed, "patch_embedding")
        draw_normal_(self.position_embedding.weight, EMBEDDING_STD, seed, "position_embedding")
        if self.class_token is not None:
            self.class_token.zero_()
        for parameter in (self.patch_embedding.bias, self.head.weight, self.head.bias):
            parameter.zero_()
        self.norm.reset_parameters()
        for name, block in self.named_blocks.items():
            block.init_weights(seed, name, std, output_std)


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, N, C * P * P)``: the patches row by row, pixels as in a convolution."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (B, C, rows, columns, P, P)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
