"""Photographs that scikit-image and scikit-learn ship inside their packages: `Photograph`, `photo_prompt`.

Nothing is downloaded: they are opened as files, not through `skimage.data`, which fetches what it lacks.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from epsim.capture.prompts.images import ImageError
from epsim.capture.prompts.requests import Prompt

MIN_CROP_PERCENT = 60  # of each side
PHOTOGRAPHS = {
    "skimage": (
        "data/astronaut.png",
        "data/brick.png",
        "data/camera.png",
        "data/cell.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/coins.png",
        "data/grass.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/moon.png",
        "data/motorcycle_left.png",
        "data/page.png",
        "data/retina.jpg",
        "data/rocket.jpg",
        "data/text.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
QUESTIONS = (
    "What is shown in this picture?",
    "Describe the image in detail.",
    "Describe this photograph in one sentence for someone who cannot see it.",
    "What is the main subject, and where in the picture is it?",
    "Which colours dominate the picture? If it is black and white, say so.",
    "Is this indoors, outdoors, in space, or under a microscope? Give the reason for your answer.",
    "List the objects that you can see, one per line.",
    "What could have happened just before this picture was taken?",
    "How was this picture probably made: with a camera, a telescope, a microscope or a scanner?",
    "Is there any text in the picture? If there is, write it out.",
    "Are there people in the picture? If so, what are they doing?",
    "Which textures and patterns can you make out, and do they repeat?",
    "Where does the light come from, and where are the darkest parts?",
    "Suggest a title and three keywords for this picture.",
    "What would you ask the photographer about this picture?",
    "Estimate the size of the main object in centimetres, and say what you compare it with.",
    "What is unusual about this picture?",
    "Write a short story of four sentences that begins with this scene.",
)


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A part of a photograph; read when it is opened.

    Attributes:
        package: the package that ships it, a key of `PHOTOGRAPHS`.
        file: its path in the package.
        box: left, upper, right, lower, in pixels; the latter two are outside.
    """

    package: str
    file: str
    box: tuple[int, int, int, int]

    @property
    def identity(self) -> str:
        """Which part of which photograph, and a hash of its file."""
        return f"{self.package}/{self.file} {self.box} of {_sha256(_path(self.package, self.file))}"

    def open(self) -> Image.Image:
        """Return the part of the photograph, RGB."""
        with Image.open(_path(self.package, self.file)) as image:
            return image.convert("RGB").crop(self.box)


def photo_prompt(rng: np.random.Generator, name: str) -> Prompt:
    """Return a general question about a random part of a random photograph, at least 60 % of each side."""
    files = [(package, file) for package, files in PHOTOGRAPHS.items() for file in files]
    package, file = files[rng.integers(len(files))]
    width, height = _size(_path(package, file))
    left, right = _part(width, rng)
    upper, lower = _part(height, rng)
    photograph = Photograph(package=package, file=file, box=(left, upper, right, lower))
    return Prompt(text=QUESTIONS[rng.integers(len(QUESTIONS))], images=(photograph,), name=name)


def _part(length: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return the start and the end of a random part of a side."""
    size = length * int(rng.integers(MIN_CROP_PERCENT, 101)) // 100
    start = int(rng.integers(length - size + 1))
    return start, start + size


@cache
def _path(package: str, file: str) -> Path:
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).is_file():
            return path
    raise ImageError(f"{package}/{file}: is not installed; run pip install 'scikit-image>=0.22' 'scikit-learn>=1.4'")


@cache
def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
