"""From prompts to what a training step takes: `ExampleBatch`, `CellsBatch`; made by `encode_examples`, `encode_cells`.

Shapes: B samples, S columns, A tokens of an answer, I images, C cells of a scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epsim.capture.models.processor import Processor
from epsim.capture.prompts.batches import EncodedRequest, batches, moved
from epsim.capture.prompts.digits import DigitScene
from epsim.capture.prompts.requests import Prompt, RequestError
from epsim.capture.prompts.scenes import INK_NAMES
from epsim.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleBatch:
    """Prompts with their answers, padded on the left, on one device.

    Attributes:
        token_ids_BS: int64 [B, S], prompt, answer and the end-of-sequence token; padding is never the image token.
        is_token_BS: bool [B, S], False for padding.
        is_text_BS: bool [B, S], False where a token stands for an image patch; padding counts as text.
        is_answer_BS: bool [B, S], tokens to be predicted: the answer and the end-of-sequence token.
        pixel_values: float32 [I, 3, height, width], sample by sample, or None if none has an image.
    """

    token_ids_BS: Tensor
    is_token_BS: Tensor
    is_text_BS: Tensor
    is_answer_BS: Tensor
    pixel_values: Tensor | None

    def to(self, device: torch.device) -> "ExampleBatch":
        """Return the batch on `device`; see `moved`."""
        return replace(
            self,
            token_ids_BS=moved(self.token_ids_BS, device),
            is_token_BS=moved(self.is_token_BS, device),
            is_text_BS=moved(self.is_text_BS, device),
            is_answer_BS=moved(self.is_answer_BS, device),
            pixel_values=None if self.pixel_values is None else moved(self.pixel_values, device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class CellsBatch:
    """Scenes, one image each, and what is in their cells, row by row from the top left.

    Attributes:
        pixel_values: float32 [B, 3, height, width].
        digits_BC: int64 [B, C], 0 to 9.
        inks_BC: int64 [B, C], places in `INK_NAMES`.
    """

    pixel_values: Tensor
    digits_BC: Tensor
    inks_BC: Tensor

    def to(self, device: torch.device) -> "CellsBatch":
        """Return the batch on `device`; see `moved`."""
        return CellsBatch(
            pixel_values=moved(self.pixel_values, device),
            digits_BC=moved(self.digits_BC, device),
            inks_BC=moved(self.inks_BC, device),
        )


def encode_examples(prompts: Sequence[Prompt], processor: Processor) -> ExampleBatch:
    """Return prompts and answers in the model's vocabulary, on the host.

    A prompt is encoded as `Processor.encode` does, so that the model is asked in training as in a capture. Raises
    RequestError, with the prompt's name, where there is no answer, and where prompt or answer do not fit the model.
    """
    requests = [_request(index, prompt, processor) for index, prompt in enumerate(prompts)]
    batch = next(batches(requests, len(requests)))
    num_columns = batch.token_ids_BS.shape[1]
    num_answer_B = torch.tensor([request.max_new_tokens for request in requests])
    images = [image.open() for prompt in prompts for image in prompt.images]
    return ExampleBatch(
        token_ids_BS=batch.token_ids_BS,
        is_token_BS=batch.is_token_BS,
        is_text_BS=batch.is_text_BS,
        is_answer_BS=torch.arange(num_columns) >= num_columns - num_answer_B[:, None],
        pixel_values=processor.pixels(images) if images else None,
    )


def encode_cells(scenes: Sequence[DigitScene], processor: Processor) -> CellsBatch:
    """Return scenes and their cells, on the host; raises InputError if the model reads no images."""
    return CellsBatch(
        pixel_values=processor.pixels([scene.open() for scene in scenes]),
        digits_BC=torch.tensor([scene.digits for scene in scenes]),
        inks_BC=torch.tensor([[INK_NAMES.index(ink) for ink in scene.inks] for scene in scenes]),
    )


def require_answer(prompt: Prompt) -> str:
    """Return the answer; raises RequestError, with the prompt's name, if there is none."""
    if prompt.answer is None:
        raise RequestError(f'{prompt.name}: has no answer to learn; write "answer"')
    return prompt.answer


def _request(index: int, prompt: Prompt, processor: Processor) -> EncodedRequest:
    """Return prompt and answer as one request; its `max_new_tokens` are those of the answer, A. No pixels yet."""
    try:
        prompt_S = processor.tokens(prompt.text, len(prompt.images))
        answer_A = processor.answer_tokens(require_answer(prompt))
    except RequestError:
        raise
    except InputError as error:
        raise RequestError(f"{prompt.name}: {error}") from error
    token_ids_S = torch.cat((prompt_S, answer_A))
    return EncodedRequest(
        request_id=index,
        token_ids_S=token_ids_S,
        is_text_S=token_ids_S != (-1 if processor.image_token_id is None else processor.image_token_id),
        pixel_values=None,
        max_new_tokens=len(answer_A),
    )
