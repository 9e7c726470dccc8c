"""What interop tests call a tie is one, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from tests.interop.common import assert_agree, random_rows, ties_n
from tests.small import random_sae

THEIRS = [3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("ours", "tie"),
    [
        ([3.0, 2.0, 0.0, 1.0], True),  # the least of both, in another place
        ([3.0, 2.0, 0.0, -1.000001], True),
        ([3.0, 2.0, 1.0, 0.0], False),  # the same
        ([3.0, 2.0, 0.0, 1.01], False),  # another magnitude
        ([3.0, 2.0, 0.0, 0.0], False),  # one fewer: a threshold, not a tie
        ([0.0, 2.0, 1.0, 3.0], False),  # not the least
    ],
)
def test_ties(ours: list[float], tie: bool) -> None:
    assert ties_n(torch.tensor([ours]), torch.tensor([THEIRS])).tolist() == [tie]


def test_an_sae_whose_latents_are_permuted_does_not_agree() -> None:
    sae, x_nd = random_sae(k=1, d=64, s=96), random_rows()
    z_ns = sae.encode(x_nd).dense()
    with pytest.raises(AssertionError, match="rows keep other latents"):
        assert_agree(sae, lambda _: (z_ns.roll(1, dims=1), sae.decode(sae.encode(x_nd))), x_nd)
