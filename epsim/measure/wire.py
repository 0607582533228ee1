"""Messages as bytes: `Codec` for hidden vectors, `pack_dispatch`, `unpack_dispatch`; and what ranks do around them:
`pack_leg`, `read_arrival`, `add_returned`.

A dispatch is vectors, then an int32 code per pair (vector * slots of all ranks + physical expert), then a float32 gate
weight per pair: the bytes that `epsim.traffic.MessageFormat` counts. A combine is vectors alone. T home tokens, K
top-k, V vectors, N pairs, H hidden size.
"""

from dataclasses import dataclass

import torch

from epsim.traffic import Dtype

_SCALE_VALUES = 128  # values that share a float32 scale in FP8, as in DeepEP
_FP8_MAX = 448.0  # of float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Hidden vectors of hidden_size in a wire dtype."""

    hidden_size: int
    dtype: Dtype

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector."""
        if self.dtype == "fp8":
            return self.hidden_size + 4 * -(-self.hidden_size // _SCALE_VALUES)
        return self.hidden_size * (4 if self.dtype == "fp32" else 2)

    def write(self, vectors_VH: torch.Tensor, out: torch.Tensor) -> None:
        """Write vectors into V * vector_bytes of `out` (uint8)."""
        if self.dtype == "fp8":
            self._write_fp8(vectors_VH, out)
            return
        out.view(self._torch_dtype).view(vectors_VH.shape).copy_(vectors_VH)

    def read(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the vectors [V, H] that `data` (uint8) holds, in the model's dtype; a view where it is the same."""
        if self.dtype == "fp8":
            return self._read_fp8(data).to(dtype)
        return data.view(self._torch_dtype).view(-1, self.hidden_size).to(dtype)

    @property
    def _torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16

    def _write_fp8(self, vectors_VH: torch.Tensor, out: torch.Tensor) -> None:
        num_scales = -(-self.hidden_size // _SCALE_VALUES)
        padded = torch.nn.functional.pad(vectors_VH.float(), (0, num_scales * _SCALE_VALUES - self.hidden_size))
        blocks = padded.view(-1, num_scales, _SCALE_VALUES)
        scale = blocks.abs().amax(dim=2).clamp_min(1e-12) / _FP8_MAX
        values = (blocks / scale[:, :, None]).view(len(vectors_VH), -1)[:, : self.hidden_size]
        split = len(vectors_VH) * self.hidden_size
        out[:split].view(torch.float8_e4m3fn).view(values.shape).copy_(values)
        out[split:].view(scale.shape[0], -1).copy_(scale.contiguous().view(torch.uint8).view(scale.shape[0], -1))

    def _read_fp8(self, data: torch.Tensor) -> torch.Tensor:
        num_vectors = len(data) // self.vector_bytes
        split = num_vectors * self.hidden_size
        values = data[:split].view(torch.float8_e4m3fn).view(num_vectors, -1).float()
        scale = data[split:].contiguous().view(torch.float32).view(num_vectors, -1)
        return values * scale.repeat_interleave(_SCALE_VALUES, dim=1)[:, : self.hidden_size]


@dataclass(frozen=True, kw_only=True)
class LegIndex:
    """What of a home's tokens goes into a dispatch, as tensors.

    rows_V: int64, the tokens. code_N: int32, as sent. row_N, choice_N: int64, where the gate weights are.
    """

    rows_V: torch.Tensor
    code_N: torch.Tensor
    row_N: torch.Tensor
    choice_N: torch.Tensor


def pack_leg(
    codec: Codec, vectors_TH: torch.Tensor, weights_TK: torch.Tensor, index: LegIndex, out: torch.Tensor
) -> None:
    """Gather a leg's vectors and gate weights and write them as a dispatch."""
    weight_N = weights_TK[index.row_N, index.choice_N]
    pack_dispatch(codec, vectors_TH[index.rows_V], index.code_N, weight_N, out)


def read_arrival(
    codec: Codec, data: torch.Tensor, num_vectors: int, dtype: torch.dtype, *, num_slots: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return vectors [V, H], vector and slot of each pair, int64 [N], and gate weights of a dispatch message.

    num_slots: of all ranks. first_slot: slots are counted from it.
    """
    vectors, code_N, weight_N = unpack_dispatch(codec, data, num_vectors, dtype)
    code_N = code_N.long()
    return vectors, code_N // num_slots, code_N % num_slots - first_slot, weight_N


def add_returned(codec: Codec, data: torch.Tensor, rows_V: torch.Tensor, sums_TH: torch.Tensor) -> None:
    """Add the vectors of a combine message to the rows of the tokens that they belong to."""
    sums_TH.index_add_(0, rows_V, codec.read(data, sums_TH.dtype))


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How vectors travel: their dtypes, and the (vector, expert) pairs that a dispatch has of each vector."""

    dispatch_dtype: Dtype
    combine_dtype: Dtype
    pairs_per_vector: int


def dispatch_bytes(codec: Codec, num_vectors: int, num_pairs: int) -> int:
    """Return the size of a dispatch message."""
    return num_vectors * codec.vector_bytes + 8 * num_pairs


def pack_dispatch(
    codec: Codec, vectors_VH: torch.Tensor, code_N: torch.Tensor, weight_N: torch.Tensor, out: torch.Tensor
) -> None:
    """Write a dispatch into `out` (uint8, exactly its size)."""
    split, num_pairs = len(vectors_VH) * codec.vector_bytes, len(code_N)
    codec.write(vectors_VH, out[:split])
    _part(out, split, num_pairs).copy_(code_N.to(torch.int32).view(torch.uint8))
    _part(out, split + 4 * num_pairs, num_pairs).copy_(weight_N.float().contiguous().view(torch.uint8))


def unpack_dispatch(
    codec: Codec, data: torch.Tensor, num_vectors: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return vectors [V, H], codes int32 [N] and gate weights float32 [N] of a dispatch message."""
    split = num_vectors * codec.vector_bytes
    num_pairs = (len(data) - split) // 8
    codes = _part(data, split, num_pairs).clone().view(torch.int32)
    weights = _part(data, split + 4 * num_pairs, num_pairs).clone().view(torch.float32)
    return codec.read(data[:split], dtype), codes, weights


def _part(data: torch.Tensor, start: int, num_values: int) -> torch.Tensor:
    return data[start : start + 4 * num_values]
