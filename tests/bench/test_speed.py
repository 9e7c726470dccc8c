"""How much slower than its bare encoder product is the evaluation of an SAE?

    pytest tests/bench -m bench -n 0 --benchmark-enable -s

Ratios are of medians over interleaved rounds in one process; docs/performance.md has results. CPU
time is printed beside the clock's, which other programs on the machine disturb.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from saebench.saes import Sae
from tests.bench.setting import (
    IMAGES,
    D,
    Interleaved,
    activations,
    best_product,
    evaluation,
    make_sae,
)

pytestmark = pytest.mark.bench


def report(benchmark: Any, text: str, rounds: Interleaved, count: int) -> None:
    """Run the rounds and print every function's time as a multiple of the first one's."""
    with torch.inference_mode():
        benchmark.pedantic(rounds.round, rounds=count, iterations=1, warmup_rounds=1)
    for clock, name in enumerate(("clock", "CPU time")):
        medians = rounds.medians(clock)
        base = next(iter(medians.values()))
        ratios = {key: seconds / base for key, seconds in medians.items()}
        benchmark.extra_info[name] = {"ratios": ratios, "seconds": medians}
        shown = ", ".join(f"{key} {ratios[key]:.2f} ({medians[key]:.2f} s)" for key in medians)
        print(f"\n{text}, {torch.get_num_threads()} threads, {name}: {shown}")


def naive(x_btd: Tensor, sae: Sae) -> dict[str, float]:
    """Dense codes, dense decoding, two metrics: how it is usually written."""
    x_nd = x_btd.flatten(0, 1)
    pre_ns = (x_nd - sae.b_dec_d) @ sae.W_enc_ds + sae.b_enc_s
    assert sae.k is not None
    kept = torch.topk(pre_ns, sae.k, dim=-1)
    z_ns = torch.zeros_like(pre_ns).scatter_(-1, kept.indices, kept.values.relu())
    xhat_nd = z_ns @ sae.W_dec_sd + sae.b_dec_d
    return {
        "mse": float(mse_loss(xhat_nd, x_nd)),
        "l0": float((z_ns != 0).float().sum(dim=-1).mean()),
    }


def test_one_sae(benchmark: Any) -> None:
    """At most 1.35 times the product: all metrics, intervals and latents of 768 -> 16,384, k 32."""
    x_btd, sae = activations(), make_sae()
    with torch.inference_mode():
        best, product = best_product(x_btd, sae)
    rounds = Interleaved(
        product=product,
        evaluation=evaluation(x_btd, [sae]),
        naive=lambda: naive(x_btd, sae),
    )
    report(benchmark, f"one SAE over {x_btd.shape[:2].numel():,} rows ({best})", rounds, 5)


def test_eight_saes(benchmark: Any) -> None:
    """At most 1.35 times the sum of their products, and 1.1 times one pass of the backbone."""
    saes = [make_sae(seed) for seed in range(8)]
    backbone = timm.create_model("vit_base_patch16_224", pretrained=False).eval()
    images_b3hw = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    captured: list[Tensor] = []
    backbone.blocks[10].register_forward_hook(lambda module, args, out: captured.append(out))

    def capture() -> Tensor:
        captured.clear()
        backbone.forward_features(images_b3hw)
        return captured[0]

    with torch.inference_mode():
        x_btd = capture().clone()
        assert x_btd.shape[2] == D
        _, product = best_product(x_btd, saes[0])
    rounds = Interleaved(
        product=product,
        backbone=capture,
        run=lambda: evaluation(capture(), saes)(),
    )
    report(benchmark, "eight SAEs and ViT-B/16", rounds, 3)
    for clock, name in enumerate(("clock", "CPU time")):
        seconds = rounds.medians(clock)
        allowed = 1.35 * 8 * seconds["product"] + 1.1 * seconds["backbone"]
        print(f"\neight SAEs and ViT-B/16, {name}: {seconds['run'] / allowed:.2f} of what may be")
