"""Requests of random tokens and random pixels: `MockRequests`, `MockImages`. A trace of them is marked mock.

They tell how fast a capture is, and not how a model routes: against real prompts, random tokens overstate the skew of
routing, by up to 2.35 times in arXiv:2605.20982.
Shapes: S tokens of a prompt, I images of a request.
"""

from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from epsim.capture.prompts.batches import EncodedRequest
from epsim.capture.prompts.builtin import check_num_and_seed
from epsim.capture.prompts.requests import RequestError, check_max_new_tokens


@dataclass(frozen=True, kw_only=True)
class MockImages:
    """Images whose pixels are standard normal, as those of photographs roughly are once they are normalised.

    Attributes:
        num_per_request: I, 1 or more.
        tokens_per_image: image tokens that the model makes of one.
        pixels: height and width.
        token_id: the image token.
    """

    num_per_request: int = 1
    tokens_per_image: int
    pixels: int
    token_id: int

    @property
    def num_tokens(self) -> int:
        """Image tokens of a request."""
        return self.num_per_request * self.tokens_per_image


@dataclass(frozen=True, kw_only=True)
class MockRequests:
    """Requests 0 to num - 1, drawn when they are asked for: the image tokens first, then text.

    Attributes:
        num: requests.
        seed: same seed, same requests, and the first of any larger number.
        text_tokens: of a prompt, drawn uniformly from the vocabulary.
        max_new_tokens: output tokens.
        vocab_size: ids are below this.
        excluded_ids: ids that are never drawn, e.g. those of special tokens; the image token never is.
        images: None for text only.
    """

    num: int
    seed: int
    text_tokens: int
    max_new_tokens: int
    vocab_size: int
    excluded_ids: Set[int] = field(default_factory=frozenset)
    images: MockImages | None = None

    def __post_init__(self) -> None:
        check_num_and_seed(self.num, self.seed)
        check_max_new_tokens(self.max_new_tokens, "max_new_tokens")
        if self.text_tokens < (1 if self.images is None else 0):
            raise RequestError(f"text tokens: {self.text_tokens} must be 1 or more, or 0 with images")
        if not len(self._text_ids):
            raise RequestError(f"vocabulary: none of its {self.vocab_size} ids is left to draw from; exclude fewer")

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[EncodedRequest]:
        return (self._request(request_id) for request_id in range(self.num))

    def describe(self) -> dict[str, Any]:
        """Return what a trace says of the requests, for JSON: all that it takes to draw them again."""
        fields = asdict(self) | {"excluded_ids": sorted(self.excluded_ids)}
        return {"source": "mock", "num_requests": fields.pop("num"), **fields, "numpy": np.__version__}

    @cached_property
    def _text_ids(self) -> NDArray[np.int64]:
        excluded = set(self.excluded_ids) | ({self.images.token_id} if self.images else set())
        return np.setdiff1d(np.arange(self.vocab_size), sorted(excluded))

    def _request(self, request_id: int) -> EncodedRequest:
        rng = np.random.default_rng([self.seed, request_id])
        num_image_tokens = self.images.num_tokens if self.images else 0
        token_ids_S = np.full(num_image_tokens + self.text_tokens, self.images.token_id if self.images else 0)
        token_ids_S[num_image_tokens:] = rng.choice(self._text_ids, self.text_tokens)
        pixel_values = None
        if self.images:
            shape = (self.images.num_per_request, 3, self.images.pixels, self.images.pixels)
            pixel_values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return EncodedRequest(
            request_id=request_id,
            token_ids_S=torch.from_numpy(token_ids_S),
            is_text_S=torch.arange(len(token_ids_S)) >= num_image_tokens,
            pixel_values=pixel_values,
            max_new_tokens=self.max_new_tokens,
        )
