"""What a task is: a small class that sees every batch once and yields measured numbers.

Standard library only, so that listing and planning need no torch. A task's file is one class:

    class MeanNorm(Task):
        name, version = "mean_norm", 1
        metrics = (Metric("norm", unit="act", better="none", bounds=(0, None), interval="none"),)

        def start(self, ctx):
            from saebench.metrics import Total
            self.parts = {"norm": Total()}

        def update(self, batch):
            self.parts["norm"].add(batch.x_btd.double().norm(dim=-1).sum(), batch.n_rows)

        def results(self):
            yield Measurement("norm", self.parts["norm"].mean(), n=self.parts["norm"].n)

Everything that a task accumulates lies in `parts`. A part can be saved and merged exactly (see
`Part`), which is what makes segments, resume and shards one mechanism that tasks need not know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from saebench.backbones import Reads
    from saebench.saes import Codes

Need = Literal["readouts", "probes"]
"""readouts: heads over the final embedding, in `Context.readouts`; probes: classifiers fitted on
features of train images, in `Context.probes`, from the task's options `feature label shots solver`.
"""

REPLICATES = 500  # bootstrap replicates; a protocol constant, so that stored replicates pair up


@dataclass(frozen=True)
class Metric:
    """One number a task can report: a name means one formula (docs/metrics.md).

    A row with a `convention` is another project's formula of that name, and `bounds` do not hold.
    """

    name: str
    unit: str
    better: Literal["lower", "higher", "one", "none"]
    bounds: tuple[float | None, float | None] = (None, None)
    interval: Literal["bootstrap", "bound", "none"] = "none"
    doc: str = ""


@dataclass(frozen=True)
class Measurement:
    """One measured value. `value` None means undefined, and then `note` says why.

    `replicates` [500] are the bootstrap's values of the same statistic; the runner takes the
    percentile interval from them and stores them. `variant` holds whatever distinguishes this
    row from the metric's default, by the names of the typed columns of a row; `columns` are such
    columns that every row states, the default's too.
    """

    metric: str
    value: float | None
    n: int
    n_images: int = 0
    group: str = "all"
    variant: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    columns: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    ci_low: float | None = None
    ci_high: float | None = None
    replicates: np.ndarray | None = None
    note: str = ""


def variant_string(variant: Mapping[str, Any]) -> str:
    """The canonical text of a variant: sorted `key=value`, joined by `;`, '' for the default."""
    return ";".join(f"{key}={variant[key]}" for key in sorted(variant))


@dataclass(frozen=True)
class Option:
    """One choice that a task leaves to its user: `saebench run --option TASK.NAME=VALUE`.

    A value is text, one of `choices` where there are any. Another than the default is part of a
    unit's identity, and of the `variant` of its rows where the task says so.
    """

    default: str
    choices: tuple[str, ...] = ()
    doc: str = ""


class Part(Protocol):
    """An accumulator whose state can be saved, restored and merged without losing a bit.

    `state()` gives flat numpy arrays; `merge(state)` adds the state of a LATER stretch of the
    images. A fresh part merged with a state equals the part that state came from.
    """

    def state(self) -> dict[str, np.ndarray]: ...
    def merge(self, state: Mapping[str, np.ndarray]) -> None: ...


class Sees(Protocol):
    def __call__(self, policy: str, reads: Reads = "any") -> bool | None: ...


@dataclass(frozen=True)
class Context:
    """What a task may know before the first batch."""

    backbone: str
    sae: str
    dataset: str
    site: str
    tokens: str
    d_model: int
    d_sae: int
    kinds: Mapping[str, slice]  # token kind -> its slice of the SAE's t tokens
    n_images: int  # of the whole evaluation, not of one segment
    last_block: str = "full"  # cls: of the last block only what the head reads is computed
    class_names: Sequence[str] = ()
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)  # label level -> value names
    options: Mapping[str, str] = field(default_factory=dict)  # every option's value
    readouts: Sequence[Any] = ()  # `saebench.readouts.Readout`s, where the task needs them
    captions: Any = None  # `saebench.readouts.Captions`, where the task needs readouts
    probes: Any = None  # `saebench.probing.Probes`, where the task needs them
    # Whether what is read can change at all with the tokens of a policy; None: there are none such.
    sees: Sees = lambda policy, reads="any": True
    # Of the tokens of a policy those that the SAE was not trained on, by name.
    foreign: Callable[[str], Sequence[str]] = lambda policy: ()
    # Why no reconstruction can take the place of the tokens of a policy; '' where one can.
    refused: Callable[[str], str] = lambda policy: ""
    conventions: bool = False
    seed: int = 0
    shift_d: Any = None  # [d] float64 pilot mean of x: sums of squares are taken around it

    @property
    def n_tokens(self) -> int:
        """t, the tokens of one image that the SAE covers."""
        return max(part.stop for part in self.kinds.values())

    @property
    def groups(self) -> dict[str, list[int]]:
        """Group of rows -> which of `kinds` are in it: `all` of them, then each by itself."""
        return {"all": list(range(len(self.kinds)))} | {k: [i] for i, k in enumerate(self.kinds)}


class Batch(Protocol):
    """Some images and one SAE. Everything is lazy, computed once, and shared by all tasks.

    b images, t tokens that the SAE covers, n = b*t rows in image-major order, d width.
    """

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def first(self) -> int: ...  # position of the first image in the evaluation order
    @property
    def kinds(self) -> Mapping[str, slice]: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def decoder_norms_s(self) -> torch.Tensor: ...  # [s] float64, raw length of a latent's unit
    @property
    def n_images(self) -> int: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def labels(self) -> np.ndarray: ...  # [b] int64, the dataset's main label
    @property
    def levels(self) -> Mapping[str, np.ndarray]: ...  # label level -> [b] int64
    @property
    def x_btd(self) -> torch.Tensor: ...  # raw float32 activations, the SAE's tokens
    @property
    def codes(self) -> Codes: ...  # of the n rows
    @property
    def recon_btd(self) -> torch.Tensor: ...
    @property
    def weights_br(self) -> torch.Tensor: ...  # [b REPLICATES] float64 Poisson(1) weights
    @property
    def places(self) -> range: ...  # positions of the images in the evaluation order
    @property
    def clean_output(self) -> Any: ...  # backbones.Output of the untouched images
    @property
    def clean_name(self) -> str: ...  # tells it from the clean outputs of others of these images
    def spliced_output(self, replaced: str = "sae_tokens") -> Any:
        """Output with the reconstruction in place of x, for the tokens of a policy."""
        ...

    def ablated_output(self, value: Literal["zero", "mean"], ablated: str = "sae_tokens") -> Any:
        """Output with 0 or the train mean in place of x, for the tokens of a policy."""
        ...

    def shared(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` once for all SAEs that see the same activations (same site and tokens)."""
        ...

    def shared_by_all(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` once for all SAEs that see the same images, whatever their sites."""
        ...


class Task(ABC):
    """One file, one class. Bump `version` whenever a number could change."""

    name: ClassVar[str]
    version: ClassVar[int]
    metrics: ClassVar[tuple[Metric, ...]]
    suite: ClassVar[Literal["default", "full"]] = "default"
    needs: ClassVar[tuple[Need, ...]] = ()
    options: ClassVar[Mapping[str, Option]] = {}
    splices: ClassVar[bool] = False  # it can measure several SAEs spliced together
    has_conventions: ClassVar[bool] = False  # it knows peers' formulas (ctx.conventions)

    parts: dict[str, Part]

    @classmethod
    def canonical(cls, options: Mapping[str, str], *, conventions: bool) -> Mapping[str, str]:
        """The same options in one way of saying them, so that one result has one unit.

        conventions: for the unit of the peers' formulas, which may not heed some of them.
        """
        return options

    @abstractmethod
    def start(self, ctx: Context) -> None:
        """Begin with empty `parts`. Called once for every segment, and once to fold them."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """See one batch. The images come in evaluation order, each exactly once."""

    @abstractmethod
    def results(self) -> Iterator[Measurement]:
        """What was measured on all images merged so far."""

    def latents(self) -> Mapping[str, np.ndarray] | None:
        """Columns of the latents table (one row a latent and token kind), or None."""
        return None

    def state(self) -> dict[str, np.ndarray]:
        """All parts, as flat arrays named `part/array`."""
        return {
            f"{name}/{key}": array
            for name, part in self.parts.items()
            for key, array in part.state().items()
        }

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add the state of a later segment."""
        for name, part in self.parts.items():
            prefix = f"{name}/"
            part.merge({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
