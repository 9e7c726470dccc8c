"""Linear probes fitted on a GPU are those fitted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench.probe import DenseRows, Rows, fit_probe, solve
from saebench.probe.csr import CsrRows
from saebench.probe.mapped import MappedRows
from saebench.probe.mapped_csr import MappedCsrRows
from saebench.probe.ridge import fit_ridge
from saebench.probe.staging import staged
from saebench.tensors import memory_map, to_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N, D, CLASSES = 6000, 96, 9
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
Make = Callable[[torch.device], Rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    """The same rows in each form; of the mapped ones in a dozen pieces."""
    rng = np.random.default_rng(0)
    x_nd = (rng.normal(size=(N, D)) * np.geomspace(0.1, 3, D) + 5).astype(np.float32)
    z_nd = np.where(rng.random((N, D)) < 0.1, rng.exponential(size=(N, D)), 0).astype(np.float32)
    W_dc = rng.normal(size=(D, CLASSES))
    y_n = torch.from_numpy(
        ((x_nd - 5 + z_nd) @ W_dc / 10 + rng.gumbel(size=(N, CLASSES))).argmax(axis=1)
    )
    row_e, latent_e = z_nd.nonzero()
    offsets_n1 = np.searchsorted(row_e, np.arange(N + 1))
    codes = {"latent": latent_e.astype(np.int32), "value": z_nd[row_e, latent_e]}
    folder = tmp_path_factory.mktemp("rows")
    for name, arrays in {"x": {"x": x_nd}, "codes": codes}.items():
        (folder / name).write_bytes(to_bytes(arrays))
    return {
        "dense": lambda at: DenseRows.of(torch.from_numpy(x_nd).to(at), y_n.to(at)),
        "codes": lambda at: CsrRows.of(
            torch.from_numpy(offsets_n1).to(at),
            torch.from_numpy(latent_e).to(at),
            torch.from_numpy(codes["value"]).to(at),
            D,
            y_n.to(at),
        ),
        "mapped": lambda at: _mapped(folder / "x", y_n, at),
        "mapped codes": lambda at: _mapped_codes(folder / "codes", offsets_n1, y_n, at),
    }


def _mapped(path: Path, y_n: torch.Tensor, device: torch.device) -> MappedRows:
    return MappedRows.of([memory_map(path)["x"]], y_n, device=device, piece_bytes=500 * D * 4)


def _mapped_codes(
    path: Path, offsets_n1: np.ndarray, y_n: torch.Tensor, device: torch.device
) -> MappedCsrRows:
    found = memory_map(path)
    parts = [(found["latent"], found["value"])]
    return MappedCsrRows.of(offsets_n1, parts, D, y_n, device=device, piece_bytes=500 * D)


@pytest.mark.parametrize("form", ["dense", "codes", "mapped", "mapped codes"])
def test_blocks_are_those_of_the_cpu(made: dict[str, Make], form: str) -> None:
    """Every row in its place: two pieces are on their way while one is used."""
    W_dc = torch.randn(D, CLASSES, generator=torch.Generator().manual_seed(0))
    for keep_n in (torch.ones(N, dtype=torch.bool), torch.arange(N) % 5 != 4):
        found = []
        for device in (CPU, CUDA):
            rows = made[form](device).where(keep_n.to(device))
            assert rows.device.type == device.type
            times = [block.times(W_dc.to(device)).clone() for block in rows.blocks()]
            found.append(torch.cat(times).cpu())
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "codes", "mapped", "mapped codes"])
def test_fits_are_those_of_the_cpu(made: dict[str, Make], form: str) -> None:
    here = solve(made[form](CPU), CLASSES, 1e-3)
    there = solve(made[form](CUDA), CLASSES, 1e-3)
    assert there.converged
    assert there.W_dc.device.type == "cuda"
    assert there.loss == pytest.approx(here.loss, rel=1e-4)
    # Within its tolerance of the optimum, the weights of either are within √(2·1e-4·loss/λ).
    assert float((there.W_dc.cpu() - here.W_dc).norm()) < 2 * (2e-4 * here.loss / 1e-3) ** 0.5


@pytest.mark.parametrize("fit", [fit_probe, fit_ridge])
def test_a_path_is_that_of_the_cpu(made: dict[str, Make], fit: Callable[..., object]) -> None:
    held_n = torch.arange(N) % 5 == 4
    here = fit(made["dense"](CPU), held_n, CLASSES)
    there = fit(made["mapped"](CUDA), held_n.to(CUDA), CLASSES)
    assert there.penalty == here.penalty  # type: ignore[attr-defined]
    accuracy = here.accuracy_validation  # type: ignore[attr-defined]
    assert there.accuracy_validation == pytest.approx(accuracy, abs=0.01)  # type: ignore[attr-defined]


def test_the_same_twice(made: dict[str, Make]) -> None:
    """Deltas of the identity are exactly 0 only if a fit is the same each time."""
    for form in ("dense", "codes"):
        first, second = (solve(made[form](CUDA), CLASSES, 1e-3) for _ in range(2))
        assert torch.equal(first.W_dc, second.W_dc), form


def test_no_piece_is_written_while_it_is_read() -> None:
    """The GPU is kept busy with each, so that the next ones would overtake it."""
    busy = torch.randn(2048, 2048, device=CUDA)

    def fill(i: int, arrays: tuple[np.ndarray, ...]) -> tuple[int]:
        arrays[0][:] = i
        return (len(arrays[0]),)

    sums = []
    for (piece,) in staged(40, fill, [((1 << 20,), torch.float32)], CUDA):
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        sums.append(piece.double().mean() + 0 * busy[0, 0])
    assert torch.stack(sums).tolist() == list(range(40))
