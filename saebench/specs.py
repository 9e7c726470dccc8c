"""What registry entries say, as frozen dataclasses read strictly from TOML.

A field marked `semantic` can change a number: the semantic fields of a backbone, a dataset and an
SAE are part of a unit's identity (`saebench.units`). All others (description, licence, paths) are
columns or documentation. `saebench.strict` reads them from TOML. An entry is read
once (`saebench.registry`), so entries compare and hash as objects, not by their many fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TokenKind = Literal["cls", "distillation", "registers", "patches", "grid", "pooled"]
KINDS: tuple[TokenKind, ...] = ("cls", "distillation", "registers", "patches", "grid", "pooled")

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu6", "silu", "hard_swish"]


Feature = Literal["embedding", "cls", "patches"]


def semantic(**kwargs: Any) -> Any:
    """A dataclass field that can change a number."""
    return field(**kwargs, metadata={"semantic": True})


def semantic_fields(spec: Any) -> dict[str, Any]:
    """The semantic fields of a spec, nested specs included, as plain JSON-ready values."""
    return {
        f.name: _plain(getattr(spec, f.name))
        for f in dataclasses.fields(spec)
        if f.metadata.get("semantic")
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return semantic_fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class WeightsSpec:
    """Where a weights file is: `file` beside the entry, or `hub`, a Hugging Face repository.

    `sha256` identifies the bytes. It is checked before anything is parsed. Whatever of `revision`,
    `filename` and `sha256` a hub entry leaves out is resolved at first use and locked
    (`saebench.lock`). `beside`: the configurations that an SAE's format reads with the file, by
    their names in its folder, with their sha256 ("": not declared). Of a local file, those that lie
    where they usually do are found without it.

    An SAE's `filename` that ends in / is a folder of the repository: which file in it is not known.
    A `file` may also lie below the user's folder for weights (`saebench.paths`).
    """

    file: str | None = None
    url: str = ""  # where people get the file from: told where it is not there, never opened
    hub: str | None = None  # owner/name
    revision: str | None = None  # a commit, tag or branch; none: the default branch
    filename: str | None = None  # none: the loader's usual names, in their usual order
    sha256: str | None = semantic(default=None)
    beside: Mapping[str, str] = field(default_factory=dict)  # see `units.coder_identity`


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The weights' own pixel pipeline: PIL image -> [3 h w] float32, in this order.

    Convert to RGB; resize (`shortest` side to `resize_to`, `squash` to a square of `resize_to`, or
    `none`); centre crop to `size` when `crop`; scale to 0..1; subtract `mean`, divide by `std`.
    """

    size: int = semantic()
    resize: Literal["shortest", "squash", "none"] = semantic(default="shortest")
    resize_to: int | None = semantic(default=None)  # None: the same as `size`
    interpolation: Literal["bicubic", "bilinear", "nearest"] = semantic(default="bicubic")
    crop: bool = semantic(default=True)
    mean: tuple[float, float, float] = semantic(default=(0.5, 0.5, 0.5))
    std: tuple[float, float, float] = semantic(default=(0.5, 0.5, 0.5))

    def __post_init__(self) -> None:
        if self.resize_to is None and self.resize != "none":
            object.__setattr__(self, "resize_to", self.size)
        if self.size < 1 or (self.resize_to is not None and self.resize_to < 1):
            raise ValueError("size and resize_to are pixels, 1 or more")
        if min(self.std) <= 0:
            raise ValueError("std divides the pixels, so each has to be above 0")


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """One place in a backbone: a literal `named_modules()` path, a side, and a token layout.

    `layout = "tokens"`: [b t d], in the order CLS, distillation token, registers, patches.
    `layout = "map"`: a conv map [b c h w], read as h*w tokens of width c (kind `grid`).
    `layout = "channels_last"`: the same, of a module whose maps are [b h w c].
    `layout = "pooled"`: [b d], read as one token.
    A `bottleneck` is all that later layers see; a `branch` (an MLP output) is added to one.
    """

    path: str = semantic()
    width: int = semantic()
    side: Literal["output", "input"] = semantic(default="output")
    kind: Literal["bottleneck", "branch"] = semantic(default="bottleneck")
    layout: Literal["tokens", "map", "channels_last", "pooled"] = semantic(default="tokens")
    cls: int = semantic(default=0)
    distillation: int = semantic(default=0)
    registers: int = semantic(default=0)
    grid: tuple[int, int] | None = semantic(default=None)

    def __post_init__(self) -> None:
        if self.width < 1 or min(self.cls, self.distillation, self.registers) < 0:
            raise ValueError("width is 1 or more, and a number of tokens is never negative")
        if self.layout in ("map", "channels_last") and self.grid is None:
            raise ValueError("a map needs its grid: say grid = [h, w]")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError("grid is [h, w], each 1 or more")
        if not self.kinds:
            raise ValueError("it has no tokens: say cls = 1, or grid = [h, w]")

    @property
    def kinds(self) -> dict[str, slice]:
        """Token kind -> its slice of the t tokens, in the order they stand in."""
        if self.layout == "pooled":
            return {"pooled": slice(0, 1)}
        n_grid = self.grid[0] * self.grid[1] if self.grid else 0
        if self.layout in ("map", "channels_last"):
            return {"grid": slice(0, n_grid)}
        found: dict[str, slice] = {}
        start = 0
        counts: tuple[tuple[TokenKind, int], ...] = (
            ("cls", self.cls),
            ("distillation", self.distillation),
            ("registers", self.registers),
            ("patches", n_grid),
        )
        for kind, count in counts:
            if count:
                found[kind] = slice(start, start + count)
                start += count
        return found

    @property
    def tokens(self) -> int:
        """t, the number of tokens of one image at this site."""
        return max(part.stop for part in self.kinds.values())


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What reads the backbone's final embedding.

    `classifier`: the model's own; `classes[name] = [first, count]` is the slice of its outputs that
    are the classes of a dataset, or of a class list that datasets share, in label order.
    `zero_shot`: a text tower; `templates` takes the place of a dataset's own. `none`: a linear head
    is read, the published one of `linear[name]`, or a probe that is fitted on train images.
    `features`: what a linear head reads, side by side: the `embedding`, or of the final, normed
    sequence the token `cls` and the mean of `patches`.
    """

    kind: Literal["classifier", "zero_shot", "none"] = semantic(default="none")
    classes: Mapping[str, tuple[int, int]] = semantic(default_factory=dict)
    templates: Mapping[str, tuple[str, ...]] = semantic(default_factory=dict)
    features: tuple[Feature, ...] = semantic(default=("embedding",))
    linear: Mapping[str, WeightsSpec] = semantic(default_factory=dict)
    interleaved: bool = semantic(default=False)  # `linear` reads cls[0], patches[0], cls[1], …

    def __post_init__(self) -> None:
        if not self.features or ("embedding" in self.features and len(self.features) > 1):
            raise ValueError('features is ["embedding"], or cls, patches, or both')

    def published(self, dataset: DatasetSpec) -> str | None:
        """The key of `linear` that is the published linear head for the classes of a dataset."""
        return _classes_among(self.linear, dataset)

    def outputs(self, dataset: DatasetSpec) -> slice | None:
        """The classifier's outputs that are the classes of a dataset, in label order."""
        name = _classes_among(self.classes, dataset)
        return slice(self.classes[name][0], sum(self.classes[name])) if name else None


