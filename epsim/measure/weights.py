"""`Weights`: random weights of a decoder, each tensor from a generator of its own.

What a tensor holds follows from (seed, layer, part, expert), the kind of device and torch: so a rank's copy of an
expert equals every other's, and an expert that is not held is never drawn.
"""

import hashlib

import torch
from torch import Tensor

NO_LAYER = -1  # of weights that no layer owns


def key_of(seed: int, layer: int, part: str, expert: int = -1) -> int:
    """Return the seed of a tensor's generator, below 2^63."""
    text = f"{seed} {layer} {part} {expert}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Weights:
    """Draws the weights of one decoder onto its device."""

    def __init__(self, *, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self._seed = seed
        self.device = device
        self.dtype = dtype

    def matrix(self, layer: int, part: str, *shape: int, fan_in: int, expert: int = -1) -> Tensor:
        """Return normal numbers, drawn in float32, of deviation fan_in^-1/2: outputs are as large as inputs."""
        numbers = self._normal(layer, part, shape, expert)
        return numbers.mul_(fan_in**-0.5).to(self.dtype)

    def norm(self, layer: int, part: str, size: int) -> Tensor:
        """Return the factors of a norm: about 1."""
        return self._normal(layer, part, (size,), -1).mul_(0.1).add_(1.0).to(self.dtype)

    def _normal(self, layer: int, part: str, shape: tuple[int, ...], expert: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(key_of(self._seed, layer, part, expert))
        return torch.randn(shape, generator=generator, device=self.device)
