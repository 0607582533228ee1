"""Messages as bytes: `Codec` for hidden vectors, `pack_dispatch`, `unpack_dispatch`.

A dispatch is vectors, then an int32 code per pair (vector * slots of all ranks + physical expert), then a float32 gate
weight per pair: the bytes that `epsim.traffic.MessageFormat` counts. A combine is vectors alone. V vectors, N pairs,
H hidden size.
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
