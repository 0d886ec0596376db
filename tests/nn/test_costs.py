"""summary(), held against numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import abste
from abste.errors import ConfigError
from abste.nn import BinaryConv2d, BinaryLinear, LayerCost

KEYS = ("binary_parameters", "float_parameters", "packed_bytes", "float_bytes", "binary_macs", "float_macs")


def cost(layer: nn.Module, size: tuple[int, ...], position: int = 0) -> dict[str, int]:
    row = abste.summary(nn.Sequential(layer), size).layers[position]
    return {key: getattr(row, key) for key in KEYS}


def test_a_small_network_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 5),
    )
    abste.convert(model, activations="ste", example_input=torch.zeros(1, 3, 8, 8))
    result = abste.summary(model, (2, 3, 8, 8))
    stem, norm, conv, fc = result.layers
    assert stem == LayerCost("0", "Conv2d", (8, 8, 8), 0, 216, 864, 864, 0, 2 * 216 * 64)
    assert norm == LayerCost("1", "BatchNorm2d", (8, 8, 8), 0, 16, 4 * 32, 4 * 32, 0, 0)
    # 12 filters of 2x3x3 bits, a bias and a scale each, 16 positions, 2 images
    assert conv == LayerCost("2", "BinaryConv2d", (12, 4, 4), 216, 12, 27 + 48 + 48, 4 * 228, 2 * 216 * 16, 0)
    assert fc == LayerCost("4", "Linear", (5,), 0, 965, 3860, 3860, 0, 2 * 192 * 5)
    assert result.binary_parameters == 216
    assert result.float_parameters == 216 + 16 + 12 + 965
    assert result.packed_bytes == 864 + 128 + 123 + 3860
    assert result.float_bytes == 864 + 128 + 912 + 3860
    assert result.binary_macs == 6912
    assert result.float_macs == 27648 + 1920
    assert result.total_macs == 36480
    assert result.compression == pytest.approx(result.float_bytes / result.packed_bytes)
    assert json.loads(json.dumps(result.to_dict()))["totals"]["packed_bytes"] == result.packed_bytes


@pytest.mark.parametrize(("name", "binary_macs"), [("resnet20", 0), ("resnet20_bireal", 40_550_400 - 442_368)])
def test_resnet20(name: str, binary_macs: int) -> None:
    model = abste.models.create(name)
    plain = abste.summary(model, (1, 3, 32, 32))
    assert plain.float_parameters == 269_850
    assert plain.total_macs == plain.float_macs == 40_550_400 + 640
    assert plain.compression == 1.0
    abste.convert(model, activations="ste" if binary_macs else None, example_input=torch.zeros(1, 3, 32, 32))
    result = abste.summary(model, (1, 3, 32, 32))
    assert result.binary_parameters == 267_264
    assert result.binary_parameters + result.float_parameters == 269_850
    assert result.total_macs == plain.total_macs
    assert result.binary_macs == binary_macs
    assert result.float_bytes == plain.float_bytes
    scales = 4 * (6 * 16 + 6 * 32 + 6 * 64)
    assert result.packed_bytes == 267_264 // 8 + scales + (plain.float_bytes - 4 * 267_264)
    assert abste.summary(model, (4, 3, 32, 32)).total_macs == 4 * plain.total_macs


@pytest.mark.parametrize(
    ("options", "packed", "floats"),
    [
        ({"scale": "channel"}, 3 + 4 * 3, 0),
        ({"scale": "tensor"}, 3 + 4, 0),
        ({"scale": "learned"}, 3 + 4 * 3, 3),
        ({"scale": None}, 3, 0),
    ],
)
def test_scales_are_stored(options: dict[str, Any], packed: int, floats: int) -> None:
    row = cost(BinaryLinear(7, 3, bias=False, **options), (1, 7))  # 21 bits in 3 bytes
    assert row == dict(zip(KEYS, (21, floats, packed, 84, 0, 21), strict=True))


def test_only_two_binary_operands_make_a_binary_mac() -> None:
    sizes = {}
    for bits, (weights, activations) in {
        "W1A32": ("ste", None),
        "W32A1": (None, "ste"),
        "W1A1": ("ste", "ste"),
    }.items():
        sizes[bits] = cost(BinaryConv2d(4, 4, 3, weights=weights, activations=activations, bias=False), (1, 4, 5, 5))
    assert {bits: (row["binary_macs"], row["float_macs"]) for bits, row in sizes.items()} == {
        "W1A32": (0, 1296),
        "W32A1": (0, 1296),
        "W1A1": (1296, 0),
    }
    assert sizes["W32A1"]["binary_parameters"] == 0
    assert sizes["W32A1"]["packed_bytes"] == sizes["W32A1"]["float_bytes"] == 4 * 144


@pytest.mark.parametrize(
    ("compute", "extra"),
    [
        (lambda layer: prune.identity(layer, "weight"), 0),
        (nn.utils.parametrizations.weight_norm, 8),
        (nn.utils.parametrizations.orthogonal, 0),
        (nn.utils.weight_norm, 8),
    ],
    ids=["prune", "parametrizations.weight_norm", "parametrizations.orthogonal", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_something_computes_are_binary(compute: Any, extra: int) -> None:
    plain = BinaryConv2d(8, 8, 3, weights="ste", bias=False)
    expected = abste.summary(nn.Sequential(plain), (1, 8, 6, 6))
    found = abste.summary(nn.Sequential(compute(plain)), (1, 8, 6, 6))
    assert found.binary_parameters == expected.binary_parameters == 576
    assert found.float_parameters == extra and found.packed_bytes == expected.packed_bytes + 4 * extra
    assert found.binary_macs == expected.binary_macs and found.float_macs == expected.float_macs


def test_macs_of_other_layers() -> None:
    assert cost(nn.Linear(6, 5), (2, 7, 6))["float_macs"] == 2 * 7 * 6 * 5
    assert cost(nn.Conv1d(4, 6, 3, groups=2), (1, 4, 9))["float_macs"] == 7 * 6 * 2 * 3
    assert cost(nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5))["float_macs"] == 25 * 4 * 6 * 9
    assert cost(nn.LayerNorm(6), (2, 6))["float_macs"] == 0


def test_shared_things_are_stored_once_and_computed_each_time() -> None:
    layer = nn.Linear(6, 6)
    twice = abste.summary(nn.Sequential(layer, nn.ReLU(), layer), (1, 6))
    assert (twice.float_parameters, twice.float_macs) == (42, 72)
    tied = nn.Linear(6, 6, bias=False)
    tied.weight = layer.weight
    both = abste.summary(nn.Sequential(layer, tied), (1, 6))
    assert (both.float_parameters, both.float_macs) == (42, 72)


def test_what_is_not_called_still_has_parameters() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)
            self.free = nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(input=x) + self.free.sum()

    result = abste.summary(Half(), (1, 3))
    assert [(r.name, r.output_shape, r.float_macs) for r in result.layers] == [
        ("(model)", (3,), 0),
        ("used", (3,), 9),
        ("unused", (), 0),
    ]
    assert result.float_parameters == 29


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    abste.convert(model, activations="ste", example_input=torch.zeros(1, 3, 9, 9))
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    abste.summary(model, (1, 3, 9, 9))
    with pytest.raises(ConfigError):
        abste.summary(model, (1, 4, 9, 9))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())


def test_columns_fit() -> None:
    model = abste.models.create("resnet20_bireal")
    abste.convert(model, activations="ste", example_input=torch.zeros(1, 3, 32, 32))
    result = abste.summary(model, (1, 3, 32, 32))
    lines = str(result).splitlines()
    assert len(lines) == len(result.layers) + 5
    assert max(map(len, lines)) <= 120
    table = [line for line in lines[:-1] if not line.startswith("-")]
    ends = [line.rindex(" ") for line in table]
    assert {len(line) for line in table} == {len(table[0])}
    assert all(ends)
    assert "40,108,032" in lines[-2]
    assert lines[-1].startswith("input 1x3x32x32; packed ")
    assert lines[-1].endswith(f"{result.compression:.1f} times smaller")


def test_dtype_follows_the_model() -> None:
    assert abste.summary(nn.Sequential(nn.Linear(3, 2)).bfloat16(), (1, 3)).total_macs == 6
    assert abste.summary(nn.Sequential(nn.Linear(3, 2)).double(), (1, 3)).total_macs == 6
    assert abste.summary(nn.Embedding(9, 4), (1, 3), dtype=torch.int64).layers[0].output_shape == (3, 4)
    assert abste.summary(nn.Sequential(nn.Linear(3, 2, device="meta")), (1, 3)).total_macs == 6


@pytest.mark.parametrize("size", [(), (1, 0), (1, -3), (1, 3.0), "1x3", 3, None, [[1, 3]]])
def test_a_bad_input_size(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"input_size must be a shape such as \(1, 3, 32, 32\), got"):
        abste.summary(nn.Linear(3, 3), size)


def test_an_input_size_the_model_refuses() -> None:
    with pytest.raises(ConfigError, match=r"fails on an input of shape \(1, 4\): ") as raised:
        abste.summary(nn.Linear(3, 3), (1, 4))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_parametrised_layer_costs_what_it_multiplies(name: str) -> None:
    layer = getattr(nn.utils.parametrizations, name)(nn.Linear(8, 4, bias=False))
    assert abste.summary(nn.Sequential(layer, nn.ReLU()), (1, 8)).total_macs == 32
