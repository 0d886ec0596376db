"""Networks for ImageNet: the table in docs/models.md, block orders, and the way from conversion to a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import abste
from abste import models
from abste.errors import ConfigError
from abste.models.quicknet import QuickNet
from abste.models.reactnet import ReActNetBlock
from abste.models.resnet import CifarResNet, ReActBlock

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## ImageNet\n")[2].partition("\n## ")[0]
_HEAD, _, *_BODY = [
    [cell.strip() for cell in line.strip("| ").split(" | ")] for line in SECTION.splitlines() if line.startswith("|")
]
ROWS = {row[0].strip("`"): dict(zip(_HEAD, row, strict=True)) for row in _BODY}
SETTINGS: dict[str, Any] = {}
exec(SECTION.partition("```python\n")[2].partition("```")[0], SETTINGS)
SETTINGS = SETTINGS["settings"]

# One of each kind of block; test_resnet18.py has the others.
NARROW = {"imagenet_resnet34_bireal": 8, "react_resnet18": 8, "reactnet_a": 4, "quicknet": 8}


def narrow(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.create(name, width=NARROW[name], **kwargs)


def disturb(model: nn.Module) -> None:
    """Norms, shifts and slopes that do something."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                nn.init.normal_(parameter, 1.0 if name == "weight" else 0.0, 0.3)


