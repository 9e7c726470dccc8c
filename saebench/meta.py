"""An SAE on the decoder of another: it writes each of its directions as a few of its own.

The SAE above reads the decoder rows W_j of the one below, and reconstructs them:

    m_j = encode(W_j)        Ŵ_j = decode(m_j)                    once, for all s latents below
    z'  = Σ_j z_j m_j        x̂ = the decoding below of z, with Ŵ in place of W

So codes z' of an activation are in the dictionary of the SAE above, and its reconstruction is what
the SAE below gives with the decoder that the one above left of it. Both are of raw activations, so
that every task measures the pair like any SAE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from saebench.codes import Codes, Frame
from saebench.errors import Mismatch
from saebench.record import Record
from saebench.saes import TILE_BYTES, Sae, no_frame, weighted_rows


@dataclass(frozen=True, eq=False)
class MetaSae:
    """`below` encodes activations, `above` its decoder's rows. Errors: Mismatch (row norms above).

    An SAE that normalises each row by itself cannot be above: what it takes from a direction would
    have to travel with every latent.
    """

    below: Sae
    above: Sae

    def __post_init__(self) -> None:
        if self.above.scaling.rows is not None or self.above.skip_dd is not None:
            raise Mismatch("an SAE that normalises its rows cannot sit on a decoder")

    @property
    def d_model(self) -> int:
        return self.below.d_model

    @property
    def d_sae(self) -> int:
        return self.above.d_sae

    @property
    def architecture(self) -> str:
        return self.above.architecture

    @property
    def transcoder(self) -> bool:
        return self.below.transcoder or self.above.transcoder

    @property
    def record(self) -> Record:
        """Where the facts of the SAE above came from."""
        return self.above.record

    @property
    def n_bytes(self) -> int:
        codes_bytes = 4 * self.below.d_sae * self.d_sae
        return self.below.n_bytes + self.above.n_bytes + codes_bytes

    @property
    def decoder_norms_s(self) -> Tensor:
        return self._decoder_norms_s

    @cached_property
    def _decoder_norms_s(self) -> Tensor:
        # One unit of z' adds a row of `above`, which the scaling of `below` takes to raw space.
        return (self._unscaled_sd.double() / self.below.scaling.scale).norm(dim=1)

    @cached_property
    def direction_codes(self) -> Codes:
        """m, the codes of the s decoder rows below."""
        return self.above.encode(self.below.W_dec_sd)

    @property
    def directions_sd(self) -> Tensor:
        """Ŵ [s d], the decoder rows below as the SAE above reconstructs them."""
        return self.above.decode(self.direction_codes)

    def encode(self, x_nd: Tensor, *, tile_bytes: int = TILE_BYTES) -> Codes:
        """z' of raw activations x [n d]."""
        if x_nd.shape[0] == 0:
            return Codes.empty(0, self.d_sae, x_nd.device)
        rows = max(1, tile_bytes // (4 * max(self.d_sae, self.below.d_sae)))
        return Codes.cat([self._encode(tile_nd, tile_bytes) for tile_nd in x_nd.split(rows)])

    def _encode(self, x_nd: Tensor, tile_bytes: int) -> Codes:
        below = self.below.encode(x_nd, tile_bytes=tile_bytes)
        # What the SAE above adds to every direction, it adds z_j times for each active latent.
        total_n = below.sum_n(below.values_m).float()
        added_nd = total_n[:, None] * self._offset_d
        frame = below.frame or Frame()
        if frame.skip_nd is not None:
            added_nd = added_nd + frame.skip_nd
        z_ns = weighted_rows(below, self._dense_codes)
        return Codes.from_dense(z_ns, replace(frame, skip_nd=added_nd))

    def decode(self, codes: Codes) -> Tensor:
        """x̂ [n d] in raw activation space.

        Errors: UsageError for codes without their frame: what the SAE above adds is in it.
        """
        u_nd = weighted_rows(codes, self._unscaled_sd) + self.below.b_dec_d
        if codes.n_rows and codes.frame is None:
            raise no_frame()
        if codes.frame is not None:
            u_nd = codes.frame.undo(u_nd)
        return self.below.scaling.undo(u_nd)

    @cached_property
    def _dense_codes(self) -> Tensor:
        return self.direction_codes.dense()

    @cached_property
    def _offset_d(self) -> Tensor:
        """What decoding above gives without any latent."""
        nothing = Codes.empty(1, self.d_sae, self.above.device)
        return self.above.decode(nothing)[0]

    @cached_property
    def _unscaled_sd(self) -> Tensor:
        """[s' d] what one latent above adds to a direction below."""
        return (self.above.W_dec_sd / self.above.scaling.scale).contiguous()