def _classes_among(known: Mapping[str, Any], dataset: DatasetSpec) -> str | None:
    names = (dataset.name, dataset.classes)
    return next((name for name in names if isinstance(name, str) and name in known), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class BackboneSpec:
    """A backbone: what it is, how it is built, its pixels, its sites. One TOML file."""

    name: str
    path: str = ""
    family: str = ""  # clip, dinov2, vit, resnet, …: leaderboards group by these four
    architecture: str = ""  # as a reader knows it; none: the model's name
    pretraining: str = ""
    corpus: str = ""
    loader: str = semantic()
    model: str = semantic()
    model_args: Mapping[str, Any] = semantic(default_factory=dict)
    revision: str = semantic(default="")  # of your own loader: change it when its code changes
    # Checked on the model: they decide nothing. Of the image tower, and of the text tower; where
    # the latter is None, the same as of an image tower that is a transformer too.
    activation: Activation | None = None
    text_activation: Activation | None = None
    weights: WeightsSpec = semantic(default_factory=WeightsSpec)
    input: InputSpec = semantic()
    sites: Mapping[str, SiteSpec] = field(default_factory=dict)
    site: str = ""  # where controls are run when no SAE asks for another; none: the first of sites
    head: HeadSpec = field(default_factory=HeadSpec)  # see `units.head_identity`
    base: str | None = None
    dataset: str = ""  # the dataset to measure on when none is named
    embedded: bool = False  # part of the benchmark that runs without a download
    replaces: str = ""  # the origin or file of the entry of the same name that this one replaces
    description: str = ""
    licence: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        filled = {"architecture": self.model, "site": next(iter(self.sites), "")}
        for name, value in filled.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True, eq=False)
