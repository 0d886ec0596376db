"""Is a packed network the network that was trained? Compares an .abste file with a torch model, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from abste.deploy import format as abste_format
from abste.deploy.graph import Array, Graph, Node, Op
from abste.nn.layers import BINARY_LAYERS, BinaryActivation, _BinaryLayer
from abste.runtime.network import Network
from abste.runtime.reference import run as run_reference

TOLERANCE = 1e-5
"""How far from zero, in RMS of its channel, a number may lie whose sign differs; and how far logits may differ, in the
largest logit."""


@dataclass
class Constants:
    """The numbers in a file, beside those that lowering the model gives.

    What a network computes for some images need not show a wrong number: a threshold may be one that none of their
    sums meets.

    Attributes:
        comparable: whether the file has the nodes and steps that this version's lowering gives; else its numbers
            are only tested by what they do.
        compared: weights, factors and thresholds that were compared.
        differences: where numbers differ, one line each.
    """

    comparable: bool = True
    compared: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether none differs."""
        return not self.differences

    def __str__(self) -> str:
        if not self.comparable:
            return "constants not compared: the file has other nodes or steps than this version of abste makes"
        if self.passed:
            return f"passed: {self.compared:,} constants of the file are those of the model"
        return "\n".join([f"FAILED: {self.compared:,} constants compared, and there differ", *self.differences])


def compare_constants(found: Graph, wanted: Graph) -> Constants:
    """Compare every weight, factor, bias and threshold of two graphs, bit by bit."""
    result = Constants()

    def shape(graph: Graph) -> list[Any]:
        attributes = [f.name for f in fields(Node) if f.name not in ("weight", "steps", "name")]
        values = [(value.shape, value.kind, value.output) for value in graph.values]
        nodes = [[getattr(node, name) for name in attributes] for node in graph.nodes]
        steps = [[(step.kind, step.value) for step in node.steps] for node in graph.nodes]
        return [values, nodes, steps]

    if shape(found) != shape(wanted):
        result.comparable = False
        return result
    for node, other in zip(found.nodes, wanted.nodes, strict=True):
        place = node.name or node.op.name.lower()
        pairs: list[tuple[str, Array | None, Array | None]] = [("weight", node.weight, other.weight)]
        for number, (step, like) in enumerate(zip(node.steps, other.steps, strict=True)):
            what = f"step {number} ({step.kind.name.lower()}{', ' + step.name if step.name else ''})"
            limits, others = (np.array([s.p, s.q], np.float32) for s in (step, like))
            pairs += [(what, step.a, like.a), (what, step.b, like.b), (what, limits, others)]
        for what, one, two in pairs:
            if one is None or two is None:
                if one is not two:
                    result.differences.append(f"  {place}, {what}: there in one only")
                continue
            if one.dtype != two.dtype or one.shape != two.shape:
                result.differences.append(f"  {place}, {what}: {one.dtype} {one.shape}, not {two.dtype} {two.shape}")
                continue
            result.compared += one.size
            unlike = ~((one == two) | ((one != one) & (two != two)))
            if unlike.any():
                result.differences.append(f"  {place}, {what}: {int(unlike.sum()):,} of {one.size:,}")
    return result


