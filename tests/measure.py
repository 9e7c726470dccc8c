"""Runs a built-in task on activations and a coder, without backbone, data set or results folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.codes import Codes
from saebench.metrics import poisson_weights
from saebench.paths import CONTENT
from saebench.saes import Coder
from saebench.task import Context, Measurement, Task, variant_string


@dataclass
class LocalBatch:
    """`saebench.task.Batch` over tensors."""

    ids: Sequence[str]
    first: int
    kinds: Mapping[str, slice]
    coder: Coder
    x_btd: Tensor
    labels: np.ndarray
    memo: dict[str, Any] = field(default_factory=dict)
    levels: Mapping[str, np.ndarray] = field(default_factory=dict)
    rest: Callable[[Tensor], Any] | None = None  # activations [b t d] -> Output
    mean_td: Tensor | None = None  # what mean ablation puts there

    @property
    def d_sae(self) -> int:
        return self.coder.d_sae

    @property
    def decoder_norms_s(self) -> Tensor:
        return self.coder.decoder_norms_s

    @property
    def n_images(self) -> int:
        return self.x_btd.shape[0]

    @property
    def n_rows(self) -> int:
        return self.x_btd.shape[0] * self.x_btd.shape[1]

    @cached_property
    def codes(self) -> Codes:
        return self.coder.encode(self.x_btd.flatten(0, 1))

    @cached_property
    def recon_btd(self) -> Tensor:
        return self.coder.decode(self.codes).view_as(self.x_btd)

    @cached_property
    def weights_br(self) -> Tensor:
        weights = self.shared("weights", lambda: poisson_weights("test", self.ids))
        return torch.as_tensor(weights, device=self.x_btd.device)

    @property
    def places(self) -> range:
        return range(self.first, self.first + self.n_images)

    @property
    def clean_name(self) -> str:
        return "here"

    @property
    def clean_output(self) -> Any:
        return self._output(self.x_btd, "all")

    def spliced_output(self, replaced: str = "sae_tokens") -> Any:
        return self._output(self.recon_btd, replaced)

    def ablated_output(self, value: str, ablated: str = "sae_tokens") -> Any:
        mean_td = self.x_btd[0] * 0
        if value == "mean":
            assert self.mean_td is not None
            mean_td = self.mean_td
        return self._output(mean_td.expand_as(self.x_btd), ablated)

    def _output(self, other_btd: Tensor, policy: str) -> Any:
        """Output with other activations for the tokens of a policy; the site has no more tokens."""
        assert self.rest is not None
        changed_btd = self.x_btd.clone()
        for kind, part in self.kinds.items():
            if policy in ("sae_tokens", "all", kind):
                changed_btd[:, part] = other_btd[:, part].to(changed_btd.dtype)
        return self.rest(changed_btd)

    def shared_by_all(self, key: str, compute: Callable[[], Any]) -> Any:
        return self.shared(f"all: {key}", compute)

    def shared(self, key: str, compute: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


@dataclass(frozen=True)
class Fixed:
    """A coder with given codes and reconstructions, for test vectors. Rows are looked up."""

    x_nd: Tensor
    xhat_nd: Tensor
    z_ns: Tensor
    architecture: str = "fixed"
    n_bytes: int = 0

    @property
    def d_model(self) -> int:
        return self.x_nd.shape[1]

    @property
    def d_sae(self) -> int:
        return self.z_ns.shape[1]

    @property
    def decoder_norms_s(self) -> Tensor:
        return torch.ones(self.d_sae, dtype=torch.float64)

    def _rows(self, x_nd: Tensor) -> Tensor:
        same = (x_nd[:, None] == self.x_nd[None]).all(dim=2)
        assert same.any(dim=1).all()
        return same.int().argmax(dim=1)

    def encode(self, x_nd: Tensor, *, tile_bytes: int = 0) -> Codes:
        codes = Codes.from_dense(self.z_ns[self._rows(x_nd)].float())
        object.__setattr__(codes, "rows_of_fixed", self._rows(x_nd))
        return codes

    def decode(self, codes: Codes) -> Tensor:
        return self.xhat_nd[codes.rows_of_fixed].float()  # type: ignore[attr-defined]


def task_class(name: str) -> type[Task]:
    """The class of a built-in task file."""
    path = CONTENT / "tasks" / f"{name}.py"
    module = f"tests_tasks_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, Path(path))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return next(
        value
        for value in vars(sys.modules[module]).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module
    )


def context(x_btd: Tensor, coder: Coder, **more: Any) -> Context:
    """A context for activations [b t d]; one token kind unless `kinds` says otherwise."""
    values: dict[str, Any] = {
        "backbone": "test",
        "sae": "test",
        "dataset": "test",
        "site": "test",
        "tokens": "all",
        "d_model": coder.d_model,
        "d_sae": coder.d_sae,
        "kinds": {"patches": slice(0, x_btd.shape[1])},
        "n_images": x_btd.shape[0],
        "shift_d": x_btd.flatten(0, 1).double().mean(0).cpu().numpy(),
    }
    return Context(**{**values, **more})


def local_batches(
    x_btd: Tensor,
    coder: Coder,
    ctx: Context,
    size: int,
    labels: np.ndarray | None = None,
    first: int = 0,
    **more: Any,
) -> Iterator[LocalBatch]:
    """Batches of `size` images, the first of them at position `first` of the order.

    more: what else a `LocalBatch` is given.
    """
    labels = np.zeros(len(x_btd), dtype=np.int64) if labels is None else labels
    for start in range(0, len(x_btd), size):
        part = slice(start, min(start + size, len(x_btd)))
        ids = [f"image{first + i}" for i in range(part.start, part.stop)]
        yield LocalBatch(ids, first + start, ctx.kinds, coder, x_btd[part], labels[part], **more)


def finished(
    name: str,
    x_btd: Tensor,
    coder: Coder,
    *,
    batch: int | None = None,
    segments: Sequence[int] = (),
    labels: np.ndarray | None = None,
    batches: Mapping[str, Any] | None = None,
    **more: Any,
) -> Task:
    """The task after all images: in batches, and cut into segments at these image positions.

    batches: what else each batch is given; more: what else the context is.
    """
    ctx = context(x_btd, coder, **more)
    bounds = [0, *segments, len(x_btd)]
    whole = task_class(name)()
    whole.start(ctx)
    for low, high in pairwise(bounds):
        task = task_class(name)()
        task.start(ctx)
        some = None if labels is None else labels[low:high]
        for one in local_batches(
            x_btd[low:high], coder, ctx, batch or max(len(x_btd), 1), some, low, **(batches or {})
        ):
            task.update(one)
        whole.merge(task.state())
    return whole


def measured(task: Task) -> dict[tuple[str, str, str], Measurement]:
    """(metric, group, variant) -> what the task measured."""
    found = {}
    for row in task.results():
        key = (row.metric, row.group, variant_string(row.variant))
        assert key not in found
        found[key] = row
    return found


def measure(
    name: str, x_btd: Tensor, coder: Coder, **how: Any
) -> dict[tuple[str, str, str], Measurement]:
    """`measured(finished(…))`."""
    return measured(finished(name, x_btd, coder, **how))
