"""What a run asks of its model, to be gone through more than once: `Workload`, made by `make_workload`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsim.capture.model import MoeModel
from epsim.capture.models.processor import Processor
from epsim.capture.options import NUM_REQUESTS, CaptureOptions
from epsim.capture.prompts.batches import EncodedRequest, check_prompts, encode_prompts
from epsim.capture.prompts.builtin import builtin_prompts
from epsim.capture.prompts.images import ImageFile
from epsim.capture.prompts.mock import MockImages, MockRequests
from epsim.capture.prompts.requests import read_prompts
from epsim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the model is asked, to be gone through more than once.

    Attributes:
        num, num_images: requests, and images in all of them.
        words: for people.
        provenance: for JSON; tells these requests from others.
        files: that are read for them.
        encoded: returns the requests, each encoded when it is asked for.
    """

    num: int
    num_images: int
    words: str
    provenance: dict[str, Any]
    files: tuple[Path, ...]
    encoded: Callable[[], Iterable[EncodedRequest]]


def make_workload(options: CaptureOptions, model: MoeModel, processor: Processor) -> Workload:
    """Return the requests of a run. Raises RequestError for a prompt that cannot be run, before anything does."""
    source = options.requests
    if source.mock:
        return _mock_workload(options, model, processor)
    if source.builtin is not None:
        prompts = builtin_prompts(source.builtin, source.num_requests or NUM_REQUESTS, source.seed)
        words, files = f"{len(prompts)} built-in {source.builtin}", set[Path]()
    else:
        assert source.path is not None
        prompts = read_prompts(Path(source.path))[: source.num_requests]
        words = f"{len(prompts)} of {source.path}"
        files = {image.path for prompt in prompts for image in prompt.images if isinstance(image, ImageFile)}
        files.add(Path(source.path))
    limits = {"default_max_new_tokens": options.max_new_tokens, "max_tokens": _context(model)}
    check_prompts(prompts, processor, **limits)
    provenance = prompts.describe()
    return Workload(
        num=len(prompts),
        num_images=provenance["num_images"],
        words=words,
        provenance=provenance,
        files=tuple(sorted(files)),
        encoded=lambda: encode_prompts(prompts, processor, **limits),
    )


def _mock_workload(options: CaptureOptions, model: MoeModel, processor: Processor) -> Workload:
    source = options.requests
    images = None
    if model.is_vlm and source.images:
        assert processor.image_token_id is not None
        images = MockImages(
            num_per_request=source.images,
            tokens_per_image=processor.tokens_per_image,
            pixels=processor.image_size,
            token_id=processor.image_token_id,
        )
    mock = MockRequests(
        num=source.num_requests or NUM_REQUESTS,
        seed=source.seed,
        text_tokens=source.text_tokens,
        max_new_tokens=options.max_new_tokens,
        vocab_size=processor.vocab_size,
        excluded_ids=frozenset(processor.tokenizer.all_special_ids),
        images=images,
    )
    num_tokens = source.text_tokens + (images.num_tokens if images else 0) + options.max_new_tokens
    if num_tokens > _context(model):
        raise InputError(
            f"--mock: requests of {num_tokens} tokens are longer than the model's context of {_context(model)}; "
            "write a smaller --text-tokens, --images or --max-new-tokens"
        )
    return Workload(
        num=mock.num,
        num_images=mock.num * (images.num_per_request if images else 0),
        words=f"{mock.num} of random tokens",
        provenance=mock.describe(),
        files=(),
        encoded=lambda: mock,
    )


def _context(model: MoeModel) -> int:
    return int(model.decoder.config.max_position_embeddings)