def count() -> dict[str, dict[str, int]]:
    found = {}
    for name in ROWS:
        model = models.create(name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        abste.convert(model, example_input=torch.zeros(1, 3, 32, 32), **SETTINGS[name])
        cost = abste.summary(model, (1, 3, 224, 224))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        found[name] = {
            "Parameters": parameters,
            "1-bit MACs": cost.binary_macs,
            "32-bit MACs": cost.float_macs,
            "Packed, bytes": cost.packed_bytes,
            "bits": cost.binary_parameters,
            "running": sum(2 * norm.num_features for norm in norms),
            "bare": sum(2 * norm.num_features for norm in norms if not norm.affine),
        }
    return found


def test_the_table_is_what_is_counted() -> None:
    """And each line of the explanations below it holds."""
    counted = count()
    names = [name for name in models.available() if name.startswith(("imagenet", "react", "quicknet"))]
    assert sorted(ROWS) == names == sorted(SETTINGS)
    for name, row in ROWS.items():
        for column in ("Parameters", "1-bit MACs", "32-bit MACs", "Packed, bytes"):
            assert row[column] == f"{counted[name][column]:,}", (name, column)
        operations = counted[name]["1-bit MACs"] / 64 + counted[name]["32-bit MACs"]
        assert row["OPs, 10^8"] == f"{operations / 1e8:.3f}", name
    assert counted["imagenet_resnet18"]["Parameters"] == 11_689_512 + 1024
    assert counted["imagenet_resnet34"]["Parameters"] == 21_797_672 + 1024
    for name, published in (("imagenet_resnet18_bireal", 1.63), ("react_resnet18", 1.63), ("reactnet_a", 0.87)):
        operations = counted[name]["1-bit MACs"] / 64 + counted[name]["32-bit MACs"]
        classifier = 0 if name == "reactnet_a" else 512_000
        assert round((operations - classifier) / 1e8, 2) == published
    birealnet = counted["imagenet_resnet18_bireal"]
    assert round(8 * (birealnet["Packed, bytes"] - 4 * birealnet["running"]) / 1e6, 1) == 33.6
    for name, parameters, size in (
        ("quicknet_small", 12_655_688, 4.00),
        ("quicknet", 13_234_088, 4.17),
        ("quicknet_large", 23_342_248, 5.40),
    ):
        cost = counted[name]
        assert cost["bare"] == (16 if name == "quicknet_small" else 32)
        assert cost["Parameters"] + cost["bare"] == parameters
        assert ROWS[name]["published"] == f"{size:.2f} MiB [4]"  # the last column of that name
        as_larq_counts = cost["Packed, bytes"] - 4 * cost["running"] + 4 * cost["bare"]
        assert as_larq_counts == cost["bits"] // 8 + 4 * (parameters - cost["bits"])
        assert round(as_larq_counts / 2**20, 2) == size


def test_docstrings_give_the_numbers_of_the_table() -> None:
    for name, row in ROWS.items():
        stated = getattr(models, name).__doc__
        assert f"{row['Parameters']} parameters" in stated
        total = sum(int(row[column].replace(",", "")) for column in ("1-bit MACs", "32-bit MACs"))
        like = "`imagenet_resnet34`" if "34" in name else "`imagenet_resnet18`"
        assert f"{total:,}\n    multiply" in stated or f"{total:,} multiply" in stated or f"as {like}" in stated, name


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("size", [32, 45])
def test_shapes(name: str, size: int) -> None:
    assert narrow(name, num_classes=7, in_channels=2)(torch.randn(2, 2, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", NARROW)
def test_what_becomes_binary_reads_signed_input(name: str) -> None:
    model = narrow(name)
    report = abste.convert(model, example_input=torch.zeros(1, 3, 32, 32), **SETTINGS[name])
    negative: list[float] = []
    for key in report.binarized:
        module = model.get_submodule(key)
        module.register_forward_pre_hook(lambda _, x: negative.append((x[0] < 0).float().mean().item()))
    model(torch.randn(4, 3, 64, 64))
    assert len(negative) == len(report.binarized) > 15
    # Max pooling leaves few negative numbers to the first one of a residual network.
    assert negative[0] > 0 and all(0.005 < share < 0.97 for share in negative[1:]), negative


@pytest.mark.parametrize("activations", [True, False], ids=["w1a1", "w1a32"])
@pytest.mark.parametrize("name", NARROW)
def test_from_conversion_to_file(name: str, activations: bool, tmp_path: Path) -> None:
    """With its authors' settings: one step changes every latent, and the file is the network."""
    settings = SETTINGS[name] | ({} if activations else {"activations": None, "pad_value": 0})
    model = narrow(name, num_classes=5)
    example = torch.zeros(1, 3, 32, 32)
    report = abste.convert(model, example_input=example, **settings)
    disturb(model)
    reasons = {"first layer", "last layer", *(["named by keep_float"] if name.startswith("quick") else [])}
    if "resnet" in name:
        reasons |= {"1x1 projection shortcut"}
    assert set(report.kept_float.values()) == reasons
    optimizer = torch.optim.SGD(abste.parameter_groups(model, lr=0.1))
    before = [latent.detach().clone() for latent in abste.nn.latent_weights(model)]
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    optimizer.step()
    for old, new in zip(before, abste.nn.latent_weights(model), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)
    exported = abste.deploy.export(model, tmp_path / "net.abste", example, kept_float=report.kept_float)
    packed = [layer.packed for layer in exported.report.layers]
    assert packed.count("xnor" if activations else "sign_conv") == len(report.binarized)
    assert packed.count("float") == len(report.kept_float)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(x)
    found = torch.from_numpy(abste.load(tmp_path / "net.abste")(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# ---- block orders


def test_a_depth_for_each_stage() -> None:
    model = models.create("imagenet_resnet34", width=4)
    assert [len(model.get_submodule(f"layer{number}")) for number in (1, 2, 3, 4)] == [3, 4, 6, 3]  # type: ignore[arg-type]
    assert isinstance(model.layer1[0], type(models.create("imagenet_resnet18", width=4).layer1[0]))
    block = type(model.layer1[0])
    with pytest.raises(ConfigError, match=r"^blocks_per_stage .* must give one number for each of 3 stages\.$"):
        CifarResNet(block, (1, 2))
    with pytest.raises(ConfigError, match=r"^blocks_per_stage of a ResNet must be a positive integer, not 0\.$"):
        CifarResNet(block, (1, 0, 2))


def test_react_block() -> None:
    """Shift, convolution, norm, shortcut, RPReLU: twice."""
    torch.manual_seed(0)
    block = ReActBlock(4, 4, 1).eval()
    disturb(block)
    x = torch.randn(2, 4, 5, 5)

    def half(x: Tensor, shift: Any, conv: Any, norm: Any, act: Any) -> Tensor:
        def column(values: Tensor) -> Tensor:
            return values.view(1, -1, 1, 1)

        y = nn.functional.conv2d(x + column(shift.shift), conv.weight, padding=1) / math.sqrt(1 + norm.eps)
        y = y * column(norm.weight) + column(norm.bias) + x + column(act.before.shift)
        return torch.where(y > 0, y, y * column(act.prelu.weight)) + column(act.after.shift)

    expected = half(x, block.shift1, block.conv1, block.bn1, block.act1)
    expected = half(expected, block.shift2, block.conv2, block.bn2, block.act2)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("out_channels", "stride"), [(3, 1), (6, 1), (6, 2)])
def test_shortcuts_of_reactnet(out_channels: int, stride: int) -> None:
    """With dead convolutions a block is its shortcuts: averages of pixels, and channels twice."""
    block = ReActNetBlock(3, out_channels, stride).eval()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    x = torch.rand(2, 3, 6, 6)  # RPReLU leaves what is positive alone
    expected = nn.functional.avg_pool2d(x, 2) if stride == 2 else x
    torch.testing.assert_close(block(x), torch.cat([expected] * (out_channels // 3), 1))
    # The norm behind the first convolution reaches both halves; those behind the others, one each.
    nn.init.ones_(block.bn1.bias)
    torch.testing.assert_close(block(x), torch.cat([expected + 1] * (out_channels // 3), 1))
    nn.init.ones_(block.bn2[-1].bias)
    added = torch.zeros(out_channels, 1, 1)
    added[-3:] = 1
    torch.testing.assert_close(block(x), torch.cat([expected + 1] * (out_channels // 3), 1) + added)


def test_reactnet_is_mobilenet_without_its_depthwise_convolutions() -> None:
    model = models.create("reactnet_a", width=2)
    sizes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _x, y: sizes.append(tuple(y.shape[1:3])))
    model(torch.randn(2, 3, 64, 64))
    assert sizes == [(4, 32), (8, 16), (8, 16), (16, 8), (16, 8), *[(32, 4)] * 6, (64, 2), (64, 2)]


def test_quicknet_pads_as_its_source() -> None:
    """With a stride of 2, an even size is padded behind the last pixel alone; and blurs are fixed."""
    model = models.create("quicknet", width=4).eval()
    first, second = model.stem[1], model.stem[5]
    for conv in (first, second):
        nn.init.zeros_(conv.weight)
        conv.weight.data[:, :, 0, 0] = 1.0
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(model.stem[:2](x), x.sum(1, keepdim=True)[:, :, ::2, ::2])
    blur = model.transition2[2]
    y = blur(torch.ones(1, 4, 7, 7))
    assert y.shape == (1, 4, 4, 4)
    torch.testing.assert_close(y[..., 1:3, 1:3], torch.ones(1, 4, 2, 2))
    torch.testing.assert_close(y[0, 0, 0, 0], torch.tensor(9 / 16))
    trained = {id(p) for group in abste.parameter_groups(model, lr=0.1) for p in group["params"]}
    assert id(blur.weight) not in trained and not blur.weight.requires_grad
    assert blur.weight[0].flatten().mul(16).tolist() == [1, 2, 1, 2, 4, 2, 1, 2, 1]


def test_wrong_arguments_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^this network takes images of 32x32 or more, not 31x40\.$"):
        models.create("quicknet", width=4)(torch.zeros(1, 3, 31, 40))
    with pytest.raises(ConfigError, match=r"^QuickNet needs as many .* not blocks=\[1\] and channels=\[4, 8\]\.$"):
        QuickNet((1,), (4, 8))
    with pytest.raises(ConfigError, match=r"^QuickNet needs .* multiple of 4, not blocks=\[1\] and channels=\[6\]\.$"):
        QuickNet((1,), (6,))
    with pytest.raises(ConfigError, match=r"^blocks of QuickNet must be a positive integer, not 0\.$"):
        QuickNet((0,), (4,))
    with pytest.raises(ConfigError, match=r"^width of ReActNet must be a positive integer, not 'a'\.$"):
        models.create("reactnet_a", width="a")
    for name in ("reactnet_a", "quicknet"):
        with pytest.raises(ConfigError, match=r"\(N, 3, H, W\), not torch.float32 of shape \(2, 1, 32, 32\)\.$"):
            models.create(name, width=4)(torch.zeros(2, 1, 32, 32))
