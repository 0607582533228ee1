"""What training learns from: held-out digits never leak, answers are right, batches mark what is to be said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from epsim.capture.models.processor import Processor, load_processor
from epsim.capture.prompts import descriptions, scenes
from epsim.capture.prompts.builtin import BUILTIN_KINDS, builtin_prompts
from epsim.capture.prompts.descriptions import description_prompt
from epsim.capture.prompts.digits import INKS, DigitScene
from epsim.capture.prompts.requests import Prompt, PromptSet, RequestError, read_prompts
from epsim.capture.prompts.scenes import (
    random_scene,
    scene_image_ids,
    scene_prompt,
    text_only_prompt,
    text_scene_prompt,
)
from epsim.errors import InputError
from epsim.scenario.train import DataSpec
from epsim.specialize.examples import ExampleBatch, encode_examples
from epsim.specialize.training_data import TrainingData, cells_batch
from tests.reference.small_models import IMAGE_TOKEN_ID, TOKENS_PER_IMAGE, small_model

torch.set_num_threads(1)
BOS, EOS = 257, 258  # of the tokenizer of bytes
LABELS = load_digits().target
WRITTEN = re.compile(r"(\d) (\w+), (\d) (\w+) / (\d) (\w+), (\d) (\w+)\. (.*)")
PLACES = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}
STEP = {"batch_size": 8, "seed": 3, "stage_index": 1, "step": 5}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(small_model("olmoe"))


@pytest.fixture(scope="module")
def text_processor() -> Processor:
    return load_processor(small_model("olmoe", vlm=False))


def scene_of(prompt: Prompt) -> DigitScene:
    (scene,) = prompt.images
    assert isinstance(scene, DigitScene)
    return scene


def answer_to(question: str, digits: list[int], inks: list[str]) -> str:
    """Return the right answer, worked out from the question's words."""
    if question == "Read all.":
        return "{} {} {} {}".format(*digits)
    if question == "Largest digit?":
        return str(sorted(digits)[-1])
    first, _, rest = question.removesuffix("?").partition(" ")
    if first == "Digit":
        return str(digits[PLACES[rest]])
    if first == "Ink":
        return inks[PLACES[rest]]
    if first == "Sum":
        start = {"of the top row": 0, "of the bottom row": 2}[rest]
        return str(digits[start] + digits[start + 1])
    assert first == "How"
    kind = rest.removeprefix("many ")
    if kind == "even":
        return str(len([digit for digit in digits if digit in (0, 2, 4, 6, 8)]))
    if kind.startswith("above "):
        bound = int(kind.removeprefix("above "))
        return str(len([digit for digit in digits if digit in range(bound + 1, 10)]))
    return str(len([ink for ink in inks if ink == kind]))


# --- what is held out


