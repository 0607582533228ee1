"""`VisionTower`: a ViT and its projector on seeded random pixels.

Shapes: I images, S patches with class tokens of an image, W hidden size of the ViT, A heads.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention

from epsim.measure.weights import NO_LAYER, Weights
from epsim.model import VisionEncoder

HEAD_SIZE = 64  # of every ViT in use; another size only where it does not divide the width


class VisionTower:
    """Layers as of CLIP (pre-norm, GELU), pixel shuffle, Linear-GELU-Linear."""

    def __init__(self, shape: VisionEncoder, weights: Weights) -> None:
        self._shape, self._weights = shape, weights
        width, patch = shape.hidden_size, 3 * shape.patch_size**2
        self._num_heads = width // HEAD_SIZE if width % HEAD_SIZE == 0 else 1
        draw = weights.matrix
        self._patches = draw(NO_LAYER, "patches", width, 3, shape.patch_size, shape.patch_size, fan_in=patch)
        self._class_SW = draw(NO_LAYER, "class tokens", shape.num_class_tokens, width, fan_in=1)
        sequence = shape.num_patches + shape.num_class_tokens
        self._positions_SW = draw(NO_LAYER, "positions", sequence, width, fan_in=1)
        self._layers = [_Layer(shape, weights, layer) for layer in range(shape.num_layers)]
        wide = width * shape.pixel_shuffle_factor**2
        self._project_in = draw(NO_LAYER, "projector in", shape.output_size, wide, fan_in=wide)
        self._project_out = draw(
            NO_LAYER, "projector out", shape.output_size, shape.output_size, fan_in=shape.output_size
        )
        self._pixels = torch.zeros(0, device=weights.device)

    def pixels(self, num_images: int) -> Tensor:
        """Return [I, 3, side, side] random pixels; image i is the same however many there are. Kept for next time."""
        have, side = len(self._pixels), self._shape.image_size
        if have < num_images:
            drawn = [
                self._weights.matrix(NO_LAYER, "pixels", 3, side, side, fan_in=1, expert=image)
                for image in range(have, num_images)
            ]
            self._pixels = torch.cat([*([self._pixels] if have else []), torch.stack(drawn)])
        return self._pixels[:num_images]

    def __call__(self, num_images: int) -> Tensor:
        """Return [I * tokens_per_image, hidden size of the decoder]."""
        if not num_images:
            return self._project_out.new_zeros(0, self._shape.output_size)
        patches = conv2d(self.pixels(num_images), self._patches, stride=self._shape.patch_size)
        patches_ISW = patches.flatten(2).transpose(1, 2)
        classes_ISW = self._class_SW.expand(num_images, -1, -1)
        hidden_ISW = torch.cat([classes_ISW, patches_ISW], dim=1) + self._positions_SW
        for layer in self._layers:
            hidden_ISW = layer(hidden_ISW, self._num_heads)
        tokens = self._shuffled(hidden_ISW[:, self._shape.num_class_tokens :])
        return linear(gelu(linear(tokens, self._project_in)), self._project_out).flatten(0, 1)

    def _shuffled(self, patches_ISW: Tensor) -> Tensor:
        """Merge squares of patches into one token each: factor times factor patches after one another."""
        factor = self._shape.pixel_shuffle_factor
        side = self._shape.image_size // self._shape.patch_size
        if factor == 1:
            return patches_ISW
        grid = patches_ISW.view(len(patches_ISW), side // factor, factor, side // factor, factor, -1)
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)


class _Layer:
    def __init__(self, shape: VisionEncoder, weights: Weights, layer: int) -> None:
        width, ffn = shape.hidden_size, shape.ffn_size
        self._qkv = weights.matrix(layer, "vision qkv", 3 * width, width, fan_in=width)
        self._out = weights.matrix(layer, "vision out", width, width, fan_in=width)
        self._up = weights.matrix(layer, "vision up", ffn, width, fan_in=width)
        self._down = weights.matrix(layer, "vision down", width, ffn, fan_in=ffn)
        self._norms = [weights.norm(layer, f"vision norm {part}", width) for part in (0, 1)]

    def __call__(self, hidden_ISW: Tensor, num_heads: int) -> Tensor:
        normed = self._normed(hidden_ISW, 0)
        qkv_IS3AD = linear(normed, self._qkv).view(*hidden_ISW.shape[:2], 3, num_heads, -1)
        q_IASD, k_IASD, v_IASD = qkv_IS3AD.permute(2, 0, 3, 1, 4).unbind()
        seen_IASD = scaled_dot_product_attention(q_IASD, k_IASD, v_IASD)
        hidden_ISW = hidden_ISW + linear(seen_IASD.transpose(1, 2).flatten(2), self._out)
        return hidden_ISW + linear(gelu(linear(self._normed(hidden_ISW, 1), self._up)), self._down)

    def _normed(self, hidden_ISW: Tensor, part: int) -> Tensor:
        weight_W = self._norms[part]
        return layer_norm(hidden_ISW, weight_W.shape, weight_W)
