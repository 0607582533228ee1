"""Requests as the model takes them: `EncodedRequest`, and many of them padded on the left, `Batch`.

`encode_prompts` and `batches` are lazy: only the images of the batch that is asked for are in memory; with `ahead`
also those of the next.
Shapes: B requests of a batch, S tokens of a prompt, or columns of a batch; I images.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from epsim.capture.prompts.requests import Prompt, RequestError, check_max_new_tokens
from epsim.errors import InputError

PAD_TOKEN_ID, OTHER_PAD_TOKEN_ID = 0, 1  # the other where the first is the image token
BLANK = Image.new("RGB", (32, 32))


class Encoded(Protocol):
    """A prompt in the model's vocabulary."""

    @property
    def token_ids(self) -> Any:
        """int64 [S], tensor or NumPy; an image is as many image tokens as the model makes of it."""

    @property
    def pixel_values(self) -> Tensor | None:
        """float32 [I, 3, height, width], or None without images."""


class Encoder(Protocol):
    """What turns a prompt into tokens: a `Processor`."""

    @property
    def image_token_id(self) -> int | None:
        """The id that stands for an image patch; None for a text model."""

    def encode(self, text: str, images: Sequence[Image.Image]) -> Encoded:
        """Return text and images in the model's vocabulary; raises InputError if they do not fit together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRequest:
    """One request on the host.

    Attributes:
        request_id: its number in the trace.
        token_ids_S: int64 [S], the prompt.
        is_text_S: bool [S], False where a token stands for an image patch.
        pixel_values: float32 [I, 3, height, width], in the order of the image tokens, or None without images.
        max_new_tokens: output tokens, 1 or more.
    """

    request_id: int
    token_ids_S: Tensor
    is_text_S: Tensor
    pixel_values: Tensor | None
    max_new_tokens: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, S."""
        return len(self.token_ids_S)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Requests that run together. What ends in _BS, and the pixels, are on the model's device, all else on the host.

    Attributes:
        request_ids_B: int32 [B], numbers in the trace.
        token_ids_BS: int64 [B, S], padded on the left, never with the image token.
        is_token_BS: bool [B, S], False for padding.
        is_text_BS: bool [B, S], False where a token stands for an image patch; padding counts as text.
        pixel_values: [I, 3, height, width], request by request, or None if none has an image.
        num_prompt_tokens_B: int64 [B].
        max_new_tokens_B: int64 [B], output tokens, each 1 or more.
    """

    request_ids_B: NDArray[np.int32]
    token_ids_BS: Tensor
    is_token_BS: Tensor
    is_text_BS: Tensor
    pixel_values: Tensor | None
    num_prompt_tokens_B: Tensor
    max_new_tokens_B: Tensor

    @property
    def has_padding(self) -> bool:
        """Whether the prompts differ in length."""
        return bool((self.num_prompt_tokens_B != self.token_ids_BS.shape[1]).any())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; see `moved`."""
        pixel_values = self.pixel_values
        return replace(
            self,
            token_ids_BS=moved(self.token_ids_BS, device),
            is_token_BS=moved(self.is_token_BS, device),
            is_text_BS=moved(self.is_text_BS, device),
            pixel_values=None if pixel_values is None else moved(pixel_values, device),
        )


def encode_prompts(
    prompts: Iterable[Prompt], encoder: Encoder, *, default_max_new_tokens: int, max_tokens: int | None = None
) -> Iterator[EncodedRequest]:
    """Return the prompts as requests 0, 1, …, each encoded when it is asked for.

    Args:
        default_max_new_tokens: of prompts that do not say.
        max_tokens: the model's context: prompt and output tokens of a request together; None for no limit.

    Raises RequestError, with the prompt's name, for one that is too long or that the encoder refuses; and at once for
    a wrong `default_max_new_tokens`. `check_prompts` finds these before anything runs.
    """
    check_max_new_tokens(default_max_new_tokens, "max_new_tokens")
    return (
        _encode(index, prompt, encoder, default_max_new_tokens, max_tokens, blank=False)
        for index, prompt in enumerate(prompts)
    )