def test_a_fifth_of_each_digit_is_held_out() -> None:
    """scikit-learn has 174 to 183 images of a digit: 34, 35 or 36 of each are held out."""
    held_out, others = scene_image_ids(True), scene_image_ids(False)
    assert sorted([*held_out, *others]) == list(range(1797))
    np.testing.assert_array_equal(np.bincount(LABELS[held_out]), np.bincount(LABELS) // 5)
    assert held_out[:5].tolist() == sorted(held_out)[:5]
    mean = held_out.mean()  # not a stretch of the file, which goes by writer: uniform 898, standard error 28
    assert 800 < mean < 1000


def test_what_is_held_out_stays_what_it_is() -> None:
    """A model that was trained on one machine is tested on another: its test images must not become others."""
    assert scene_image_ids(True)[:8].tolist() == [9, 10, 11, 14, 15, 16, 17, 19]


def test_no_prompt_of_training_shows_a_held_out_image() -> None:
    held_out = set(scene_image_ids(True).tolist())
    train, test = TrainingData(), set[int]()
    seen = set[int]()
    for step in range(300):
        for prompt in train.prompts("multimodal", 0.2, batch_size=16, seed=0, stage_index=3, step=step):
            seen |= {image_id for image in prompt.images for image_id in image.image_ids}  # type: ignore[attr-defined]
    for prompt in train.held_out(1000, 0, seed=0).with_image:
        test |= set(scene_of(prompt).image_ids)
    for prompt in builtin_prompts("scenes", 500, seed=0):
        test |= {image_id for image in prompt.images for image_id in image.image_ids}  # type: ignore[attr-defined]
    assert len(seen) > 1400  # of 1442
    assert not seen & held_out
    assert test == held_out


def test_cells_are_split_as_prompts_are() -> None:
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        drawn = {image_id for _ in range(1000) for image_id in random_scene(rng, held_out).image_ids}
        assert drawn <= set(scene_image_ids(held_out).tolist())


def test_scenes_in_words_share_no_combination_of_digits() -> None:
    seen: dict[bool, set[str]] = {}
    for held_out in (False, True):
        rng = np.random.default_rng(0)
        texts = [text_scene_prompt(rng, "x", held_out).text for _ in range(4000)]
        seen[held_out] = {re.sub(r"\D", "", text.split(".")[0]) for text in texts}
    assert not seen[False] & seen[True]
    assert 0.18 < len(scenes._combinations(True)) / 10_000 < 0.22
    assert len(scenes._combinations(True)) + len(scenes._combinations(False)) == 10_000


def test_pieces_of_held_out_texts_are_nowhere_in_training() -> None:
    train = "\0".join(descriptions._stretches(False))
    rng = np.random.default_rng(0)
    for _ in range(500):
        prompt = description_prompt(rng, "x", held_out=True)
        assert prompt.answer is not None
        assert (len(prompt.text), len(prompt.answer)) == (20, 80)
        assert prompt.text + prompt.answer not in train
        prompt = description_prompt(rng, "x", held_out=False)
        assert prompt.text + str(prompt.answer) in train


# --- questions and answers


def test_answers_about_scenes_hold() -> None:
    rng = np.random.default_rng(1)
    asked = set()
    for _ in range(3000):
        prompt = scene_prompt(rng, "x", held_out=False)
        scene = scene_of(prompt)
        digits = [int(LABELS[image_id]) for image_id in scene.image_ids]
        assert prompt.answer == answer_to(prompt.text, digits, list(scene.inks))
        assert len(prompt.text) <= 22
        assert prompt.max_new_tokens is not None
        assert len(prompt.answer) < prompt.max_new_tokens  # its bytes and the end of sequence
        asked.add(prompt.text)
    assert len(asked) == 4 + 4 + 1 + 4 + 8 + 2 + 1 + 1  # places twice, even, inks, bounds, rows, largest, all


def test_answers_about_scenes_in_words_hold() -> None:
    rng = np.random.default_rng(2)
    asked = set()
    for _ in range(3000):
        prompt = text_scene_prompt(rng, "x", held_out=True)
        found = WRITTEN.fullmatch(prompt.text)
        assert found
        words, question = found.groups()[:8], found[9]
        assert prompt.answer == answer_to(question, [int(word) for word in words[::2]], list(words[1::2]))
        assert set(words[1::2]) <= set(INKS)
        assert not prompt.images
        asked.add(question)
    assert len(asked) == 25


def test_two_of_three_prompts_without_image_are_scenes() -> None:
    """Of 3000, 2000 with a standard deviation of 26."""
    rng = np.random.default_rng(3)
    prompts = [text_only_prompt(rng, "x", held_out=False) for _ in range(3000)]
    assert abs(sum(WRITTEN.fullmatch(prompt.text) is not None for prompt in prompts) - 2000) < 100


def test_a_small_scene_is_the_large_one_seen_from_afar() -> None:
    small = random_scene(np.random.default_rng(0), held_out=False)
    large = DigitScene(side=2, image_ids=small.image_ids, inks=small.inks)
    drawn = np.asarray(small.open(), dtype=np.float64)
    assert drawn.shape == (64, 64, 3)
    shrunk = np.asarray(large.open().resize((64, 64), Image.Resampling.BOX), dtype=np.float64)
    assert np.corrcoef(drawn.ravel(), shrunk.ravel())[0, 1] > 0.97
    assert small.identity != large.identity
    assert "pixels" not in large.identity  # that of scenes before there were small ones


# --- batches


def test_exactly_the_answer_and_the_end_are_to_be_predicted(processor: Processor) -> None:
    """ "Hi" and "on?" are bos and 2 or 3 bytes; their answers "ab" and "1" and eos are 3 and 2 tokens: 6 and 6.

    With the image, "\\n" and "?": bos, 16 image tokens, 2 bytes, then "7" and eos: 21 columns.
    """
    scene = random_scene(np.random.default_rng(0), held_out=False)
    prompts = [
        Prompt(text="Hi", answer="ab"),
        Prompt(text="?", images=(scene,), answer="7"),
        Prompt(text="on?", answer="1"),
    ]
    batch = encode_examples(prompts, processor)
    with_image = [BOS, *[IMAGE_TOKEN_ID] * TOKENS_PER_IMAGE, *b"\n?7", EOS]
    pad = [0] * 15
    expected = [[*pad, BOS, *b"Hiab", EOS], with_image, [*pad, BOS, *b"on?1", EOS]]
    assert batch.token_ids_BS.tolist() == expected
    assert batch.is_token_BS.tolist() == [[False] * 15 + [True] * 6, [True] * 21, [False] * 15 + [True] * 6]
    assert batch.is_text_BS.tolist() == [[True] * 21, [True] + [False] * 16 + [True] * 4, [True] * 21]
    answers = [[False] * (21 - num) + [True] * num for num in (3, 2, 2)]
    assert batch.is_answer_BS.tolist() == answers
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (1, 3, 56, 56)
    encoded = processor.encode("?", [scene.open()])
    assert encoded.pixel_values is not None
    torch.testing.assert_close(batch.pixel_values, encoded.pixel_values, rtol=0, atol=0)
    assert batch.token_ids_BS[1, :19].tolist() == encoded.token_ids.tolist()  # as a capture asks


def test_a_batch_moves_whole(processor: Processor) -> None:
    batch = encode_examples([Prompt(text="Hi", answer="ab")], processor)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, ExampleBatch)
    assert moved.pixel_values is None
    tensors = [value for value in vars(moved).values() if value is not None]
    assert len(tensors) == 4
    assert {str(tensor.device) for tensor in tensors} == {"meta"}
    cells = cells_batch(processor, **STEP).to(torch.device("meta"))
    assert {str(tensor.device) for tensor in vars(cells).values()} == {"meta"}


