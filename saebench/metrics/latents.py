"""What is known of every latent: how often and how strongly it fires, when first, on which images.

All statistics are kept per token kind, g of them; latent j of kind i has the number i·s + j, and
there are G = g·s in all. An image's value for a latent is its largest code on any token of the
kind, and its token the first one that has it. The sixteen top images are the largest values;
among equal ones the earlier image. Both orders are total, so nothing depends on the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saebench.metrics.sums import ratio

TOP = 16  # images kept for a latent
TABLE_CELLS = 2**23  # of the table latent x image: 64 MiB
MOST_CODES = 2**21  # looked at together: some 16 MiB an array
NEVER = np.iinfo(np.int64).max  # the first firing of a latent that has not fired

_EMPTY = torch.iinfo(torch.int64).min
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Firings:
    """The non-zero codes of b images, with the kind, latent and place of each.

    group_m = kind·s + latent, image_m in 0 … b−1, token_m in 0 … t−1, value_m float32.
    """

    groups: int
    tokens: int
    group_m: Tensor
    image_m: Tensor
    token_m: Tensor
    value_m: Tensor

    @classmethod
    def of(
        cls,
        row_m: Tensor,
        latent_m: Tensor,
        value_m: Tensor,
        *,
        tokens: int,
        d_sae: int,
        kinds: Sequence[slice],
    ) -> Firings:
        """From codes of b·tokens rows, image by image."""
        image_m = row_m // tokens
        token_m = row_m - image_m * tokens
        offset_t = torch.zeros(tokens, dtype=torch.int64)
        for kind, part in enumerate(kinds):
            offset_t[part] = kind * d_sae
        group_m = latent_m + offset_t.to(row_m.device)[token_m]
        return cls(len(kinds) * d_sae, tokens, group_m, image_m, token_m, value_m)

    def any_kind(self, d_sae: int) -> Firings:
        """The same firings with all token kinds taken as one."""
        return replace(self, groups=d_sae, group_m=self.group_m % max(d_sae, 1))

    def row_m(self) -> Tensor:
        return self.image_m * self.tokens + self.token_m


def stretches(images: int, codes: int, groups: int) -> Iterator[slice]:
    """So few of a batch's images at a time that what is made of them stays small.

    `codes` is the number of non-zero codes of all the images, `groups` is G.
    """
    per_image = codes // max(images, 1) + 1
    step = max(1, min(TABLE_CELLS // max(groups, 1), MOST_CODES // per_image))
    for start in range(0, images, step):
        yield slice(start, min(start + step, images))


class FirstFiring:
    """[G] int64: the row (image · t + token) on which each latent fired first, else `NEVER`."""

    def __init__(self, groups: int) -> None:
        self.row_g = np.full(groups, NEVER)

    def add(self, firings: Firings, first_image: int) -> None:
        row_g = torch.full((firings.groups,), NEVER, device=firings.group_m.device)
        row_m = firings.row_m() + first_image * firings.tokens
        row_g.scatter_reduce_(0, firings.group_m, row_m, "amin")
        np.minimum(self.row_g, row_g.cpu().numpy(), out=self.row_g)

    def state(self) -> dict[str, np.ndarray]:
        return {"row": self.row_g}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        np.minimum(self.row_g, state["row"], out=self.row_g)


class Activity:
    """[G] each: rows on which a latent fired, Σz and max z over them, images with a firing."""

    def __init__(self, groups: int) -> None:
        self.rows_g = np.zeros(groups, dtype=np.int64)
        self.images_g = np.zeros(groups, dtype=np.int64)
        self.sum_g = np.zeros(groups)
        self.max_g = np.full(groups, -np.inf, dtype=np.float32)

    def add(self, firings: Firings, table: ImageTable) -> None:
        """See the next images, and the table made of them."""
        g = firings.groups
        self.rows_g += torch.bincount(firings.group_m, minlength=g).cpu().numpy()
        self.sum_g += sum_by(firings.group_m, firings.value_m.double(), g).cpu().numpy()
        self.images_g += table.images_g().cpu().numpy()
        np.maximum(self.max_g, table.max_g().cpu().numpy(), out=self.max_g)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "rows": self.rows_g,
            "images": self.images_g,
            "sum": self.sum_g,
            "max": self.max_g,
        }

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        self.rows_g += state["rows"]
        self.images_g += state["images"]
        self.sum_g += state["sum"]
        np.maximum(self.max_g, state["max"], out=self.max_g)


def sum_by(index_m: Tensor, value_m: Tensor, size: int) -> Tensor:
    """[size] float64, the values added up by index, always in the same order.

    A GPU's scattered additions come in any order, so there the values are sorted first.
    """
    if not value_m.is_cuda:
        return value_m.new_zeros(size).index_add_(0, index_m, value_m)
    order_m = torch.argsort(index_m, stable=True)
    counts = torch.bincount(index_m, minlength=size)
    return torch.segment_reduce(value_m[order_m], "sum", lengths=counts)


@dataclass(frozen=True)
class ImageTable:
    """The largest code of each latent on each image, and its token: table_gb [G b] int64.

    A cell holds the value's bits, ordered like the value, above the token, counted from the end;
    so the integer maximum is the largest value on its first token, in whatever order it is taken.
    """

    table_gb: Tensor

    @classmethod
    def of(cls, firings: Firings, images: slice) -> ImageTable:
        """`images` is the stretch that the firings are of."""
        g, b = firings.groups, images.stop - images.start
        table = torch.full((g * b,), _EMPTY, dtype=torch.int64, device=firings.group_m.device)
        key_m = (_ordered(firings.value_m).long() << 32) | (_LOW - firings.token_m)
        table.scatter_reduce_(0, firings.group_m * b + firings.image_m, key_m, "amax")
        return cls(table.view(g, b))

    def filled(self) -> tuple[Tensor, Tensor]:
        """(group, image) of every cell with a firing, group by group."""
        return self._above(torch.full((), _EMPTY, device=self.table_gb.device))

    def over(self, value_g: Tensor) -> tuple[Tensor, Tensor]:
        """(group, image) of every cell whose value is above its latent's float32 value [G]."""
        floor_g = (_ordered(value_g).long() << 32) | _LOW
        return self._above(floor_g.masked_fill_(value_g == -torch.inf, _EMPTY)[:, None])

    def _above(self, floor: Tensor) -> tuple[Tensor, Tensor]:
        at = (self.table_gb > floor).flatten().nonzero().squeeze(1)
        group = at // max(self.table_gb.shape[1], 1)
        return group, at - group * self.table_gb.shape[1]

    def at(self, group: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """(value float32, token) of cells with a firing."""
        key = self.table_gb[group, image]
        return _value(key), _LOW - (key & _LOW)

    def images_g(self) -> Tensor:
        """[G] int64, on how many of the images each latent fired."""
        return torch.bincount(self.filled()[0], minlength=self.table_gb.shape[0])

    def max_g(self) -> Tensor:
        """[G] float32, each latent's largest code; −∞ without a firing."""
        key_g = self.table_gb.amax(dim=1)
        return _value(key_g).masked_fill_(key_g == _EMPTY, -torch.inf)

    def distinct(self, kinds: int) -> Tensor:
        """[kinds + 1, b] int64, how many latents fired on each image; last: on any token."""
        g, b = self.table_gb.shape
        group, image = self.filled()
        by_kind = torch.bincount(group // max(g // kinds, 1) * b + image, minlength=kinds * b)
        if not g:
            return by_kind.new_zeros(kinds + 1, b)
        _, image = ImageTable(self.table_gb.unflatten(0, (kinds, -1)).amax(dim=0)).filled()
        return torch.cat([by_kind, torch.bincount(image, minlength=b)]).view(kinds + 1, b)


class TopImages:
    """[G 16] each: value, image, token and label of the images with the largest values.

    Best first; where there are fewer, the value is −∞ and the image −1.
    """

    def __init__(self, groups: int) -> None:
        self.value = np.full((groups, TOP), -np.inf, dtype=np.float32)
        self.image = np.full((groups, TOP), -1, dtype=np.int32)
        self.token = np.zeros((groups, TOP), dtype=np.int32)
        self.label = np.full((groups, TOP), -1, dtype=np.int32)

    def add(self, table: ImageTable, first_image: int, label_b: np.ndarray) -> None:
        """See the next images, which begin at `first_image` of the evaluation order."""
        least_g = torch.from_numpy(self.value[:, -1]).to(table.table_gb.device)
        group, image = table.over(least_g)
        value, token = table.at(group, image)
        image_m = image.cpu().numpy()
        self._insert(
            group.cpu().numpy(),
            value.cpu().numpy(),
            (image_m + first_image).astype(np.int32),
            token.cpu().numpy().astype(np.int32),
            label_b[image_m].astype(np.int32),
        )

    def _insert(self, group: np.ndarray, *candidate: np.ndarray) -> None:
        """Candidates later than all that is held, and in order among equals of a latent."""
        if not group.size:
            return
        touched = np.zeros(len(self.value), dtype=bool)
        touched[group] = True
        touched = np.flatnonzero(touched)
        held = self.image[touched] >= 0
        fields = (self.value, self.image, self.token, self.label)
        group = np.concatenate([np.repeat(touched, held.sum(axis=1)), group])
        columns = [
            np.concatenate([field[touched][held], new])
            for field, new in zip(fields, candidate, strict=True)
        ]
        falling = np.int64(_LOW >> 1) - _ordered(torch.from_numpy(columns[0])).numpy()
        order = np.argsort((group << 32) + falling, kind="stable")
        group = group[order]
        begins = np.flatnonzero(np.diff(group, prepend=-1))
        rank = np.arange(group.size) - np.repeat(begins, np.diff(begins, append=group.size))
        kept = rank < TOP
        for field, column in zip(fields, columns, strict=True):
            field[group[kept], rank[kept]] = column[order[kept]]

    def best_class(self) -> tuple[np.ndarray, np.ndarray]:
        """[G] int64 the commonest label of a latent's top images, −1 without; [G] its share.

        Among equally common labels, the one whose image comes first.
        """
        held = self.image >= 0
        same = np.stack(
            [((self.label == self.label[:, i : i + 1]) & held).sum(axis=1) for i in range(TOP)],
            axis=1,
        )
        same = np.where(held, same, 0)
        best = same.argmax(axis=1)
        rows = np.arange(len(best))
        return self.label[rows, best].astype(np.int64), ratio(same[rows, best], held.sum(axis=1))

    def state(self) -> dict[str, np.ndarray]:
        return {
            "value": self.value,
            "image": self.image,
            "token": self.token,
            "label": self.label,
        }

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        held = state["image"] >= 0
        group = np.repeat(np.arange(len(held)), held.sum(axis=1))
        self._insert(group, *(state[k][held] for k in ("value", "image", "token", "label")))


def _ordered(value: Tensor) -> Tensor:
    """int32 in the order of the float32 values. −0 does not occur: zeros are never stored."""
    bits = value.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: Tensor) -> Tensor:
    bits = (key >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
