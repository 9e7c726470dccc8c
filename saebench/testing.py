"""Conformance: what a new SAE, backbone or task must do before its numbers can be trusted.

`saebench check sae|backbone|task NAME` prints the report; in Python, `check_sae(registry, name)`
and its siblings return a list of `Check`. Nothing is measured for a leaderboard here: the
activations are those of a few real images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saebench.backbones import Backbone, load_backbone
from saebench.batch import Images, SaeBatch, rebased
from saebench.coders import chain_of, check_fit, token_kinds
from saebench.controls import Identity
from saebench.data import open_dataset
from saebench.data.loader import batches
from saebench.errors import SaebenchError
from saebench.formats import read_entry
from saebench.loading import check_widths
from saebench.registry import Registry
from saebench.rows import check_value, interval
from saebench.saes import Sae
from saebench.specs import BackboneSpec
from saebench.task import REPLICATES, Context, Measurement, Task, variant_string
from saebench.taskfiles import load_task

if TYPE_CHECKING:
    from rich.console import Console

N_IMAGES = 32  # real images that a check looks at


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was seen."""

    name: str
    passed: bool
    detail: str


def print_check(registry: Registry, kind: str, name: str, console: Console) -> int:
    """Print a report and return the exit status: 0 only when everything passed."""
    checks = {"sae": check_sae, "backbone": check_backbone, "task": check_task}[kind]
    n_failed = 0
    for check in checks(registry, name):
        console.print("[green]ok  [/] " if check.passed else "[red]FAIL[/] ", end="")
        console.print(f"{check.name}: {check.detail}", markup=False)
        n_failed += not check.passed
    if n_failed:
        console.print(f"{n_failed} checks of {name} failed", style="red")
    return 1 if n_failed else 0


def attempt(name: str, look: Callable[[], str]) -> Check:
    """A check that passes when `look` returns what it saw, and fails with what it raised."""
    try:
        return Check(name, True, look())
    except AssertionError as error:
        return Check(name, False, str(error))
    except Exception as error:
        said = (
            str(error) if isinstance(error, SaebenchError) else f"{type(error).__name__}: {error}"
        )
        return Check(name, False, said)


def real_images(backbone: Backbone, registry: Registry, n: int = N_IMAGES) -> tuple[Any, ...]:
    """(dataset, evaluation positions, images_b3hw) of the first n images of its own dataset."""
    spec = registry.dataset(backbone.spec.dataset or "shapes")
    dataset = open_dataset(spec)
    order = dataset.manifest(spec.test).order(n)
    stream = batches(dataset, spec.test, order, backbone.transform, n)
    _, images_b3hw = next(iter(stream))
    return dataset, order, images_b3hw


# --- backbones ---------------------------------------------------------------------------------


def check_backbone(registry: Registry, name: str) -> Iterator[Check]:
    """Builds; its sites give the declared layout; resume equals the full forward at each."""
    spec = registry.backbone(name)
    held: dict[str, Any] = {}

    def build() -> str:
        held["backbone"] = load_backbone(spec)
        parameters = sum(p.numel() for p in held["backbone"].model.module.parameters())
        said = f"{parameters:,} parameters"
        return (
            said if spec.weights.file or spec.weights.hub else f"{said}, RANDOM: no weights named"
        )

    yield (built := attempt("builds, with its weights", build))
    if not built.passed:
        return
    backbone: Backbone = held["backbone"]

    def pixels() -> str:
        dataset, _, images_b3hw = real_images(backbone, registry, 8)
        held["images"] = images_b3hw
        shape = tuple(images_b3hw.shape[1:])
        assert shape == (3, spec.input.size, spec.input.size), f"its transform gives {shape}"
        return f"{shape} from {dataset.spec.name}"

    yield (looked := attempt("transforms real images", pixels))
    if not looked.passed:
        return
    images_b3hw = held["images"]
    assert isinstance(images_b3hw, torch.Tensor)
    clean = backbone.forward(images_b3hw)
    yield attempt("is deterministic", lambda: _same_output(clean, backbone.forward(images_b3hw)))
    if not spec.sites:
        yield Check("declares sites", False, f"{spec.path}: there is no [sites] table")
    for site, site_spec in spec.sites.items():

        def layout(site: str = site, site_spec: Any = site_spec) -> str:
            acts_btd = backbone.acts(images_b3hw, [site])[site].acts_btd
            expected = (len(images_b3hw), site_spec.tokens, site_spec.width)
            assert tuple(acts_btd.shape) == expected, f"{tuple(acts_btd.shape)}, not {expected}"
            assert torch.isfinite(acts_btd).all(), "NaN or infinite activations"
            kinds = {kind: part.stop - part.start for kind, part in site_spec.kinds.items()}
            return f"{expected[1]} tokens of width {expected[2]}: {kinds}"

        def resumed(site: str = site) -> str:
            capture = backbone.acts(images_b3hw, [site])[site]
            return _same_output(clean, backbone.resume(site, capture.acts_btd, capture.state))

        yield attempt(f"site {site}: layout", layout)
        yield attempt(f"site {site}: resume gives the full forward's output", resumed)
    if spec.base:
        yield attempt("its base is in the registry", lambda: registry.backbone(str(spec.base)).name)


