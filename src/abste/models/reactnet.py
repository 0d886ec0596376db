"""ReActNet-A: MobileNetV1 without depthwise convolutions, with a shortcut around every convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abste.models._arguments import check_count, check_images
from abste.nn import ChannelShift, RPReLU

_CHANNELS = (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)  # of each block, in units of the stem's


class ReActNetBlock(nn.Module):
    """A 3x3 convolution and a 1x1 one, with a learned shift before and RPReLU behind each, and shortcuts of their own.

    All shortcuts are free of parameters: with stride 2 the first averages 2x2 pixels; where the channels double, two
    1x1 convolutions read the same input, each adds it to what it gives, and the results are concatenated.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), signed.

    Args:
        in_channels: channels of the input.
        out_channels: the same number, or twice as many.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.shift1 = ChannelShift(in_channels)
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pool: nn.Module = nn.Identity()
        if stride != 1:
            self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        self.act1 = RPReLU(in_channels)
        self.shift2 = ChannelShift(in_channels)
        halves = range(out_channels // in_channels)
        self.conv2 = nn.ModuleList(nn.Conv2d(in_channels, in_channels, 1, bias=False) for _ in halves)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(in_channels) for _ in halves)
        self.act2 = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Each convolution with its own identity."""
        x = self.act1(self.bn1(self.conv1(self.shift1(x))) + self.pool(x))
        shifted = self.shift2(x)
        halves = [bn(conv(shifted)) + x for conv, bn in zip(self.conv2, self.bn2, strict=True)]
        return self.act2(torch.cat(halves, 1) if len(halves) > 1 else halves[0])


class ReActNet(nn.Module):
    """ReActNet-A: a float 3x3 stem with stride 2, 13 blocks, pooling, a float linear classifier.

    Convolutions have no bias; they and the classifier start from Kaiming's normal distribution (fan-in, ReLU), unlike
    the authors'.

    Shapes: float (N, in_channels, H, W), any H and W from 1 up -> logits (N, num_classes).

    Args:
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the stem; the last block has 32 times as many.

    Raises:
        ConfigError: a count is not a positive integer; in the forward, an input of another shape or dtype.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        for name, count in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            check_count(name, count, "ReActNet")
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, channels = [], width
        for factor in _CHANNELS:
            # The first doubling keeps the size of the image.
            stride = 2 if channels != width * factor and factor > 2 else 1
            blocks.append(ReActNetBlock(channels, width * factor, stride))
            channels = width * factor
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        check_images(x, self.in_channels)
        x = self.blocks(self.bn1(self.conv1(x)))
        return self.fc(self.pool(x).flatten(1))


def reactnet_a(num_classes: int = 1000, in_channels: int = 3, width: int = 32) -> ReActNet:
    """ReActNet-A, for ImageNet.

    29,343,592 parameters with the defaults; 4,828,758,016 multiply-accumulates for one 3x224x224 image, of which the
    convolutions do 4,827,734,016. See `ReActNet` for its layers, arguments, shapes and errors.
    Source: ReActNet (arXiv 2003.03488; liuzechun/ReActNet, mobilenet).
    """
    return ReActNet(num_classes, in_channels, width)
