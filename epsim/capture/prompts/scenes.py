"""Small questions about 2x2 scenes of digits, to learn from and to be tested on, which share nothing that matters.

`scene_prompt` shows a scene of `epsim.capture.prompts.digits`; of scikit-learn's images a fifth of each digit is held
out: no prompt to learn from shows one, and prompts to be tested on show no other. `text_scene_prompt` writes the scene
out; a fifth of all combinations of digits is held out. `text_only_prompt` mixes these with pieces of texts.
Questions and answers are short, as a model that reads bytes takes each letter for a token.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from epsim.capture.prompts.descriptions import description_prompt
from epsim.capture.prompts.digits import COLUMNS, INKS, ROWS, DigitScene, digit_images, digit_labels
from epsim.capture.prompts.requests import Prompt

SIDE = 2
NUM_CELLS = SIDE * SIDE
INK_NAMES = tuple(INKS)
SMALL_PIXELS = 64
ANSWER_TOKENS = 16  # the longest answer, "1 2 3 4", is 7 letters
HELD_OUT = 5  # one in five
_PLACES = tuple(f"{row} {column}" for row in ROWS[SIDE] for column in COLUMNS[SIDE])
_SALT = b"epsim held out"


class Cells(Protocol):
    """What is written where, row by row from the top left, and in which ink."""

    @property
    def digits(self) -> tuple[int, ...]:
        """0 to 9."""

    @property
    def inks(self) -> tuple[str, ...]:
        """Keys of `INKS`."""


@dataclass(frozen=True, kw_only=True)
class WrittenScene:
    """A scene in words."""

    digits: tuple[int, ...]
    inks: tuple[str, ...]

    def __str__(self) -> str:
        cells = [f"{digit} {ink}" for digit, ink in zip(self.digits, self.inks, strict=True)]
        return " / ".join(", ".join(cells[start : start + SIDE]) for start in range(0, NUM_CELLS, SIDE))


def scene_prompt(rng: np.random.Generator, name: str, held_out: bool) -> Prompt:
    """Return a question about a scene of random images, all held out or none; its answer is definite."""
    scene = random_scene(rng, held_out)
    question, answer = _ask(scene, rng)
    return Prompt(text=question, images=(scene,), max_new_tokens=ANSWER_TOKENS, name=name, answer=answer)


def text_scene_prompt(rng: np.random.Generator, name: str, held_out: bool) -> Prompt:
    """Return the same kind of question about a scene in words: "3 red, 5 blue / 2 green, 1 red. How many even?"."""
    combinations = _combinations(held_out)
    scene = WrittenScene(digits=combinations[int(rng.integers(len(combinations)))], inks=_random_inks(rng))
    question, answer = _ask(scene, rng)
    return Prompt(text=f"{scene}. {question}", max_new_tokens=ANSWER_TOKENS, name=name, answer=answer)


def text_only_prompt(rng: np.random.Generator, name: str, held_out: bool) -> Prompt:
    """Return in two of three cases a `text_scene_prompt`, else a `description_prompt`."""
    make = description_prompt if rng.integers(3) == 0 else text_scene_prompt
    return make(rng, name, held_out)


def random_scene(rng: np.random.Generator, held_out: bool, pixels: int = SMALL_PIXELS) -> DigitScene:
    """Return a scene of random images in random inks; of images that are held out, or of the others."""
    image_ids = scene_image_ids(held_out)
    chosen = image_ids[rng.integers(len(image_ids), size=NUM_CELLS)]
    return DigitScene(side=SIDE, image_ids=tuple(chosen.tolist()), inks=_random_inks(rng), pixels=pixels)


@cache
def scene_image_ids(held_out: bool) -> NDArray[np.int64]:
    """Return the numbers of scikit-learn's images that are held out, or of the others, ascending.

    Of each digit those fifth whose pixels have the smallest salted hash: no matter which library draws random numbers.
    """
    hashes = [hashlib.sha256(_SALT + strokes.tobytes()).hexdigest() for strokes in digit_images()]
    chosen: list[int] = []
    for digit in range(10):
        ids = sorted(np.flatnonzero(digit_labels() == digit).tolist(), key=lambda image_id: hashes[image_id])
        cut = len(ids) // HELD_OUT
        chosen += ids[:cut] if held_out else ids[cut:]
    return np.array(sorted(chosen), dtype=np.int64)


@cache
def _combinations(held_out: bool) -> Sequence[tuple[int, ...]]:
    """Return the digits of all written scenes that are held out, or of the others: about 2000 and 8000."""
    return [digits for digits in product(range(10), repeat=NUM_CELLS) if _is_held_out(digits) == held_out]


def _is_held_out(digits: tuple[int, ...]) -> bool:
    return int.from_bytes(hashlib.sha256(_SALT + bytes(digits)).digest()[:8]) % HELD_OUT == 0


def _random_inks(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(INK_NAMES[i] for i in rng.integers(len(INK_NAMES), size=NUM_CELLS))


Question = Callable[[Cells, np.random.Generator], tuple[str, str]]


def _ask(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    return QUESTIONS[rng.integers(len(QUESTIONS))](cells, rng)


def _digit(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    at = int(rng.integers(NUM_CELLS))
    return f"Digit {_PLACES[at]}?", str(cells.digits[at])


def _ink(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    at = int(rng.integers(NUM_CELLS))
    return f"Ink {_PLACES[at]}?", cells.inks[at]


def _how_many_even(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    return "How many even?", str(sum(digit % 2 == 0 for digit in cells.digits))


def _how_many_in_ink(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    ink = INK_NAMES[rng.integers(len(INK_NAMES))]
    return f"How many {ink}?", str(cells.inks.count(ink))


def _how_many_above(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    bound = int(rng.integers(1, 9))
    return f"How many above {bound}?", str(sum(digit > bound for digit in cells.digits))


def _row_sum(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    row = int(rng.integers(SIDE))
    return f"Sum of the {ROWS[SIDE][row]} row?", str(sum(cells.digits[row * SIDE : (row + 1) * SIDE]))


def _largest(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    return "Largest digit?", str(max(cells.digits))


def _read(cells: Cells, rng: np.random.Generator) -> tuple[str, str]:
    return "Read all.", " ".join(map(str, cells.digits))


QUESTIONS: tuple[Question, ...] = (
    _digit,
    _ink,
    _how_many_even,
    _how_many_in_ink,
    _how_many_above,
    _row_sum,
    _largest,
    _read,
)
