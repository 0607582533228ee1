"""Requests that need no file and no network: `builtin_prompts`.

- `digits`: questions with one right answer about scenes of handwritten digits (`epsim.capture.prompts.digits`);
- `photos`: general questions about parts of photographs (`epsim.capture.prompts.photos`);
- `text`: passages, sums, words and programs, without an image (`epsim.capture.prompts.passages`);
- `mixed`: of every five prompts two digits, two photos and one text;
- `scenes`: of every five prompts four short questions about small scenes of digits and one about a scene in words, none
  of which `epsim.specialize` trains on (`epsim.capture.prompts.scenes`).
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from epsim.capture.prompts.digits import digit_prompt
from epsim.capture.prompts.passages import text_prompt
from epsim.capture.prompts.photos import photo_prompt
from epsim.capture.prompts.requests import Prompt, PromptSet, RequestError
from epsim.capture.prompts.scenes import scene_prompt, text_scene_prompt
from epsim.scenario.describe import did_you_mean

BUILTIN_KINDS = ("mixed", "digits", "photos", "text", "scenes")  # the place of each is part of its seed
_MIXED = ("photos", "digits", "photos", "digits", "text")
_SCENES = (scene_prompt, scene_prompt, scene_prompt, scene_prompt, text_scene_prompt)
_LIBRARIES = ("numpy", "pillow", "scikit-image", "scikit-learn")
_MAKERS: dict[str, Callable[[np.random.Generator, str], Prompt]] = {
    "digits": digit_prompt,
    "photos": photo_prompt,
    "text": text_prompt,
}


def builtin_prompts(kind: str, num: int, seed: int) -> PromptSet:
    """Return `num` prompts of a kind; the same for the same arguments, and the first of any larger number.

    Images are drawn or read when they are opened. Raises RequestError for an unknown kind, and for a number or a seed
    that is out of range; ImageError if a library lacks its pictures.
    """
    if kind not in BUILTIN_KINDS:
        hint = did_you_mean(kind, BUILTIN_KINDS) or f"write one of {', '.join(BUILTIN_KINDS)}"
        raise RequestError(f'"{kind}" is not a kind of built-in prompts; {hint}')
    check_num_and_seed(num, seed)
    source: dict[str, Any] = {"source": "builtin", "kind": kind, "seed": seed}
    source["libraries"] = {library: version(library) for library in _LIBRARIES}
    return PromptSet(prompts=tuple(_prompt(kind, index, seed) for index in range(num)), source=source)


def check_num_and_seed(num: int, seed: int) -> None:
    """Raise RequestError unless `num` is at least 1 and `seed` at least 0."""
    if num < 1:
        raise RequestError(f"number of requests: {num} must be 1 or more")
    if seed < 0:
        raise RequestError(f"seed: {seed} must be 0 or more")


def _prompt(kind: str, index: int, seed: int) -> Prompt:
    part = _MIXED[index % len(_MIXED)] if kind == "mixed" else kind
    rng = np.random.default_rng([seed, BUILTIN_KINDS.index(part), index])
    name = f"built-in {part} {index}"
    if part == "scenes":
        return _SCENES[index % len(_SCENES)](rng, name, held_out=True)
    return _MAKERS[part](rng, name)
