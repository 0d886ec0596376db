from __future__ import annotations

import pytest

from abste import models
from abste.errors import ConfigError


def test_available_names_are_public_builders() -> None:
    names = models.available()
    assert (
        names
        == sorted(names)
        == [
            *(f"imagenet_resnet{depth}{order}" for depth in (18, 34) for order in ("", "_bireal")),
            *("quicknet", "quicknet_large", "quicknet_small", "react_resnet18", "reactnet_a"),
            *(f"resnet{depth}{order}" for depth in (18, 20, 8) for order in ("", "_bireal")),
            "vgg_small",
        ]
    )
    assert set(names) < set(models.__all__)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"^unknown model 'resnet2O': did you mean 'resnet20'"):
        models.create("resnet2O")


def test_unknown_argument() -> None:
    with pytest.raises(
        ConfigError, match=r"^model 'resnet8' takes no argument 'classes': did you mean 'num_classes'\?$"
    ):
        models.create("resnet8", classes=3)
