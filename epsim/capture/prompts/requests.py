"""What is asked of the model: `Prompt`, many of them, `PromptSet`, and a file of them, `read_prompts`.

The file holds one JSON object per line:

    {"text": "What is this?", "image": "cat.png"}
    {"text": "What changed?", "images": ["before.png", "after.png"], "max_new_tokens": 64}
    {"text": "2 + 3 =", "answer": "5"}

Paths of images are relative to the file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from epsim.capture.prompts.images import ImageError, ImageFile, ImageSource
from epsim.errors import InputError
from epsim.scenario.describe import did_you_mean

MAX_NEW_TOKENS = 2**31 - 1  # steps and positions of a trace are int32
_EXAMPLE = '{"text": "What is this?", "image": "cat.png"}'
_ADDRESSES = ("http://", "https://", "data:")
_KEYS = ("text", "image", "images", "max_new_tokens", "answer")


class RequestError(InputError):
    """What is to be asked of the model is wrong: edit the file of prompts, or the option."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one request asks.

    Attributes:
        text: as the user writes it; "" only with images.
        images: in the order in which the prompt shows them; not in memory.
        max_new_tokens: output tokens; None for the default of the run.
        name: where it is from, for messages.
        answer: the right one where it is definite: what training learns. In a capture the model does not see it.
    """

    text: str
    images: tuple[ImageSource, ...] = ()
    max_new_tokens: int | None = None
    name: str = "prompt"
    answer: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip() and not self.images:
            raise RequestError(f"{self.name}: text: {self.text!r} is empty; write what to ask, or name an image")
        if self.max_new_tokens is not None:
            check_max_new_tokens(self.max_new_tokens, f"{self.name}: max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class PromptSet(Sequence[Prompt]):
    """Prompts in order, and where they are from; a slice of it is one too.

    Attributes:
        prompts: light objects: their images are not in memory.
        source: how to get the prompts again; goes into the trace.
    """

    prompts: tuple[Prompt, ...]
    source: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "PromptSet": ...
    def __getitem__(self, index: int | slice) -> "Prompt | PromptSet":
        return replace(self, prompts=self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def describe(self) -> dict[str, Any]:
        """Return what a trace says of the prompts, for JSON.

        The keys of `source`, then `num_requests`, `num_images`, and `sha256` of all that the model is asked: texts,
        numbers of new tokens, and the pixels or the files of the images, in order.
        """
        digest = hashlib.sha256()
        for prompt in self.prompts:
            asked = [prompt.text, prompt.max_new_tokens, [image.identity for image in prompt.images]]
            digest.update(json.dumps(asked).encode() + b"\n")
        num_images = sum(len(prompt.images) for prompt in self.prompts)
        counts = {"num_requests": len(self), "num_images": num_images}
        return {**self.source, **counts, "sha256": digest.hexdigest()}


def read_prompts(path: Path) -> PromptSet:
    """Return the prompts of a JSONL file; every image is read and decoded once, and none is kept in memory.

    UTF-8, with or without byte-order mark; empty lines are left out. Raises RequestError with file and line, at the
    first thing that is wrong.
    """
    content = _read(path)
    reader = _LineReader(path)
    lines = enumerate(_decode(path, content).split("\n"), start=1)
    prompts = tuple(reader.prompt(f"{path}:{number}", line) for number, line in lines if line.strip())
    if not prompts:
        raise RequestError(f"{path}: holds no prompts; write one per line, e.g. {_EXAMPLE}")
    source = {"source": "file", "file": path.name, "file_sha256": hashlib.sha256(content).hexdigest()}
    return PromptSet(prompts=prompts, source=source)


def check_max_new_tokens(value: object, field: str) -> None:
    """Raise RequestError unless `value` is an integer that can be a number of output tokens."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_NEW_TOKENS:
        raise RequestError(f"{field}: {_shown(value)} must be an integer from 1 to {MAX_NEW_TOKENS}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}; write the path of a JSONL file") from error


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}:{line}: is not UTF-8; save the file in UTF-8") from error


class _LineReader:
    """Turns lines into prompts; an image that many lines name is checked once."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        self._checked: dict[str, ImageFile] = {}

    def prompt(self, place: str, line: str) -> Prompt:
        fields = _fields(place, line)
        if "max_new_tokens" in fields:
            check_max_new_tokens(fields["max_new_tokens"], f"{place}: max_new_tokens")
        return Prompt(
            text=_text(place, fields),
            images=tuple(self._image(place, name) for name in _image_names(place, fields)),
            max_new_tokens=fields.get("max_new_tokens"),
            name=place,
            answer=_answer(place, fields),
        )

    def _image(self, place: str, name: str) -> ImageFile:
        if name.startswith(_ADDRESSES):
            raise RequestError(f"{place}: image {_shown(name)} is an address; write the path of a file")
        if name not in self._checked:
            try:
                self._checked[name] = ImageFile.check(self._folder / name)
            except ImageError as error:
                raise RequestError(f"{place}: {error}") from error
        return self._checked[name]


def _fields(place: str, line: str) -> dict[str, Any]:
    try:
        pairs = json.loads(line, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RequestError(f"{place}: is not JSON ({where}); write one object per line, e.g. {_EXAMPLE}") from error
    if not line.lstrip().startswith("{"):
        raise RequestError(f"{place}: {_shown(pairs)} is not an object; write e.g. {_EXAMPLE}")
    for key, _ in pairs:
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS) or f"the keys are {', '.join(_KEYS)}"
            raise RequestError(f"{place}: unknown key {_shown(key)}; {hint}")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RequestError(f"{place}: a key is there twice in {_shown(line)}; write each once")
    return fields


def _text(place: str, fields: dict[str, Any]) -> str:
    has_image = fields.keys() & {"image", "images"}
    if "text" not in fields and not has_image:
        raise RequestError(f'{place}: "text" is missing; write what to ask, e.g. {_EXAMPLE}')
    return _string(place, "text", fields.get("text", ""))


def _answer(place: str, fields: dict[str, Any]) -> str | None:
    if "answer" not in fields:
        return None
    answer = _string(place, "answer", fields["answer"])
    if not answer.strip():
        raise RequestError(f'{place}: answer: {_shown(answer)} is empty; write the right answer, or leave "answer" out')
    return answer


def _string(place: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{place}: {key}: {_shown(value)} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{place}: {key}: holds half of a surrogate pair; write whole characters") from error
    return value


def _image_names(place: str, fields: dict[str, Any]) -> Sequence[str]:
    if "image" in fields and "images" in fields:
        raise RequestError(f'{place}: has "image" and "images"; write all of them in "images"')
    if "image" in fields:
        if not isinstance(fields["image"], str) or not fields["image"]:
            raise RequestError(
                f'{place}: image: {_shown(fields["image"])} must be one path, in quotes; several go in "images"'
            )
        return (fields["image"],)
    names = fields.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RequestError(f'{place}: images: {_shown(names)} must be a list of paths, e.g. ["cat.png"]')
    return names


def _shown(value: object) -> str:
    """Return the value as JSON on one line, cut to a readable length."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
