"""What a backbone is worth: linear probes on frozen features, its own head, zero-shot classes.

The probe is scikit-learn's multinomial logistic regression (C = 1, L2) on standardised features of
the train split, scored on the test split. Features are what the model hands to a head: the final
CLS token (ViT), the pooled map (ResNet), the image embedding (CLIP). The pixel baseline is the same
probe on the 3,072 raw pixel values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from recipes.backbones.contrastive import tokenizer
from recipes.backbones.images import DATASETS, Split, dataset, split
from saebench.data.taxonomy import SPECIES
from saebench.specs import BackboneSpec

Encode = Callable[[torch.Tensor], torch.Tensor]


def encoder(model: nn.Module) -> Encode:
    """[b 3 h w] -> [b d], for a timm or an open_clip model."""
    if hasattr(model, "encode_image"):
        return lambda images: model.encode_image(images)  # type: ignore[operator]
    return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]


def pixels(images_b3hw: torch.Tensor) -> torch.Tensor:
    """The baseline's features."""
    return images_b3hw.flatten(1)


@torch.inference_mode()
def features(encode: Encode, part: Split) -> np.ndarray:
    """[n d] float32."""
    return torch.cat([encode(images) for images in part.images_n3hw.split(256)]).numpy()


def probe(encode: Encode, name: str) -> float:
    """Test accuracy of a linear probe on dataset `name`."""
    train, test = split(name, "train"), split(name, "test")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(features(encode, train), train.labels_n.numpy())
    return float(classifier.score(features(encode, test), test.labels_n.numpy()))


def head(model: nn.Module, classes: Mapping[str, tuple[int, int]], name: str) -> float:
    """Test accuracy of the model's own classifier among the classes of dataset `name`."""
    test, (first, count) = split(name, "test"), classes[name]
    logits = features(lambda images: model(images)[:, first : first + count], test)
    return float((logits.argmax(1) == test.labels_n.numpy()).mean())


@torch.inference_mode()
def zero_shot(model: Any, spec: BackboneSpec, name: str) -> np.ndarray:
    """[n] the class of dataset `name` whose text embedding is nearest to each test image's.

    A class embedding is the mean over the entry's templates of unit text embeddings, made unit
    again (Radford et al., 2021).
    """
    tokens = tokenizer(spec)
    rows = []
    for class_name in dataset(name).class_names:
        texts = [template.format(class_name) for template in spec.head.templates[name]]
        rows.append(model.encode_text(tokens(texts), normalize=True).mean(0))
    classes_cd = nn.functional.normalize(torch.stack(rows), dim=-1).numpy()
    return (features(encoder(model), split(name, "test")) @ classes_cd.T).argmax(1)


def everything(spec: BackboneSpec, model: nn.Module) -> dict[str, float]:
    """Test accuracies by name: the probes, and what the entry's own head reaches."""
    found = {f"probe {name}": probe(encoder(model), name) for name in DATASETS}
    for name in DATASETS:
        labels = split(name, "test").labels_n.numpy()
        if spec.head.kind == "classifier":
            found[f"head {name}"] = head(model, spec.head.classes, name)
        elif spec.head.kind == "zero_shot":
            chosen = zero_shot(model, spec, name)
            found[f"zero-shot {name}"] = float((chosen == labels).mean())
            if name == "shapes":
                family = np.array([species.family for species in SPECIES])
                found["zero-shot families"] = float((family[chosen] == family[labels]).mean())
    return found
