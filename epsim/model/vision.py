"""The vision side of a model card: `VisionEncoder`, a ViT and its projector.

One multiply-add is 2 FLOPs; biases, norms, softmax and activations are ignored.
"""

from dataclasses import dataclass

from epsim.errors import ScenarioError
from epsim.model._sizes import check_sizes


@dataclass(frozen=True, kw_only=True)
class VisionEncoder:
    """A ViT and the projector Linear-GELU-Linear from its patches to `output_size`, for one image or tile.

    `num_layers` are the layers that run; `pixel_shuffle_factor` patches per side are merged into one token,
    which widens the projector's input by its square.
    """

    name: str
    image_size: int
    patch_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    output_size: int
    num_class_tokens: int = 1
    pixel_shuffle_factor: int = 1
    weight_dtype_bytes: float = 2.0

    def __post_init__(self) -> None:
        check_sizes(self, "model.vision.", "num_class_tokens")
        if self.image_size % (self.patch_size * self.pixel_shuffle_factor):
            raise ScenarioError(
                f"model.vision.image_size: {self.image_size} is not a multiple of patch_size "
                f"{self.patch_size} x pixel_shuffle_factor "
                f"{self.pixel_shuffle_factor}; write the pixels per side of its input"
            )

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens of one image that enter the language model (class tokens do not)."""
        return int(self.num_patches // self.pixel_shuffle_factor**2)

    @property
    def _layer_params(self) -> int:
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_size

    @property
    def _patch_embedding_params(self) -> int:
        return 3 * self.patch_size**2 * self.hidden_size

    @property
    def _projector_params(self) -> int:
        return int(self.output_size * (self.hidden_size * self.pixel_shuffle_factor**2 + self.output_size))

    @property
    def encoder_num_params(self) -> int:
        """Weights of the ViT: layers, patch embedding, position and class embeddings."""
        positions = (self.num_patches + 2 * self.num_class_tokens) * self.hidden_size
        return self.num_layers * self._layer_params + self._patch_embedding_params + positions

    @property
    def num_params(self) -> int:
        """Weights of the ViT and the projector."""
        return self.encoder_num_params + self._projector_params

    @property
    def weight_bytes(self) -> float:
        """Bytes of the ViT and the projector."""
        return self.num_params * self.weight_dtype_bytes

    @property
    def encoder_flops_per_image(self) -> int:
        """FLOPs of the ViT for one image.

        With S = patches + class tokens, H = hidden_size, F = ffn_size, p = patch_size:
        num_layers * (2 S (4 H² + 2 H F) + 4 S² H) + 2 * patches * 3 p² H.
        """
        sequence = self.num_patches + self.num_class_tokens
        layer = 2 * sequence * self._layer_params + 4 * sequence**2 * self.hidden_size
        return self.num_layers * layer + 2 * self.num_patches * self._patch_embedding_params

    @property
    def flops_per_image(self) -> int:
        """FLOPs of the ViT and the projector for one image: the ViT's and 2 * tokens * (H f² D + D²).

        f = pixel_shuffle_factor, D = output_size; H f² is the width of a token after the shuffle.
        """
        return self.encoder_flops_per_image + 2 * self.tokens_per_image * self._projector_params
