"""CIFAR ResNets in the block order that binary networks need.

Each convolution is followed by ReLU and then batch norm, and the identity is added after both with no activation behind
the sum: what the next convolution reads is signed, so the sign of an activation carries information. The order is that
of ReSTE's CIFAR networks (Wu et al., arXiv 2308.06689); the depth, widths and parameter-free shortcuts (option A) are
those of He et al. (arXiv 1512.03385, section 4.2); a shortcut around every convolution is Bi-Real net's (Liu et al.,
arXiv 1808.00278). The float network is built in the same order as the binary one, so only binarisation differs.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from abste.errors import ConfigError


class PadShortcut(nn.Module):
    """Option A: keep every `stride`-th row and column and pad channels with zeros on both sides; no parameters.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"stride={self.stride}, pad_channels=({self.before}, {self.after})"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by ReLU and batch norm, and one shortcut around both.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), signed.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = PadShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Both convolutions, then the identity."""
        out = self.bn1(F.relu(self.conv1(x)))
        out = self.bn2(F.relu(self.conv2(out)))
        return out + self.shortcut(x)


class BiRealBlock(BasicBlock):
    """The same modules as `BasicBlock` with a shortcut around each convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Each convolution with its own identity."""
        x = self.bn1(F.relu(self.conv1(x))) + self.shortcut(x)
        return self.bn2(F.relu(self.conv2(x))) + x


class CifarResNet(nn.Module):
    """A ResNet for small images: a stem, three stages of blocks, pooling, batch norm, a linear classifier.

    The stages have `width`, 2 `width` and 4 `width` channels; the second and third halve the image. Convolutions have
    no bias; they and the classifier start from Kaiming's normal distribution (fan-in, ReLU).

    Shapes: float (N, in_channels, H, W), any H and W from 1 up, 32x32 for CIFAR -> logits (N, num_classes).

    Args:
        block: `BasicBlock` or `BiRealBlock`.
        blocks_per_stage: n; the network has 6 n + 2 layers with weights.
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the stem and the first stage.

    Raises:
        ConfigError: a count is not a positive integer; in the forward, an input of another shape or dtype.
    """

    def __init__(
        self,
        block: type[BasicBlock],
        blocks_per_stage: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
    ) -> None:
        super().__init__()
        counts = {
            "blocks_per_stage": blocks_per_stage,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
        }
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ConfigError(f"{name} of a ResNet must be a positive integer, not {count!r}.")
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(block, blocks_per_stage, width, width, stride=1)
        self.layer2 = _stage(block, blocks_per_stage, width, 2 * width, stride=2)
        self.layer3 = _stage(block, blocks_per_stage, 2 * width, 4 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.bn2 = nn.BatchNorm1d(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ConfigError(
                f"this network takes a floating-point batch of shape (N, {self.in_channels}, H, W), "
                f"not {x.dtype} of shape {tuple(x.shape)}."
            )
        x = self.bn1(F.relu(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.bn2(self.pool(x).flatten(1))
        return self.fc(x)


def _stage(block: type[BasicBlock], count: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(count - 1)))


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 (three blocks per stage) with a shortcut around every two convolutions.

    269,850 parameters with the defaults; 40,551,040 multiply-accumulates for one 3x32x32 image, of which the
    convolutions do 40,550,400. See `CifarResNet` for the order of its layers, arguments, shapes and errors.
    Source: ReSTE's `resnet20` (arXiv 2308.06689), after He et al. (arXiv 1512.03385).
    """
    return CifarResNet(BasicBlock, 3, num_classes, in_channels, width)


def resnet20_bireal(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 with a shortcut around every convolution, which binary activations need.

    The parameters and multiply-accumulates are those of `resnet20`. Source: ReSTE's `resnet20_bireal`
    (arXiv 2308.06689), after Bi-Real net (arXiv 1808.00278).
    """
    return CifarResNet(BiRealBlock, 3, num_classes, in_channels, width)


def resnet8(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-8 (one block per stage) with a shortcut around every two convolutions: small enough for quick studies.

    75,418 parameters with the defaults; 12,239,488 multiply-accumulates for one 3x32x32 image, of which the
    convolutions do 12,238,848. Otherwise as `resnet20`.
    """
    return CifarResNet(BasicBlock, 1, num_classes, in_channels, width)


def resnet8_bireal(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-8 with a shortcut around every convolution; parameters and multiply-accumulates as `resnet8`."""
    return CifarResNet(BiRealBlock, 1, num_classes, in_channels, width)