class SaeSpec:
    """One SAE checkpoint: a file, and the activations it was trained on. One TOML file."""

    name: str
    path: str = ""
    backbone: str = semantic()
    site: str = semantic()
    tokens: str = semantic(default="all")  # "all", a token kind, or kinds joined by "+"
    weights: WeightsSpec = semantic()
    format: str | None = semantic(default=None)
    semantics: Mapping[str, Any] = semantic(default_factory=dict)
    architecture: str = ""
    recipe: str = ""
    seed: int | None = None
    trained_on: str = ""
    l0: float | None = None  # as its maker states it; chooses the PCA controls
    replaces: str = ""
    suite: Literal["default", "full"] = "default"
    description: str = ""
    licence: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        if self.l0 is not None and self.l0 <= 0:
            raise ValueError("l0 is a number of latents, above 0")


@dataclass(frozen=True, kw_only=True)
class FolderForm:
    """Image files in folders: `<root>/<split>/<class>/…/<image>`, or listed in a table.

    `root` is absolute, or relative to the entry's folder; none: `<data root>/<dataset name>`.
    """

    root: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)  # split -> its folder below root
    labels: str | None = None  # a CSV below root, a line for each image, perhaps with a `split`
    file: str = "file"  # its column of files: paths below root or below the split folder
    label: str = "label"  # its column of labels: all numbers, or names of classes
    caption: str | None = None  # its column of captions; none: there are none


@dataclass(frozen=True, kw_only=True)
class TarForm:
    """Tar shards in WebDataset layout: members of one stem are one sample (`x.jpg`, `x.cls`)."""

    root: str | None = None  # as of a folder
    splits: Mapping[str, str] = field(default_factory=dict)  # split -> glob of its shards
    label: str = "cls"  # the member that holds it: `cls`, `json:<key>`; `folder`: the key's folder
    caption: str | None = None  # the member that holds it: `txt`, `json:<key>`


@dataclass(frozen=True, kw_only=True)
class HubForm:
    """A dataset of the Hugging Face hub, read with the `datasets` library."""

    repo: str  # owner/name, or a folder that holds its Parquet files
    config: str = ""
    revision: str | None = None  # none: resolved at first use and locked
    splits: Mapping[str, str] = field(default_factory=dict)  # split -> the hub's name of it
    image: str = "image"  # column of the images
    label: str = "label"  # column of the labels
    id: str | None = None  # column of the ids; none: the image's path, else the row number
    levels: Mapping[str, str] = field(default_factory=dict)  # label level -> its column
    caption: str | None = None  # column of the captions: texts, or lists of them (the first counts)
    streaming: bool | tuple[str, ...] = False  # first rows as they come: all, or of these splits


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetSpec:
    """A labelled image dataset. `source` names the reader in `saebench.data`.

    `source = "images"` is a collection that may be had in several forms: `folder`, `tar` and `hub`
    say what each looks like, and the first that is there is read. Ids, labels and so the manifest
    are the same in every form, which is why a form is not part of the dataset's identity.
    """

    name: str
    path: str = ""
    source: str = semantic()
    options: Mapping[str, Any] = semantic(default_factory=dict)
    revision: str = semantic(default="")
    train: str = semantic(default="train")  # the split artifacts are fitted on
    test: str = semantic(default="test")  # the split rows are measured on
    folder: FolderForm | None = None
    tar: TarForm | None = None
    hub: HubForm | None = None
    # The names of the classes in label order, or a list known beforehand: `imagenet-1k`, `inat21`;
    # none: the order of the dataset's own names where it has one, else the names found, sorted.
    classes: tuple[str, ...] | str = semantic(default="")
    # A regular expression whose group 1, searched in a file's path below its split, is the image's
    # id; none: the split (not with a holdout) and that path without its suffix.
    id_pattern: str = semantic(default="")
    holdout: float | None = semantic(default=None)  # no split folders: this share is `test`
    # Of zero-shot texts, with {} for the name; or the name of a set: `openai_imagenet`, `simple`.
    templates: tuple[str, ...] | str = ()  # see `units.head_identity`
    replaces: str = ""
    description: str = ""
    licence: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        if self.train == self.test:
            raise ValueError("train and test are one split: statistics would see what is measured")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ValueError("holdout is a share of the images, between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class BoardSpec:
    """A table of results: which measured columns stand beside each other."""

    name: str
    path: str = ""
    title: str = ""
    columns: tuple[str, ...] = ()  # "task/metric"
    replaces: str = ""
    description: str = ""
