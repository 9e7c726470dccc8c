"""A backbone in use: activations at its sites, and its output with activations put in their place.

    captures = backbone.acts(images_b3hw, ["blocks.2"])
    output = backbone.resume("blocks.2", captures["blocks.2"].acts_btd, captures["blocks.2"].state)

equals `backbone.forward(images_b3hw)`, on the CPU in float32 and at one batch size bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from PIL.Image import Image
from torch import Tensor

from saebench.backbones.editing import Edit, Edits, as_own
from saebench.backbones.hooks import hooked
from saebench.backbones.influence import Reads, influences
from saebench.backbones.pixels import Transform
from saebench.backbones.places import Sites
from saebench.backbones.precision import ieee_float32
from saebench.backbones.sequence import Features
from saebench.backbones.sites import axes_in_memory, laid_out
from saebench.backbones.steps import (
    Output,
    Step,
    SteppedModel,
    TextTower,
    boundaries,
    memory_format,
)
from saebench.errors import Mismatch, UsageError
from saebench.specs import BackboneSpec

LastBlock = Literal["full", "cls"]

# In the state of a capture: what the step that holds a branch is given; and for a site that lies
# after the final sequence of tokens, what a linear head reads of that sequence.
ENTRY = "entry"
FEATURES = "features"


@dataclass(frozen=True)
class Capture:
    """Activations of one site: all its tokens [b t d], in the dtype of the computation.

    state: what else `resume` needs. For a branch the activation at the preceding bottleneck, in
    the model's own shape; for a bottleneck nothing, unless a linear head reads tokens that lie
    before it: then what it reads of them.
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
        self._seen: dict[tuple[str, tuple[str, ...]], frozenset[str]] = {}
        self._sites = Sites(spec, model)
        self._features = Features(spec, model)

    def acts(self, images_b3hw: Tensor, sites: Sequence[str]) -> dict[str, Capture]:
        """Activations at some sites, in one forward pass that ends at the last of them.

        Errors: NotFound (a site that the entry lacks), Mismatch (images or activations of another
        shape than the entry says).
        """
        wanted = {name: self._sites.place(name) for name in sites}
        if not wanted:
            return {}
        x, features_bd = self._images(images_b3hw), None
        captures: dict[str, Capture] = {}
        last = wanted[self.deepest(wanted)]
        with self._computing():
            for i in range(last.step + 1):
                here = [name for name, place in wanted.items() if place.step == i]
                for name in here:
                    if wanted[name].module is None:
                        acts_btd = self._sites.read(name, x, len(images_b3hw))
                        captures[name] = Capture(acts_btd, _state(FEATURES, features_bd))
                features_bd = self._features.at(i, x, features_bd)
                if i < last.step or last.module is not None:
                    state = _state(ENTRY, x) | _state(FEATURES, features_bd)
                    inside = [name for name in here if wanted[name].module is not None]
                    x = self._step(i, x, inside, captures, state)
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
        place, who = self._sites.place(site), self._sites.who(site)
        later = Edits(self._sites, edits or {}, self._axes, after=site)
        with self._computing():
            x = self._sites.written(site, acts_btd.to(self.device, self.dtype))
            before = self._features.before(self._sites.depth(site))
            features_bd = _kept(FEATURES, state, x, who) if before else None
            if place.module is None:
                if x.ndim == 4:
                    x = laid_out(x, self._axes(place.step))
                return self._finish(x, place.step, later, features_bd)
            entry = _kept(ENTRY, state, x, who)
            with later.within(place.step) as made:

                def replacement(own: Tensor) -> Tensor:
                    later.refuse(made)
                    self._sites.read(site, own, len(x))
                    return as_own(own, x)

                with hooked(place.module, place.side, replacement, who):
                    after = self.model.steps[place.step].run(entry)
            return self._finish(after, place.step + 1, later, features_bd)

    def forward(self, images_b3hw: Tensor) -> Output:
        """Output of untouched images [b 3 h w]. Errors: Mismatch."""
        with self._computing():
            x = self._images(images_b3hw)
            return self._finish(x, 0, Edits(self._sites, {}, self._axes))

    def deepest(self, sites: Iterable[str]) -> str:
        """Of some sites the one after which least is left to run."""
        return max(sites, key=self._sites.depth)

    def in_order(self, sites: Iterable[str]) -> list[str]:
        """Sites in the order in which a forward pass meets them."""
        return sorted(sites, key=self._sites.depth)

    def sees(self, site: str, kinds: Sequence[str], reads: Reads = "any") -> bool:
        """Whether the output can change at all with these tokens of a site: found by trying, once.

        Patches at the last block of a model that reads CLS alone cannot: a splice there is vacuous.
        reads: of the output, what is asked for.
        Errors: NotFound; UsageError (the site has no such tokens).
        """
        key = (site, tuple(sorted(kinds)))
        if key not in self._seen:
            self._seen[key] = influences(self, site, kinds)
        return bool(self._seen[key]) if reads == "any" else reads in self._seen[key]

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

    def _step(
        self,
        i: int,
        x: Tensor,
        inside: list[str],
        captures: dict[str, Capture],
        state: Mapping[str, Tensor],
    ) -> Tensor:
        """Run one step, and read the branch sites that lie within it."""
        with ExitStack() as taps:
            for name in inside:
                place = self._sites.place(name)
                assert place.module is not None

                def read(tensor: Tensor, name: str = name) -> None:
                    acts_btd = self._sites.read(name, tensor, len(x))
                    if tensor.ndim == 4:
                        # Conv blocks add their skip connection in place, onto this tensor.
                        acts_btd = acts_btd.clone()
                    captures[name] = Capture(acts_btd, state)

                taps.enter_context(hooked(place.module, place.side, read, self._sites.who(name)))
            return self.model.steps[i].run(x)

    def _finish(
        self, x: Tensor, start: int, edits: Edits, features_bd: Tensor | None = None
    ) -> Output:
        n_images = len(x)
        for i, step in enumerate(self.model.steps[start:], start):
            x = edits.at_boundary(i, x)
            features_bd = self._features.at(i, x, features_bd)
            with edits.within(i):
                x = self._runner(i, step, edits)(x)
        last = len(self.model.steps)
        x = edits.at_boundary(last, x)
        features_bd = self._features.at(last, x, features_bd)
        output = self.model.read(x)
        shape = list(output.embedding_bd.shape)
        if len(shape) != 2 or shape[0] != n_images:
            raise Mismatch(
                f"the backbone '{self.spec.name}' ends in {shape}, not in one vector an image",
                "choose a pooling that leaves one vector, such as model_args.global_pool",
            )
        return output if features_bd is None else replace(output, features_bd=features_bd)

    def _runner(self, i: int, step: Step, edits: Edits) -> Callable[[Tensor], Tensor]:
        """How a step is run: whole, or only as far as the head will see it."""
        needs_all = self.last_block == "full" or self._features.whole
        return step.run if step.short is None or needs_all or edits.reach(i) else step.short

    def _axes(self, boundary: int) -> tuple[int, ...]:
        return self._axes_in_memory[boundary]

    @cached_property
    def _axes_in_memory(self) -> list[tuple[int, ...]]:
        """How the tensor at each boundary lies in memory, found by one pass over blank images."""
        size = self.spec.input.size
        blank = self._images(torch.zeros(2, 3, size, size))
        return [axes_in_memory(x) for x in boundaries(self.model, blank)]

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


_KEPT = {
    ENTRY: "a branch resumes from the activation before its block",
    FEATURES: "the linear head reads tokens that lie before it",
}


def _kept(key: str, state: Mapping[str, Tensor], x: Tensor, who: str) -> Tensor:
    """What a capture keeps beside its activations. Errors: Mismatch where it does not."""
    if key not in state or len(state[key]) != len(x):
        found = f"of {len(state[key])} images" if key in state else "without it"
        raise Mismatch(
            f"{who}: {_KEPT[key]}, and the state is {found}, for {len(x)} images",
            "pass the state of the same Capture as the activations",
        )
    return state[key].to(x.device, x.dtype)


def _state(key: str, x: Tensor | None) -> dict[str, Tensor]:
    return {} if x is None else {key: x}
