"""What interop tests call a tie is one, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from saebench.activations import Absolute, Activation, Threshold, TopK
from saebench.saes import Sae
from tests.interop.common import assert_agree, random_rows, ties_n
from tests.small import random_sae

THEIRS = [3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("ours", "tie"),
    [
        ([3.0, 2.0, 0.0, 1.0], True),  # the least of both, in another place
        ([3.0, 2.0, 0.0, 1.000001], True),
        ([3.0, 2.0, 1.0, 0.0], False),  # the same
        ([3.0, 2.0, 0.0, 1.01], False),  # another value
        ([3.0, 2.0, 0.0, -1.0], False),  # another sign
        ([3.0, 2.0, 0.0, 0.0], False),  # one fewer: a threshold, not a tie
        ([0.0, 2.0, 1.0, 3.0], False),  # not the least
    ],
)
def test_ties(ours: list[float], tie: bool) -> None:
    assert ties_n(torch.tensor([ours]), torch.tensor([THEIRS])).tolist() == [tie]


def test_ties_of_magnitudes_and_of_what_is_below_zero() -> None:
    ours_ns, theirs_ns = torch.tensor([[-3.0, 0.0, 1.0]]), torch.tensor([[-3.0, -1.0, 0.0]])
    assert ties_n(ours_ns, theirs_ns, by_magnitude=True).all()
    assert not ties_n(ours_ns, theirs_ns).any()
    ours_ns, theirs_ns = torch.tensor([[3.0, 0.0, -1.0]]), torch.tensor([[3.0, -1.0, 0.0]])
    assert ties_n(ours_ns, theirs_ns).all()


X_ND = torch.tensor([[3.0, 1.0, 1.0, 0.0]])  # a tie for the second place, which goes to latent 1


def as_it_is(activation: Activation) -> Sae:
    """An SAE whose pre-activations, and what it makes of its codes, are the row itself."""
    I_ss, zeros_s = torch.eye(4), torch.zeros(4)
    return Sae(I_ss, zeros_s, I_ss, zeros_s, activation, "topk")


def agree(z_s: list[float], xhat_d: list[float], activation: Activation) -> None:
    sae = as_it_is(activation)
    assert sae.encode(X_ND).dense()[0, 2] == 0 or sae.k is None
    assert_agree(sae, lambda _: (torch.tensor([z_s]), torch.tensor([xhat_d])), X_ND)


@pytest.mark.parametrize("activation", [TopK(2), Absolute(TopK(2))])
def test_a_tie_that_went_the_other_way_agrees(activation: Activation) -> None:
    agree([3.0, 0.0, 1.0, 0.0], [3.0, 0.0, 1.0, 0.0], activation)


@pytest.mark.parametrize(
    ("z_s", "xhat_d"),
    [
        ([-3.0, 0.0, 1.0, 0.0], [3.0, 0.0, 1.0, 0.0]),  # the sign of a latent that both keep
        ([3.001, 0.0, 1.0, 0.0], [3.0, 0.0, 1.0, 0.0]),  # its value
        ([3.0, 0.0, 1.0, 0.0], [3.0, 1.0, 0.0, 0.0]),  # not of the codes
        ([3.0, 0.0, 1.0, 0.0], [3.001, 0.0, 1.0, 0.0]),
        ([3.0, 0.0, -1.0, 0.0], [3.0, 0.0, -1.0, 0.0]),
    ],
)
def test_all_else_of_a_row_with_a_tie_is_compared(z_s: list[float], xhat_d: list[float]) -> None:
    with pytest.raises(AssertionError, match="apart"):
        agree(z_s, xhat_d, TopK(2))


def test_only_a_top_k_has_ties() -> None:
    agree([3.0, 1.0, 1.0, 0.0], [3.0, 1.0, 1.0, 0.0], Threshold())
    with pytest.raises(AssertionError, match="apart"):
        agree([3.0, 0.0, 1.0, 1.0], [3.0, 0.0, 1.0, 1.0], Threshold())


def test_an_sae_whose_latents_are_permuted_does_not_agree() -> None:
    sae, x_nd = random_sae(k=1, d=64, s=96), random_rows()
    z_ns = sae.encode(x_nd).dense()
    with pytest.raises(AssertionError, match="rows keep other latents"):
        assert_agree(sae, lambda _: (z_ns.roll(1, dims=1), sae.decode(sae.encode(x_nd))), x_nd)