def _same_output(a: Any, b: Any) -> str:
    gap = (a.embedding_bd - b.embedding_bd).abs().max().item()
    scale = a.embedding_bd.abs().max().item()
    assert gap <= 1e-5 * max(scale, 1e-12), f"differs by {gap:.3g} at a scale of {scale:.3g}"
    return "bit for bit" if gap == 0 else f"to {gap / scale:.1e} relative"


# --- SAEs --------------------------------------------------------------------------------------


def check_sae(registry: Registry, name: str) -> Iterator[Check]:
    """Fits its backbone, is finite, and reconstructs real activations better than their mean."""
    spec = registry.sae(name)
    chain = chain_of(registry, spec)
    held: dict[str, Any] = {}

    def declared() -> str:
        held["spec"] = backbone_spec = registry.backbone(spec.backbone)
        site = check_fit(backbone_spec, chain[-1])
        return f"{spec.site} ({spec.tokens}) of {backbone_spec.name}, width {site.width}"

    def reads() -> str:
        held["saes"] = {link.name: read_entry(link) for link in chain}
        sae: Sae = held["saes"][name]
        digest = "as declared" if spec.weights.sha256 else "NOT DECLARED: write it in the entry"
        return f"{sae.architecture}, {sae.d_model} → {sae.d_sae}, finite; sha256 {digest}"

    yield (fits := attempt("its site and tokens are the backbone's", declared))
    yield (read := attempt("its file is read", reads))
    if not (fits.passed and read.passed):
        return
    backbone_spec: BackboneSpec = held["spec"]
    saes: Mapping[str, Sae] = held["saes"]
    site = backbone_spec.sites[chain[-1].site]

    def widths() -> str:
        check_widths(chain, saes, site.width, chain[-1].site)
        return "every width is that of what it reads"

    yield (wide := attempt("its width is the site's", widths))
    if not wide.passed:
        return

    def activations() -> str:
        backbone = load_backbone(backbone_spec)
        _, _, images_b3hw = real_images(backbone, registry)
        acts_btd = backbone.acts(images_b3hw, [chain[-1].site])[chain[-1].site].acts_btd.float()
        kinds = token_kinds(site, chain[-1].tokens, who=name)
        x_btd = torch.cat([acts_btd[:, site.kinds[kind]] for kind in kinds], dim=1)  # type: ignore[index]
        x_nd = x_btd.reshape(-1, x_btd.shape[-1])
        for link in reversed(chain[1:]):
            x_nd = saes[link.name].encode(x_nd).dense()
        held["x"] = x_nd
        return f"{len(images_b3hw)} images, {x_nd.shape[0]:,} tokens"

    yield (given := attempt("real activations reach it", activations))
    if not given.passed:
        return
    x_nd, sae = held["x"], saes[name]
    yield from _on_activations(sae, x_nd, spec.l0)


def _on_activations(sae: Sae, x_nd: torch.Tensor, stated_l0: float | None) -> Iterator[Check]:
    codes = sae.encode(x_nd)
    l0 = float(codes.l0_n().double().mean())
    recon_nd = sae.decode(codes)
    centred = (x_nd - x_nd.mean(dim=0)).double().square().sum()
    fvu = float((x_nd - recon_nd).double().square().sum() / centred)

    def sparse() -> str:
        assert 0 < l0 < sae.d_sae, f"L0 {l0:.4g} of {sae.d_sae} latents"
        if sae.k is not None and sae.architecture == "topk":
            assert int(codes.l0_n().max()) <= sae.k, f"a row has more than k = {sae.k} latents"
        if stated_l0:
            assert 0.5 < l0 / stated_l0 < 2, f"L0 {l0:.4g}, and its entry states {stated_l0:.4g}"
        return f"L0 {l0:.4g} of {sae.d_sae} latents"

    def better_than_mean() -> str:
        assert fvu < 1, (
            f"fvu {fvu:.3g}: worse than the mean. The usual causes: wrong site, wrong tokens, "
            "input scaling that the file does not hold, before against after a LayerNorm"
        )
        return f"fvu {fvu:.4f}, explained variance {1 - fvu:.4f}"

    def alone_or_together() -> str:
        rows = torch.linspace(0, len(x_nd) - 1, 8).long()
        together = sae.encode(x_nd[rows]).dense()
        alone = torch.cat([sae.encode(x_nd[row][None]).dense() for row in rows])
        gap = float((together - alone).abs().max())
        scale = float(together.abs().max())
        assert gap <= 1e-4 * scale, f"a row's codes differ by {gap:.3g} with the rows beside it"
        return f"eight rows encode alike alone and together (to {gap / max(scale, 1e-30):.0e})"

    def oriented() -> str:
        # An encoder that reads what its decoder writes points the same way; a transposed or
        # permuted matrix of the right shape does not.
        cosine_s = torch.nn.functional.cosine_similarity(sae.W_enc_ds.T, sae.W_dec_sd, dim=1)
        mean = float(cosine_s.mean())
        assert mean > 0, f"mean cosine of encoder and decoder {mean:.3f}: is a matrix transposed?"
        return f"mean cosine of encoder and decoder {mean:.3f}"

    yield attempt("its codes are sparse", sparse)
    yield attempt("it reconstructs better than the mean", better_than_mean)
    yield attempt("a row encodes alike in any company", alone_or_together)
    yield attempt("encoder and decoder point the same way", oriented)


