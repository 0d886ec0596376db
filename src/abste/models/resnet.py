"""ResNets in the block orders that binary networks need.

Each convolution is followed by ReLU and then batch norm, and the identity is added after both with no activation behind
the sum: what the next convolution reads is signed, so the sign of an activation carries information. The order is that
of ReSTE's CIFAR networks (Wu et al., arXiv 2308.06689); the depth, widths and parameter-free shortcuts (option A) are
those of He et al. (arXiv 1512.03385, section 4.2); a shortcut around every convolution is Bi-Real net's (Liu et al.,
arXiv 1808.00278). The float network is built in the same order as the binary one, so only binarisation differs.
Other papers put other things around a binary convolution with a shortcut of its own: `Order` names theirs.

ResNet-18 and ResNet-34 have real-valued 1x1 projections instead (option B), as their binary versions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from abste.errors import ConfigError, nearest
from abste.models._arguments import check_count, check_images
from abste.nn import ChannelShift, RPReLU

Init = Literal["kaiming", "default"]
Order = Literal["reste", "bireal", "irnet", "react"]


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


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B: a 1x1 convolution, which keeps every `stride`-th row and column, and batch norm.

    Shapes as :class:`PadShortcut`. Source: He et al. (arXiv 1512.03385).
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def pooled_projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Average pooling, then a 1x1 convolution and batch norm: every pixel has its say.

    Shapes as :class:`PadShortcut`. Source: Bi-Real net (arXiv 1808.00278).
    """
    return nn.Sequential(
        nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


Shortcut = Callable[[int, int, int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by ReLU and batch norm, and one shortcut around both.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), signed.

    Args:
        in_channels, out_channels, stride: see above.
        shortcut: makes the shortcut from these where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut = PadShortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Both convolutions, then the identity."""
        out = self.bn1(F.relu(self.conv1(x)))
        out = self.bn2(F.relu(self.conv2(out)))
        return out + self.shortcut(x)

    @staticmethod
    def behind_stem(x: Tensor, norm: nn.Module) -> Tensor:
        """What stands between the first convolution, which gives `x`, and the first block."""
        return norm(F.relu(x))


class BiRealBlock(BasicBlock):
    """The same modules as `BasicBlock` with a shortcut around each convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Each convolution with its own identity."""
        x = self.bn1(F.relu(self.conv1(x))) + self.shortcut(x)
        return self.bn2(F.relu(self.conv2(x))) + x


class BiRealNetBlock(BasicBlock):
    """The block of Bi-Real net: as `BiRealBlock`, without ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """Each convolution with its own identity."""
        x = self.bn1(self.conv1(x)) + self.shortcut(x)
        return self.bn2(self.conv2(x)) + x

    @staticmethod
    def behind_stem(x: Tensor, norm: nn.Module) -> Tensor:
        """Batch norm alone."""
        return norm(x)


class IRNetBlock(BasicBlock):
    """The block of IR-Net with binary activations: as `BiRealNetBlock`, with Hardtanh behind each sum.

    Source: htqin/IR-Net, CIFAR-10/ResNet20/1w1a (arXiv 1909.10788).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Each convolution with its own identity."""
        x = F.hardtanh(self.bn1(self.conv1(x)) + self.shortcut(x))
        return F.hardtanh(self.bn2(self.conv2(x)) + x)

    @staticmethod
    def behind_stem(x: Tensor, norm: nn.Module) -> Tensor:
        """Batch norm, then Hardtanh."""
        return F.hardtanh(norm(x))


class ReActBlock(BiRealNetBlock):
    """The block of ReAct-ResNet: a learned shift before each convolution and RPReLU behind each sum, no other ReLU.

    The shift moves the threshold of the sign that a converted convolution takes of its input: together they are RSign.
    Shapes and arguments as `BasicBlock`. Source: ReActNet (arXiv 2003.03488).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut = PadShortcut) -> None:
        super().__init__(in_channels, out_channels, stride, shortcut)
        self.shift1 = ChannelShift(in_channels)
        self.act1 = RPReLU(out_channels)
        self.shift2 = ChannelShift(out_channels)
        self.act2 = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Each convolution with its own identity."""
        x = self.act1(self.bn1(self.conv1(self.shift1(x))) + self.shortcut(x))
        return self.act2(self.bn2(self.conv2(self.shift2(x))) + x)


_ORDERS: dict[Order, type[BasicBlock]] = {
    "reste": BiRealBlock,
    "bireal": BiRealNetBlock,
    "irnet": IRNetBlock,
    "react": ReActBlock,
}


def _ordered(order: Order) -> type[BasicBlock]:
    if order not in _ORDERS:
        raise ConfigError(f"unknown order {order!r} of a ResNet: {nearest(order, _ORDERS)}")
    return _ORDERS[order]


class CifarResNet(nn.Module):
    """A ResNet for small images: a stem, stages of blocks, pooling, batch norm, a linear classifier.

    The stages have `width`, 2 `width`, 4 `width`... channels; each but the first halves the image. Convolutions have
    no bias.

    Shapes: float (N, in_channels, H, W), any H and W from 1 up, 32x32 for CIFAR -> logits (N, num_classes).

    Args:
        block: `BasicBlock`, `BiRealBlock`, `BiRealNetBlock`, `IRNetBlock` or `ReActBlock`.
        blocks_per_stage: n, or one number for each stage; the network has twice as many layers with weights as blocks
            and 2 more, shortcuts aside.
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the stem and the first stage.
        stages: how many.
        shortcut: makes the shortcuts of blocks that change the shape: `PadShortcut`, `projection` or
            `pooled_projection`.
        init: where convolutions and classifier start: ``"kaiming"``, his normal distribution (fan-in, ReLU), with no
            bias; or ``"default"``, that of torch's layers: uniform within ±1/sqrt(fan-in), the bias too. ReSTE's code
            has the first for ResNet-20 (but torch's bias) and for ImageNet (convolutions alone: the classifier there is
            torch's), and the second for CIFAR's ResNet-18.

    Raises:
        ConfigError: a count is not a positive integer, or there is not one for each stage; an unknown ``init``; in the
            forward, an input of another shape or dtype.
    """

    def __init__(
        self,
        block: type[BasicBlock],
        blocks_per_stage: int | Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        stages: int = 3,
        shortcut: Shortcut = PadShortcut,
        init: Init = "kaiming",
    ) -> None:
        super().__init__()
        if init not in get_args(Init):
            raise ConfigError(f"unknown init {init!r} of a ResNet: {nearest(init, get_args(Init))}")
        counts = {"stages": stages, "num_classes": num_classes, "in_channels": in_channels, "width": width}
        for name, count in counts.items():
            check_count(name, count, "a ResNet")
        blocks = list(blocks_per_stage) if isinstance(blocks_per_stage, Sequence) else [blocks_per_stage] * stages
        for count in blocks:
            check_count("blocks_per_stage", count, "a ResNet")
        if len(blocks) != stages:
            raise ConfigError(f"blocks_per_stage of a ResNet must give one number for each of {stages} stages.")
        self.in_channels = in_channels
        self.stages = stages
        self.conv1 = self.stem_convolution(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for number in range(stages):
            stride, out_channels = (2, 2 * channels) if number else (1, channels)
            stage = [block(channels, out_channels, stride, shortcut)]
            stage += [block(out_channels, out_channels, 1, shortcut) for _ in range(blocks[number] - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*stage))
            channels = out_channels
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.bn2 = self.last_norm(channels)
        self.fc = nn.Linear(channels, num_classes)
        if init == "default":
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def stem_convolution(self, in_channels: int, width: int) -> nn.Conv2d:
        """The first convolution."""
        return nn.Conv2d(in_channels, width, 3, padding=1, bias=False)

    def last_norm(self, channels: int) -> nn.Module:
        """What stands before the classifier."""
        return nn.BatchNorm1d(channels)

    def stem(self, x: Tensor) -> Tensor:
        """What stands before the first stage."""
        block = cast(BasicBlock, self.get_submodule("layer1.0"))
        return block.behind_stem(self.conv1(x), self.bn1)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        check_images(x, self.in_channels)
        x = self.stem(x)
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        x = self.bn2(self.pool(x).flatten(1))
        return self.fc(x)


class ImageNetResNet(CifarResNet):
    """A ResNet for images of 224x224: a 7x7 stem with stride 2, max pooling, four stages; otherwise as `CifarResNet`.

    Shapes: float (N, in_channels, H, W), any H and W from 1 up -> logits (N, num_classes).
    """

    def __init__(
        self,
        block: type[BasicBlock],
        blocks_per_stage: int | Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        shortcut: Shortcut = projection,
        init: Init = "kaiming",
    ) -> None:
        super().__init__(block, blocks_per_stage, num_classes, in_channels, width, 4, shortcut, init)
        self.stem_pool = nn.MaxPool2d(3, stride=2, padding=1)

    def stem_convolution(self, in_channels: int, width: int) -> nn.Conv2d:
        return nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)

    def stem(self, x: Tensor) -> Tensor:
        return self.stem_pool(super().stem(x))


class BiRealNet(ImageNetResNet):
    """The order of Bi-Real net: no ReLU anywhere, averaging shortcuts around every convolution, no last batch norm.

    `block` is `BiRealNetBlock`, or `ReActBlock` for ReAct-ResNet.
    """

    def __init__(
        self,
        blocks_per_stage: int | Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        block: type[BasicBlock] = BiRealNetBlock,
        init: Init = "kaiming",
    ) -> None:
        super().__init__(block, blocks_per_stage, num_classes, in_channels, width, pooled_projection, init)

    def last_norm(self, channels: int) -> nn.Module:
        return nn.Identity()


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16, init: Init = "kaiming") -> CifarResNet:
    """ResNet-20 (three blocks per stage) with a shortcut around every two convolutions.

    269,850 parameters with the defaults; 40,551,040 multiply-accumulates for one 3x32x32 image, of which the
    convolutions do 40,550,400. See `CifarResNet` for the order of its layers, arguments, shapes and errors.
    Source: ReSTE's `resnet20` (arXiv 2308.06689), after He et al. (arXiv 1512.03385).
    """
    return CifarResNet(BasicBlock, 3, num_classes, in_channels, width, init=init)


def resnet20_bireal(
    num_classes: int = 10, in_channels: int = 3, width: int = 16, init: Init = "kaiming", order: Order = "reste"
) -> CifarResNet:
    """ResNet-20 with a shortcut around every convolution, which binary activations need.

    The parameters and multiply-accumulates are those of `resnet20`. Source: ReSTE's `resnet20_bireal`
    (arXiv 2308.06689), after Bi-Real net (arXiv 1808.00278).

    `order` is what stands around the convolutions of a block: ``"reste"`` convolution, ReLU, batch norm, sum;
    ``"bireal"`` convolution, batch norm, sum (Bi-Real net); ``"irnet"`` the same, and Hardtanh behind the sum (IR-Net's
    W1A1); ``"react"`` a learned shift, convolution, batch norm, sum, RPReLU (ReActNet), with 2,640 parameters more.
    """
    return CifarResNet(_ordered(order), 3, num_classes, in_channels, width, init=init)


def resnet8(num_classes: int = 10, in_channels: int = 3, width: int = 16, init: Init = "kaiming") -> CifarResNet:
    """ResNet-8 (one block per stage) with a shortcut around every two convolutions: small enough for quick studies.

    75,418 parameters with the defaults; 12,239,488 multiply-accumulates for one 3x32x32 image, of which the
    convolutions do 12,238,848. Otherwise as `resnet20`.
    """
    return CifarResNet(BasicBlock, 1, num_classes, in_channels, width, init=init)


def resnet8_bireal(
    num_classes: int = 10, in_channels: int = 3, width: int = 16, init: Init = "kaiming", order: Order = "reste"
) -> CifarResNet:
    """ResNet-8 with a shortcut around every convolution; parameters and multiply-accumulates as `resnet8`.

    `order` as in `resnet20_bireal`; ``"react"`` has 848 parameters more.
    """
    return CifarResNet(_ordered(order), 1, num_classes, in_channels, width, init=init)


def resnet18(num_classes: int = 10, in_channels: int = 3, width: int = 64, init: Init = "kaiming") -> CifarResNet:
    """ResNet-18 for small images: four stages of two blocks behind a 3x3 stem, with 1x1 projection shortcuts.

    11,174,986 parameters with the defaults (``width=32`` is half as wide); 555,422,720 multiply-accumulates for one
    3x32x32 image, of which the convolutions do 555,417,600. Otherwise as `CifarResNet`.
    Source: ReSTE's `resnet18` (arXiv 2308.06689), after He et al. (arXiv 1512.03385).
    """
    return CifarResNet(BasicBlock, 2, num_classes, in_channels, width, 4, projection, init)


def resnet18_bireal(
    num_classes: int = 10, in_channels: int = 3, width: int = 64, init: Init = "kaiming", order: Order = "reste"
) -> CifarResNet:
    """ResNet-18 for small images with a shortcut around every convolution, which binary activations need.

    The parameters and multiply-accumulates are those of `resnet18`. `order` as in `resnet20_bireal`; ``"react"`` has
    14,912 parameters more.
    """
    return CifarResNet(_ordered(order), 2, num_classes, in_channels, width, 4, projection, init)


def imagenet_resnet18(
    num_classes: int = 1000, in_channels: int = 3, width: int = 64, init: Init = "kaiming"
) -> ImageNetResNet:
    """ResNet-18 for ImageNet in ReSTE's order: convolution, ReLU, batch norm, a shortcut around every convolution.

    11,690,536 parameters with the defaults: those of He et al., and a batch norm before the classifier;
    1,814,073,344 multiply-accumulates for one 3x224x224 image, of which the convolutions do 1,813,561,344.
    IR-Net's network (arXiv 1909.10788; htqin/IR-Net) differs: batch norm stands right behind the convolution, the
    activation behind the sum (Hardtanh for W1A1; ReLU around pairs of convolutions for W1A32), and another batch norm
    behind the classifier.
    Source: He et al. (arXiv 1512.03385), in the order of ReSTE (arXiv 2308.06689; DravenALG/ReSTE, models_imagenet).
    """
    return ImageNetResNet(BiRealBlock, 2, num_classes, in_channels, width, init=init)


def imagenet_resnet34(
    num_classes: int = 1000, in_channels: int = 3, width: int = 64, init: Init = "kaiming"
) -> ImageNetResNet:
    """ResNet-34 for ImageNet, in the order of `imagenet_resnet18`.

    21,798,696 parameters with the defaults: those of He et al., and a batch norm before the classifier;
    3,663,761,408 multiply-accumulates for one 3x224x224 image, of which the convolutions do 3,663,249,408.
    """
    return ImageNetResNet(BiRealBlock, (3, 4, 6, 3), num_classes, in_channels, width, init=init)


def imagenet_resnet18_bireal(
    num_classes: int = 1000, in_channels: int = 3, width: int = 64, init: Init = "kaiming"
) -> BiRealNet:
    """Bi-Real net 18: a shortcut around every convolution, averaging before its 1x1 projections, no ReLU.

    11,689,512 parameters with the defaults; multiply-accumulates as `imagenet_resnet18`.
    Source: Bi-Real net (arXiv 1808.00278).
    """
    return BiRealNet(2, num_classes, in_channels, width, init=init)


def imagenet_resnet34_bireal(
    num_classes: int = 1000, in_channels: int = 3, width: int = 64, init: Init = "kaiming"
) -> BiRealNet:
    """Bi-Real net 34, in the order of `imagenet_resnet18_bireal`.

    21,797,672 parameters with the defaults; multiply-accumulates as `imagenet_resnet34`.
    Source: Bi-Real net (arXiv 1808.00278).
    """
    return BiRealNet((3, 4, 6, 3), num_classes, in_channels, width, init=init)


def react_resnet18(num_classes: int = 1000, in_channels: int = 3, width: int = 64, init: Init = "kaiming") -> BiRealNet:
    """ReAct-ResNet-18: Bi-Real net 18 with learned shifts before its convolutions and RPReLU behind every sum.

    11,704,424 parameters with the defaults; multiply-accumulates as `imagenet_resnet18`.
    Its authors train it in two steps, with binary activations alone first. For the order see `ReActBlock`.
    Source: ReActNet (arXiv 2003.03488; liuzechun/ReActNet, resnet).
    """
    return BiRealNet(2, num_classes, in_channels, width, ReActBlock, init)
