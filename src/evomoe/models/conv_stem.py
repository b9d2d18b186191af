"""Convolutions ahead of a Vision Transformer's patch embedding.

Shapes: B batch, C channels, P side of a patch, N patches of an image, D model width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evomoe.errors import ConfigError
from evomoe.models.initialization import draw_normal_

GELU_RMS = 0.652
"""Root mean square of GELU of a normed value, sqrt(E[GELU(z)^2]) for z of a standard normal distribution."""


class ConvStem(nn.Module):
    """3 x 3 convolutions that halve the image until each place of the map stands for a patch.

    Early Convolutions Help Transformers See Better (arXiv 2106.14881). With ``depth=1`` as in its two smaller models
    (1GF and 4GF): log2(P) convolutions of stride 2, each twice as wide as the one before, the last of width D, each
    followed by a norm and an activation; the 1 x 1 convolution behind them is the model's own patch embedding. The
    paper leaves out a block of the transformer to pay for them, as ``num_layers`` may. Ours: the norm is over all
    channels and places of one image (GroupNorm of one group), not BatchNorm, so that no image depends on the others of
    its batch; the activation is GELU, not ReLU; and a greater ``depth`` is that of every stage, where the paper's
    larger models have a second convolution in the stages of the middle alone, and widths of their own.

    Args:
        image_size: height and width of the images, a multiple of P.
        patch_size: side P of a patch, a power of two.
        channels: of the images, C.
        d_model: width D, divisible by P / 2.
        depth: convolutions of a stage, at least 1; the first halves the image, the others have stride 1.

    Raises:
        ConfigError: for sizes that do not fit together.
    """

    def __init__(self, image_size: int, patch_size: int, channels: int, d_model: int, depth: int = 1) -> None:
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            raise ConfigError(
                f"patch_size={patch_size} under a convolutional stem, which halves the image again and again: "
                "expected 2, 4, 8 or another power of two; model.stem=patch takes every size"
            )
        if d_model % (patch_size // 2):
            raise ConfigError(
                f"d_model={d_model} under a convolutional stem is not divisible by {patch_size // 2}, half of "
                f"patch_size={patch_size}: its width doubles with each halving and ends as d_model; model.stem=patch "
                "takes every width"
            )
        self.image_size = image_size
        self.depth = depth
        halvings = patch_size.bit_length() - 1
        widths = [channels, *(d_model >> (halvings - 1 - index // depth) for index in range(halvings * depth))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if index % depth else 2, padding=1, bias=False)
            for index, (before, after) in enumerate(pairwise(widths))
        )
        # A fifth faster than the layout of the images.
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, N, D)``, the patches row by row."""
        hidden = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = F.gelu(norm(convolution(hidden)))
        return hidden.flatten(2).transpose(1, 2)

    @property
    def flops_per_image(self) -> int:
        """Of a forward pass, 2 per multiply-add."""
        kernels = [parameter.numel() for parameter in self.parameters() if parameter.ndim == 4]
        sides = [self.image_size >> (index // self.depth + 1) for index in range(len(kernels))]
        return sum(2 * kernel * side**2 for kernel, side in zip(kernels, sides, strict=True))

    @torch.no_grad()
    def init_weights(self, seed: int, name: str) -> None:
        """Draw all parameters anew; the norms make up for the kernels' scale.

        Args:
            seed: of the model's draws.
            name: of the stem.
        """
        for key, parameter in self.named_parameters():
            if parameter.ndim == 4:
                draw_normal_(parameter, parameter[0].numel() ** -0.5, seed, f"{name}.{key}")
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
