"""ViT-Prisma: every layer of CLIP ViT-B/32 (DataComp) and of DINO ViT-B/16.

Numbers are those of the project's docs/sae_table.md, which leaves one out: of the patches at layer
10, they are those of the repository's name. Files are called `weights.pt` in some
repositories and `n_images_2600058.pt` in others, so only those that were looked up are named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from recipes.public_saes.entry import Entry

_CLIP, _DINO = "clip-vit-b32-datacomp", "dino-vitb16"
_HUB = "Prisma-Multimodal"
_FILE = {"filename": "n_images_2600058.pt or weights.pt in the repositories that were looked up"}
_LICENCE = {"licence": "its repository was not looked up"}

# layer: explained variance %, L0 without CLS, L0 of CLS, CE recovered %; all tokens, l1 1e-5 but *
_MLP = """
 0  98.7   604.44    36.92   99.51
 1  98.4  1476.8     97.82   99.40
 2  98.0  1799.7    376.0    99.44
 3  98.1  1893.4    648.2    99.54
 4  98.1  1901.2   1115.0    99.55
 5  98.2  1761.5   1259.0    99.76
 6  98.3  1598.0   1337.0    99.83
 7  98.2  1535.3   1300.0   100.17
 8  97.8  1074.5   1167.0   100.57
 9  97.6   856.68  1076.0   100.28
10  98.1   788.49   965.5   101.50
11  89.7   748.14   745.5   135.77 5e-05
"""
_RESID = """
 0  98.6  1110.9     40.46   99.23
 1  98.3  1508.4     27.39   99.02
 2  90.6   717.84    10.11   96.34 5e-05
 3  98.1  2053.9     77.90   99.79
 4  98.0  2068.3    156.7    99.74
 5  98.1  1953.8    228.5    99.80
 6  98.2  1717.5    321.3    99.93
 7  98.2  1688.4    494.3   100.24
 8  98.2  1570.8    791.3   100.41
 9  98.2  1533.5   1053.0   100.32
10  98.4  1292.6   1010.0   100.83
11  98.4  1405.0   1189.0    98.03
"""
# layer: explained variance %, CE recovered %
_TOPK = """
 0  90   99.995
 1  96  100.00
 2  96  100.00
 3  95  100.00
 4  94   99.998
 5  93   99.997
 6  92  100.00
 7  90  100.03
 8  87  100.11
 9  85  100.43
10  86  101.19
11  84  102.97
"""
# layer: L0, how the repository's name ends: an L0 of its own, and the explained variance in %
_CLS = """
 0  934.83  936.799987792969-82
 1  314.13  314.175018310547-85
 2  711.84  711.121887207031-96
 3  687.41  686.334411621094-95
 4  681.08  682.543762207031-95
 5  506.77  510.356262207031-94
 6  423.70  430.556243896484-92
 7  492.68  492.959381103516-88
 8  623.01  635.018737792969-76
 9  521.90  518.621887207031-74
10  533.94  552.512512207031-74
11  386.09  383.75-65
"""
_SPATIAL = """
 0  989.19  989.203430175781-99
 1  757.83  757.82958984375-99
 2  1007.89 1007.89801025391-99
 3  935.06  935.601989746094-99
 4  965.15  965.410095214844-99
 5  966.38  964.674072265625-99
 6  1006.62 1006.57165527344-99
 7  984.19  984.1376953125-99
 8  965.12  965.125-99
 9  854.92  854.891540527344-99
11  829.09  829.0498046875-99
"""
_OF_DINO = """
 0   507   507-98
 1   549   549-95
 2   812   661-95
 3   989   989-95
 4   876   876-99
 5  1001  1001-98
 6   962   962-99
 7  1086  1086-98
 8   530   530-90
 9  1105  1105-99
