"""A decision tree of bounded depth that names an image's class from its codes.

scikit-learn's DecisionTreeClassifier (Gini, best splits) on z [n k], the codes of at most LATENTS
latents, those best on train rows, and at most ROWS rows, drawn where there are more. It is kept as
plain arrays: of m nodes a latent, a threshold, two children and a class. An image goes left where
z ≤ threshold; that comparison is scikit-learn's own, bit for bit. Without latents the tree is one
leaf, the most frequent class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

DEPTH = 10  # 1,024 leaves at most: no fewer could name the 1,000 classes of ImageNet
LATENTS = 1000
ROWS = 100_000

_BLOCK = 2**22  # codes held dense at once while predicting


@dataclass(frozen=True, eq=False)
class Tree:
    """m nodes, the root first. A leaf is a node whose latent is −1, and it is its own children."""

    latent_m: Tensor  # int64, in the numbering of the dictionary
    threshold_m: Tensor  # float32
    left_m: Tensor  # int64
    right_m: Tensor
    class_m: Tensor  # int64, the most frequent class of the node's train rows
    depth: int

    def predict(self, offsets_b1: Tensor, indices_m: Tensor, values_m: Tensor) -> Tensor:
        """[b] int64, the classes of b images by their codes as compressed rows."""
        device = offsets_b1.device
        latent_m, threshold_m, left_m, right_m, class_m = (
            getattr(self, name).to(device) for name in _ARRAYS
        )
        used_k = latent_m[latent_m >= 0].unique()
        column_m = torch.searchsorted(used_k, latent_m)  # of a leaf 0, and never looked at
        size = max(1, _BLOCK // (len(used_k) + 1))
        found: list[Tensor] = []
        for start in range(0, len(offsets_b1) - 1, size):
            own_b1 = offsets_b1[start : start + size + 1]
            b = len(own_b1) - 1
            inside = slice(int(own_b1[0]), int(own_b1[-1]))
            z_bk = _dense(own_b1, indices_m[inside], values_m[inside], used_k)
            image_b, node_b = torch.arange(b, device=device), own_b1.new_zeros(b)
            for _ in range(self.depth):
                left_b = z_bk[image_b, column_m[node_b]] <= threshold_m[node_b]
                node_b = torch.where(left_b, left_m[node_b], right_m[node_b])
            found.append(class_m[node_b])
        return torch.cat(found) if found else class_m[:0]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that it is, to be stored."""
        own = {name: getattr(self, name).cpu().numpy() for name in _ARRAYS}
        return {**own, "depth": np.array(self.depth)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Tree:
        own = {name: torch.from_numpy(np.array(arrays[name])) for name in _ARRAYS}
        return cls(**own, depth=int(arrays["depth"]))


_ARRAYS = tuple(field.name for field in fields(Tree) if field.name != "depth")


def fit_tree(
    offsets_n1: Tensor,
    indices_m: Tensor,
    values_m: Tensor,
    d: int,
    y_n: Tensor,
    n_classes: int,
    latents_k: Tensor,
    *,
    seed: int,
) -> Tree:
    """Fit a tree on codes as compressed rows. latents_k: the best first.

    seed: which rows are drawn where there are too many, and scikit-learn's random_state (splits
    that are as good as each other).
    """
    from scipy.sparse import csr_matrix
    from sklearn.tree import DecisionTreeClassifier

    y = y_n.cpu().numpy()
    latents = np.sort(latents_k.cpu().numpy()[:LATENTS])
    if not len(latents):
        most = int(np.bincount(y, minlength=n_classes).argmax())
        return _leaf(most)
    arrays = [part.cpu().numpy() for part in (values_m.float(), indices_m, offsets_n1)]
    codes = csr_matrix((arrays[0], arrays[1], arrays[2]), shape=(len(y), d))
    if len(y) > ROWS:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(y))[:ROWS])
        codes, y = codes[chosen], y[chosen]
    model = DecisionTreeClassifier(max_depth=DEPTH, random_state=seed)
    with warnings.catch_warnings():  # labels are classes, however few images there are of each
        warnings.filterwarnings("ignore", message="The number of unique classes")
        model.fit(codes[:, latents].tocsc(), y)
    grown = model.tree_
    leaf = grown.children_left < 0
    own = np.arange(grown.node_count)
    nodes = {
        "latent_m": np.where(leaf, -1, latents[np.maximum(grown.feature, 0)]),
        "threshold_m": _rounded_down(grown.threshold),
        "left_m": np.where(leaf, own, grown.children_left),
        "right_m": np.where(leaf, own, grown.children_right),
        "class_m": model.classes_[grown.value[:, 0, :].argmax(axis=1)],
    }
    types = {name: np.float32 if name == "threshold_m" else np.int64 for name in nodes}
    tensors = {name: torch.from_numpy(nodes[name].astype(types[name])) for name in nodes}
    return Tree(**tensors, depth=int(grown.max_depth))


def _leaf(label: int) -> Tree:
    zero_m = torch.zeros(1, dtype=torch.int64)
    return Tree(zero_m - 1, torch.zeros(1), zero_m, zero_m, zero_m + label, 0)


def _rounded_down(threshold_m: np.ndarray) -> np.ndarray:
    """The greatest float32 not above each: of float32 codes just the same go left."""
    near_m = threshold_m.astype(np.float32)
    below_m = np.nextafter(near_m, np.float32(-np.inf))
    return np.where(near_m > threshold_m, below_m, near_m)


def _dense(offsets_b1: Tensor, indices_m: Tensor, values_m: Tensor, used_k: Tensor) -> Tensor:
    """[b k + 1] float32: the codes of some latents, sorted, and a column of zeros."""
    b, k = len(offsets_b1) - 1, len(used_k)
    z_bk = torch.zeros(b, k + 1, device=offsets_b1.device)
    if not k:
        return z_bk
    row_m = torch.arange(b, device=offsets_b1.device).repeat_interleave(
        offsets_b1.diff(), output_size=len(indices_m)
    )
    indices_m = indices_m.long()
    column_m = torch.searchsorted(used_k, indices_m).clamp_(max=k - 1)
    kept_m = used_k[column_m] == indices_m
    z_bk[row_m[kept_m], column_m[kept_m]] = values_m[kept_m].float()
    return z_bk
