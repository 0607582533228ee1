"""Scenes of handwritten digits, 2x2 or 3x3, with questions that have one right answer: `DigitScene`, `digit_prompt`.

The digits are the 1797 images of 8x8 pixels that scikit-learn ships, of NIST's forms (UCI, "Optical Recognition of
Handwritten Digits", the test set).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from epsim.capture.prompts.requests import Prompt

SCENE_PIXELS = 336  # the image size of CLIP ViT-L/14-336; both 2 and 3 divide it
PAPER = (250, 248, 240)
INKS = {"black": (20, 20, 20), "red": (200, 30, 30), "green": (20, 130, 50), "blue": (30, 60, 200)}
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}
REQUESTS = ("", " Answer with one word or number.", " Explain how you found the answer.", " Think step by step.")


@dataclass(frozen=True, kw_only=True)
class DigitScene:
    """A square of `side` x `side` digits, row by row from the top left; drawn when it is opened.

    Attributes:
        side: 2 or 3.
        image_ids: of scikit-learn's images, side * side of them.
        inks: the colour of each, a key of `INKS`.
        pixels: width and height of the picture.
    """

    side: int
    image_ids: tuple[int, ...]
    inks: tuple[str, ...]
    pixels: int = SCENE_PIXELS

    @cached_property
    def digits(self) -> tuple[int, ...]:
        """What is written, 0 to 9."""
        return tuple(int(digit_labels()[i]) for i in self.image_ids)

    @property
    def places(self) -> tuple[str, ...]:
        """Where each digit is, in words."""
        return tuple(f"{row} {column}" for row in ROWS[self.side] for column in COLUMNS[self.side])

    @property
    def identity(self) -> str:
        """Which digits, in which ink, at which size if not the usual one, and a hash of scikit-learn's images."""
        size = "" if self.pixels == SCENE_PIXELS else f" at {self.pixels} pixels"
        return f"digits {self.image_ids} {self.inks}{size} of {_images_sha256()}"

    def open(self) -> Image.Image:
        """Return the scene, RGB, `pixels` wide and high."""
        scene = Image.new("RGB", (self.pixels, self.pixels), PAPER)
        cell = self.pixels // self.side
        margin = cell // 14
        size = cell - 2 * margin
        for place, (image_id, ink) in enumerate(zip(self.image_ids, self.inks, strict=True)):
            strokes = Image.fromarray(digit_images()[image_id]).resize((size, size), Image.Resampling.BICUBIC)
            row, column = divmod(place, self.side)
            scene.paste(INKS[ink], (column * cell + margin, row * cell + margin), strokes)
        return scene


def digit_prompt(rng: np.random.Generator, name: str) -> Prompt:
    """Return a question about a random scene; its answer is definite."""
    side = int(rng.integers(2, 4))
    inks = tuple(INKS)
    scene = DigitScene(
        side=side,
        image_ids=tuple(int(i) for i in rng.integers(len(digit_labels()), size=side * side)),
        inks=tuple(inks[i] for i in rng.integers(len(inks), size=side * side)),
    )
    question, answer = QUESTIONS[rng.integers(len(QUESTIONS))](scene, rng)
    text = question + REQUESTS[rng.integers(len(REQUESTS))]
    return Prompt(text=text, images=(scene,), name=name, answer=answer)


@cache
def digit_images() -> NDArray[np.uint8]:
    """Return strokes [1797, 8, 8], 0 to 255."""
    images: NDArray[np.float64] = load_digits().images
    return np.round(images * (255 / 16)).astype(np.uint8)


@cache
def digit_labels() -> NDArray[np.int64]:
    labels: NDArray[np.int64] = load_digits().target
    return labels


@cache
def _images_sha256() -> str:
    return hashlib.sha256(digit_images().tobytes()).hexdigest()


Question = Callable[[DigitScene, np.random.Generator], tuple[str, str]]


def _at_place(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    at = int(rng.integers(len(scene.digits)))
    return f"Which digit is at the {scene.places[at]} of the picture?", str(scene.digits[at])


def _ink_at_place(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    at = int(rng.integers(len(scene.digits)))
    return f"In which colour is the digit at the {scene.places[at]} written?", scene.inks[at]


def _how_many_larger(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    bound = int(rng.integers(1, 9))
    return f"How many digits are larger than {bound}?", str(sum(digit > bound for digit in scene.digits))


def _how_many_even(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    return "How many of the digits are even?", str(sum(digit % 2 == 0 for digit in scene.digits))


def _how_many_in_ink(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    ink = tuple(INKS)[rng.integers(len(INKS))]
    return f"How many of the digits are {ink}?", str(scene.inks.count(ink))


def _how_many_different(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    question = "How many different digits are there? Count each only once."
    return question, str(len(set(scene.digits)))


def _how_often(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    digit = int(rng.integers(10))
    return f"How many times does the digit {digit} appear?", str(scene.digits.count(digit))


def _sum(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    return "What is the sum of all digits in the picture?", str(sum(scene.digits))


def _row_sum(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    row = int(rng.integers(scene.side))
    total = sum(scene.digits[row * scene.side : (row + 1) * scene.side])
    return f"Add up the digits in the {ROWS[scene.side][row]} row. What do you get?", str(total)


def _largest(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    return "What is the largest digit in the picture?", str(max(scene.digits))


def _read(scene: DigitScene, rng: np.random.Generator) -> tuple[str, str]:
    question = "Read the digits row by row, each row from left to right."
    return question, " ".join(map(str, scene.digits))


QUESTIONS: tuple[Question, ...] = (
    _at_place,
    _ink_at_place,
    _how_many_larger,
    _how_many_even,
    _how_many_in_ink,
    _how_many_different,
    _how_often,
    _sum,
    _row_sum,
    _largest,
    _read,
)