def check_prompts(
    prompts: Iterable[Prompt], encoder: Encoder, *, default_max_new_tokens: int, max_tokens: int | None = None
) -> None:
    """Raise what `encode_prompts` would of lengths and placeholders, with a blank picture in place of each image.

    Takes a model that makes the same number of tokens of every image, as LLaVA-1.5 does.
    """
    check_max_new_tokens(default_max_new_tokens, "max_new_tokens")
    for index, prompt in enumerate(prompts):
        _encode(index, prompt, encoder, default_max_new_tokens, max_tokens, blank=True)


def batches(requests: Iterable[EncodedRequest], batch_size: int) -> Iterator[Batch]:
    """Return the requests in their order, `batch_size` at a time, the last batch with what is left; on the host."""
    if batch_size < 1:
        raise RequestError(f"batch size: {batch_size} must be 1 or more")
    remaining = iter(requests)
    return (_batch(group) for group in iter(lambda: list(islice(remaining, batch_size)), []))


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Return the batches, each made by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, "encoder") as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch


def _encode(
    index: int, prompt: Prompt, encoder: Encoder, default_max_new_tokens: int, max_tokens: int | None, *, blank: bool
) -> EncodedRequest:
    if prompt.images and encoder.image_token_id is None:
        raise RequestError(
            f"{prompt.name}: has an image, and the model reads none; ask without images (--builtin text), or take a "
            "vision-language model"
        )
    try:
        encoded = encoder.encode(prompt.text, [BLANK if blank else image.open() for image in prompt.images])
    except InputError as error:
        raise RequestError(f"{prompt.name}: {error}") from error
    token_ids_S = torch.as_tensor(encoded.token_ids, dtype=torch.int64)
    max_new_tokens = default_max_new_tokens if prompt.max_new_tokens is None else prompt.max_new_tokens
    _check_length(prompt.name, len(token_ids_S), max_new_tokens, max_tokens)
    return EncodedRequest(
        request_id=index,
        token_ids_S=token_ids_S,
        is_text_S=token_ids_S != (-1 if encoder.image_token_id is None else encoder.image_token_id),
        pixel_values=encoded.pixel_values,
        max_new_tokens=max_new_tokens,
    )


def _check_length(name: str, num_prompt_tokens: int, max_new_tokens: int, max_tokens: int | None) -> None:
    if num_prompt_tokens == 0:
        raise RequestError(f"{name}: has no tokens; write a text")
    if max_tokens is not None and num_prompt_tokens + max_new_tokens > max_tokens:
        raise RequestError(
            f"{name}: {num_prompt_tokens} prompt tokens and {max_new_tokens} new ones must be at most {max_tokens} "
            "together, the model's context; ask for fewer new tokens, or give shorter prompts (--requests)"
        )


def _batch(requests: Sequence[EncodedRequest]) -> Batch:
    longest = max(request.num_prompt_tokens for request in requests)
    token_ids_BS = torch.full((len(requests), longest), _pad_token_id(requests), dtype=torch.int64)
    is_token_BS = torch.zeros_like(token_ids_BS, dtype=torch.bool)
    is_text_BS = torch.ones_like(is_token_BS)
    for row, request in enumerate(requests):
        columns = slice(longest - request.num_prompt_tokens, longest)
        token_ids_BS[row, columns] = request.token_ids_S
        is_token_BS[row, columns] = True
        is_text_BS[row, columns] = request.is_text_S
    pixels = [request.pixel_values for request in requests if request.pixel_values is not None]
    return Batch(
        request_ids_B=np.array([request.request_id for request in requests], dtype=np.int32),
        token_ids_BS=token_ids_BS,
        is_token_BS=is_token_BS,
        is_text_BS=is_text_BS,
        pixel_values=torch.cat(pixels) if pixels else None,
        num_prompt_tokens_B=torch.tensor([request.num_prompt_tokens for request in requests]),
        max_new_tokens_B=torch.tensor([request.max_new_tokens for request in requests]),
    )


def _pad_token_id(requests: Sequence[EncodedRequest]) -> int:
    is_image = any((request.token_ids_S[~request.is_text_S] == PAD_TOKEN_ID).any() for request in requests)
    return OTHER_PAD_TOKEN_ID if is_image else PAD_TOKEN_ID


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`; copies to CUDA go through pinned memory, and the host does not wait."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
