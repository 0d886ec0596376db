"""Data sets as whole uint8 tensors, and batches augmented on the device.

splits = abste.data.load("cifar10", root="data")
batches = abste.data.Batches(
    splits.train, 256, augment=abste.data.Augment(crop_padding=4, flip="alternating"), seed=0, train=True
)
for images, labels in batches.epoch(0):
    ...
"""

from abste.data.batches import Augment, Batches
from abste.data.sets import Description, ImageData, Splits, available, describe, hold_out, load

__all__ = ["Augment", "Batches", "Description", "ImageData", "Splits", "available", "describe", "hold_out", "load"]
