"""One SAE in training: parameters, optimiser, sparsity controller and the memory of dead latents.

A trainee draws on nothing outside itself but the rows it is given, so that an SAE trained beside
others is bit for bit the one trained alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from saebench.errors import NonFiniteError
from saebench.train.architectures import Params, forward
from saebench.train.recipe import PENALISED, Recipe
from saebench.train.revive import auxk_loss, lower_the_bar, start_threshold
from saebench.train.sparsity import Controller

# Adam moves log θ by lr a step, and θ has orders of magnitude to go: at the rate of the weights it
# comes late, the controller overshoots, and the L0 of JumpReLU ends far from its target.
RATES = {"log_threshold_s": 5.0}


class Trainee:
    """Trains one SAE on scaled rows. `weights` (scaled space) replace the random start."""

    def __init__(
        self,
        recipe: Recipe,
        d_model: int,
        *,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
        b_dec_d: Tensor | None = None,
    ) -> None:
        self.recipe = recipe
        start = dict(weights) if weights else self._random_start(d_model, b_dec_d)
        if "threshold_s" in start:
            start["log_threshold_s"] = start.pop("threshold_s").log()
        self.params: Params = {
            name: value.to(device, torch.float32).clone().requires_grad_()
            for name, value in start.items()
        }
        self.optimizer = torch.optim.Adam(
            [
                {"params": [value], "factor": RATES.get(name, 1.0)}
                for name, value in self.params.items()
            ],
            lr=recipe.lr,
            fused=device.type in ("cpu", "cuda"),
        )
        self.controller = Controller(recipe.target) if recipe.arch in PENALISED else None
        self.silent_s = torch.zeros(recipe.d_sae, dtype=torch.int64, device=device)
        self.step_count = 0
        self.loss = self.l0 = float("nan")

    def _random_start(self, d_model: int, b_dec_d: Tensor | None) -> Params:
        s = self.recipe.d_sae
        # On the CPU, whatever the device, so that a seed means the same start everywhere.
        generator = torch.Generator().manual_seed(self.recipe.seed)
        rows_sd = torch.randn(s, d_model, generator=generator)
        W_dec_sd = torch.nn.functional.normalize(rows_sd, dim=-1)
        params = {
            "W_enc_ds": W_dec_sd.T.contiguous(),
            "b_enc_s": torch.zeros(s),
            "W_dec_sd": W_dec_sd,
            "b_dec_d": torch.zeros(d_model) if b_dec_d is None else b_dec_d.cpu(),
        }
        if self.recipe.arch == "jumprelu":
            params["log_threshold_s"] = torch.full((s,), start_threshold(d_model)).log()
        if self.recipe.arch == "gated":
            params |= {"r_mag_s": torch.zeros(s), "b_mag_s": torch.zeros(s)}
        return params

    @property
    def progress(self) -> float:
        return self.step_count / self.recipe.steps

    @property
    def rate(self) -> float:
        """The learning rate of this step: a linear rise, a plateau, a linear fall to 0."""
        recipe = self.recipe
        rise = (self.step_count + 1) / max(1.0, recipe.warmup * recipe.steps)
        fall = (recipe.steps - self.step_count) / max(1.0, recipe.decay * recipe.steps)
        return recipe.lr * min(1.0, rise, fall)

    @property
    def dead_s(self) -> Tensor:
        """[s] bool: has not fired on the last `dead_after` rows."""
        return self.silent_s >= self.recipe.dead_after

    def step(self, x_nd: Tensor) -> None:
        """One optimisation step on scaled rows [n d]. Errors: NonFiniteError when it diverged."""
        recipe, params = self.recipe, self.params
        out = forward(recipe, params, x_nd)
        active_ns = out.codes_ns.detach() > 0
        self.l0 = active_ns.sum().item() / len(x_nd)
        loss = out.loss
        if self.controller is not None and out.penalty is not None:
            loss = loss + self.controller.coefficient(self.l0, self.progress) * out.penalty
        if (aux := auxk_loss(params, out, x_nd, self.dead_s)) is not None:
            loss = loss + recipe.aux * aux
        self.loss = out.loss.item()
        if not torch.isfinite(loss):
            raise self._divergence()
        self.optimizer.zero_grad()
        loss.backward()
        self._update()
        self._remember(active_ns)
        self.step_count += 1

    def check(self) -> None:
        """Errors: NonFiniteError when the last update has left weights that are not finite."""
        if not all(torch.isfinite(value).all() for value in self.params.values()):
            raise self._divergence()

    def _divergence(self) -> NonFiniteError:
        rate = self.recipe.lr
        return NonFiniteError(
            f"training of {self.recipe.setting} diverged at step {self.step_count}",
            f"try a smaller learning rate than {rate:.2g}: --lr {rate / 3:.1g}",
        )

    @torch.no_grad()
    def _update(self) -> None:
        recipe, W_dec_sd = self.recipe, self.params["W_dec_sd"]
        assert W_dec_sd.grad is not None
        # Rows stay on the sphere: what would only change their length is taken out of the step.
        W_dec_sd.grad -= (W_dec_sd.grad * W_dec_sd).sum(-1, keepdim=True) * W_dec_sd
        torch.nn.utils.clip_grad_norm_(self.params.values(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["factor"]
        self.optimizer.step()
        W_dec_sd /= W_dec_sd.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def _remember(self, active_ns: Tensor) -> None:
        self.silent_s += len(active_ns)
        self.silent_s[active_ns.any(0)] = 0
        if self.recipe.arch in PENALISED:
            lower_the_bar(self.params, self.dead_s, self.rate)

    def weights(self) -> Params:
        """The weights in scaled space, detached, with `threshold_s` where the architecture has it.

        JumpReLU: its own. BatchTopK family: none here; it is estimated afterwards.
        """
        found = {name: value.detach().clone() for name, value in self.params.items()}
        found["W_dec_sd"] /= found["W_dec_sd"].norm(dim=-1, keepdim=True)
        if "log_threshold_s" in found:
            found["threshold_s"] = found.pop("log_threshold_s").exp()
        return found

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values only."""
        return {
            "params": {name: value.detach() for name, value in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state() if self.controller else {},
            "silent_s": self.silent_s,
            "step_count": self.step_count,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(state["params"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.controller is not None:
            self.controller.restore(state["controller"])
        self.silent_s.copy_(state["silent_s"])
        self.step_count = state["step_count"]


@torch.no_grad()
def batch_threshold(
    params: Params, tiles: Iterable[Tensor], k: float, *, iterations: int = 40
) -> float:
    """θ at which Σ_s [pre > θ] is k on average over scaled rows, by bisection in float64.

    Positive, so that θ = 0 (a plain ReLU) is the loosest it gets.
    """
    tiles = list(tiles)

    def mean_l0(theta: float) -> float:
        count = sum(int((_pre(params, x_nd) > theta).sum()) for x_nd in tiles)
        return count / sum(len(x_nd) for x_nd in tiles)

    low, high = 0.0, max(float(_pre(params, x_nd).max()) for x_nd in tiles)
    if high <= 0 or mean_l0(0.0) <= k:
        return 0.0
    for _ in range(iterations):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_l0(middle) > k else (low, middle)
    return high


def _pre(params: Params, x_nd: Tensor) -> Tensor:
    return torch.addmm(params["b_enc_s"], x_nd - params["b_dec_d"], params["W_enc_ds"])
