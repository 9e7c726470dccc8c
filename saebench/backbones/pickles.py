"""Reads the tensors of a PyTorch checkpoint file (`.pt`, `.pth`, `.bin`) without running its code.

A pickle is a program; `saebench.torchfiles` builds tensors and plain containers of it, and nothing
else. A file that needs more is refused, and so is a TorchScript archive, which is code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saebench import archives
from saebench.archives import ZIP
from saebench.errors import WeightsError
from saebench.plainvalues import Damaged, ForeignName, Stub, Unsupported
from saebench.torchfiles import TorchScript, read_torch

# How checkpoints begin: a zip archive, or a bare pickle. The length of a safetensors file's header
# may be the same bytes: `saebench.weights.is_safetensors` is to be asked first.
PICKLES = (ZIP, b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# Where training scripts keep the weights among other things, in timm's order: an average of the
# weights over training, where there is one, is what was evaluated.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


# timm's training script saves its arguments beside the weights.
_NAMES = {"argparse.Namespace": Stub}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name, as they are stored.

    Errors: WeightsError for a file that is truncated, needs code, or holds no weights.
    """
    try:
        _refuse_numpy(path)
        content = read_torch(path, _NAMES.__getitem__)
    except ForeignName as error:
        raise WeightsError(
            f"{path} needs code to be read: {error}",
            "it is not run here: where it was written, save the weights alone, "
            "torch.save(model.state_dict(), path), or take them from its makers as safetensors",
        ) from None
    except TorchScript:
        raise WeightsError(
            f"{path} is a TorchScript archive: a program, not only weights",
            "OpenAI's CLIP models are had as weights alone too, such as hub = "
            "'timm/vit_base_patch32_clip_224.openai'; of another, save model.state_dict() in a "
            "place where you trust it",
        ) from None
    except Unsupported as error:
        raise WeightsError(
            f"{path} is not read: {error}",
            "where it was written, save the weights alone again, as safetensors",
        ) from None
    except (Damaged, OSError) as error:
        raise WeightsError(
            f"{path} cannot be read as a PyTorch checkpoint: {error}",
            f"it has {path.stat().st_size:,} bytes, and may be truncated: get it again",
        ) from None
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _state_dict(content[key], path)
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"{path} holds no weights by name, but {_shown(content)}",
            "save the weights of the one model that you mean: torch.save(model.state_dict(), path)",
        )
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _shown(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    other = [k for k, v in content.items() if not isinstance(v, Tensor)]
    names = ", ".join(f"{key} ({type(content[key]).__name__})" for key in other[:4])
    return names + (", …" if len(other) > 4 else "")


def _refuse_numpy(path: Path) -> None:
    """Errors: WeightsError for a NumPy archive, which is a zip archive too; Damaged."""
    with path.open("rb") as file:
        names = archives.members(path) if file.read(len(ZIP)) == ZIP else ()
    if names and all(name.endswith(".npy") for name in names):
        raise WeightsError(
            f"{path} is a NumPy archive, as JAX models are released",
            "take the model from timm's own repository, where it is safetensors",
        )