@dataclass
class Verification:
    """What was compared, and what was found.

    Attributes:
        source: the images, in words.
        images: how many.
        integers: sums of layers with binary weights and inputs that were compared, given the packed network's bits.
        wrong_integers: how many of them differ.
        signs: binary weights that were compared.
        wrong_signs: how many of them differ.
        bits: binary activations that were compared, in images without an earlier difference.
        differing_bits: how many of them differ.
        farthest_bit: the largest distance from zero of one that differs, in RMS of its channel.
        far_bits: how many lie farther than the tolerance.
        images_with_bits: images with a differing bit; the rest of them is not compared.
        logit_difference: the largest, in the other images, as a fraction of an image's largest logit.
        images_off: images without a differing bit whose logits differ by more than the tolerance.
        agreement: images with the same most likely class.
        ties: images without a differing bit whose two most likely classes are within the tolerance, and change places.
        misclassified: images without a differing bit whose most likely class differs beyond it.
        reference_images: images on which the runtime was compared with the numpy interpreter.
        reference_differences: numbers in which those two differ, at the end of any node.
        labelled: images whose class is known.
        correct: how many of these the model gets right, and how many the packed network.
        unlike: where the file has other shapes than the model, one line each; no numbers are then compared.
    """

    source: str
    images: int = 0
    integers: int = 0
    wrong_integers: int = 0
    signs: int = 0
    wrong_signs: int = 0
    bits: int = 0
    differing_bits: int = 0
    farthest_bit: float = 0.0
    far_bits: int = 0
    images_with_bits: int = 0
    logit_difference: float = 0.0
    images_off: int = 0
    agreement: int = 0
    ties: int = 0
    misclassified: int = 0
    reference_images: int = 0
    reference_differences: int = 0
    correct: list[int] = field(default_factory=lambda: [0, 0])
    labelled: int = 0
    unlike: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Of the model and of the packed network, 0 to 1; None where no class is known."""
        return None if not self.labelled else (self.correct[0] / self.labelled, self.correct[1] / self.labelled)

    def differs(self, place: str, in_file: Any, in_model: Any) -> None:
        """Note that the file has another shape there than the model."""
        line = f"{place}: {in_file} in the file, {in_model} in the model"
        if line not in self.unlike:
            self.unlike.append(line)

    @property
    def passed(self) -> bool:
        """Whether it is the same network."""
        wrong = (self.wrong_integers, self.wrong_signs, self.far_bits, self.images_off, self.misclassified)
        return self.images > 0 and not any(wrong) and not self.unlike and self.reference_differences == 0

    def __str__(self) -> str:
        if self.unlike:
            return "\n  ".join(
                ["FAILED: the file is of another network than the model, and there differ", *self.unlike]
            )
        lines = [f"{'passed' if self.passed else 'FAILED'} on {self.images:,} images: {self.source}"]
        lines.append(f"  binary weights         {self.signs:,} compared, {self.wrong_signs:,} differ")
        if self.integers:
            lines.append(f"  integer sums           {self.integers:,} compared, {self.wrong_integers:,} differ")
        if self.bits:
            distance = f", at most {self.farthest_bit:.1e} RMS from zero" if self.differing_bits else ""
            lines.append(
                f"  binary activations     {self.bits:,} compared, {self.differing_bits:,} differ{distance}"
                f" ({self.far_bits:,} by more than {TOLERANCE:g}), in {self.images_with_bits:,} images"
            )
        lines.append(
            f"  logits                 largest difference {self.logit_difference:.1e} of the largest logit"
            f" ({self.images_off:,} images by more than {TOLERANCE:g})"
        )
        lines.append(
            f"  most likely class      the same in {self.agreement:,} of {self.images:,} images"
            + (f", a tie in {self.ties:,}" if self.ties else "")
        )
        if self.reference_images:
            images = f"{self.reference_images:,} image{'s' * (self.reference_images > 1)}"
            lines.append(f"  numpy interpreter      {self.reference_differences:,} numbers differ, on {images}")
        if self.accuracy is not None:
            lines.append(
                f"  accuracy               PyTorch {self.accuracy[0]:.2%}, packed {self.accuracy[1]:.2%}"
                f" ({self.labelled:,} labelled images)"
            )
        return "\n".join(lines)


def verify(
    model: nn.Module,
    file: bytes | Array,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    source: str,
    *,
    reference_images: int = 1,
    threads: int | None = None,
) -> Verification:
    """Compare a packed network with the model it was made from, both in float32 on the CPU.

    Given the packed network's own bits, each integer must be that of the model's ±1 weights. A bit may differ from the
    sign that PyTorch sees only where that number lies within 1e-5 of its channel's RMS from zero, and what follows
    from such a bit is not compared further. In images without one, logits agree to 1e-5 of the largest. Of a network of
    other shapes than the model's, these are told, and no numbers.

    Args:
        model: the trained model, in eval mode.
        file: the bytes of an .abste file.
        batches: (images, labels or None); images float32 (N, C, H, W), normalised as in training.
        source: what these images are, for the report.
        reference_images: how many of them to run through the numpy interpreter too, which is slow.
        threads: of the packed network.

    Raises:
        FormatError: the file is malformed.
    """
    data = np.frombuffer(file, np.uint8)
    graph = abste_format.read(data.data)
    network = Network(data, "the packed network")
    found = Verification(source)
    named = model.named_modules(remove_duplicate=False)  # a layer may go by several names
    layers = {name: layer for name, layer in named if isinstance(layer, BINARY_LAYERS)}
    for node in graph.nodes:
        if node.op in (Op.SIGN_CONV, Op.XNOR) and node.name in layers:
            _compare_weights(node, layers[node.name], found)
    for images, labels in batches:
        if found.unlike:
            break
        if len(images):
            _compare(model, layers, graph, network, images, labels, found, reference_images, threads)
    return found


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)


def _compare_weights(node: Node, layer: _BinaryLayer, found: Verification) -> None:
    assert node.weight is not None
    if layer.weight_binarizer is None:
        found.differs(f"{node.name}, weight", "binary", "float")
        return
    wanted = _signs(layer).numpy() > 0
    packed = np.moveaxis(node.weight, -1, 1)
    if (len(packed), packed.size) != (len(wanted), wanted.size):
        found.differs(f"{node.name}, weight", packed.shape, wanted.shape)
        return
    packed = packed.reshape(wanted.shape)
    found.signs += packed.size
    found.wrong_signs += int((packed != wanted).sum())


def _signs(layer: _BinaryLayer) -> Tensor:
    return layer.binary_weight().sign


def _compare(
    model: nn.Module,
    layers: dict[str, Any],
    graph: Graph,
    network: Network,
    images: Tensor,
    labels: Tensor | None,
    found: Verification,
    reference_images: int,
    threads: int | None,
) -> None:
    seen: dict[nn.Module, list[Tensor]] = {}  # a layer may be called several times
    signs: dict[int, tuple[Tensor, int, Tensor]] = {}  # what sign modules give, by its memory, and what they take

    def taken_in(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
        return (args[0] if args else kwargs["input"]).detach()

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        signs[output.untyped_storage().data_ptr()] = output, output._version, taken_in(args, kwargs)

    def keep(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = taken_in(args, kwargs)
        output, version, before = signs.get(x.untyped_storage().data_ptr(), (x, x._version, x))
        # How far from zero a number lies can only be seen before its sign is taken.
        x = before.reshape(x.shape) if output._version == version and output.numel() == x.numel() else x
        seen.setdefault(layer, []).append(x)

    nodes = [(number, node) for number, node in enumerate(graph.nodes) if node.op is Op.XNOR and node.name in layers]
    watched = {layers[node.name]: node.name for _, node in nodes}
    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in watched]
    activations = [module for module in model.modules() if isinstance(module, BinaryActivation)]
    handles += [module.register_forward_hook(note, with_kwargs=True) for module in activations]
    try:
        with torch.no_grad():
            results = [output.float().numpy() for output in tree_leaves(model(images)) if isinstance(output, Tensor)]
    finally:
        for handle in handles:
            handle.remove()
    taken, given = [value.shape for value in network.inputs], [tuple(images.shape[1:])]
    if taken != given:
        found.differs("input", _listed(taken), _listed(given))
    written, wanted_shapes = [value.shape for value in network.outputs], [result.shape[1:] for result in results]
    if written != wanted_shapes:
        found.differs("output", _listed(written), _listed(wanted_shapes))
    calls = Counter(layers[node.name] for _, node in nodes)
    for layer, count in calls.items():
        if count > len(seen.get(layer, ())):
            found.differs(f"{watched[layer]}, calls", count, len(seen.get(layer, ())))
    if found.unlike:
        return
    inputs = np.ascontiguousarray(images.numpy())
    producers = {index: number for number, node in enumerate(graph.nodes) for index in node.written()}
    points = [(number, -1) for number, _ in nodes]
    points += [(p := producers[node.inputs[0]], len(graph.nodes[p].steps) - 1) for _, node in nodes]
    outputs, traced = network.trace(inputs, points, threads=threads)

    n = len(images)
    clean = np.ones(n, bool)
    for position, (_, node) in enumerate(nodes):
        layer = layers[node.name]
        bits = torch.from_numpy(np.moveaxis(traced[len(nodes) + position], -1, 1) >= 0)
        before = _taken(seen[layer], bits)
        if bits.numel() != before.numel():
            found.differs(f"{node.name}, input", tuple(bits.shape[1:]), tuple(before.shape[1:]))
            return
        bits = bits.reshape(before.shape)
        sums = torch.from_numpy(np.moveaxis(traced[position], -1, 1))
        wanted = _integers(layer, bits)
        if sums.numel() != wanted.numel():
            found.differs(f"{node.name}, output", tuple(sums.shape[1:]), tuple(wanted.shape[1:]))
            return
        found.integers += sums.numel()
        found.wrong_integers += int((sums.reshape(wanted.shape) != wanted).sum())
        # From here on with images that agree so far.
        rest = torch.from_numpy(clean)
        dims = [d for d in range(before.dim()) if d != 1]
        rms = before.double().square().mean(dims, keepdim=True).sqrt()
        differs = (bits != (before >= 0)) & rest.view(-1, *[1] * (before.dim() - 1))
        found.bits += int(rest.sum()) * before[0].numel()
        if differs.any():
            distance = (before.double().abs() / rms.clamp(min=1e-30))[differs]
            found.differing_bits += len(distance)
            found.far_bits += int((distance > TOLERANCE).sum())
            found.farthest_bit = max(found.farthest_bit, float(distance.max()))
            clean &= ~differs.flatten(1).any(1).numpy()
    found.images_with_bits += int((~clean).sum())

    off = np.zeros(n)
    for wanted_output, output in zip(results, outputs, strict=True):
        largest = np.abs(wanted_output).reshape(n, -1).max(1)
        difference = np.abs(wanted_output - output).reshape(n, -1).max(1) / np.maximum(largest, 1e-30)
        off = np.maximum(off, np.where(np.isfinite(output).reshape(n, -1).all(1), difference, np.inf))
    if clean.any():
        found.logit_difference = max(found.logit_difference, float(off[clean].max()))
        found.images_off += int((off[clean] > TOLERANCE).sum())
    expected, logits = results[0], outputs[0]  # of several outputs, the first one is taken for the logits
    largest = np.abs(expected).reshape(n, -1).max(1)
    if expected.ndim == 2:
        first, second = expected.argmax(1), logits.argmax(1)
        rows = np.arange(n)
        found.agreement += int((first == second).sum())
        gap = (expected[rows, first] - expected[rows, second]) / np.maximum(largest, 1e-30)
        tie = gap <= 2 * TOLERANCE
        found.ties += int((clean & (first != second) & tie).sum())
        found.misclassified += int((clean & (first != second) & ~tie).sum())
        if labels is not None:
            truth = labels.numpy()
            found.labelled += n
            found.correct[0] += int((first == truth).sum())
            found.correct[1] += int((second == truth).sum())
    few = min(reference_images - found.reference_images, n)
    if few > 0:
        _compare_reference(graph, network, inputs[:few], found)
    found.images += n


def _taken(calls: list[Tensor], bits: Tensor) -> Tensor:
    """Which of a layer's calls had these bits for its input, as near as can be; it is taken out of the list.

    Calls of a layer with several can run in another order in the file, and those that lead to nothing are not in it.
    """

    def unlike(number: int) -> float:
        same_size = calls[number].numel() == bits.numel()
        return int((bits.reshape(calls[number].shape) != (calls[number] >= 0)).sum()) if same_size else np.inf

    return calls.pop(min(range(len(calls)), key=unlike) if len(calls) > 1 else 0)


def _compare_reference(graph: Graph, network: Network, inputs: Array, found: Verification) -> None:
    h, w, c = graph.values[0].shape
    shaped = np.moveaxis(inputs.reshape(len(inputs), c, h, w), 1, -1)
    wanted = run_reference(graph, [shaped]).points
    points = [(number, len(node.steps) - 1) for number, node in enumerate(graph.nodes)]
    _, traced = network.trace(inputs, points)
    for (number, point), got in zip(points, traced, strict=True):
        other = np.broadcast_to(wanted[number][point + 1], got.shape)
        found.reference_differences += int((~((got == other) | ((got != got) & (other != other)))).sum())
    found.reference_images += len(inputs)


def _integers(layer: Any, bits: Tensor) -> Tensor:
    """The sums of a layer for given input bits, in integers that float32 holds exactly."""
    x = torch.where(bits, 1.0, -1.0)
    weight = _signs(layer).float()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight).round().to(torch.int32)
    geometry = layer._geometry()
    with torch.no_grad():
        return geometry.forward(x, weight).round().to(torch.int32)


def random_batches(
    shape: tuple[int, ...], count: int = 64, seed: int = 0, batch_size: int = 32
) -> list[tuple[Tensor, None]]:
    """Images of Gaussian noise, (N, *shape) float32: what can be compared without data."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    return [(torch.randn(size, *shape, generator=generator), None) for size in sizes]