10   835   835-99
11  1085  1085-99
"""

# Files whose names public code or pages have: (kind, layer) -> file.
_SEEN = {
    ("resid", 0): "n_images_2600058.pt",
    ("resid", 8): "n_images_2600058.pt",
    ("resid", 9): "n_images_2600058.pt",
    ("resid", 10): "n_images_2600058.pt",
    ("mlp", 10): "weights.pt",
    ("topk", 9): "weights.pt",
    ("topk", 11): "weights.pt",
}
_DEFAULT = (("resid", 10), ("mlp", 10), ("topk", 11))


def entries() -> Iterator[Entry]:
    for kind, table in (("resid", _RESID), ("mlp", _MLP)):
        yield from _all_tokens(kind, table)
    yield from _cls_topk()
    yield from _sweep("cls", "CLS", "CLS", _CLS)
    yield from _sweep("patches", "Spatial_max", "patches alone", _SPATIAL)
    yield from _of_dino()


_FAMILY = Entry(
    name="",
    series="",
    site="",
    tokens="all",
    architecture="relu",
    s=49152,
    recipe="prisma",
    trained_on="imagenet-1k/train",
    description="",
    paper="https://arxiv.org/abs/2504.19475",
    weights={},
    beside=("config.json",),
    unknown=_LICENCE | _FILE,
)


def _all_tokens(kind: str, table: str) -> Iterator[Entry]:
    hook = {"resid": "hook_resid_post", "mlp": "hook_mlp_out"}[kind]
    for layer, variance, l0, of_cls, recovered, *rest in _rows(table):
        l1 = rest[0] if rest else "1e-05"
        repository = f"sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-{layer}-{hook}-l1-{l1}"
        entry = replace(
            _FAMILY,
            name=f"{_CLIP}/prisma-{kind}-layer{layer}",
            series=f"{_CLIP}/prisma-{kind}-layer*",
            site=f"blocks.{layer}" + (".mlp" if kind == "mlp" else ""),
            l0=float(l0),
            l0_note="without CLS",
            description=f"ViT-Prisma: ReLU, 49,152 latents, l1 {l1}; by its makers explained "
            f"variance {variance} %, L0 of CLS {of_cls}, loss recovered {recovered} %",
            licence="Apache-2.0",
            weights={"hub": f"{_HUB}/{repository}"},
            unknown=_FILE,
        )
        yield _as_seen(entry, kind, int(layer))


def _cls_topk() -> Iterator[Entry]:
    for layer, variance, recovered in _rows(_TOPK):
        entry = replace(
            _FAMILY,
            name=f"{_CLIP}/prisma-topk64-cls-layer{layer}",
            series=f"{_CLIP}/prisma-topk64-cls-layer*",
            site=f"blocks.{layer}",
            tokens="cls",
            architecture="topk",
            recipe="prisma-topk",
            l0=64.0,
            description="ViT-Prisma: TopK at k = 64, 49,152 latents, on CLS; by its makers "
            f"explained variance {variance} %, loss recovered {recovered} %",
            weights={"hub": f"{_HUB}/sae-top_k-64-cls_only-layer_{layer}-hook_resid_post"},
        )
        yield _as_seen(entry, "topk", int(layer))


def _sweep(tokens: str, written: str, about: str, table: str) -> Iterator[Entry]:
    for layer, l0, ending in _rows(table):
        repository = f"imagenet-sweep-vanilla-x64-{written}_{layer}-hook_resid_post-{ending}"
        yield replace(
            _FAMILY,
            name=f"{_CLIP}/prisma-{tokens}-layer{layer}",
            series=f"{_CLIP}/prisma-{tokens}-layer*",
            site=f"blocks.{layer}",
            tokens=tokens,
            l0=float(l0),
            description=f"ViT-Prisma: ReLU, 49,152 latents, on {about}; by its makers explained "
            f"variance {ending.rpartition('-')[2]} %",
            weights={"hub": f"{_HUB}/{repository}"},
        )


def _of_dino() -> Iterator[Entry]:
    for layer, l0, ending in _rows(_OF_DINO):
        entry = replace(
            _FAMILY,
            name=f"{_DINO}/prisma-resid-layer{layer}",
            series=f"{_DINO}/prisma-resid-layer*",
            site=f"blocks.{layer}",
            l0=float(l0),
            description="ViT-Prisma: ReLU, 49,152 latents; by its makers explained variance "
            f"{ending.rpartition('-')[2]} %",
            weights={"hub": f"{_HUB}/DINO-vanilla-x64-all_patches_{layer}-resid_post-{ending}"},
            note="The title of its makers' table says B/32; they evaluate ViT-B/16.",
        )
        yield replace(entry, l0_note="the repository's name says 661") if layer == "2" else entry


def _as_seen(entry: Entry, kind: str, layer: int) -> Entry:
    if (kind, layer) not in _SEEN:
        return entry
    return replace(
        entry,
        suite="default" if (kind, layer) in _DEFAULT else "full",
        weights={**entry.weights, "filename": _SEEN[kind, layer]},
        unknown={key: why for key, why in entry.unknown.items() if key != "filename"},
    )


def _rows(table: str) -> Iterator[list[str]]:
    return (line.split() for line in table.strip().splitlines())
