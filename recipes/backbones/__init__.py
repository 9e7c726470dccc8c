"""The recipes of the embedded backbones.

    python -m recipes.backbones tiny-vit --out DIR

trains the model that `registry/backbones/tiny-vit.toml` describes on the train splits of `digits`
and `shapes`, stores it in float16, measures what was stored on the test splits, and prints the
SHA-256 for the entry. One file per objective (`supervised`, `distilled`, `contrastive`); what they
share is `images` (pixels and augmentation), `optimise` (the loop) and `measure` (probes).
"""
