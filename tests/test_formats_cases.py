"""What holds for every format: each fabricated checkpoint is itself, exact, and by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import FORMATS, read_sae, write_sae
from saebench.formats.content import sniff
from saebench.saes import Sae
from saebench.specs import SaeSpec, WeightsSpec
from tests.checkpoints import Case, cases, inputs

CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def spec_of(case: Case, path: Path) -> SaeSpec:
    return SaeSpec(
        name=case.name,
        path=str(path.parent / "entry.toml"),
        backbone="b",
        site="s",
        weights=WeightsSpec(file=path.name),
        format=case.stated,
        semantics=case.semantics,
    )


def load(case: Case, folder: Path) -> Sae:
    path = case.write(folder)
    return read_sae(path, spec_of(case, path))


@every_case
def test_forward_is_that_of_the_facts(case: Case, tmp_path: Path) -> None:
    sae, x_nd = load(case, tmp_path), inputs(case.d)
    z_ns, xhat_nd = case.forward(x_nd.double().numpy())
    codes = sae.encode(x_nd)
    np.testing.assert_allclose(codes.dense(), z_ns, atol=case.atol * max(1, np.abs(z_ns).max()))
    # What is exactly zero in one is so in the other, but for values within rounding of zero.
    apart = (codes.dense().numpy() != 0) != (z_ns != 0)
    assert not (apart & (np.abs(z_ns) > 1e-5)).any()
    np.testing.assert_allclose(
        sae.decode(codes), xhat_nd, atol=case.atol * max(1, np.abs(xhat_nd).max())
    )
    assert sae.transcoder == case.transcoder


@every_case
def test_a_file_is_itself_and_nothing_else(case: Case, tmp_path: Path) -> None:
    content = sniff(case.write(tmp_path))
    found = [name for name, module in FORMATS.items() if module.recognise(content)]
    assert found == ([] if case.stated else [case.format])
    assert load(case, tmp_path).record.format == case.format


@every_case
def test_a_row_encodes_and_decodes_alike_alone_and_together(case: Case, tmp_path: Path) -> None:
    sae, x_nd = load(case, tmp_path), inputs(case.d)
    codes = sae.encode(x_nd)
    alone = [sae.encode(row_d[None]) for row_d in x_nd]
    torch.testing.assert_close(
        torch.cat([one.dense() for one in alone]), codes.dense(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        torch.cat([sae.decode(one) for one in alone]), sae.decode(codes), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "case", [one for one in CASES if one.semantics], ids=lambda case: case.name
)
def test_what_has_to_be_said_is_asked_for(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    with pytest.raises(SpecError, match="does not say"):
        read_sae(path, replace(spec_of(case, path), semantics={}))


@pytest.mark.parametrize("case", [one for one in CASES if one.stated], ids=lambda case: case.name)
def test_an_ambiguous_file_is_refused_with_the_formats_it_could_be(
    case: Case, tmp_path: Path
) -> None:
    path = case.write(tmp_path)
    with pytest.raises(WeightsError, match=f"could be of several formats.*{case.stated}"):
        read_sae(path, replace(spec_of(case, path), format=None))


@every_case
def test_a_fact_that_no_such_file_has_is_refused(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    strange = replace(spec_of(case, path), semantics={**case.semantics, "colour": "red"})
    with pytest.raises(SpecError, match="colour"):
        read_sae(path, strange)


@every_case
def test_whatever_is_read_can_be_kept_in_our_own_format(case: Case, tmp_path: Path) -> None:
    sae, x_nd = load(case, tmp_path), inputs(case.d)
    write_sae(sae, tmp_path / "own.safetensors")
    back = read_sae(tmp_path / "own.safetensors")
    codes = sae.encode(x_nd)
    again = back.encode(x_nd)
    assert torch.equal(again.dense(), codes.dense())
    assert torch.equal(back.decode(again), sae.decode(codes))
    kept = (back.architecture, back.prefixes, back.transcoder, back.k)
    assert kept == (sae.architecture, sae.prefixes, sae.transcoder, sae.k)
