"""Recipes: everything that decides what a training run computes, typed, in TOML.

A recipe file holds the sections below; what it leaves out has the default given here. ``extends = "other"`` starts from
another recipe (a built-in name, or a path relative to the file) and replaces single keys of it, so that a float network
and its binary sibling provably differ in nothing but ``[model]`` and ``[binarize]``. This module needs pydantic and
tomli-w, not torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from abste.errors import ConfigError, nearest

MOST_SIZES = 8
"""Of ``train.image_sizes``: with more, torch.compile would stop compiling for each."""


def _check_spec(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return value
    raise PydanticCustomError("binarizer_type", "")


def _check_transform(value: Any) -> Any:
    if isinstance(value, bool | str) or (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return value
    raise PydanticCustomError("transform_type", "")


def _none_is_a_word(value: Any) -> Any:
    return "none" if value is None else value  # as --set gives it


def _check_image_sizes(value: Any) -> Any:
    """Pairs [part of the run, pixels], both rising, the first from 0 on; an empty list stands for none."""
    if value is None or value == []:
        return None

    def number(x: Any, *kinds: type) -> bool:
        return isinstance(x, kinds) and not isinstance(x, bool)

    pairs = isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and number(pair[0], int, float) and number(pair[1], int)
        for pair in value
    )
    if not pairs or not 2 <= len(value) <= MOST_SIZES:
        raise PydanticCustomError(
            "rule",
            f"must be a list of 2 to {MOST_SIZES} pairs [part of the run after which a size begins, pixels], such as "
            "[[0, 16], [0.5, 32]]",
        )
    begins, pixels = zip(*value, strict=True)
    if begins[0] != 0 or not all(a < b < 1 for a, b in pairwise(begins)):
        raise PydanticCustomError("rule", f"must begin at 0 and go on at rising parts below 1, not {list(begins)}")
    if pixels[0] < 1 or not all(a < b for a, b in pairwise(pixels)):
        raise PydanticCustomError("rule", f"must have sizes that rise, from at least 1 pixel on, not {list(pixels)}")
    return value


Spec = Annotated[Any, AfterValidator(_check_spec)]
"""A binarizer: its name, a table with its name and arguments (``{name = "ab_tanh", k = 3.0}``), or nothing (float)."""

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of a recipe: no other keys, no conversions between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


DATA_FILES = ("folder", "shards")
"""Data sets of files on disk; the others are held in memory."""

_ONLY_IN_MEMORY = ("crop_padding", "crop_fill", "cutout", "statistics")
_Pair = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
_Channels = Annotated[list[float], Field(min_length=1, max_length=3)]


class DataSection(Section):
    """The data set and its augmentation. Lengths in pixels.

    ``folder`` and ``shards`` (``abste.data.open_files``) are files on disk, of any size; ``image_shape`` is what is
    cropped out of them. The keys from ``mean`` on are theirs; ``crop_padding``, ``crop_fill``, ``cutout`` and
    ``statistics`` are of the others.
    """

    name: str = "cifar10"
    """``cifar10``, ``digits``, ``folder`` or ``shards``: docs/data.md."""
    image_shape: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)] = [3, 32, 32]
    """Channels, height, width; checked against the data set."""
    classes: Annotated[int, Field(gt=0)] | None = None
    """10 by default; of files, as many as there are."""
    holdout: Count | None = None
    """Images of the training set held out, the same for every seed; then every evaluation is on them, none on the test
    set. 0 by default; of files that have one split alone, a fifth."""
    crop_padding: Count = 0
    """Width of the border that is added before a crop of the image's size is taken at a random place."""
    crop_fill: Literal["reflect", "zero"] | None = None
    """What the crop's padding is: the image mirrored (by default), or black pixels, before normalisation."""
    flip: Annotated[Literal["none", "random", "alternating"], BeforeValidator(_none_is_a_word)] = "none"
    """Mirror images: each at random, or each in every other epoch."""
    cutout: Count = 0
    """Side of the square at a random place that is set to the mean."""
    statistics: Literal["dataset", "imagenet"] | None = None
    """Mean and standard deviation to normalise with, in training, evaluation and exports: of the data set's training
    pixels (by default), or ImageNet's."""
    mean: _Channels | None = None
    """Of pixels divided by 255, per channel; by default ImageNet's."""
    std: _Channels | None = None
    resize: Annotated[int, Field(gt=0)] | None = None
    """Shorter side in evaluation, before the crop; by default 8/7 of the crop's longer side."""
    scale: _Pair | None = None
    """Smallest and largest part of an image's area that is cropped in training; by default 0.08 and 1."""
    ratio: _Pair | None = None
    """Smallest and largest width of that crop, in heights; by default 3/4 and 4/3."""
    color_jitter: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=3, max_length=4)] | None = None
    """Brightness, contrast, saturation and, if wanted, hue."""
    rand_augment: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """Operations and magnitude (0 to 30)."""
    mixup: Annotated[float, Field(gt=0)] | None = None
    """Alpha; with ``cutmix`` too, each batch gets one of them."""
    cutmix: Annotated[float, Field(gt=0)] | None = None
    workers: Count | None = None
    """Processes that read images; by default one per CPU, at most 8. No matter how many, the batches are the same."""
    on_error: Literal["raise", "skip"] | None = None
    """What to do with an image that cannot be read; "raise" by default. What is skipped is named in summary.json."""

    @property
    def on_disk(self) -> bool:
        """Whether the data set is files."""
        return self.name in DATA_FILES

    @model_validator(mode="before")
    @classmethod
    def _known_in_advance(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("name", "cifar10") in DATA_FILES:
            return given
        known = {"classes": 10, "holdout": 0}
        return {**given, **{key: value for key, value in known.items() if given.get(key) is None}}

    @model_validator(mode="after")
    def _keys_fit(self) -> DataSection:
        if self.statistics == "imagenet" and self.image_shape[0] != 3:
            text = f"has statistics = 'imagenet', which are of 3 channels, and images of {self.image_shape[0]}"
            raise PydanticCustomError("rule", text)
        names = list(type(self).model_fields)
        if self.on_disk:
            wrong = [key for key in _ONLY_IN_MEMORY if getattr(self, key)]
            owners = "a data set in memory"
        else:
            wrong = [key for key in names[names.index("mean") :] if getattr(self, key) is not None]
            owners = " or ".join(map(repr, DATA_FILES))
        if wrong:
            raise PydanticCustomError("rule", f"has {wrong[0]}, which needs name = {owners}, not '{self.name}'")
        return self


class ModelSection(Section):
    """A network of ``abste.models`` and its arguments; classes and channels come from ``[data]`` unless given."""

    name: str = "resnet20"
    """One of ``abste.models.available()``: docs/models.md."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its builder, such as ``width``, ``init`` and ``order``."""


class BinarizeSection(Section):
    """Arguments of ``abste.convert``, with its defaults; without this section the network stays float."""

    weights: Spec = None
    """Estimator of the weights: docs/estimators.md. Absent: float."""
    activations: Spec = None
    """Estimator of the activations. Absent: float."""
    keep_float: list[str] = Field(default_factory=list)
    """Names of layers that stay float; ``*`` stands for anything."""
    keep_first: bool = True
    """The first layer stays float."""
    keep_last: bool = True
    """The last layer stays float."""
    keep_projections: bool = True
    """1x1 projections of shortcuts stay float."""
    unsigned_inputs: Literal["error", "keep_float", "weights_only", "batch_norm"] = "error"
    """What to do about a layer whose binary input would never be negative: stop, leave it float, leave its activations
    float, or put a batch norm before it."""
    standardize: Annotated[Any, AfterValidator(_check_transform)] = True
    """True, false, the name of a transform of the latents (``"recu"``), or a table with its name and arguments."""
    normalize: bool = True
    """Take the slope of ``activations`` at the input divided by its running RMS."""
    scale: Annotated[Literal["channel", "tensor", "std", "learned", "none"], BeforeValidator(_none_is_a_word)] = (
        "channel"
    )
    """What multiplies the ±1 weights: the mean size of the latents of an output channel or of the tensor, the standard
    deviation of an output channel, a parameter of each, or nothing."""
    scale_gradient: bool = False
    """Let gradients flow through ``scale`` to the latents."""
    center: Literal["mean", "learned"] | None = None
    """What is added to the ±1 weights of a filter."""
    pad_value: Literal[-1, 0, 1] = 0
    """What binary activations are padded with; ±1 keeps them one bit wide."""
    # None rather than the default: what a recipe leaves out is not written, so that older runs still resume.
    keep_depthwise: bool | None = None
    """Depthwise convolutions stay float; true by default."""
    adaptive_set: bool | None = None
    """AdaBin's two learned values for binary activations; false by default."""
    gradient_branch: Annotated[float, Field(ge=0)] | None = None
    """SURGE's branch, with this share; none by default."""

    @model_validator(mode="after")
    def _something_to_do(self) -> BinarizeSection:
        if self.weights is None and self.activations is None:
            raise PydanticCustomError("rule", "needs 'weights', 'activations' or both; leave the section out for float")
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``abste.convert``."""
        arguments = self.model_dump()
        if self.scale == "none":
            arguments["scale"] = None
        arguments["adaptive_set"] = bool(self.adaptive_set)
        arguments["keep_depthwise"] = self.keep_depthwise is not False
        return arguments


# Keys that only some optimizers have, with their defaults: absent from a recipe of another, whose checkpoints they
# would otherwise part from their own runs.
_OPTIMIZER_KEYS: dict[str, dict[str, Any]] = {
    "muon": {
        "muon_momentum": 0.6,
        "muon_steps": 3,
        "muon_normalize": "tensor",
        "muon_filters": False,
        "rest": "sgd",
    },
    "bop": {"gamma": 1e-4, "threshold": 1e-8, "rest": "adamw"},
}


class OptimizerSection(Section):
    """``momentum`` and ``nesterov`` belong to sgd, ``betas`` to adam and adamw.

    Weight decay is part of the gradient in sgd and adam, and decoupled in the others. ``muon`` and ``bop``
    (``abste.optim``) train the latents, ``rest`` everything else. Under ``bop`` the weights are ±1 and there are no
    latents, so it has no rates for them, and ``[binarize]`` needs weights = "identity_ste", standardize = false and
    scale = "none" or "learned".
    """

    name: Literal["sgd", "adam", "adamw", "muon", "bop"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    """The peak learning rate, of the mean loss over a global batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd."""
    nesterov: bool = True
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Not of norms, biases and learned scales, unless ``decay_norms``."""
    decay_norms: bool | None = None
    """Decay norms, biases and learned scales too; false by default."""
    latent_lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the latent weights; by default ``lr``. Of muon: of all that it trains."""
    latent_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of the latent weights; by default ``weight_decay``."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of all gradients together; larger ones are scaled down to it."""
    rest: Literal["sgd", "adam", "adamw"] | None = None
    """What trains all but the latents; by default sgd beside muon, and adamw beside bop, with ``lr``."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """0.6 by default, as in airbench. ``nesterov`` counts for muon too."""
    muon_steps: Annotated[int, Field(ge=1, le=20)] | None = None
    """Newton-Schulz iterations; 3 by default."""
    muon_normalize: Literal["tensor", "filter", "none"] | None = None
    """What has a fixed norm before each step; by default each tensor."""
    muon_filters: bool | None = None
    """Train the convolutions in full precision with muon too, the first included; false by default."""
    gamma: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak adaptivity rate of bop, 1e-4 by default; the schedule moves it as it moves learning rates."""
    threshold: Annotated[float, Field(ge=0)] | None = None
    """Of bop, 1e-8 by default: a weight flips where its average gradient is larger. It stays the same."""

    @model_validator(mode="before")
    @classmethod
    def _keys_of_its_own(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name", "sgd"), str):
            return given
        known = _OPTIMIZER_KEYS.get(given.get("name", "sgd"), {})
        given = {key: value for key, value in given.items() if value is not None or key not in known}
        return known | given

    @model_validator(mode="after")
    def _keys_fit(self) -> OptimizerSection:
        own = _OPTIMIZER_KEYS.get(self.name, {})
        for key in dict.fromkeys(key for keys in _OPTIMIZER_KEYS.values() for key in keys):
            if key not in own and getattr(self, key) is not None:
                owners = " or ".join(f"'{name}'" for name, keys in _OPTIMIZER_KEYS.items() if key in keys)
                raise PydanticCustomError("rule", f"has {key}, which needs name = {owners}, not '{self.name}'")
        for key in ("latent_lr", "latent_weight_decay"):
            if self.name == "bop" and getattr(self, key) is not None:
                raise PydanticCustomError("rule", f"has {key}, but bop has no latents; what it has is gamma")
        momenta = {"momentum": self.momentum} if "sgd" in (self.name, self.rest) else {}
        if self.name == "muon":
            momenta["muon_momentum"] = self.muon_momentum or 0.0
        for key, momentum in momenta.items():
            if self.nesterov and momentum == 0:
                raise PydanticCustomError("rule", f"has nesterov = true, which needs a {key} above 0")
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the optimizer's class, beside the parameter groups and their rates."""
        if self.name == "bop":
            return {"gamma": self.gamma, "threshold": self.threshold}
        if self.name == "muon":
            return {
                "momentum": self.muon_momentum,
                "nesterov": self.nesterov,
                "steps": self.muon_steps,
                "normalize": None if self.muon_normalize == "none" else self.muon_normalize,
            }
        return self.plain_arguments(self.name)

    def plain_arguments(self, name: str) -> dict[str, Any]:
        """The same for torch's sgd, adam or adamw, which may train the rest."""
        if name != "sgd":
            return {"betas": (self.betas[0], self.betas[1])}
        return {"momentum": self.momentum, "nesterov": self.nesterov}


class ScheduleSection(Section):
    """The learning rate as a pure function of the optimizer step, as a factor of its peak."""

    shape: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after its peak."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Part of the run during which the rate rises linearly to its peak."""
    final: Fraction = 0.0
    """Factor at the end; ``constant`` ignores it."""


class TrainSection(Section):
    """The loop. ``batch_size`` is global: the processes of a distributed run share it, unless ``scale`` is true."""

    epochs: Annotated[int, Field(gt=0)] = 30
    batch_size: Annotated[int, Field(gt=0)] = 256
    """Images of an optimizer step."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Of training; evaluation is always float32."""
    channels_last: bool = True
    compile: bool = False
    """Train through torch.compile: a minute or two at the start, then faster steps. CPUs need a C++ compiler for it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    eval_every: Annotated[int, Field(gt=0)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: Annotated[int, Field(gt=0)] = 50
    """Steps between metrics, checks for a non-finite loss and, in distributed runs, agreement to stop."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    """Longest time between two checkpoints; the end of every epoch writes one anyway."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """CPU threads of torch; by default torch's choice. Part of what makes a run reproducible."""
    accumulate: Annotated[int, Field(gt=0)] | None = None
    """Parts that each process computes its share of a batch in, one after the other, before the optimizer's step: less
    memory, and batch norm sees smaller batches. By default one."""
    scale: bool | None = None
    """True: ``batch_size`` and the learning rates are those of one process and grow with their number (the linear
    scaling rule, Goyal et al., arXiv 1706.02677). By default both are of the whole run, whatever its processes."""
    sync_batch_norm: bool | None = None
    """Batch norm over the batch of all processes; needs GPUs. Untested, for want of one."""
    image_sizes: Annotated[Any, AfterValidator(_check_image_sizes)] = None
    """Progressive size of the training images: pairs ``[part of the run, pixels]``, as in ``[[0, 16], [0.5, 32]]``. An
    epoch has the height of the last pair whose part of the epochs is done (and its width in proportion); augmentation
    comes first, at full size. Sizes rise to the full one; evaluation always has that. An empty list, the full size all
    along, takes back what a recipe extends."""

    @model_validator(mode="after")
    def _full_size_comes(self) -> TrainSection:
        if self.image_sizes is not None:
            begin = self.image_sizes[-1][0]
            if begin > (self.epochs - 1) / self.epochs:
                raise PydanticCustomError(
                    "rule",
                    f"has image_sizes whose last size would begin at {begin:g} of {self.epochs} epochs, after the last "
                    f"epoch has begun; let it begin by {(self.epochs - 1) / self.epochs:.3g}",
                )
        return self


class AverageSection(Section):
    """Weight averaging; the averaged network is evaluated after batch-norm recalibration, beside the plain one."""

    method: Literal["ema", "swa"] = "ema"
    """Exponential, or the plain mean."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Of ema, per update; swa is the plain mean."""
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the run after which averaging begins."""
    every: Annotated[int, Field(gt=0)] = 1
    """Optimizer steps between updates."""


class DistillSection(Section):
    """Learning from a teacher: the loss is (1 - alpha) CE + alpha T^2 KL(teacher || student), T being the temperature.

    KL is that of the softmax of the logits over T, summed over classes and averaged over the batch; label smoothing is
    part of CE alone.
    """

    teacher: str
    """Directory of the teacher's run, on the same data; ``averaged.safetensors`` in it for the averaged weights. Or, on
    ImageNet's images, "torchvision:resnet34"; "torchvision:resnet50:IMAGENET1K_V2" for other weights than the first.
    """
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """1 learns from the teacher alone, as ReActNet (arXiv 2003.03488) does."""
    temperature: Annotated[float, Field(gt=0)] = 1.0


class DiagnosticsSection(Section):
    """Measure what the estimators do, and log it; without this section nothing is measured. It changes no weights.

    See ``abste.diagnostics.Diagnostics``. A float network has nothing to measure.
    """

    every: Annotated[int, Field(gt=0)] = 200
    """Optimizer steps between measurements."""
    sample: Annotated[int, Field(gt=1)] = 65536
    """How many numbers of an activation tensor are measured; weights are measured whole."""


class Recipe(Section):
    """A whole training run. See the sections for every key, its unit and its default."""

    name: str = "unnamed"
    description: str = ""
    notes: str | None = None
    """What a reader should know, such as how it differs from what it follows."""
    init: str | None = None
    """Directory of a run whose weights this one starts from; ``averaged.safetensors`` in it for the averaged ones."""
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    binarize: BinarizeSection | None = None
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    average: AverageSection | None = None
    distill: DistillSection | None = None
    diagnostics: DiagnosticsSection | None = None

    @model_validator(mode="after")
    def _rates_can_grow(self) -> Recipe:
        if self.train.scale and self.optimizer.name == "bop":
            raise PydanticCustomError("rule", "scales learning rates (train.scale), but bop has none for its weights")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Recipe:
        full = self.data.image_shape[1]
        if self.train.image_sizes is not None and self.train.image_sizes[-1][1] != full:
            raise PydanticCustomError(
                "rule",
                f"'train.image_sizes' must end with {full} pixels, the full height of the images, not with "
                f"{self.train.image_sizes[-1][1]}",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, without the keys whose value is None (TOML has no word for it)."""
        return self.model_dump(exclude_none=True)

    def to_toml(self) -> str:
        """The resolved recipe; :func:`load_recipe` reads it back to an equal one."""
        tables = self.to_dict()
        text = tomli_w.dumps(tables, multiline_strings=True)
        # For reading; but it writes the end of a line as \n, whatever it was.
        return text if tomllib.loads(text) == tables else tomli_w.dumps(tables)


# Keys that may change between the parts of a run: they decide when things are reported and saved, not what is computed.
FREE_KEYS = frozenset(
    {
        "name",
        "description",
        "notes",
        "train.eval_every",
        "train.log_every",
        "train.checkpoint_minutes",
        "train.threads",
        "diagnostics.every",
        "diagnostics.sample",
        "data.workers",
        "data.on_error",  # up to the first image that cannot be read, both compute the same
    }
)


def _leaves(recipe: Mapping[str, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            leaves |= {f"{key}.{inner}": leaf for inner, leaf in value.items()}
        else:
            leaves[key] = value
    return leaves


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key, with both values, in which two resolved recipes would compute something different."""
    a, b = _leaves(old), _leaves(new)
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in FREE_KEYS and a.get(key) != b.get(key):
            return key, a.get(key), b.get(key)
    return None


def known_keys(section: type[Section]) -> list[str]:
    """Every key that a section may hold, dotted; sections within it themselves too."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(name)
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += [f"{name}.{key}" for key in kind.model_fields]
    return keys


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "list_type": "a list",
    "binarizer_type": "the name of a binarizer or a table with a 'name'",
    "transform_type": "true, false, the name of a transform or a table with a 'name'",
    "finite_number": "a finite number",
}


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the string {value!r}"
    if isinstance(value, dict):
        return "a table"
    return repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"


def _hint(key: str, known: list[str]) -> str:
    """The end of the message for an unknown key."""
    section, _, last = key.rpartition(".")
    elsewhere = [other for other in known if other.endswith("." + last)]
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    hint = nearest(key, [other for other in known if ("." in other) == bool(section)])
    if hint.startswith("did"):
        return hint
    return f"section '{section}' has no such key." if section else "there is no such section."  # all names are no hint


def _problem(error: Mapping[str, Any], known: list[str]) -> str:
    """One pydantic error as part of a sentence."""
    key, kind, given, ctx = ".".join(map(str, error["loc"])), error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        hint = _hint(key, known)
        return f"unknown key '{key}'; {hint}"
    if kind == "missing":
        return f"'{key}' is missing."
    if kind == "rule":
        return f"'{key}' {error['msg']}." if key else f"{error['msg']}."
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    if kind in bounds:
        wanted = f"{words[bounds[kind]]} {ctx[bounds[kind]]:g}"
    elif kind == "literal_error":
        wanted = str(ctx["expected"])
    elif kind in ("too_short", "too_long"):
        length = ctx.get("min_length", ctx.get("max_length"))
        wanted = f"a list of {length} values" if length > 1 else "a list that is not empty"
    else:
        wanted = _WANTED.get(kind, error["msg"])
    return f"'{key}' must be {wanted}, not {_shown(given)}."


S = TypeVar("S", bound=Section)


def checked(kind: type[S], tables: Mapping[str, Any], source: str) -> S:
    """A section of type ``kind`` from plain tables; ``source`` names it in errors.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range: one problem, and how many more.
    """
    try:
        return kind.model_validate(dict(tables))
    except ValidationError as error:
        # A key that is misspelt is unknown and, where it is a required one, missing too: the former helps.
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] == "missing")
        text = _problem(problems[0], known_keys(kind))
        more = len(problems) - 1
        if more:
            text = f"{text.rstrip('.')} (and {more} more problem{'s' if more > 1 else ''})."
        raise ConfigError(f"{source}: {text}") from None


def make_recipe(tables: Mapping[str, Any], source: str) -> Recipe:
    """A checked :class:`Recipe` from plain tables: see :func:`checked`."""
    return checked(Recipe, tables, f"recipe '{source}'")


def builtin_recipes() -> dict[str, str]:
    """Name and text of every recipe that comes with abste."""
    folder = resources.files(__package__) / "recipes"
    files = {f.name.removesuffix(".toml"): f for f in folder.iterdir() if f.name.endswith(".toml")}
    return {name: files[name].read_text(encoding="utf-8") for name in sorted(files)}


def _read(name: str, base: Path | None) -> tuple[str, str, Path | None]:
    """``(name, text, folder)`` of a recipe: a file (relative to the one that extends it), or a built-in."""
    builtin = builtin_recipes()
    path = Path(name) if base is None else base / name
    if path.suffix == ".toml" or "/" in name:
        try:
            return path.stem, path.read_text(encoding="utf-8"), path.parent
        except FileNotFoundError:
            raise ConfigError(f"recipe file '{path}' does not exist; `abste recipes` lists those built in.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe file '{path}' cannot be read: {error}.") from None
    if name in builtin:
        return name, builtin[name], None
    raise ConfigError(f"unknown recipe '{name}'; {nearest(name, builtin)}")


def _tables(name: str, base: Path | None, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tables of a recipe with all that it extends merged in."""
    stem, text, folder = _read(name, base)
    if len(seen) > 16 or name in seen[1:]:
        raise ConfigError(f"recipe '{seen[0]}': 'extends' leads back to '{name}'; recipes must not extend themselves.")
    try:
        own = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe '{stem}' is not valid TOML: {error}.") from None
    parent = own.pop("extends", None)
    if parent is None:
        merged: dict[str, Any] = {}
    elif isinstance(parent, str):
        merged = _tables(parent, folder, (*seen, name))
    else:
        raise ConfigError(f"recipe '{stem}': 'extends' must be the name of a recipe, not {_shown(parent)}.")
    for key, value in own.items():
        # Sections merge key by key; below that a value replaces: arguments belong to the name they stand beside.
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    merged["name"] = own.get("name", stem)
    return merged


Overrides = Sequence[str] | Mapping[str, Any]
"""Keys to replace: assignments such as ``"optimizer.lr=0.2"``, or a table such as ``{"optimizer.lr": 0.2}``."""


def _assigned(assignment: str) -> tuple[str, Any]:
    """Key and value of an assignment; the value is read as TOML, else as a string."""
    key, equals, text = assignment.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set '{assignment}' is not of the form section.key=value.")
    if text.lower() == "none":
        return key, None
    try:
        parsed = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return key, text  # a bare word is a string
    return key, parsed["v"] if list(parsed) == ["v"] else text


def _override(tables: dict[str, Any], key: str, value: Any, shown: str) -> None:
    path = key.split(".")
    table = tables
    for depth, part in enumerate(path[:-1]):
        inner = table.get(part)
        if depth == 1 and path[0] == "binarize" and isinstance(inner, str):
            inner = {"name": inner}  # weights = "ab_tanh" and weights.k=4 together
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            where = ".".join(path[: depth + 1])
            raise ConfigError(f"{shown}: '{where}' is {_shown(inner)}, which has no keys.")
        table[part] = dict(inner)
        table = table[part]
    table[path[-1]] = value


def load_recipe(name: str | Path, overrides: Overrides = (), *, folder: Path | None = None) -> Recipe:
    """Read a recipe, merge what it extends, apply overrides and check it.

    Args:
        name: a built-in recipe (``abste recipes`` lists them), or the path of a TOML file.
        overrides: assignments such as ``"optimizer.lr=0.2"``; the value is read as TOML, else as a string; ``none``
            empties an optional key. Or a table of dotted keys and their values.
        folder: what a relative path is relative to; by default the current directory.

    Raises:
        ConfigError: an unknown recipe or key, a wrong type, a value out of range.
    """
    tables = _tables(str(name), folder)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _override(tables, key, None if value == "none" else value, f"override '{key}'")
    else:
        for assignment in overrides:
            _override(tables, *_assigned(assignment), f"--set '{assignment}'")
    return make_recipe(tables, str(tables["name"]))
