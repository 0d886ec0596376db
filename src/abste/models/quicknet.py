"""QuickNet, the fastest network of Larq's zoo: binary 3x3 convolutions in residual blocks, float 1x1 transitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from abste.errors import ConfigError
from abste.models._arguments import check_count, check_images


class QuickNetBlock(nn.Module):
    """A 3x3 convolution, ReLU and batch norm, and the identity around them: (N, C, H, W), unchanged and signed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution and the identity."""
        return self.bn(F.relu(self.conv(x))) + x


def _blur_pool(channels: int) -> nn.Conv2d:
    """A depthwise 3x3 convolution with stride 2 whose weights are fixed: [1 2 1] by [1 2 1], over 16."""
    blur = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
    row = torch.tensor([1.0, 2.0, 1.0])
    blur.weight.requires_grad_(False).copy_((row[:, None] * row / 16).expand_as(blur.weight))
    return blur


class QuickNet(nn.Module):
    """QuickNet: a float stem, four sections of residual blocks with float transitions between, a float classifier.

    A transition is ReLU, max pooling of 2x2 with stride 1, a blur with stride 2, a 1x1 convolution and batch norm. In
    the published network stem and transitions stay float (``keep_float=["stem", "transition*"]``), the padding of
    binary convolutions is +1 (``pad_value=1``) and their weights have no scale (``scale=None``); estimators are STE
    clipped at 1.25, over raw latents and inputs.

    Shapes: float (N, in_channels, H, W), H and W from 2^(sections + 1) up, 32 for four sections -> logits
    (N, num_classes). Where H and W are multiples of that number every border is that of the source.

    Args:
        blocks: how many blocks each section has.
        channels: of each section; the first a multiple of 4.
        num_classes: number of logits.
        in_channels: channels of the image.

    Raises:
        ConfigError: a count is not a positive integer, or they do not fit; in the forward, an input of another shape
            or dtype.
    """

    def __init__(
        self, blocks: Sequence[int], channels: Sequence[int], num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        counts = [("blocks", n) for n in blocks] + [("channels", n) for n in channels]
        for name, count in (*counts, ("num_classes", num_classes), ("in_channels", in_channels)):
            check_count(name, count, "QuickNet")
        if len(blocks) != len(channels) or not channels or channels[0] % 4:
            raise ConfigError(
                "QuickNet needs as many numbers of blocks as of channels, and first channels that are a multiple of 4, "
                f"not blocks={list(blocks)} and channels={list(channels)}."
            )
        self.in_channels = in_channels
        self.sections = len(blocks)
        thin, before = channels[0] // 4, channels[0]
        # A stride of 2 pads an even size at the end alone, as its source does.
        self.stem = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(in_channels, thin, 3, stride=2, bias=False),
            nn.BatchNorm2d(thin, eps=1e-3, momentum=0.01),
            nn.ReLU(),
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(thin, thin, 3, stride=2, groups=thin, bias=False),
            nn.BatchNorm2d(thin, eps=1e-3, momentum=0.01, affine=False),
            nn.Conv2d(thin, before, 1, bias=False),
            nn.BatchNorm2d(before, eps=1e-3, momentum=0.01),
        )
        for number, (count, width) in enumerate(zip(blocks, channels, strict=True), 1):
            if number > 1:
                transition = nn.Sequential(
                    nn.ReLU(),
                    nn.MaxPool2d(2, stride=1),
                    _blur_pool(before),
                    nn.Conv2d(before, width, 1, bias=False),
                    nn.BatchNorm2d(width),
                )
                self.add_module(f"transition{number}", transition)
            self.add_module(f"section{number}", nn.Sequential(*(QuickNetBlock(width) for _ in range(count))))
            before = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad:
                init = nn.init.kaiming_normal_ if name.startswith("stem") else nn.init.xavier_normal_
                init(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        check_images(x, self.in_channels)
        least = 2 ** (self.sections + 1)
        if min(x.shape[2:]) < least:
            raise ConfigError(f"this network takes images of {least}x{least} or more, not {x.shape[2]}x{x.shape[3]}.")
        x = self.stem(x)
        for number in range(1, self.sections + 1):
            if number > 1:
                x = self.get_submodule(f"transition{number}")(x)
            x = self.get_submodule(f"section{number}")(x)
        return self.fc(self.pool(F.relu(x)).flatten(1))


def quicknet(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> QuickNet:
    """QuickNet, for ImageNet.

    See `QuickNet` for its layers, arguments, shapes, errors and how it is binarised; sections have `width`, 2 `width`,
    4 `width` and 8 `width` channels. 13,234,056 parameters with the defaults, of which 4,032 are fixed; 1,879,339,776
    multiply-accumulates for one 3x224x224 image, of which the convolutions do 1,878,827,776.
    Source: larq/zoo, sota/quicknet.py, version 1.0 (Bannink et al., arXiv 2011.09398).
    """
    return QuickNet((4, 4, 4, 4), (width, 2 * width, 4 * width, 8 * width), num_classes, in_channels)


def quicknet_small(num_classes: int = 1000, in_channels: int = 3, width: int = 32) -> QuickNet:
    """QuickNetSmall: half the channels in the first two sections.

    Sections have `width`, 2 `width`, 8 `width` and 16 `width` channels. 12,655,672 parameters with the defaults, of
    which 3,168 are fixed; 1,171,996,160 multiply-accumulates for one 3x224x224 image, of which the convolutions do
    1,171,484,160. Otherwise as `quicknet`.
    """
    return QuickNet((4, 4, 4, 4), (width, 2 * width, 8 * width, 16 * width), num_classes, in_channels)


def quicknet_large(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> QuickNet:
    """QuickNetLarge: 6, 8, 12 and 6 blocks.

    23,342,216 parameters with the defaults, of which 4,032 are fixed; 3,729,027,840 multiply-accumulates for one
    3x224x224 image, of which the convolutions do 3,728,515,840. Otherwise as `quicknet`.
    """
    return QuickNet((6, 8, 12, 6), (width, 2 * width, 4 * width, 8 * width), num_classes, in_channels)
