"""A backbone in use: activations at its sites, and its output with activations put in their place.

    captures = backbone.acts(images_b3hw, ["blocks.2"])
    output = backbone.resume("blocks.2", captures["blocks.2"].acts_btd, captures["blocks.2"].state)

equals `backbone.forward(images_b3hw)`, on the CPU in float32 and at one batch size bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor

from saebench.backbones.hooks import hooked
from saebench.backbones.pixels import Transform
from saebench.backbones.precision import ieee_float32
from saebench.backbones.sites import axes_in_memory, from_tokens, laid_out, to_tokens
from saebench.backbones.steps import (
    Output,
    Place,
    Step,
    SteppedModel,
    TextTower,
    boundaries,
    memory_format,
    place_of,
)
from saebench.errors import Mismatch, NotFound, UsageError
from saebench.specs import BackboneSpec, SiteSpec

LastBlock = Literal["full", "cls"]
Edit = Callable[[Tensor], Tensor]

ENTRY = "entry"  # in a branch's state: what the step that holds it is given


@dataclass(frozen=True)
class Capture:
    """Activations of one site: all its tokens [b t d], in the dtype of the computation.

    state: what else `resume` needs; nothing for a bottleneck, and for a branch the activation at
    the preceding bottleneck, in the model's own shape.
    """

    acts_btd: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)


class Backbone:
    """A model in evaluation mode on one device and dtype, with the sites of its entry.

    All that computes runs in inference mode, with TF32 off. Made by `load_backbone`.
    weights_sha256: of the file. notes: which of its values were resampled to fit the model.
    last_block: `cls` computes of the last block only what a head that reads CLS alone sees, where
    the model has such a head; embeddings then agree with those of `full` to rounding.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        model: SteppedModel,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        weights_sha256: str | None = None,
        notes: Sequence[str] = (),
        last_block: LastBlock = "full",
    ) -> None:
        self.spec = spec
        self.last_block: LastBlock = last_block
        self.device = torch.device(device)
        self.dtype = dtype
        self.weights_sha256 = weights_sha256
        self.notes = tuple(notes)
        self.transform: Callable[[Image], Tensor] = Transform(spec.input)
        self.model = model
        # Parameters stay as they are built: with requires_grad off, fused attention takes another
        # path, and the last bits are no longer those of the library's own forward.
        model.module.eval()
        for module in model.module.modules():
            if getattr(module, "inplace", False):  # would overwrite what a site has captured
                module.inplace = False  # type: ignore[assignment]
        model.module.to(device=self.device, dtype=dtype)
        self._memory_format = memory_format(model.module)
        self._seen: dict[tuple[str, tuple[str, ...]], bool] = {}
        self._places = {
            name: place_of(model, site.path, site.side, self._who(name))
            for name, site in spec.sites.items()
        }

    def acts(self, images_b3hw: Tensor, sites: Sequence[str]) -> dict[str, Capture]:
        """Activations at some sites, in one forward pass that ends at the last of them.

        Errors: NotFound (a site that the entry lacks), Mismatch (images or activations of another
        shape than the entry says).
        """
        wanted = {name: self._place(name) for name in sites}
        if not wanted:
            return {}
        x = self._images(images_b3hw)
        captures: dict[str, Capture] = {}
        last = max(wanted.values(), key=_depth)
        with self._computing():
            for i in range(last.step + 1):
                here = [name for name, place in wanted.items() if place.step == i]
                for name in here:
                    if wanted[name].module is None:
                        captures[name] = Capture(self._tokens(name, x, len(images_b3hw)))
                if i < last.step or last.module is not None:
                    inside = [name for name in here if wanted[name].module is not None]
                    x = self._step(i, x, inside, captures)
        return {name: captures[name] for name in wanted}

    def resume(
        self,
        site: str,
        acts_btd: Tensor,
        state: Mapping[str, Tensor],
        edits: Mapping[str, Edit] | None = None,
    ) -> Output:
        """Output with the given activations [b t d] at a site. Runs only what comes after it.

        edits: later sites -> what is done there on the way: all tokens as they arrive [b t d] -> as
        they go on.
        Errors: NotFound; Mismatch (activations or state of another shape than the site's);
        UsageError for an edit at a site that does not come after this one.
        """
        place, layout, who = self._place(site), self.spec.sites[site], self._who(site)
        later = self._later(site, edits or {})
        with self._computing():
            x = from_tokens(acts_btd.to(self.device, self.dtype), layout, who)
            if place.module is None:
                if x.ndim == 4:
                    x = laid_out(x, self._axes_in_memory[place.step])
                return self._finish(x, place.step, later)

            def replacement(own: Tensor) -> Tensor:
                self._tokens(site, own, len(x))
                # As the module's own lies in memory; and new, for conv blocks add their skip
                # connection in place, here onto it.
                return torch.empty_like(own).copy_(x)

            entry = self._entry(state, len(acts_btd), who)
            with hooked(place.module, place.side, replacement, who):
                after = self.model.steps[place.step].run(entry)
            return self._finish(after, place.step + 1, later)

    def forward(self, images_b3hw: Tensor) -> Output:
        """Output of untouched images [b 3 h w]. Errors: Mismatch."""
        with self._computing():
            return self._finish(self._images(images_b3hw), 0, {})

    def deepest(self, sites: Iterable[str]) -> str:
        """Of some sites the one after which least is left to run."""
        return max(sites, key=lambda name: _depth(self._place(name)))

    def in_order(self, sites: Iterable[str]) -> list[str]:
        """Sites in the order in which a forward pass meets them."""
        return sorted(sites, key=lambda name: _depth(self._place(name)))

    def sees(self, site: str, kinds: Sequence[str]) -> bool:
        """Whether the output can change at all with these tokens of a site.

        Patches at the last block of a model that reads CLS alone cannot: a splice there is vacuous.
        Found by trying: two images, the tokens replaced by noise. Errors: NotFound.
        """
        key = (site, tuple(kinds))
        if key not in self._seen:
            layout, size = self.spec.sites[site], self.spec.input.size
            generator = torch.Generator().manual_seed(0)
            images_b3hw = torch.rand(2, 3, size, size, generator=generator)
            capture = self.acts(images_b3hw, [site])[site]
            noise = torch.randn(capture.acts_btd.shape, generator=generator)
            acts_btd = capture.acts_btd.clone()
            spread = 1 + acts_btd.float().std()
            for kind in kinds:
                part = layout.kinds[kind]
                acts_btd[:, part] += (spread * noise[:, part].to(spread.device)).to(acts_btd.dtype)
            clean = self.resume(site, capture.acts_btd, capture.state)
            other = self.resume(site, acts_btd, capture.state)
            self._seen[key] = not (
                torch.equal(clean.embedding_bd, other.embedding_bd)
                and torch.equal(clean.read_bd, other.read_bd)
            )
        return self._seen[key]

    @property
    def logit_scale(self) -> float:
        """The factor of a contrastive model's cosines (1 / temperature). Errors: UsageError."""
        return self._text.logit_scale

    @property
    def logit_bias(self) -> float:
        """What a contrastive model adds to its scaled cosines; 0 for CLIP. Errors: UsageError."""
        return self._text.logit_bias

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float32 embeddings [n d] of n texts. Errors: UsageError (no text tower)."""
        text = self._text
        with self._computing():
            return text.encode(texts)

    @property
    def _text(self) -> TextTower:
        if self.model.text is None:
            raise UsageError(
                f"the backbone '{self.spec.name}' has no text tower",
                "texts need a backbone of the CLIP family",
            )
        return self.model.text

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), ieee_float32(self.device):
            yield

    def _step(self, i: int, x: Tensor, inside: list[str], captures: dict[str, Capture]) -> Tensor:
        """Run one step, and read the branch sites that lie within it."""
        with ExitStack() as taps:
            for name in inside:
                place = self._place(name)
                assert place.module is not None

                def read(tensor: Tensor, name: str = name) -> None:
                    acts_btd = self._tokens(name, tensor, len(x))
                    if tensor.ndim == 4:
                        # Conv blocks add their skip connection in place, onto this tensor.
                        acts_btd = acts_btd.clone()
                    captures[name] = Capture(acts_btd, {ENTRY: x})

                taps.enter_context(hooked(place.module, place.side, read, self._who(name)))
            return self.model.steps[i].run(x)

    def _finish(self, x: Tensor, start: int, edits: Mapping[str, Edit]) -> Output:
        n_images, features_bd = len(x), None
        for i, step in enumerate(self.model.steps[start:], start):
            x = self._edit_boundary(i, x, edits)
            features_bd = self._features(i, x, features_bd)
            with self._edited(i, edits):
                x = self._runner(i, step, edits)(x)
        last = len(self.model.steps)
        x = self._edit_boundary(last, x, edits)
        features_bd = self._features(last, x, features_bd)
        output = self.model.read(x)
        shape = list(output.embedding_bd.shape)
        if len(shape) != 2 or shape[0] != n_images:
            raise Mismatch(
                f"the backbone '{self.spec.name}' ends in {shape}, not in one vector an image",
                "choose a pooling that leaves one vector, such as model_args.global_pool",
            )
        return output if features_bd is None else replace(output, features_bd=features_bd)

    def _runner(self, i: int, step: Step, edits: Mapping[str, Edit]) -> Callable[[Tensor], Tensor]:
        """How a step is run: whole, or only as far as the head will see it."""
        needs_all = self.last_block == "full" or self.spec.head.features != ("embedding",)
        if step.short is None or needs_all or any(self._place(s).step >= i for s in edits):
            return step.run
        return step.short

    def _features(self, boundary: int, x: Tensor, found: Tensor | None) -> Tensor | None:
        """What a linear head reads of the normed sequence, at the boundary where that lies."""
        features = self.spec.head.features
        if features == ("embedding",) or boundary != self.model.sequence:
            return found
        prefix = sum(self.model.prefix.values())
        parts = {"cls": lambda: x[:, 0], "patches": lambda: x[:, prefix:].mean(dim=1)}
        return torch.cat([parts[feature]() for feature in features], dim=1)

    def _later(self, site: str, edits: Mapping[str, Edit]) -> dict[str, Edit]:
        """Edits, once they are known to lie after a site."""
        here = self._place(site)
        for name in edits:
            there = self._place(name)
            after = _depth(there) > _depth(here)
            if not after or (there.step == here.step and here.module is not None):
                raise UsageError(
                    f"the site '{name}' of '{self.spec.name}' does not come after '{site}'",
                    "replace the earlier one first, and no two within one block",
                )
        return dict(edits)

    def _edit_boundary(self, i: int, x: Tensor, edits: Mapping[str, Edit]) -> Tensor:
        for name, edit in edits.items():
            place = self._place(name)
            if place.module is None and place.step == i:
                new = edit(self._tokens(name, x, len(x))).to(x.dtype)
                x = from_tokens(new, self.spec.sites[name], self._who(name))
                x = laid_out(x, self._axes_in_memory[i]) if x.ndim == 4 else x
        return x

    @contextmanager
    def _edited(self, i: int, edits: Mapping[str, Edit]) -> Iterator[None]:
        """The branches within a step with what is done there, for as long as the step runs."""
        with ExitStack() as hooks:
            for name, edit in edits.items():
                place = self._place(name)
                if place.module is None or place.step != i:
                    continue

                def changed(own: Tensor, name: str = name, edit: Edit = edit) -> Tensor:
                    new = edit(self._tokens(name, own, len(own))).to(own.dtype)
                    x = from_tokens(new, self.spec.sites[name], self._who(name))
                    return torch.empty_like(own).copy_(x)

                hooks.enter_context(hooked(place.module, place.side, changed, self._who(name)))
            yield

    @cached_property
    def _axes_in_memory(self) -> list[tuple[int, ...]]:
        """How the tensor at each boundary lies in memory, found by one pass over blank images."""
        size = self.spec.input.size
        blank = self._images(torch.zeros(2, 3, size, size))
        return [axes_in_memory(x) for x in boundaries(self.model, blank)]

    def _tokens(self, name: str, x: Tensor, n_images: int) -> Tensor:
        return to_tokens(x, self.spec.sites[name], n_images, self._who(name))

    def _images(self, images_b3hw: Tensor) -> Tensor:
        size = self.spec.input.size
        if images_b3hw.ndim != 4 or tuple(images_b3hw.shape[1:]) != (3, size, size):
            raise Mismatch(
                f"images are {list(images_b3hw.shape)}, and the backbone '{self.spec.name}' "
                f"takes [b, 3, {size}, {size}]",
                "pass PIL images through backbone.transform, and stack them",
            )
        if not images_b3hw.is_floating_point():
            raise Mismatch(
                f"images are {images_b3hw.dtype}, and must be floats as backbone.transform gives",
                "pass PIL images through backbone.transform, and stack them",
            )
        return images_b3hw.to(self.device, self.dtype, memory_format=self._memory_format)

    def _entry(self, state: Mapping[str, Tensor], n_images: int, who: str) -> Tensor:
        if ENTRY not in state or len(state[ENTRY]) != n_images:
            found = f"of {len(state[ENTRY])} images" if ENTRY in state else "without it"
            raise Mismatch(
                f"{who}: a branch resumes from the activation before its block, and the state "
                f"is {found}, for {n_images} images",
                "pass the state of the same Capture as the activations",
            )
        return state[ENTRY].to(self.device, self.dtype)

    def _place(self, site: str) -> Place:
        if site in self._places:
            return self._places[site]
        near = get_close_matches(site, self._places, n=3, cutoff=0.3) or list(self._places)
        raise NotFound(
            f"the backbone '{self.spec.name}' has no site '{site}'",
            f"the nearest: {', '.join(near)}" if near else "its entry declares no sites",
        )

    def _who(self, name: str) -> str:
        site: SiteSpec = self.spec.sites[name]
        return f"{self.spec.name}, site '{name}' (the {site.side} of '{site.path}')"


def _depth(place: Place) -> tuple[int, bool]:
    return place.step, place.module is not None
