"""From text and images to what a model takes: `Processor`, `Encoded`, `load_processor`.

Shapes: S prompt tokens, A tokens of an answer, I images.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from epsim.capture.model import MoeModel
from epsim.capture.models.byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from epsim.capture.models.checkpoint import one_line
from epsim.capture.models.device import quiet
from epsim.capture.models.tiktoken_file import is_moonshot, moonshot_tokenizer
from epsim.errors import InputError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A prompt as a model takes it, on the CPU.

    Attributes:
        token_ids: int64 [S]; each image is as many image tokens as the model has features of it.
        pixel_values: float32 [images, 3, height, width], in the order of the image tokens; None without images.
    """

    token_ids: Tensor
    pixel_values: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Processor:
    """Tokenizer and image processor of a model.

    Attributes:
        tokenizer: of the checkpoint, or of bytes.
        image_processor: None for a text model.
        image_token_id: stands for an image patch; None for a text model.
        image_size: pixels per side that the vision encoder takes; 0 for a text model.
        tokens_per_image: image tokens per image; 0 for a text model.
        vocab_size: ids that the model embeds.
        eos_token_ids: end generation; empty for random weights, which do not know when to stop.
        chat_template: turns a prompt into a user's turn; None leaves prompts as they are.
        origin: where it comes from, as JSON takes it; goes into the trace.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    image_token_id: int | None
    image_size: int
    tokens_per_image: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    chat_template: str | None
    origin: dict[str, Any]

    def encode(self, text: str, images: Sequence[Image.Image] = ()) -> Encoded:
        """Return the prompt's tokens and pixels.

        `<image>` in the text says where an image goes. Without any, the images come first, each on a line of its own,
        as LLaVA has it. Then the chat template is applied, if there is one.
        Raises InputError if the placeholders are not as many as the images, if a text model gets an image, and if
        the prompt is empty.
        """
        return Encoded(token_ids=self.tokens(text, len(images)), pixel_values=self.pixels(images) if images else None)

    def tokens(self, text: str, num_images: int = 0) -> Tensor:
        """Return the tokens of a prompt with that many images, int64 [S]; as `encode`, which raises the same."""
        self._require_vision(num_images)
        if num_images and IMAGE_TOKEN not in text:
            text = f"{IMAGE_TOKEN}\n" * num_images + text
        if (placeholders := text.count(IMAGE_TOKEN)) != num_images:
            raise InputError(
                f"prompt: {placeholders} x {IMAGE_TOKEN} for {num_images} images; write it as often as there are "
                "images, or not at all"
            )
        if self.chat_template is not None:
            text = self._turn(text)
        if self.image_token_id is not None:
            one_image = str(self.tokenizer.convert_ids_to_tokens(self.image_token_id)) * self.tokens_per_image
            text = text.replace(IMAGE_TOKEN, one_image)
        with quiet():
            ids = self.tokenizer(text, add_special_tokens=self._lacks_bos(text))["input_ids"]
        token_ids = torch.tensor(ids, dtype=torch.int64)
        self._check(token_ids, num_images)
        return token_ids

    def answer_tokens(self, answer: str) -> Tensor:
        """Return the tokens of what the model is to say, int64 [A]: no beginning of sequence, but its end.

        Raises InputError if the tokenizer has no end-of-sequence token, and for tokens that the model cannot say.
        """
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise InputError("answer: the checkpoint's tokenizer has no end-of-sequence token; give it an eos_token")
        ids = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], eos]
        if self.image_token_id in ids:
            raise InputError(f"answer: has an image token; leave {IMAGE_TOKEN} out, a model answers in text")
        if (largest := max(ids)) >= self.vocab_size:
            raise self._not_embedded("answer", largest)
        return torch.tensor(ids, dtype=torch.int64)

    def _not_embedded(self, what: str, token_id: int) -> InputError:
        return InputError(
            f"{what}: the tokenizer gives id {token_id}, and the model embeds {self.vocab_size} ids; "
            "write a checkpoint whose tokenizer belongs to it"
        )

    def _require_vision(self, num_images: int) -> None:
        if num_images and self.image_token_id is None:
            raise InputError(f"prompt: {num_images} images for a model that takes text only; leave them out")

    def _lacks_bos(self, text: str) -> bool:
        """As transformers has it: a text model's template writes all special tokens, LLaVA's leaves <bos> out."""
        bos = self.tokenizer.bos_token
        complete = self.chat_template is not None and self.image_token_id is None
        return not complete and not (bos is not None and text.startswith(bos))

    def _check(self, token_ids: Tensor, num_images: int) -> None:
        if not len(token_ids):
            raise InputError("prompt: is empty; write some text")
        if (largest := int(token_ids.max())) >= self.vocab_size:
            raise self._not_embedded("prompt", largest)
        found = 0 if self.image_token_id is None else int(token_ids.eq(self.image_token_id).sum())
        if found != (wanted := num_images * self.tokens_per_image):
            raise InputError(
                f"prompt: has {found} image tokens where {num_images} images need {wanted}; leave image tokens out of "
                f"the text, and use a checkpoint whose tokenizer knows {IMAGE_TOKEN}"
            )

    def _turn(self, text: str) -> str:
        """Return the text as a user's turn, whichever form of message the template takes: plain, or a list of parts."""
        for content in (text, [{"type": "text", "text": text}]):
            try:
                rendered = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            except Exception:  # a template may raise whatever it likes at the form that it does not take
                continue
            if text.strip() in rendered and rendered.count("{'type'") == text.count("{'type'"):
                return str(rendered)
        raise InputError("prompt: the checkpoint's chat template does not render it; mend or remove the template")

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the pixels of one image or more, float32 [I, 3, height, width]; many at once are faster."""
        self._require_vision(len(images))
        converted = [image.convert("RGB") for image in images]
        with quiet():
            pixels: Tensor = self.image_processor(images=converted, return_tensors="pt")["pixel_values"]
        if tuple(pixels.shape[-2:]) != (self.image_size, self.image_size):
            raise InputError(
                f"images: the image processor makes {pixels.shape[-1]} x {pixels.shape[-2]} pixels, and the model "
                f"takes {self.image_size} x {self.image_size}; mend preprocessor_config.json of the checkpoint"
            )
        return pixels.to(torch.float32)


def load_processor(model: MoeModel) -> Processor:
    """Return what encodes prompts for a model: of its checkpoint, or of bytes and CLIP if its weights were drawn.

    The checkpoint's chat template is applied where it has one, so that an instruction model is asked as it was
    trained, and LLaVA gets "USER: ... ASSISTANT:".

    Raises InputError if the checkpoint lacks a tokenizer, or for one that comes as remote code.
    """
    with quiet():
        return _of_bytes(model) if model.folder is None else _of_checkpoint(model, model.folder)


def num_image_tokens(model: MoeModel) -> int:
    """Return the features of one image: its patches, with the class token if the model keeps it; 0 for a text model."""
    if not model.is_vlm:
        return 0
    vision = model.module.config.vision_config
    class_tokens = 1 if vision.model_type == "clip_vision_model" else 0
    dropped = 1 if model.module.config.vision_feature_select_strategy == "default" else 0
    return int((vision.image_size // vision.patch_size) ** 2) + class_tokens - dropped


def _shapes(model: MoeModel) -> dict[str, Any]:
    return {
        "image_token_id": model.image_token_id,
        "image_size": int(model.module.config.vision_config.image_size) if model.is_vlm else 0,
        "tokens_per_image": num_image_tokens(model),
        "vocab_size": int(model.decoder.get_input_embeddings().num_embeddings),
    }


def _of_bytes(model: MoeModel) -> Processor:
    shapes = _shapes(model)
    size = shapes["image_size"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return Processor(
        tokenizer=byte_tokenizer(shapes["vocab_size"], model.image_token_id),
        image_processor=image_processor if model.is_vlm else None,
        eos_token_ids=frozenset(),
        chat_template=None,
        origin={"tokenizer": "bytes", "chat_template": False},
        **shapes,
    )


def _of_checkpoint(model: MoeModel, folder: Path) -> Processor:
    shapes = _shapes(model)
    tokenizer = _tokenizer(folder, shapes["vocab_size"])
    template = _template(tokenizer, folder)
    return Processor(
        tokenizer=tokenizer,
        image_processor=_image_processor(folder) if model.is_vlm else None,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        chat_template=template,
        origin={"tokenizer": "checkpoint", "files_sha256": _sha256(folder), "chat_template": template is not None},
        **shapes,
    )


def _tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    if is_moonshot(folder):
        return moonshot_tokenizer(folder, vocab_size)
    _check_tokenizer_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded; put its tokenizer.json into the folder ({one_line(error, 160)})"
        ) from error
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """transformers would give an empty tokenizer for a missing one."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(f"{folder}: has no tokenizer; put its tokenizer.json into the folder")
    settings = folder / "tokenizer_config.json"
    own_code = settings.is_file() and b'"auto_map"' in settings.read_bytes()
    if own_code and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder}: its tokenizer is code of its own, which is not run; put a tokenizer.json into the folder, as "
            "save_pretrained of a fast tokenizer writes it"
        )


def _image_processor(folder: Path) -> Any:
    """The variant on Pillow, also where torchvision is installed: both round differently, and a trace should not.

    The class is taken from its module: transformers 5.17 itself gives a stand-in for it where torchvision is missing.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{folder}: its image processor cannot be loaded; put a preprocessor_config.json into the folder "
            f"({one_line(error, 160)})"
        ) from error


def _template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """The chat template: of the tokenizer, or as LLaVA's checkpoints have it, of the processor."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    if isinstance(tokenizer.chat_template, dict):
        return tokenizer.chat_template.get("default")
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    if (file := folder / "chat_template.json").is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    return None


def _eos_token_ids(model: MoeModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    found: set[int] = set()
    generation = getattr(model.module, "generation_config", None)
    for holder in (tokenizer, model.decoder.config, generation):
        ids = getattr(holder, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and ("token" in path.name or "process" in path.name or "chat_template" in path.name):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
