"""Rows in files are fitted as rows in memory are, and never held whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import saebench.probe.mapped
import saebench.probe.rows
from saebench.probe import DenseRows, fit_probe, solve
from saebench.probe.mapped import MappedRows
from saebench.probe.parts import Parts
from saebench.probe.staging import staged
from saebench.tensors import memory_map, to_bytes

N, D, CLASSES = 3000, 24, 7
LENGTHS = (1, 700, 0, 1299, 1000)  # of the parts
PIECE = 300 * D * 4  # bytes of 300 rows, so that pieces reach over parts


@pytest.fixture(scope="module")
def x_nd() -> np.ndarray:
    """Anisotropic, with a common mean far from 0."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(N, D)) * np.geomspace(0.1, 3, D) + 30).astype(np.float32)


@pytest.fixture(scope="module")
def y_n(x_nd: np.ndarray) -> torch.Tensor:
    rng = np.random.default_rng(1)
    W_dc = rng.normal(size=(D, CLASSES))
    noisy_nc = (x_nd - 30) @ W_dc + rng.gumbel(size=(N, CLASSES))
    return torch.from_numpy(noisy_nc.argmax(axis=1))


@pytest.fixture
def parts(x_nd: np.ndarray, tmp_path: Path) -> list[np.ndarray]:
    """Maps of files that hold something else too, as tables of the store do."""
    return list(mapped(np.split(x_nd, np.cumsum(LENGTHS)[:-1]), tmp_path))


def mapped(arrays: Sequence[np.ndarray], folder: Path) -> Iterator[np.ndarray]:
    for i, array in enumerate(arrays):
        path = folder / f"{i}.safetensors"
        path.write_bytes(to_bytes({"id": np.arange(2 * i + 1), "x": array}))
        yield memory_map(path)["x"]


def some_rows() -> torch.Tensor:
    return torch.arange(N) % 5 == 4


def all_of(rows: DenseRows | MappedRows) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = [(block.x_md.clone(), block.y_m) for block in rows.blocks()]
    return torch.cat([x for x, _ in blocks]), torch.cat([y for _, y in blocks])


def test_mean_and_scale_are_those_of_numpy(
    parts: list[np.ndarray], x_nd: np.ndarray, y_n: torch.Tensor
) -> None:
    rows = MappedRows.of(parts, y_n, piece_bytes=PIECE)
    exact_nd = x_nd.astype(np.float64)
    assert (rows.n, rows.d) == (N, D)
    np.testing.assert_allclose(rows.mean_d, exact_nd.mean(axis=0), rtol=1e-12)
    spread = np.sqrt(np.square(exact_nd - exact_nd.mean(axis=0)).mean())
    assert rows.scale == pytest.approx(spread, rel=1e-12)


def test_mean_and_scale_far_from_zero(y_n: torch.Tensor) -> None:
    """A sum of squares without a shift would leave nothing of this spread."""
    x_nd = 1e4 + np.random.default_rng(2).normal(size=(N, D)) / 10
    rows = MappedRows.of([x_nd], y_n, dtype=torch.float64)
    assert rows.scale == pytest.approx(x_nd.std(axis=0, ddof=0).mean(), rel=1e-3)
    spread = np.sqrt(np.square(x_nd - x_nd.mean(axis=0)).mean())
    assert rows.scale == pytest.approx(spread, rel=1e-9)


def test_rows_that_are_all_alike_are_not_scaled(y_n: torch.Tensor) -> None:
    assert MappedRows.of([np.full((N, D), 0.1, np.float32)], y_n).scale == 1


