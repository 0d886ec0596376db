"""Data sets, as tensors or as files on disk, and batches of them, augmented.

splits = abste.data.load("cifar10", root="data")
batches = abste.data.Batches(
    splits.train, 256, augment=abste.data.Augment(crop_padding=4, flip="alternating"), seed=0, train=True
)
for images, labels in batches.epoch(0):
    ...

splits = abste.data.open_files("folder", root="photos")
batches = abste.data.FileBatches(
    splits.train, 64, views=abste.data.Views((224, 224), flip="random"), seed=0, train=True
)
"""

from abste.data.batches import Augment, Batches, BatchSource
from abste.data.files import FileSplits, ImageFiles
from abste.data.loading import FileBatches, lost_workers
from abste.data.opening import FILE_SETS, open_files
from abste.data.sets import IMAGENET, DataSet, Description, ImageData, Splits, available, describe, hold_out, load
from abste.data.shards import write_shards
from abste.data.transforms import Views, default_resize

__all__ = [
    "FILE_SETS",
    "IMAGENET",
    "Augment",
    "BatchSource",
    "Batches",
    "DataSet",
    "Description",
    "FileBatches",
    "FileSplits",
    "ImageData",
    "ImageFiles",
    "Splits",
    "Views",
    "available",
    "default_resize",
    "describe",
    "hold_out",
    "load",
    "lost_workers",
    "open_files",
    "write_shards",
]
