"""What is asked of a model: files of prompts, pictures, the built-in sets, mock tokens, padded batches."""

import io
import itertools
import json
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from epsim.capture.prompts import digits, photos
from epsim.capture.prompts.batches import (
    Batch,
    EncodedRequest,
    Encoder,
    ahead,
    batches,
    check_prompts,
    encode_prompts,
)
from epsim.capture.prompts.builtin import BUILTIN_KINDS, builtin_prompts
from epsim.capture.prompts.digits import DigitScene
from epsim.capture.prompts.images import ImageError, ImageFile
from epsim.capture.prompts.mock import MockImages, MockRequests
from epsim.capture.prompts.requests import Prompt, PromptSet, RequestError, read_prompts
from epsim.errors import InputError
from tests.reference.small_models import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, small_model

torch.set_num_threads(1)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def picture(path: Path, colour: tuple[int, int, int] = RED, size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def refusal(path: Path) -> str:
    """Return the one line with which `read_prompts` refuses a file, without the folder."""
    with pytest.raises(RequestError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path.parent}/", "")


# --- files of prompts


def test_a_file_is_read_as_people_write_it(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    picture(tmp_path / "pictures" / "a.png")
    picture(tmp_path / "b.jpg", BLUE)
    lines = (
        '\ufeff{"text": "What is this?", "image": "pictures/a.png"}\r\n'
        "\r\n"
        '{"text": "Zeile\u2028eins", "images": ["b.jpg", "pictures/a.png"], "max_new_tokens": 7}\n'
        '{"text": "no picture"}\n'
        '   \n{"text": "", "image": "b.jpg"}'
    )
    (tmp_path / "p.jsonl").write_bytes(lines.encode())
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert [prompt.text for prompt in prompts] == ["What is this?", "Zeile\u2028eins", "no picture", ""]
    assert [len(prompt.images) for prompt in prompts] == [1, 2, 0, 1]
    assert [prompt.max_new_tokens for prompt in prompts] == [None, 7, None, None]
    assert [prompt.name.rsplit("/", 1)[1] for prompt in prompts] == ["p.jsonl:1", "p.jsonl:3", "p.jsonl:4", "p.jsonl:6"]
    colours = [image.open().getpixel((20, 15)) for image in prompts[1].images]
    assert np.abs(np.array(colours) - [BLUE, RED]).max() < 5  # a JPEG is not exact


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("what is this?", 'is not JSON (Expecting value, column 1); write one object per line, e.g. {"text"'),
        ('[{"text": "a"},', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a"]', '["a"] is not an object; write e.g. {"text"'),
        ('"a"', '"a" is not an object'),
        ("null", "null is not an object"),
        ("{}", '"text" is missing; write what to ask'),
        ('{"max_new_tokens": 3}', '"text" is missing'),
        ('{"txt": "a"}', 'unknown key "txt"; did you mean "text"?'),
        ('{"question": "a"}', 'unknown key "question"; the keys are text, image, images, max_new_tokens'),
        ('{"text": "a", "max_tokens": 1}', 'did you mean "max_new_tokens"?'),
        ('{"text": "a", "text": "b"}', "a key is there twice in"),
        ('{"text": ""}', "text: '' is empty; write what to ask, or name an image"),
        ('{"text": " \\t\\n"}', "text: ' \\t\\n' is empty"),
        ('{"text": ["a"]}', 'text: ["a"] must be a string'),
        ('{"text": null}', "text: null must be a string"),
        ('{"text": "\\ud83d"}', "text: holds half of a surrogate pair"),
        ('{"text": "a", "max_new_tokens": 0}', "max_new_tokens: 0 must be an integer from 1 to 2147483647"),
        ('{"text": "a", "max_new_tokens": -1}', "max_new_tokens: -1 must be"),
        ('{"text": "a", "max_new_tokens": 2.0}', "max_new_tokens: 2.0 must be"),
        ('{"text": "a", "max_new_tokens": "5"}', 'max_new_tokens: "5" must be'),
        ('{"text": "a", "max_new_tokens": true}', "max_new_tokens: true must be"),
        ('{"text": "a", "max_new_tokens": null}', "max_new_tokens: null must be"),
        ('{"text": "a", "max_new_tokens": 3000000000}', "max_new_tokens: 3000000000 must be"),
        ('{"text": "a", "images": "a.png"}', 'images: "a.png" must be a list of paths, e.g. ["cat.png"]'),
        ('{"text": "a", "images": [1]}', "images: [1] must be a list of paths"),
        ('{"text": "a", "image": ["a.png"]}', 'image: ["a.png"] must be one path, in quotes; several go in "images"'),
        ('{"text": "a", "image": ""}', 'image: "" must be one path'),
        ('{"text": "a", "image": "a.png", "images": []}', 'has "image" and "images"; write all of them in "images"'),
        ('{"text": "a", "image": "https://a.org/b.png"}', '"https://a.org/b.png" is an address; write the path'),
        ('{"text": "a", "image": "none.png"}', 'image "none.png": No such file or directory; write the path'),
        ('{"text": "a", "image": "."}', "Is a directory; write the path of a picture"),
        ('{"text": "a", "image": "a\\u0000b"}', "embedded null byte; write the path of a picture"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    message = refusal(write(tmp_path / "p.jsonl", '{"text": "fine"}', "", line))
    assert message.startswith("p.jsonl:3: ")
    assert said in message
    assert len(message) < 260


def test_a_file_that_is_no_file_of_prompts(tmp_path: Path) -> None:
    assert "p.jsonl: holds no prompts; write one per line" in refusal(write(tmp_path / "p.jsonl", "", "  "))
    (tmp_path / "p.jsonl").write_bytes('{"text": "a"}\n{"text": "ä"}'.encode("latin-1"))
    assert refusal(tmp_path / "p.jsonl") == "p.jsonl:2: is not UTF-8; save the file in UTF-8"
    assert "none.jsonl: cannot be read: No such file" in refusal(tmp_path / "none.jsonl")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def damaged_pictures(folder: Path) -> dict[str, str]:
    """Write pictures that are none; return what is to be said of each."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.gif"):
        noise.save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])
    noise.save(folder / "flipped.png")
    content = bytearray((folder / "flipped.png").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "flipped.png").write_bytes(content)
    (folder / "empty.png").write_bytes(b"")
    write(folder / "text.png", "not a picture")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (1001, 10)).save(folder / "ribbon.png")
    damaged = dict.fromkeys(("cut.png", "cut.jpg", "cut.gif", "flipped.png"), "is damaged (")
    none = dict.fromkeys(("empty.png", "text.png"), "is not a picture that can be read; write e.g. a PNG or JPEG")
    deep = {"deep.png": "has more than 8 bits per channel (I;16); write it with 8"}
    ribbon = {"ribbon.png": "1001 x 10 pixels; the long side must be at most 100 times the short one: crop it"}
    return damaged | none | deep | ribbon


def test_damaged_pictures_are_found_before_anything_runs(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name, said in damaged_pictures(tmp_path).items():
        lines = ('{"text": "fine", "image": "a.png"}', json.dumps({"text": "x", "images": ["a.png", name]}))
        message = refusal(write(tmp_path / "p.jsonl", *lines))
        assert message.startswith(f'p.jsonl:2: image "{name}": ')
        assert said in message


@pytest.mark.parametrize("limit", [1000, 500])  # of 1200 pixels: a warning of pillow, and an error
def test_a_picture_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=r"has more than 0 million pixels; make it smaller"):
        ImageFile.check(tmp_path / "a.png")


def test_pictures_are_turned_and_made_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = Image.new("RGB", (4, 2), RED)
    upright.putpixel((0, 1), BLUE)  # bottom left becomes top left
    upright.save(tmp_path / "turned.png", exif=exif)
    opened = ImageFile.check(tmp_path / "turned.png").open()
    assert opened.size == (2, 4)
    assert opened.getpixel((0, 0)) == BLUE
    for mode in ("L", "P", "RGBA", "1", "CMYK", "LA"):
        Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / "mode.tif")
        opened = ImageFile.check(tmp_path / "mode.tif").open()
        assert (opened.mode, opened.getpixel((1, 1))) == ("RGB", (255, 255, 255))


def test_a_picture_that_many_prompts_name_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = ImageFile.check
    monkeypatch.setattr(ImageFile, "check", staticmethod(lambda path: checked.append(path) or check(path)))
    picture(tmp_path / "a.png")
    prompts = read_prompts(write(tmp_path / "p.jsonl", *['{"text": "x", "image": "a.png"}'] * 5))
    assert len(checked) == 1
    assert len({prompt.images for prompt in prompts}) == 1


def test_a_picture_that_changes_after_the_check_is_refused(tmp_path: Path) -> None:
    image = ImageFile.check(picture(tmp_path / "a.png"))
    picture(tmp_path / "a.png", BLUE)
    with pytest.raises(ImageError, match=r"changed after it was checked"):
        image.open()


def test_the_description_changes_with_all_that_is_asked(tmp_path: Path) -> None:
    def described(line: str, colour: tuple[int, int, int] = RED) -> dict[str, Any]:
        picture(tmp_path / "a.png", colour)
        picture(tmp_path / "b.png", (0, 9, 9))
        return read_prompts(write(tmp_path / "p.jsonl", line)).describe()

    first = described('{"text": "x", "images": ["a.png", "b.png"]}')
    assert json.loads(json.dumps(first)) == first
    assert (first["source"], first["file"], first["num_requests"], first["num_images"]) == ("file", "p.jsonl", 1, 2)
    assert described('{"text": "x", "images": ["a.png", "b.png"]}') == first
    others = [
        described('{"text": "y", "images": ["a.png", "b.png"]}'),
        described('{"text": "x", "images": ["b.png", "a.png"]}'),
        described('{"text": "x", "images": ["a.png", "b.png"], "max_new_tokens": 5}'),
        described('{"text": "x", "images": ["a.png", "b.png"]}', BLUE),
    ]
    assert len({first["sha256"], *(other["sha256"] for other in others)}) == 5
    assert others[3]["file_sha256"] == first["file_sha256"]  # only the picture changed


def test_a_slice_of_a_set_says_where_it_is_from() -> None:
    prompts = builtin_prompts("text", 6, seed=3)
    part = prompts[:4]
    assert isinstance(part, PromptSet)
    assert list(part) == [prompts[i] for i in range(4)]
    assert part.describe() == builtin_prompts("text", 4, seed=3).describe()
    assert part.describe()["num_requests"] == 4


# --- built-in sets


def scene_of(*wanted: int, inks: tuple[str, ...]) -> DigitScene:
    """Return a scene of the first images that scikit-learn labels with these digits."""
    labels = load_digits().target.tolist()
    side = {4: 2, 9: 3}[len(wanted)]
    return DigitScene(side=side, image_ids=tuple(labels.index(digit) for digit in wanted), inks=inks)


def test_answers_about_a_scene_worked_out_by_hand() -> None:
    """The scene: a red 3, a blue 1; a red 4, a black 1."""
    scene = scene_of(3, 1, 4, 1, inks=("red", "blue", "red", "black"))
    answers = {
        "Which digit is at the top left of the picture?": "3",
        "Which digit is at the bottom left of the picture?": "4",
        "Which digit is at the bottom right of the picture?": "1",
        "In which colour is the digit at the top right written?": "blue",
        "In which colour is the digit at the bottom right written?": "black",
        "How many digits are larger than 1?": "2",
        "How many digits are larger than 3?": "1",
        "How many digits are larger than 4?": "0",
        "How many of the digits are even?": "1",
        "How many of the digits are red?": "2",
        "How many of the digits are green?": "0",
        "How many different digits are there? Count each only once.": "3",
        "How many times does the digit 1 appear?": "2",
        "How many times does the digit 9 appear?": "0",
        "What is the sum of all digits in the picture?": "9",
        "Add up the digits in the top row. What do you get?": "4",
        "Add up the digits in the bottom row. What do you get?": "5",
        "What is the largest digit in the picture?": "4",
        "Read the digits row by row, each row from left to right.": "3 1 4 1",
    }
    rng = np.random.default_rng(0)
    asked = dict(question(scene, rng) for question in digits.QUESTIONS for _ in range(100))
    assert {text: asked[text] for text in answers} == answers


def test_a_scene_of_nine_names_its_places() -> None:
    scene = scene_of(1, 2, 3, 4, 5, 6, 7, 8, 9, inks=("black",) * 9)
    assert dict(zip(scene.places, scene.digits, strict=True))["middle right"] == 6
    assert dict(zip(scene.places, scene.digits, strict=True))["bottom center"] == 8


@pytest.mark.parametrize("side", [2, 3])
def test_a_scene_shows_each_digit_at_its_place_in_its_ink(side: int) -> None:
    """Each cell, brought back to 8x8, has the strokes of scikit-learn's image, and ink where it is darkest."""
    ids = tuple(range(40, 40 + side * side))
    inks = tuple(list(digits.INKS)[i % 4] for i in range(side * side))
    scene = DigitScene(side=side, image_ids=ids, inks=inks)
    drawn = scene.open()
    assert (drawn.mode, drawn.size) == ("RGB", (336, 336))
    cell = 336 // side
    for place, (image_id, ink) in enumerate(zip(ids, inks, strict=True)):
        x, y = place % side * cell, place // side * cell
        pixels = drawn.crop((x + cell // 14, y + cell // 14, x + cell - cell // 14, y + cell - cell // 14))
        small = np.asarray(pixels.resize((8, 8), Image.Resampling.BOX), dtype=np.float64)
        strokes = load_digits().images[image_id]
        assert np.corrcoef((255 - small).sum(axis=2).ravel(), strokes.ravel())[0, 1] > 0.95
        darkest = np.asarray(pixels).reshape(-1, 3)[np.asarray(pixels).sum(axis=2).argmin()]
        assert np.abs(darkest.astype(int) - digits.INKS[ink]).max() < 25


def test_photographs_ship_with_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)  # whatever reaches for the network fails
    seen = set()
    for prompt in builtin_prompts("photos", 150, seed=0):
        (photograph,) = prompt.images
        assert isinstance(photograph, photos.Photograph)
        left, upper, right, lower = photograph.box
        if photograph.file not in seen:
            opened = photograph.open()
            assert (opened.mode, opened.size) == ("RGB", (right - left, lower - upper))
            assert np.asarray(opened).std() > 5  # not a plain surface
        seen.add(photograph.file)
        assert prompt.text in photos.QUESTIONS
    assert seen == {file for files in photos.PHOTOGRAPHS.values() for file in files}


def test_a_photograph_is_a_part_of_its_file() -> None:
    """chelsea.png is 451 x 300; the part is cut out of the array."""
    whole = np.asarray(Image.open(photos._path("skimage", "data/chelsea.png")))
    part = photos.Photograph(package="skimage", file="data/chelsea.png", box=(10, 20, 300, 290)).open()
    np.testing.assert_array_equal(np.asarray(part), whole[20:290, 10:300])
    with pytest.raises(ImageError, match=r"skimage/data/none.png: is not installed; run pip install"):
        photos.Photograph(package="skimage", file="data/none.png", box=(0, 0, 1, 1)).open()


def test_mixed_has_two_of_five_digits_two_photographs_one_text() -> None:
    prompts = builtin_prompts("mixed", 1000, seed=1)
    kinds = [re.sub(r"built-in (\w+) \d+", r"\1", prompt.name) for prompt in prompts]
    for start in range(0, 1000, 5):
        assert sorted(kinds[start : start + 5]) == ["digits", "digits", "photos", "photos", "text"]
    assert [bool(prompt.images) for prompt in prompts] == [kind != "text" for kind in kinds]
    with_images = {(prompt.text, *(image.identity for image in prompt.images)) for prompt in prompts if prompt.images}
    assert len(with_images) == 800  # none twice


@pytest.mark.parametrize("kind", BUILTIN_KINDS)
def test_a_built_in_set_is_its_seed(kind: str) -> None:
    first, again, longer = builtin_prompts(kind, 20, 7), builtin_prompts(kind, 20, 7), builtin_prompts(kind, 30, 7)
    other = builtin_prompts(kind, 20, 8)
    assert list(first) == list(again) == list(longer[:20])
    assert first.describe() == again.describe() == longer[:20].describe()
    assert first.describe()["sha256"] != other.describe()["sha256"]
    for prompt, same in zip(first, again, strict=True):
        for image, same_image in zip(prompt.images, same.images, strict=True):
            assert image.open().tobytes() == same_image.open().tobytes()
    description = first.describe()
    assert json.loads(json.dumps(description)) == description
    assert (description["kind"], description["seed"], description["num_requests"]) == (kind, 7, 20)
    assert set(description["libraries"]) == {"numpy", "pillow", "scikit-image", "scikit-learn"}


def test_built_in_images_are_drawn_when_they_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(DigitScene, "open", refuse)
    monkeypatch.setattr(photos.Photograph, "open", refuse)
    assert builtin_prompts("mixed", 100, seed=0).describe()["num_images"] == 80


def test_answers_of_text_prompts_hold() -> None:
    """Programs are run, sums and words are taken from the text and worked out another way."""
    kinds = dict.fromkeys(("program", "apples", "train", "sort", "letter"), 0)
    for prompt in builtin_prompts("text", 400, seed=2):
        assert not prompt.images
        text, answer = prompt.text, prompt.answer
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        if "Python" in text:
            kinds["program"] += 1
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(text.split("\n\n")[1], {})
            assert printed.getvalue().strip() == answer
        elif "apples" in text:
            kinds["apples"] += 1
            assert answer == str(sum([numbers[1]] * numbers[0]) - numbers[2])
        elif "train" in text and numbers:
            kinds["train"] += 1
            assert answer == f"{sum([numbers[1]] * numbers[0])} km, {numbers[0] + numbers[0]} hours"
        elif text.startswith("Sort"):
            kinds["sort"] += 1
            assert answer is not None
            words = answer.split(", ")
            assert all(a < b for a, b in itertools.pairwise(words))
            assert set(words) == set(text.removeprefix("Sort these words alphabetically: ").rstrip(".").split(", "))
        elif text.startswith("How often"):
            kinds["letter"] += 1
            letter, words_text = re.findall(r'"([^"]+)"', text)
            assert answer == str(len(words_text.split(letter)) - 1)
        else:
            assert answer is None
            assert len(text) > 200
    assert min(kinds.values()) > 20


def test_wrong_built_in_sets_are_refused() -> None:
    for kind, num, seed, said in (
        ("digit", 5, 0, '"digit" is not a kind of built-in prompts; did you mean "digits"?'),
        ("videos?", 5, 0, "write one of mixed, digits, photos, text"),
        ("text", 0, 0, "number of requests: 0 must be 1 or more"),
        ("text", 5, -1, "seed: -1 must be 0 or more"),
    ):
        with pytest.raises(RequestError, match=re.escape(said)):
            builtin_prompts(kind, num, seed)


# --- encoding and batches


@dataclass(frozen=True)
class FakeEncoded:
    token_ids: Any
    pixel_values: torch.Tensor | None


@dataclass
class FakeEncoder:
    """Three image tokens for each image, its first pixel's red as the pixels, then a token per word: its length."""

    image_token_id: int | None = 99
    num_encoded: int = 0
    tokens_per_image: int = 3

    def encode(self, text: str, images: Sequence[Image.Image]) -> FakeEncoded:
        if "<image>" in text:
            raise InputError("placeholders and images differ")
        self.num_encoded += 1
        image_tokens = [self.image_token_id or 0] * self.tokens_per_image * len(images)
        ids = np.array(image_tokens + [len(word) for word in text.split()], dtype=np.int64)
        if not images:
            return FakeEncoded(ids, None)
        reds = [image.getpixel((0, 0))[0] for image in images]  # type: ignore[index]
        return FakeEncoded(ids, torch.tensor(reds, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2))


@dataclass(frozen=True)
class Plain:
    """A surface of one red."""

    red: int

    @property
    def identity(self) -> str:
        return f"red {self.red}"

    def open(self) -> Image.Image:
        return Image.new("RGB", (8, 8), (self.red, 0, 0))


@dataclass(frozen=True)
class Unopenable(Plain):
    def open(self) -> Image.Image:
        raise ImageError('image "a.png": is gone')


PROMPTS = (
    Prompt(text="a bb", images=(Plain(10), Plain(20)), name="p:1"),
    Prompt(text="ccc", name="p:2", max_new_tokens=2),
    Prompt(text="", images=(Plain(30),), name="p:3"),
)


def test_a_batch_by_hand() -> None:
    """Prompts of 8, 1 and 3 tokens; the image token is 99, padding stands on the left and counts as text."""
    (batch,) = batches(encode_prompts(PROMPTS, FakeEncoder(), default_max_new_tokens=5), 8)
    assert batch.request_ids_B.tolist() == [0, 1, 2]
    assert batch.request_ids_B.dtype == np.int32
    assert batch.token_ids_BS.tolist() == [
        [99, 99, 99, 99, 99, 99, 1, 2],
        [0, 0, 0, 0, 0, 0, 0, 3],
        [0, 0, 0, 0, 0, 99, 99, 99],
    ]
    T, F = True, False
    assert batch.is_token_BS.tolist() == [[T] * 8, [F] * 7 + [T], [F] * 5 + [T] * 3]
    assert batch.is_text_BS.tolist() == [[F] * 6 + [T] * 2, [T] * 8, [T] * 5 + [F] * 3]
    assert batch.num_prompt_tokens_B.tolist() == [8, 1, 3]
    assert batch.max_new_tokens_B.tolist() == [5, 2, 5]
    assert batch.has_padding
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (3, 3, 2, 2)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [10, 20, 30]
    for tensor in (batch.token_ids_BS, batch.num_prompt_tokens_B, batch.max_new_tokens_B):
        assert tensor.dtype == torch.int64


def test_batches_keep_the_order_and_encode_no_more_than_they_need() -> None:
    encoder = FakeEncoder()
    stream = batches(encode_prompts(builtin_prompts("mixed", 7, seed=0), encoder, default_max_new_tokens=5), 3)
    assert encoder.num_encoded == 0
    groups = []
    for count, batch in zip((3, 6, 7), stream, strict=True):
        assert encoder.num_encoded == count
        groups.append(batch.request_ids_B.tolist())
    assert groups == [[0, 1, 2], [3, 4, 5], [6]]


def test_prompts_of_one_length_have_no_padding_and_texts_no_pixels() -> None:
    prompts = [Prompt(text="a bb"), Prompt(text="ccc d")]
    (batch,) = batches(encode_prompts(prompts, FakeEncoder(image_token_id=None), default_max_new_tokens=1), 2)
    assert not batch.has_padding
    assert batch.pixel_values is None
    assert batch.is_text_BS.all()


def test_padding_is_never_the_image_token() -> None:
    (batch,) = batches(encode_prompts(PROMPTS, FakeEncoder(image_token_id=0), default_max_new_tokens=1), 3)
    assert batch.token_ids_BS[1].tolist() == [1, 1, 1, 1, 1, 1, 1, 3]
    assert (batch.token_ids_BS == 0).equal(~batch.is_text_BS)


def refused(prompt: Prompt, encoder: Encoder, max_tokens: int | None = None) -> set[str]:
    """Return what both the check and the encoding say of a prompt."""
    said = set()
    for run in (check_prompts, lambda *args, **kwargs: list(encode_prompts(*args, **kwargs))):
        with pytest.raises(RequestError) as caught:
            run([prompt], encoder, default_max_new_tokens=5, max_tokens=max_tokens)
        said.add(str(caught.value))
    return said


def test_prompts_that_cannot_run_are_named() -> None:
    assert refused(PROMPTS[0], FakeEncoder(), 12) == {
        "p:1: 8 prompt tokens and 5 new ones must be at most 12 together, the model's context; "
        "ask for fewer new tokens, or give shorter prompts (--requests)"
    }
    assert len(list(encode_prompts(PROMPTS, FakeEncoder(), default_max_new_tokens=5, max_tokens=13))) == 3
    assert refused(PROMPTS[2], FakeEncoder(image_token_id=None)) == {
        "p:3: has an image, and the model reads none; ask without images (--builtin text), "
        "or take a vision-language model"
    }
    prompt = Prompt(text="<image> twice", images=(Plain(1),), name="p:9")
    assert refused(prompt, FakeEncoder()) == {"p:9: placeholders and images differ"}
    assert refused(PROMPTS[2], FakeEncoder(tokens_per_image=0)) == {"p:3: has no tokens; write a text"}


def test_the_check_opens_no_image() -> None:
    prompts = [Prompt(text="a", images=(Unopenable(1),), name="p:4")]
    check_prompts(prompts, FakeEncoder(), default_max_new_tokens=5)
    with pytest.raises(RequestError, match=r'p:4: image "a.png": is gone'):
        list(encode_prompts(prompts, FakeEncoder(), default_max_new_tokens=5))


def test_wrong_numbers_are_refused_at_once() -> None:
    with pytest.raises(RequestError, match=r"max_new_tokens: 0 must be an integer from 1"):
        encode_prompts([], FakeEncoder(), default_max_new_tokens=0)
    with pytest.raises(RequestError, match=r"batch size: 0 must be 1 or more"):
        batches([], 0)
    with pytest.raises(RequestError, match=r"p:5: text: ' ' is empty"):
        Prompt(text=" ", name="p:5")
    with pytest.raises(RequestError, match=r"p:5: max_new_tokens: 0 must be"):
        Prompt(text="a", name="p:5", max_new_tokens=0)


def one_batch(requests: Sequence[EncodedRequest]) -> Batch:
    (batch,) = batches(requests, len(requests))
    return batch


def test_a_batch_ahead_is_made_while_one_is_in_use_and_fails_in_its_turn() -> None:
    begun = [threading.Event() for _ in range(4)]

    def make() -> Iterator[Any]:
        for number, event in enumerate(begun):
            event.set()
            if number == 3:
                raise InputError("bad image")
            yield number

    coming = ahead(make())
    for number in range(3):
        assert next(coming) == number
        assert begun[number + 1].wait(10)
        assert not any(event.is_set() for event in begun[number + 2 :])
    with pytest.raises(InputError, match="bad image"):
        next(coming)


def test_a_batch_moves_what_the_model_needs() -> None:
    batch = one_batch(list(encode_prompts(PROMPTS, FakeEncoder(), default_max_new_tokens=5)))
    moved = batch.to(torch.device("meta"))
    for name in ("token_ids_BS", "is_token_BS", "is_text_BS", "pixel_values"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert moved.max_new_tokens_B.tolist() == [5, 2, 5]
    assert moved.has_padding
    assert batch.to(torch.device("cpu")).token_ids_BS is batch.token_ids_BS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_batch_is_the_same_on_cuda() -> None:
    batch = one_batch(list(encode_prompts(PROMPTS, FakeEncoder(), default_max_new_tokens=5)))
    moved = batch.to(torch.device("cuda"))
    for name in ("token_ids_BS", "is_token_BS", "is_text_BS", "pixel_values"):
        assert getattr(moved, name).is_cuda
        assert getattr(moved, name).cpu().equal(getattr(batch, name))


def test_the_model_puts_each_image_where_its_request_has_it() -> None:
    """Embeddings of a padded batch are those of its requests one by one."""
    model = small_model("olmoe")
    images = MockImages(tokens_per_image=TOKENS_PER_IMAGE, pixels=56, token_id=IMAGE_TOKEN_ID)
    shared = {"num": 2, "vocab_size": 500, "max_new_tokens": 3}
    with_images = list(MockRequests(seed=1, text_tokens=9, images=images, **shared))
    texts = list(MockRequests(seed=2, text_tokens=4, **shared))
    requests = [with_images[0], texts[0], with_images[1], texts[1]]
    batch = one_batch(requests)
    embeddings_BSD = model.embed(batch.token_ids_BS, batch.pixel_values)
    for row, request in enumerate(requests):
        alone_SD = model.embed(request.token_ids_S[None], request.pixel_values)[0]
        torch.testing.assert_close(embeddings_BSD[row, batch.is_token_BS[row]], alone_SD, rtol=1e-5, atol=1e-6)


# --- mock tokens

MOCK = MockRequests(
    num=40,
    seed=5,
    text_tokens=500,
    max_new_tokens=3,
    vocab_size=50,
    excluded_ids=frozenset({0, 1, 49}),
    images=MockImages(num_per_request=2, tokens_per_image=4, pixels=28, token_id=7),
)


def test_mock_requests_are_images_then_uniform_text() -> None:
    """46 of the 50 ids are left: 20 000 draws give 434.8 of each, with a standard deviation of 20.6."""
    requests = list(MOCK)
    assert [request.request_id for request in requests] == list(range(len(MOCK)))
    counts = np.zeros(50)
    for request in requests:
        assert request.token_ids_S.dtype == torch.int64
        assert request.token_ids_S[:8].tolist() == [7] * 8
        assert request.is_text_S.tolist() == [False] * 8 + [True] * 500
        counts += np.bincount(request.token_ids_S[8:], minlength=50)
    assert counts[[0, 1, 7, 49]].tolist() == [0, 0, 0, 0]
    drawn = np.delete(counts, [0, 1, 7, 49])
    assert np.abs(drawn - 20_000 / 46).max() < 4 * 20.6
    assert 25 < ((drawn - 20_000 / 46) ** 2 / (20_000 / 46)).sum() < 75  # chi-square with 45 degrees of freedom


def test_mock_pixels_are_standard_normal() -> None:
    pixels = torch.stack([request.pixel_values for request in MOCK if request.pixel_values is not None])
    assert pixels.shape == (40, 2, 3, 28, 28)
    assert pixels.dtype == torch.float32
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01


def test_mock_requests_can_be_drawn_again_from_their_description() -> None:
    description = json.loads(json.dumps(MOCK.describe()))
    assert description.pop("source") == "mock"
    assert description.pop("numpy") == np.__version__
    images = MockImages(**description.pop("images"))
    again = MockRequests(num=description.pop("num_requests"), images=images, **description)
    for request, same in zip(MOCK, again, strict=True):
        assert request.token_ids_S.equal(same.token_ids_S)
        assert request.pixel_values is not None
        assert same.pixel_values is not None
        assert request.pixel_values.equal(same.pixel_values)
    ids = [request.token_ids_S[8:].tolist() for request in MOCK]
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num": 0}, "number of requests: 0 must be 1 or more"),
        ({"seed": -2}, "seed: -2 must be 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be an integer"),
        ({"text_tokens": 0}, "text tokens: 0 must be 1 or more, or 0 with images"),
        ({"excluded_ids": frozenset(range(9))}, "none of its 9 ids is left to draw from; exclude fewer"),
    ],
)
def test_wrong_mock_requests_are_refused(changed: dict[str, Any], said: str) -> None:
    fields = {"num": 1, "seed": 0, "text_tokens": 4, "max_new_tokens": 1, "vocab_size": 9}
    with pytest.raises(RequestError, match=re.escape(said)):
        MockRequests(**(fields | changed))
