"""How much is computed at once: rows of a tile of the encoder, images of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saebench.errors import SaebenchError, is_out_of_memory

TILE_BYTES = 256 * 2**20  # of pre-activations held at once while encoding
SMALLEST_TILE = 4 * 2**20


@dataclass
class Tiles:
    """Row tile of the encoder and images in a batch: halved when memory runs out, never grown."""

    tile_bytes: int
    batch_size: int

    def halve(self) -> bool:
        """First the row tile, then the batch. False when neither can be halved again."""
        if self.tile_bytes > SMALLEST_TILE:
            self.tile_bytes //= 2
        elif self.batch_size > 1:
            self.batch_size //= 2
        else:
            return False
        return True

    def make_do(self, error: Exception) -> str:
        """Halve them because memory ran out; what to say of it.

        Errors: `error`, where it is another one; SaebenchError, where they are the smallest.
        """
        if not is_out_of_memory(error):
            raise error
        error.__traceback__ = None  # it holds the frames that hold the memory
        if not self.halve():
            raise SaebenchError(
                "memory ran out with one image in a batch and the smallest row tile",
                "hold fewer SAEs at once:  --memory 1GiB",
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return (
            f"memory ran out: going on with row tiles of {self.tile_bytes >> 20} MiB and batches "
            f"of {self.batch_size} images"
        )
