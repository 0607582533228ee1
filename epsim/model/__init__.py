"""Model cards: what the layers of a backbone weigh and cost, derived from their shapes. No torch.

`ModelCard` is one checkpoint; it holds a `GroupedQueryAttention` or a `LatentAttention`, a `Moe` unless the
model is dense, and a `VisionEncoder` if it sees images. `ModelCard.from_mapping` builds it from a mapping.

Conventions: one multiply-add is 2 FLOPs and only matrix products count. Norms, biases, rotary embedding,
softmax, activations and the router's correction bias are left out of FLOPs, bytes and parameters.
"""

from epsim.model.attention import Attention, GroupedQueryAttention, LatentAttention
from epsim.model.card import ModelCard, Moe
from epsim.model.vision import VisionEncoder

__all__ = ["Attention", "GroupedQueryAttention", "LatentAttention", "ModelCard", "Moe", "VisionEncoder"]
