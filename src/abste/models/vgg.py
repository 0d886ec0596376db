"""VGG-Small in the layer order that binary networks need."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from abste.errors import ConfigError
from abste.models._arguments import check_count


class VGGSmall(nn.Module):
    """Six 3x3 convolutions, each followed by ReLU and batch norm, and a linear classifier over what is left.

    Max pooling behind the second, fourth and sixth halves the image; it follows batch norm, so that what the next
    convolution reads is signed. The float network is built in the same order as the binary one, so only binarisation
    differs. (ReSTE's own float network has batch norm before ReLU.)

    Shapes: float (N, in_channels, image_size, image_size) -> logits (N, num_classes).

    Args:
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the first two convolutions; the next two have twice, the last two four times as many.
        image_size: height and width of the image in pixels, a multiple of 8; the classifier sees each place.

    Raises:
        ConfigError: a count is not a positive integer, or the size no multiple of 8; in the forward, an input of
            another shape or dtype.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 128, image_size: int = 32) -> None:
        super().__init__()
        counts = {"num_classes": num_classes, "in_channels": in_channels, "width": width, "image_size": image_size}
        for name, count in counts.items():
            check_count(name, count, "VGG-Small")
        if image_size % 8:
            raise ConfigError(f"image_size of VGG-Small must be a multiple of 8, not {image_size}.")
        self.shape = (in_channels, image_size, image_size)
        channels = in_channels
        for number, out_channels in enumerate((width, width, 2 * width, 2 * width, 4 * width, 4 * width), 1):
            self.add_module(f"conv{number}", nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(out_channels))
            if number % 2 == 0:
                self.add_module(f"pool{number}", nn.MaxPool2d(2))
            channels = out_channels
        self.fc = nn.Linear(channels * (image_size // 8) ** 2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        if tuple(x.shape[1:]) != self.shape or not x.is_floating_point():
            raise ConfigError(
                f"this network takes a floating-point batch of shape (N, {', '.join(map(str, self.shape))}), "
                f"not {x.dtype} of shape {tuple(x.shape)}; image_size is an argument of the model."
            )
        for number in range(1, 7):
            x = self.get_submodule(f"bn{number}")(F.relu(self.get_submodule(f"conv{number}")(x)))
            if number % 2 == 0:
                x = self.get_submodule(f"pool{number}")(x)
        return self.fc(x.flatten(1))


def vgg_small(num_classes: int = 10, in_channels: int = 3, width: int = 128, image_size: int = 32) -> VGGSmall:
    """VGG-Small: six convolutions of 128 to 512 channels, for images of 32x32.

    4,660,106 parameters with the defaults; 607,600,640 multiply-accumulates for one 3x32x32 image, of which the
    convolutions do 607,518,720. See `VGGSmall` for the order of its layers, arguments, shapes and errors.
    Source: ReSTE's `vgg_small_1w1a` (arXiv 2308.06689), whose initialisation it has, after LQ-Nets (arXiv 1807.10029).
    """
    return VGGSmall(num_classes, in_channels, width, image_size)
