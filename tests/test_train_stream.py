"""The rows of training: every row once an epoch, a batch a function of its step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.errors import DataError, NonFiniteError
from saebench.train.stream import Rows, Stream


class Tokens:
    """Image i gives rows (i, 0) … (i, t − 1); counts how many images were asked for at once."""

    n_images, n_tokens, d_model = 40, 5, 2

    def __init__(self) -> None:
        self.asked: list[int] = []

    def rows(self, images: np.ndarray) -> Tensor:
        self.asked.append(len(images))
        return torch.tensor([[i, t] for i in images for t in range(self.n_tokens)]).float()


def row_names(x_nd: Tensor) -> list[tuple[float, float]]:
    return [tuple(row) for row in x_nd.tolist()]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    source = Tokens()
    stream = Stream(source, 20, memory=2**20)
    assert (stream.batches_an_epoch, stream.cached) == (10, True)
    epochs = [[r for i in range(10) for r in row_names(stream.batch(e * 10 + i))] for e in (0, 1)]
    assert all(len(set(epoch)) == 200 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert source.asked == [40]  # through the backbone once


def test_windows_hold_no_more_than_the_memory_allows() -> None:
    source = Tokens()
    memory = 12 * source.n_tokens * (4 * source.d_model + 8)  # 12 images
    stream = Stream(source, 20, memory=memory)
    assert not stream.cached
    seen = [row for i in range(stream.batches_an_epoch) for row in row_names(stream.batch(i))]
    # 12, 12, 12 and 4 images of 5 rows, in whole batches of 20
    assert stream.batches_an_epoch == 3 + 3 + 3 + 1
    assert len(set(seen)) == len(seen) == 200
    assert max(source.asked) == 12
    # A window is shuffled as a whole, and so are the images that it is made of.
    assert {i for i, _ in seen[:60]} != set(range(12))
    assert [i for i, _ in seen[:5]] != [seen[0][0]] * 5


@pytest.mark.parametrize("memory", [2**20, 12 * 5 * 16])
def test_a_batch_depends_on_its_step_alone(memory: int) -> None:
    straight = Stream(Tokens(), 16, memory=memory)
    expected = [straight.batch(i) for i in range(30)]
    jumping = Stream(Tokens(), 16, memory=memory)
    for step in (29, 0, 17, 3, 12):
        assert torch.equal(jumping.batch(step), expected[step])


def test_another_seed_is_another_order() -> None:
    a, b = (Stream(Tokens(), 16, memory=2**20, seed=seed) for seed in (0, 1))
    assert not torch.equal(a.batch(0), b.batch(0))


def test_the_sample_is_fixed_and_without_repetition() -> None:
    stream = Stream(Tokens(), 16, memory=2**20)
    first = torch.cat(list(stream.sample(50)))
    stream.batch(25)
    assert torch.equal(first, torch.cat(list(stream.sample(50))))
    assert len(set(row_names(first))) == 50
    assert len(torch.cat(list(stream.sample(10_000)))) == 200


def test_too_few_rows_for_a_batch() -> None:
    with pytest.raises(DataError, match=r"200 rows.*batch of 201"):
        Stream(Tokens(), 201, memory=2**20)


def test_a_row_that_is_not_finite_is_an_error() -> None:
    x_nd = torch.ones(50, 4)
    x_nd[7, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="1 of 50 rows"):
        Stream(Rows(x_nd), 10, memory=2**20).batch(0)


class Gaps(Tokens):
    """Every second image does not decode, and has no rows."""

    def rows(self, images: np.ndarray) -> Tensor:
        return super().rows(images[images % 2 == 0])


def test_images_that_were_left_out_are_made_up_for_evenly() -> None:
    stream = Stream(Gaps(), 20, memory=2**20)
    batches = [row_names(stream.batch(i)) for i in range(stream.batches_an_epoch)]
    assert all(len(batch) == 20 for batch in batches)
    count = Counter(row for batch in batches for row in batch)
    assert len(count) == 100
    assert set(count.values()) == {2}  # ten batches of 20 from 100 rows: each row twice
