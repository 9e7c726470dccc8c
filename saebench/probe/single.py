"""For every class the one latent that says most of it: a 1-D logistic regression of y = c on z_j.

    minimise over a, b:   mean over n of CE(σ(a z_j/s_j + b), y = c)  +  RIDGE/2 a²

s_j is the standard deviation of z_j. The ridge only keeps a finite where the class is separable.
Tried are the CANDIDATES latents of the greatest |point-biserial correlation| with the class; that
of the least CE on train rows, in nat, is kept. Beside it stands the CE of the prevalence p_c, the
share of train rows of the class: what a constant reaches.

A class that no latent tells of (none varies; it has no train rows, or all) has latent −1 and the
constant p_c, so that it gains nothing. p_c is kept 1/(2n) from 0 and 1, where its CE is finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, logsigmoid

from saebench.probe.one_latent import Fits
from saebench.probe.ranking import DIGITS, class_sums, moments

CANDIDATES = 32  # latents tried for a class
NAT = 9  # digits of a CE: of equals the lowest latent is kept
DENSE = 0.1  # share of pairs of a class and an image, from where on a dense product is faster

_BLOCK = 2**21  # codes fitted at once


@dataclass(frozen=True, eq=False)
class ClassSums:
    """Σ over images of the CE of c classes, in nat: by the single latents, and by the prevalence.

    [c], and [c R] by the weights of R replicates. All float64.
    """

    latent_c: Tensor
    prevalence_c: Tensor
    latent_cr: Tensor
    prevalence_cr: Tensor


@dataclass(frozen=True, eq=False)
class SingleLatents:
    """c classes: P(y = c) = σ(slope z_latent + bias), of codes as they are. float64."""

    latent_c: Tensor  # int64, −1 where the class has none
    slope_c: Tensor
    bias_c: Tensor
    prevalence_c: Tensor

    def sums(
        self,
        offsets_b1: Tensor,
        indices_m: Tensor,
        values_m: Tensor,
        y_b: Tensor,
        weights_br: Tensor,
    ) -> ClassSums:
        """Of b images by their codes as compressed rows; weights: how often a replicate has each.

        The cost is that of the codes of the latents in question, and of b + c for each replicate.
        """
        device = offsets_b1.device
        latent_c, slope_c, bias_c, prevalence_c = (
            getattr(self, field.name).to(device) for field in fields(self)
        )
        y_b = y_b.to(device)
        ones_b1 = torch.ones(len(y_b), 1, dtype=torch.float64, device=device)
        w_br = torch.cat([ones_b1, weights_br.to(device).double()], dim=1)  # plain, then replicates
        c = len(latent_c)
        of_class_cr = _bagged(y_b, torch.arange(len(y_b), device=device), w_br[:, 0], w_br, c)
        all_r = w_br.sum(dim=0)

        class_m, image_m, value_m = self._pairs(offsets_b1, indices_m, values_m, latent_c)
        u_m = slope_c[class_m] * value_m + bias_c[class_m]
        silent_m = _ce(bias_c[class_m], y_b[image_m] == class_m)
        more_m = _ce(u_m, y_b[image_m] == class_m) - silent_m
        more_cr = _bagged(class_m, image_m, more_m, w_br, c)
        silent_cr = -logsigmoid(-bias_c)[:, None] * all_r - bias_c[:, None] * of_class_cr
        constant_c = prevalence_c.logit()
        constant_cr = -logsigmoid(-constant_c)[:, None] * all_r - constant_c[:, None] * of_class_cr
        found_cr = silent_cr + more_cr
        return ClassSums(found_cr[:, 0], constant_cr[:, 0], found_cr[:, 1:], constant_cr[:, 1:])

    @staticmethod
    def _pairs(
        offsets_b1: Tensor, indices_m: Tensor, values_m: Tensor, latent_c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class, image and value of every code of every class's latent, by class."""
        order_c = latent_c.argsort(stable=True)
        sorted_c = latent_c[order_c]
        indices_m = indices_m.long()
        first_m = torch.searchsorted(sorted_c, indices_m)
        times_m = torch.searchsorted(sorted_c, indices_m, right=True) - first_m
        kept_m = times_m.nonzero().squeeze(1)
        times_k = times_m[kept_m]
        of_k = kept_m.repeat_interleave(times_k)
        nth_k = torch.arange(len(of_k), device=of_k.device)
        nth_k -= (times_k.cumsum(0) - times_k).repeat_interleave(times_k)
        class_k = order_c[first_m[of_k] + nth_k]
        by_class_k = class_k.argsort(stable=True)
        of_k = of_k[by_class_k]
        image_k = torch.searchsorted(offsets_b1, of_k, right=True) - 1
        return class_k[by_class_k], image_k, values_m[of_k].double()

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that it is, to be stored."""
        return {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> SingleLatents:
        return cls(*(torch.from_numpy(np.array(arrays[field.name])) for field in fields(cls)))


def _ce(u: Tensor, is_class: Tensor) -> Tensor:
    """−log σ(u) where it is the class, −log σ(−u) elsewhere."""
    return -logsigmoid(torch.where(is_class, u, -u))


def _bagged(class_m: Tensor, image_m: Tensor, by_m: Tensor, w_br: Tensor, c: int) -> Tensor:
    """[c r]: Σ of by · w over the pairs of each class. No scatter adds: it is deterministic."""
    if len(class_m) > DENSE * c * len(w_br):
        by_cb = w_br.new_zeros(c, len(w_br))
        by_cb[class_m, image_m] = by_m
        return by_cb @ w_br
    order_m = class_m.argsort(stable=True)
    every_c1 = torch.arange(c + 1, device=class_m.device)
    if not len(class_m):
        return w_br.new_zeros(c, w_br.shape[1])
    return embedding_bag(
        image_m[order_m],
        w_br,
        torch.searchsorted(class_m[order_m], every_c1),
        mode="sum",
        per_sample_weights=by_m[order_m],
        include_last_offset=True,
    )


def fit_single(
    offsets_n1: Tensor, indices_m: Tensor, values_m: Tensor, d: int, y_n: Tensor, n_classes: int
) -> SingleLatents:
    """The best latent of each class, on n train rows by their codes as compressed rows."""
    from scipy.sparse import csr_matrix

    n, y = len(y_n), y_n.cpu().numpy()
    size_c = np.bincount(y, minlength=n_classes)
    prevalence_c = np.clip(size_c / n, 0.5 / n, 1 - 0.5 / n)
    latent_c, slope_c = np.full(n_classes, -1), np.zeros(n_classes)
    bias_c = np.log(prevalence_c) - np.log1p(-prevalence_c)

    class_p, latent_p = _candidates(offsets_n1, indices_m, values_m, d, y_n, size_c)
    spread_d = moments(indices_m, values_m, d, n).spread_d
    parts = [part.cpu().numpy() for part in (values_m, indices_m, offsets_n1)]
    columns = csr_matrix((parts[0], parts[1], parts[2]), shape=(n, d)).tocsc()
    least_c = -prevalence_c * np.log(prevalence_c) - (1 - prevalence_c) * np.log1p(-prevalence_c)
    for some in _blocks(np.diff(columns.indptr)[latent_p]):
        classes, latents = class_p[some], latent_p[some]
        deviation_p = np.sqrt(spread_d[latents] / n)
        fits = Fits.of(columns, y, classes, latents, deviation_p)
        slope_p, bias_p, ce_p = fits.solve()
        ce_p = ce_p.round(NAT)
        order_p = np.lexsort((ce_p, classes))
        for p in order_p[np.diff(classes[order_p], prepend=-1) != 0]:  # the best of each class here
            label = classes[p]
            if ce_p[p] < least_c[label]:
                least_c[label], latent_c[label] = ce_p[p], latents[p]
                slope_c[label], bias_c[label] = slope_p[p] / deviation_p[p], bias_p[p]
    found = (latent_c, slope_c, bias_c, prevalence_c)
    return SingleLatents(*(torch.from_numpy(part) for part in found))


def _candidates(
    offsets_n1: Tensor,
    indices_m: Tensor,
    values_m: Tensor,
    d: int,
    y_n: Tensor,
    size_c: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a class and a latent, by class."""
    n = len(y_n)
    known = moments(indices_m, values_m, d, n)
    inverse_d = np.where(known.spread_d > 0, known.spread_d, np.inf) ** -0.5
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for classes, sums_cd in class_sums(offsets_n1, indices_m, values_m, d, y_n, len(size_c)):
        own_c = size_c[classes]
        told_c = (own_c > 0) & (own_c < n)
        length_c = np.where(told_c, own_c * (1 - own_c / n), np.inf) ** 0.5  # of y = c, centred
        r_cd = np.abs(sums_cd - own_c[:, None] * known.mean_d) * inverse_d / length_c[:, None]
        class_p, latent_p = _largest(torch.from_numpy(r_cd.round(DIGITS)), min(CANDIDATES, d))
        pairs.append((class_p + classes.start, latent_p))
    class_p, latent_p = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return class_p, latent_p


def _largest(r_cd: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a row and the columns of its k largest, those alone that are above 0, both
    ascending; of equals the lowest column counts.
    """
    least_c1 = r_cd.topk(k, dim=1).values[:, -1:] if k else r_cd.new_zeros(len(r_cd), 1)
    above_cd, equal_cd = r_cd > least_c1, r_cd == least_c1
    left_c1 = k - above_cd.sum(dim=1, keepdim=True)
    above_cd |= equal_cd & (equal_cd.cumsum(dim=1) <= left_c1)
    class_p, latent_p = (above_cd & (r_cd > 0)).numpy().nonzero()
    return class_p, latent_p


def _blocks(length_p: np.ndarray) -> Iterator[slice]:
    """Successive pairs, so many that their codes are not more than are fitted at once."""
    after_p = length_p.cumsum()
    begin = 0
    while begin < len(length_p):
        done = int(after_p[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(after_p, done + _BLOCK, side="right")))
        yield slice(begin, end)
        begin = end