@pytest.mark.parametrize("piece_bytes", [PIECE // 9, PIECE, 2**25])
def test_blocks_are_those_of_rows_in_memory(
    parts: list[np.ndarray], x_nd: np.ndarray, y_n: torch.Tensor, piece_bytes: int
) -> None:
    rows = MappedRows.of(parts, y_n, piece_bytes=piece_bytes)
    mean_d = rows.mean_d.float()
    scaled_nd = (torch.from_numpy(x_nd) - mean_d) * (1 / rows.scale)
    dense = DenseRows(scaled_nd, y_n, rows.mean_d, rows.scale)
    keep_n = some_rows()
    again_m = torch.arange(N - int(keep_n.sum())) % 3 != 1
    few_n = torch.isin(torch.arange(N), torch.tensor([0, 1, 700, 2998]))
    none_n = torch.zeros(N, dtype=torch.bool)
    for ours, theirs in (
        (rows, dense),
        (rows.where(keep_n), dense.where(keep_n)),
        (rows.where(~keep_n).where(again_m), dense.where(~keep_n).where(again_m)),
        (rows.where(few_n), dense.where(few_n)),
    ):
        (x_md, y_m), (expected_md, expected_m) = all_of(ours), all_of(theirs)
        assert ours.n == theirs.n == len(x_md)
        assert torch.equal(x_md, expected_md)
        assert torch.equal(y_m, expected_m)
        assert torch.equal(ours.y_n, theirs.y_n)
    assert list(rows.where(none_n).blocks()) == []


def test_products_and_covariance(
    parts: list[np.ndarray], x_nd: np.ndarray, y_n: torch.Tensor
) -> None:
    rows = MappedRows.of(parts, y_n, dtype=torch.float64, piece_bytes=PIECE)
    scaled_nd = (x_nd - x_nd.mean(axis=0, dtype=np.float64)) / rows.scale
    W_dc = torch.randn(D, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen, gram_dc = 0, torch.zeros(D, 3, dtype=torch.float64)
    for block in rows.blocks():
        product_mc = block.times(W_dc)
        expected_mc = scaled_nd[seen : seen + len(product_mc)] @ W_dc.numpy()
        np.testing.assert_allclose(product_mc, expected_mc, atol=1e-10)
        gram_dc += block.transposed_times(product_mc)
        seen += len(product_mc)
    assert seen == N
    np.testing.assert_allclose(gram_dc, scaled_nd.T @ scaled_nd @ W_dc.numpy(), rtol=1e-10)
    covariance_dd = rows.covariance(N)
    assert covariance_dd is not None
    np.testing.assert_allclose(covariance_dd, scaled_nd.T @ scaled_nd / N, atol=1e-10)
    tenth_dd = rows.covariance(N // 10)
    assert tenth_dd is not None
    every_md = scaled_nd[::10]
    np.testing.assert_allclose(tenth_dd, every_md.T @ every_md / len(every_md), atol=1e-10)


def test_a_fit_is_that_of_rows_in_memory(
    parts: list[np.ndarray], x_nd: np.ndarray, y_n: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks of the same rows, so that sums are rounded alike."""
    for module in (saebench.probe.rows, saebench.probe.mapped):
        monkeypatch.setattr(module, "BLOCK", 200 * D)
    held_n = some_rows()
    in_memory = fit_probe(DenseRows.of(torch.from_numpy(x_nd), y_n), held_n, CLASSES)
    rows = MappedRows.of(parts, y_n, piece_bytes=2 * 200 * D * 4)
    assert len(list(rows.blocks())) == N / 200
    in_files = fit_probe(rows, held_n, CLASSES)
    assert in_files.converged
    assert in_files.penalty == in_memory.penalty
    assert in_files.loss_train == pytest.approx(in_memory.loss_train, rel=1e-6)
    assert in_files.loss_validation == pytest.approx(in_memory.loss_validation, rel=1e-6)
    torch.testing.assert_close(in_files.W_dc, in_memory.W_dc, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(in_files.b_c, in_memory.b_c, rtol=1e-4, atol=1e-5)


def test_a_fit_in_other_blocks_is_within_the_tolerance(
    parts: list[np.ndarray], x_nd: np.ndarray, y_n: torch.Tensor
) -> None:
    in_memory = solve(DenseRows.of(torch.from_numpy(x_nd), y_n), CLASSES, 1e-3)
    in_files = solve(MappedRows.of(parts, y_n, piece_bytes=PIECE), CLASSES, 1e-3)
    assert in_files.converged
    assert in_files.loss == pytest.approx(in_memory.loss, rel=1e-4)


@pytest.mark.parametrize("make", [np.float16, np.float64, "strided", "in memory"])
def test_parts_of_other_forms(x_nd: np.ndarray, y_n: torch.Tensor, make: object) -> None:
    """A column of a wider table, another float dtype, and what is no map at all."""
    wide_nd = np.repeat(x_nd, 2, axis=1)[:, ::2] if make == "strided" else x_nd.copy()
    part_nd = wide_nd if isinstance(make, str) else wide_nd.astype(make)  # type: ignore[call-overload]
    before_nd = part_nd.copy()
    x_md, _ = all_of(MappedRows.of([part_nd[:100], part_nd[100:]], y_n, piece_bytes=PIECE))
    expected_md, _ = all_of(DenseRows.of(torch.from_numpy(part_nd), y_n))
    torch.testing.assert_close(x_md, expected_md, rtol=1e-5, atol=1e-6)
    assert np.array_equal(part_nd, before_nd)


def test_what_is_written_to_a_map_is_not_dropped(x_nd: np.ndarray, tmp_path: Path) -> None:
    """A map that copies on write loses what was written if the system is told to drop it."""
    path = tmp_path / "x.bin"
    x_nd.tofile(path)
    changed_nd = np.memmap(path, np.float32, "c", shape=x_nd.shape)
    changed_nd[:] = 1
    out_nd = np.empty_like(x_nd)
    for _ in range(2):
        Parts.of([changed_nd]).read(0, N, out_nd)
        assert (out_nd == 1).all()


def test_a_filter_copies_no_rows(y_n: torch.Tensor) -> None:
    x_nd = np.zeros((N, 2000), np.float32)
    rows = MappedRows.of([x_nd], y_n)
    tracemalloc.start()
    rows.where(some_rows()).where(torch.ones(N // 5, dtype=torch.bool))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6  # the rows are 24e6 bytes


def test_pieces_come_in_order_and_an_error_in_its_turn() -> None:
    def fill(i: int, arrays: tuple[np.ndarray, ...]) -> tuple[int, int]:
        if i == 3:
            raise OSError("the disk is gone")
        arrays[0][:], arrays[1][: i + 1] = i, -i
        return 4, i + 1

    seen = []

    def look() -> None:
        forms = [((4,), torch.int64), ((5,), torch.float32)]
        for one, other in staged(6, fill, forms, torch.device("cpu")):
            assert (len(one), len(other)) == (4, len(seen) + 1)
            assert (one == len(seen)).all()
            assert (other == -len(seen)).all()
            seen.append(one)

    with pytest.raises(OSError, match="the disk is gone"):
        look()
    assert len(seen) == 3


# In a process of its own, whose peak is not that of other tests.
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, torch
from saebench.probe import solve
from saebench.probe.mapped import MappedRows
from saebench.tensors import memory_map, to_bytes

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
rng, d, c, peaks = np.random.default_rng(0), 768, 20, []
parts = []
for n_parts in (1, 1, 8):  # the first is for what the libraries take once
    while len(parts) < n_parts:
        path = Path(sys.argv[1], f"{len(parts)}.safetensors")
        path.write_bytes(to_bytes({"x": rng.normal(size=(4096, d)).astype(np.float32)}))
        parts.append(memory_map(path)["x"])
    n = 4096 * n_parts
    y_n = torch.arange(n) % c
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kib("VmRSS")
    rows = MappedRows.of(parts, y_n, piece_bytes=2**22)
    assert rows.where(y_n < c - 1).n < n
    solve(rows, c, 10.0)
    peaks.append((kib("VmHWM") - before) * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """12 MiB of rows, and 96 MiB: two pieces of 4 MiB, and a block of 4 MiB in float64.

    Of more rows than a sample has (12 MiB), there is a second one beside it.
    """
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},  # what is freed goes back at once
    )
    _, few, many = json.loads(run.stdout)
    print(f"{few / 2**20:.1f} MiB, {many / 2**20:.1f} MiB")
    assert many < few + 14 * 2**20
    assert many < 44 * 2**20
