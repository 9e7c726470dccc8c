"""How much is computed at once: rows of a tile of the encoder, images of a batch."""

from __future__ import annotations

from dataclasses import dataclass

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