def test_images_keep_the_order_of_prompts(processor: Processor, tmp_path: Path) -> None:
    """Red, then blue and red in one prompt; pictures of different sizes."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (100, 200), (0, 0, 255)).save(tmp_path / "blue.png")
    lines = [
        {"text": "a", "image": "red.png", "answer": "x"},
        {"text": "b", "answer": "x"},
        {"text": "c", "images": ["blue.png", "red.png"], "answer": "x"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = encode_examples(read_prompts(tmp_path / "p.jsonl"), processor)
    assert batch.pixel_values is not None
    means_I3 = batch.pixel_values.mean(dim=(2, 3))
    assert (means_I3[:, 0] > means_I3[:, 2]).tolist() == [True, False, True]
    assert (~batch.is_text_BS).sum(dim=1).tolist() == [TOKENS_PER_IMAGE, 0, 2 * TOKENS_PER_IMAGE]


def test_prompts_that_cannot_be_learnt_are_named(processor: Processor, text_processor: Processor) -> None:
    scene = random_scene(np.random.default_rng(0), held_out=False)
    fine = Prompt(text="Hi", answer="a")
    for prompt, of, said in (
        (Prompt(text="Hi", name="p.jsonl:7"), processor, 'p.jsonl:7: has no answer to learn; write "answer"'),
        (Prompt(text="Hi", name="n", answer="<image>"), processor, "n: answer: has an image token; leave <image> out"),
        (Prompt(text="<image>", name="n", answer="a"), processor, "n: prompt: 1 x <image> for 0 images"),
        (Prompt(text="Hi", images=(scene,), name="n", answer="a"), text_processor, "n: prompt: 1 images for a model"),
    ):
        with pytest.raises(RequestError, match=re.escape(said)):
            encode_examples([fine, prompt], of)
    with pytest.raises(InputError, match="images for a model that takes text only"):
        cells_batch(text_processor, **STEP)


def test_answers_that_the_model_cannot_say(processor: Processor) -> None:
    class WithoutEnd:
        eos_token_id = None

    class TooLarge:
        eos_token_id = 100_000

        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    fields = vars(processor)
    with pytest.raises(InputError, match="has no end-of-sequence token; give it an eos_token"):
        Processor(**fields | {"tokenizer": WithoutEnd()}).answer_tokens("a")
    with pytest.raises(InputError, match="answer: the tokenizer gives id 100000, and the model embeds"):
        Processor(**fields | {"tokenizer": TooLarge()}).answer_tokens("a")


def test_cells_are_what_a_scene_shows(processor: Processor) -> None:
    batch = cells_batch(processor, **STEP)
    assert (batch.pixel_values.shape, batch.digits_BC.shape) == ((8, 3, 56, 56), (8, 4))
    assert (batch.digits_BC.dtype, batch.inks_BC.dtype) == (torch.int64, torch.int64)
    pixels = batch.pixel_values.reshape(8, 3, 2, 28, 2, 28).permute(0, 2, 4, 3, 5, 1).reshape(8, 4, 28 * 28, 3)
    mean, std = (torch.tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    colours = (pixels * std + mean) * 255
    darkest = torch.take_along_dim(colours, colours.sum(dim=-1).argmin(dim=-1)[..., None, None], dim=2)[:, :, 0]
    for row in range(8):
        for cell in range(4):
            ink = list(INKS.values())[int(batch.inks_BC[row, cell])]
            distances = {name: (darkest[row, cell] - torch.tensor(colour)).abs().max() for name, colour in INKS.items()}
            assert INKS[min(distances, key=lambda name: float(distances[name]))] == ink
    assert batch.digits_BC.min() >= 0
    assert batch.digits_BC.max() <= 9


# --- what is drawn


def same(first: ExampleBatch, second: ExampleBatch) -> bool:
    tokens = torch.equal(first.token_ids_BS, second.token_ids_BS)
    if first.pixel_values is None or second.pixel_values is None:
        return tokens and first.pixel_values is second.pixel_values
    return tokens and torch.equal(first.pixel_values, second.pixel_values)


def test_a_step_is_its_seed_stage_and_number(processor: Processor) -> None:
    def batch(**changed: int) -> ExampleBatch:
        return encode_examples(TrainingData().prompts("multimodal", 0.5, **STEP | changed), processor)

    assert same(batch(), batch())
    for changed in ({"seed": 4}, {"stage_index": 2}, {"step": 6}):
        assert not same(batch(), batch(**changed))
        assert not torch.equal(
            cells_batch(processor, **STEP).pixel_values, cells_batch(processor, **STEP | changed).pixel_values
        )
    assert torch.equal(cells_batch(processor, **STEP).digits_BC, cells_batch(processor, **STEP).digits_BC)


def test_the_share_without_image_is_that_of_the_stage() -> None:
    """Of 2000 samples 400 at a share of 0.2, with a standard deviation of 18."""
    data = TrainingData()
    draw = STEP | {"batch_size": 2000}
    with_image = {
        share: sum(bool(p.images) for p in data.prompts("multimodal", share, **draw)) for share in (0, 0.2, 1)
    }
    assert (with_image[0], with_image[1]) == (2000, 0)
    assert abs(with_image[0.2] - 1600) < 75
    assert not any(prompt.images for prompt in data.prompts("text", 0.0, **draw))


def test_what_is_tested_on_is_fixed() -> None:
    first, again = TrainingData().held_out(30, 20, seed=1), TrainingData().held_out(30, 20, seed=1)
    assert first == again
    assert first != TrainingData().held_out(30, 20, seed=2)
    assert (len(first.with_image), len(first.text_only)) == (30, 20)
    assert all(prompt.images for prompt in first.with_image)
    assert all(WRITTEN.fullmatch(prompt.text) for prompt in first.text_only)


# --- files


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.fixture
def spec(tmp_path: Path) -> DataSpec:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    lines = [{"text": f"q{i}", "answer": str(i)} | ({"image": "a.png"} if i % 2 else {}) for i in range(10)]
    test = [{"text": "t", "answer": "1", "image": "a.png"}, {"text": "u", "answer": "2"}, {"text": "v", "answer": "3"}]
    return DataSpec(train=write(tmp_path / "train.jsonl", *lines), test=write(tmp_path / "test.jsonl", *test))


def test_files_are_drawn_from(spec: DataSpec) -> None:
    data = TrainingData.load(spec)
    drawn = data.prompts("multimodal", 0.5, **STEP | {"batch_size": 500})
    assert {prompt.text for prompt in drawn} == {f"q{i}" for i in range(10)}
    assert all(prompt.answer == prompt.text[1:] for prompt in drawn)
    assert {prompt.text for prompt in data.prompts("text", 0.0, **STEP | {"batch_size": 200})} == {
        "q0", "q2", "q4", "q6", "q8",
    }  # fmt: skip
    test = data.held_out(5, 1, seed=0)
    assert [prompt.text for prompt in (*test.with_image, *test.text_only)] == ["t", "u"]
    assert TrainingData.load(DataSpec()) == TrainingData()


def test_files_that_lack_what_a_stage_learns_from(tmp_path: Path, spec: DataSpec) -> None:
    text = write(tmp_path / "text.jsonl", {"text": "a", "answer": "b"})
    data = TrainingData.load(DataSpec(train=text, test=text))
    data.check("text", 0.0, "stages[0]")
    data.check("multimodal", 1.0, "stages[0]")
    for task, share, said in (
        ("multimodal", 0.2, 'stages[1]: task "multimodal" learns from prompts with an image, and text.jsonl has none'),
        ("multimodal", 0.0, "prompts with an image"),
    ):
        with pytest.raises(RequestError, match=re.escape(said)):
            data.check(task, share, "stages[1]")  # type: ignore[arg-type]
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    images = write(tmp_path / "images.jsonl", {"text": "a", "answer": "b", "image": "a.png"})
    data = TrainingData.load(DataSpec(train=images, test=images))
    data.check("multimodal", 0.0, "stages[0]")
    for task, share in (("multimodal", 0.2), ("text", 0.0)):
        with pytest.raises(RequestError, match=r"prompts without an image, and images\.jsonl has none; add some"):
            data.check(task, share, "stages[1]")  # type: ignore[arg-type]
    TrainingData().check("multimodal", 0.2, "stages[0]")
    mute = write(tmp_path / "mute.jsonl", {"text": "a", "answer": "b"}, {"text": "a"})
    for files in ({"train": text, "test": mute}, {"train": mute, "test": text}):
        with pytest.raises(RequestError, match=r'mute.jsonl:2: has no answer to learn; write "answer"'):
            TrainingData.load(DataSpec(**files))


def test_answers_of_files_are_read_and_not_shown_to_the_model(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "p.jsonl", {"text": "a", "answer": " b\n"}, {"text": "a"}))
    prompts = read_prompts(file)
    assert [prompt.answer for prompt in prompts] == [" b\n", None]
    unasked = PromptSet(prompts=(Prompt(text="a"), Prompt(text="a")), source=prompts.source)
    assert prompts.describe() == unasked.describe()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('""', 'answer: "" is empty; write the right answer, or leave "answer" out'),
        ('" \\n"', 'answer: " \\n" is empty'),
        ("7", "answer: 7 must be a string"),
        ("null", "answer: null must be a string"),
        ('"\\ud83d"', "answer: holds half of a surrogate pair; write whole characters"),
    ],
)
def test_a_wrong_answer_is_one_line(tmp_path: Path, answer: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"text": "a", "answer": {answer}}}\n')
    with pytest.raises(RequestError) as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert f"p.jsonl:1: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the built-in set


def test_one_in_five_built_in_scenes_is_in_words() -> None:
    prompts = builtin_prompts("scenes", 50, seed=0)
    assert [bool(prompt.images) for prompt in prompts] == [True, True, True, True, False] * 10
    assert all(prompt.max_new_tokens == 16 for prompt in prompts)
    assert prompts.describe()["kind"] == "scenes"


def test_the_older_built_in_sets_are_as_they_were() -> None:
    """Their place in the list is part of their seed; the hash is that of the prompts before there were scenes."""
    assert BUILTIN_KINDS[:4] == ("mixed", "digits", "photos", "text")
    described = builtin_prompts("digits", 20, seed=7).describe()["sha256"]
    assert described == "f657c8a96eb027530e4e6415116bac858ab89cbb7011f8e46214a0e4e42f6528"