# --- tasks -------------------------------------------------------------------------------------


def check_task(registry: Registry, name: str, backbone: str = "tiny-vit") -> Iterator[Check]:
    """Declares what it reports, and its state merges: two halves folded equal the whole."""
    held: dict[str, Any] = {}

    def loads() -> str:
        held["task"] = task = load_task(registry, name)
        names = [metric.name for metric in task.metrics]
        assert names, "it declares no metric"
        assert len(set(names)) == len(names), "a metric is declared twice"
        assert isinstance(task.version, int), "its version has to be a whole number"
        return f"version {task.version}, {len(names)} metrics"

    yield (loaded := attempt("loads, and declares its metrics", loads))
    if not loaded.passed:
        return
    task: type[Task] = held["task"]
    batch_of, ctx = _identity_batches(registry, backbone)

    def measure(cuts: list[tuple[int, int]], fold: bool) -> list[Measurement]:
        parts = []
        for first, stop in cuts:
            part = task()
            part.start(ctx)
            part.update(batch_of(first, stop))
            parts.append(part)
        if not fold:
            return list(parts[0].results())
        whole = task()
        whole.start(ctx)
        for part in parts:
            whole.merge(part.state())
        return list(whole.results())

    def reports() -> str:
        found = measure([(0, N_IMAGES)], fold=False)
        held["found"] = found
        declared = {metric.name: metric for metric in task.metrics}
        keys = set()
        for item in found:
            assert item.metric in declared, f"reports '{item.metric}', which it does not declare"
            check_value(task(), declared[item.metric], item)
            key = (item.group, item.metric, variant_string(item.variant))
            assert key not in keys, f"reports {key} twice"
            keys.add(key)
            if declared[item.metric].interval == "bootstrap" and item.value is not None:
                assert item.replicates is not None, f"'{item.metric}' has no replicates"
                shape = item.replicates.shape
                assert shape == (REPLICATES,), f"'{item.metric}' has replicates of shape {shape}"
        assert found, "it reports nothing"
        return f"{len(found)} rows on the identity control"

    def folds() -> str:
        half = N_IMAGES // 2
        folded = measure([(0, half), (half, N_IMAGES)], fold=True)
        for one, two in zip(held["found"], folded, strict=True):
            assert _alike(one, two), (
                f"'{one.metric}' [{one.group}]: {one.value} whole, {two.value} folded"
            )
        return "two halves folded equal the whole"

    yield (reported := attempt("reports what it declares", reports))
    if reported.passed:
        yield attempt("its state can be saved and merged", folds)


def _alike(a: Measurement, b: Measurement) -> bool:
    if a.value is None or b.value is None:
        return a.value is b.value
    if (interval(a)[0] is None) != (interval(b)[0] is None):
        return False
    return bool(np.isclose(a.value, b.value, rtol=1e-9, atol=1e-12))


def _identity_batches(
    registry: Registry, name: str
) -> tuple[Callable[[int, int], SaeBatch], Context]:
    """Real activations of an embedded backbone behind the identity control."""
    spec = registry.backbone(name)
    backbone = load_backbone(spec)
    dataset, order, images_b3hw = real_images(backbone, registry)
    manifest = dataset.manifest(dataset.spec.test)
    site = spec.sites[spec.site]
    kinds = tuple(site.kinds)
    coder = Identity(site.width)
    ctx = Context(
        backbone=name,
        sae="identity",
        dataset=dataset.spec.name,
        site=spec.site,
        tokens="all",
        d_model=site.width,
        d_sae=coder.d_sae,
        kinds=rebased(site.kinds, kinds),
        n_images=len(order),
        class_names=dataset.class_names,
        labels=dataset.label_names,
        shift_d=np.zeros(site.width),
    )

    def batch_of(first: int, stop: int) -> SaeBatch:
        index = order[first:stop]
        images = Images(
            backbone,
            dataset.spec.name,
            [manifest.ids[i] for i in index],
            manifest.labels[index],
            {level: values[index] for level, values in manifest.levels.items()},
            first,
            backbone.acts(images_b3hw[first:stop], [spec.site]),
        )
        return SaeBatch(images.view(spec.site, kinds), coder, tile_bytes=2**26)

    return batch_of, ctx
