"""Moonshot's tokenizer from tiktoken.model: hand-worked merges, a plain reference beside it, and what is refused."""

import base64
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from reference.small_models import small_model
from transformers import PreTrainedTokenizerFast

from epsim.capture.models import hub
from epsim.capture.models.device import quiet
from epsim.capture.models.load import load_model
from epsim.capture.models.processor import Processor, load_processor
from epsim.capture.models.source import ModelSource
from epsim.capture.models.tiktoken_file import PATTERN, halves, is_moonshot, moonshot_tokenizer, read_ranks
from epsim.errors import InputError

torch.set_num_threads(1)
BYTES = [bytes([value]) for value in range(256)]
# Ranks 256, 257, ...
MERGED = [b"ab", b"bc", b"abc", b"cd", b"abcd", b"bde", b"aa", b"aaa"]
AB, BC, ABC, CD, ABCD, BDE, AA, AAA = range(256, 264)
FIRST, VOCAB_SIZE = 264, 272
SPECIAL = {264: "[BOS]", 265: "[EOS]", 266: "<|im_end|>", 268: "<|im_middle|>", 270: "[UNK]", 271: "[PAD]"}
AUTO_MAP = {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}
TEMPLATE = (
    "{%- for m in messages -%}{{ '[BOS]' + m['role'] + '<|im_middle|>' + m['content'] + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant<|im_middle|>' }}{%- endif -%}"
)
TEXTS = (
    "I'll say WE'VE done it; it's John's turn.",
    "人工智能改变世界。日本語のテキスト、漢字とカタカナ。한국어 텍스트입니다",
    "中English文 中's ⼀⼁ 々〇 12345 ٣٤٥ 3.14 a1b",
    "café Ñoño İstanbul ﬁnancial Ǆungla ʰʷ naïve e\u0301",
    "emoji 🚀🌍 👩‍👩‍👧 \u200b\ufeff\x00\x7f",
    "  two  spaces\n\n\tand\r\nlines   \n \u3000\u00a0x ",
    "مرحبا שלום Привет नमस्ते สวัสดี",
)


def special_tokens(first: int = FIRST, named: Mapping[int, str] = SPECIAL) -> dict[str, Any]:
    return {str(first - FIRST + token_id): {"content": word, "special": True} for token_id, word in named.items()}


def write(folder: Path, tokens: Sequence[bytes] = (), **settings: Any) -> Path:
    """Write a tiktoken.model, its lines in no order, and a tokenizer_config.json."""
    tokens = tokens or BYTES + MERGED
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    random.Random(0).shuffle(lines)
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    settings = {"auto_map": AUTO_MAP, "added_tokens_decoder": special_tokens(), "chat_template": TEMPLATE} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return moonshot_tokenizer(write(tmp_path_factory.mktemp("moonshot")), VOCAB_SIZE)


def test_merges_are_recovered_from_ranks() -> None:
    ranks = {token: rank for rank, token in enumerate(BYTES + MERGED)}
    assert halves(b"ab", ranks) == (b"a", b"b")
    # a b c: ab (256) before bc (257)
    assert halves(b"abc", ranks) == (b"ab", b"c")
    # a b c d: ab (256); then abc (258) before cd (259)
    assert halves(b"abcd", ranks) == (b"abc", b"d")
    # a a a: the left one of two
    assert halves(b"aaa", ranks) == (b"aa", b"a")
    # neither bd nor de is a token
    assert halves(b"bde", ranks) is None
    assert halves(b"a", ranks) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("abcd", [ABCD]),
        ("abcdab", [ABCD, AB]),
        # x b c d: bc (257) before cd (259); bcd is no token
        ("xbcd", [ord("x"), BC, ord("d")]),
        # a a a a a: aa aa a; then the only token of two neighbours is aa a
        ("aaaaa", [AA, AAA]),
        # a whole piece that is a token, although merges do not lead to it; and as part of a piece
        ("bde", [BDE]),
        ("xbde", [ord("x"), ord("b"), ord("d"), ord("e")]),
        # the space goes with the word
        ("ab ab", [AB, ord(" "), AB]),
        # 中 is E4 B8 AD, and a piece of its own
        ("ab中ab", [AB, 0xE4, 0xB8, 0xAD, AB]),
        ("", []),
    ],
)
def test_merges_by_hand(text: str, wanted: list[int], tokenizer: PreTrainedTokenizerFast) -> None:
    assert ids_of(tokenizer, text) == wanted


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("I'll say WE'VE中文abc", ["I'll", " say", " WE'VE", "中文", "abc"]),
        ("中's", ["中", "'s"]),
        ("helloWorld HTTPServer", ["hello", "World", " HTTPServer"]),
        ("ひらがな漢字カナ", ["ひらがな", "漢字", "カナ"]),
        ("12345 6.5", ["123", "45", " ", "6", ".", "5"]),
        ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
        ("x!!\n?y\t", ["x", "!!\n", "?y", "\t"]),
    ],
)
def test_pieces_by_hand(text: str, pieces: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


def encode(text: str, ranks: Mapping[bytes, int]) -> list[int]:
    """Return what tiktoken gives, written down plainly: split, then join the neighbours of the lowest rank."""
    found: list[int] = []
    for piece in regex.findall(PATTERN, text, regex.VERSION1):
        parts = [bytes([value]) for value in piece.encode()]
        while piece.encode() not in ranks:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ranks[piece.encode()]] if piece.encode() in ranks else [ranks[part] for part in parts]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_as_a_plain_encoder_on_random_vocabularies_and_texts(seed: int, tmp_path: Path) -> None:
    """Tokens in any order, also out of reach of merges, as no vocabulary that was learned has them."""
    rng = random.Random(seed)
    letters = ("ab", "abcA '\n1", "aé中の 9")[seed % 3]
    extra = {"".join(rng.choices(letters, k=rng.randint(2, 6))).encode() for _ in range(rng.choice([10, 60, 300]))}
    tokens = BYTES + sorted({token[: rng.randint(2, 7)] for token in extra} - set(BYTES))
    rng.shuffle(tokens)
    folder = write(tmp_path, tokens, added_tokens_decoder=special_tokens(len(tokens)))
    tokenizer = moonshot_tokenizer(folder, len(tokens) + 8)
    ranks = read_ranks(folder / "tiktoken.model")
    assert list(ranks) == tokens
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(200)]
    for text in (*texts, *TEXTS):
        assert ids_of(tokenizer, text) == encode(text, ranks)


def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    scalars = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    drawn = ["".join(map(chr, rng.choices(scalars, k=50))) for _ in range(50)]
    for text in (*TEXTS, *drawn):
        assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_special_tokens_are_single_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    named = SPECIAL | {267: "<|reserved_token_267|>", 269: "<|reserved_token_269|>"}
    for token_id, word in named.items():
        assert ids_of(tokenizer, f"ab {word} ab{word}") == [AB, ord(" "), token_id, ord(" "), AB, token_id]
        assert tokenizer.convert_ids_to_tokens(token_id) == word
    assert ids_of(tokenizer, "<|reserved_token_272|>") != [272]
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (264, 265)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (270, 271)
    assert tokenizer.decode([264, AB, 267, CD, 266], skip_special_tokens=True) == "abcd"


def test_tokenizer_config_says_what_ends_a_text(tmp_path: Path) -> None:
    """As strings, or as transformers saves added tokens; one that is not special is shown."""
    added = special_tokens() | {"269": {"content": "<|tool|>", "special": False}}
    eos = {"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"}
    tokenizer = moonshot_tokenizer(
        write(tmp_path, added_tokens_decoder=added, eos_token=eos, pad_token=None), VOCAB_SIZE
    )
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("[BOS]", 266, 271)
    assert ids_of(tokenizer, "<|tool|>ab") == [269, AB]
    assert tokenizer.decode([264, 269, AB], skip_special_tokens=True) == "<|tool|>ab"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"auto_map": AUTO_MAP}, True),
        ({"auto_map": {"AutoTokenizer": ["owner/model--tokenization_kimi.TikTokenTokenizer", None]}}, True),
        ({"auto_map": {"AutoTokenizer": "tokenization_moonshot.TikTokenTokenizer"}}, True),
        ({"tokenizer_class": "TikTokenTokenizer"}, True),
        # others have the class's name for another tokenizer
        (
            {"auto_map": {"AutoTokenizer": ["code.TikTokenTokenizer", None]}, "tokenizer_class": "TikTokenTokenizer"},
            False,
        ),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({}, False),
    ],
)
def test_how_moonshots_tokenizer_is_told(settings: dict[str, Any], wanted: bool, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert is_moonshot(tmp_path) == wanted
    (tmp_path / "tokenizer.json").write_text("{}")  # goes first: transformers reads it
    assert not is_moonshot(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tiktoken.model").unlink()
    assert not is_moonshot(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"added_tokens_decoder": {"263": {"content": "[BOS]"}}},
            '"[BOS]" has id 263, and special tokens have ids from 264',
        ),
        ({"added_tokens_decoder": {"272": {"content": "<image>"}}}, "to 271, the last that the model embeds"),
        ({"added_tokens_decoder": {"264": "[BOS]"}}, '{"264": "[BOS]"} is not an id with its "content"'),
        ({"added_tokens_decoder": {"x": {"content": "[BOS]"}}}, 'is not an id with its "content"'),
        ({"added_tokens_decoder": special_tokens() | {"269": {"content": "[BOS]"}}}, "one token has two ids"),
        ({"eos_token": "</s>"}, 'eos_token "</s>" is none of its added_tokens_decoder'),
        ({"added_tokens_decoder": {}}, 'bos_token "[BOS]" is none of its added_tokens_decoder'),
    ],
)
def test_special_tokens_that_do_not_fit(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        moonshot_tokenizer(write(tmp_path, **settings), VOCAB_SIZE)
    assert str(caught.value).startswith(f"{tmp_path}/tokenizer_config.json: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b + b"YWI= 9 9\n", 'tiktoken.model:265: "YWI= 9 9" is not a token in base64 and its rank'),
        (lambda b: b + b"YWI=\n", 'tiktoken.model:265: "YWI="'),
        (lambda b: b + b"a*b= 264\n", 'tiktoken.model:265: "a*b= 264"'),
        (lambda b: b + b"eHk= zwei\n", 'tiktoken.model:265: "eHk= zwei"'),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 'tiktoken.model:1: "version https'),
        (lambda b: b + b"eHk= 265\n", "its ranks are not 0 to 264, each of one token"),
        (lambda b: b + b"eHk= 263\n", "its ranks are not 0 to 264"),
        (lambda b: b.replace(b"QQ== 65\n", b"eHk= 65\n"), "byte 65 is none of its tokens"),
        (lambda b: b"", "byte 0 is none of its tokens"),
    ],
)
def test_files_that_are_damaged(change: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path) / "tiktoken.model"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        moonshot_tokenizer(tmp_path, VOCAB_SIZE)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tiktoken\.model: has 264 tokens, and the model embeds 200 ids"):
        moonshot_tokenizer(write(tmp_path), 200)


# In a checkpoint


@pytest.fixture(scope="module")
def moonlight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Moonlight that embeds 512 ids, as its checkpoint comes: with code, which is not to be run."""
    folder = tmp_path_factory.mktemp("moonlight")
    with quiet():
        small_model("moonlight", vlm=False).module.save_pretrained(folder)
    (folder / "tokenization_moonshot.py").write_text("raise SystemExit('remote code was run')")
    return write(folder)


def processor_of(folder: Path) -> Processor:
    return load_processor(load_model(ModelSource(checkpoint=str(folder), device="cpu")))


def test_a_checkpoint_with_moonshots_tokenizer(moonlight: Path) -> None:
    processor = replace(processor_of(moonlight), chat_template=None)
    assert processor.encode("abcd").token_ids.tolist() == [ABCD]  # and no [BOS]
    assert processor.encode("[BOS]ab<|reserved_token_511|>").token_ids.tolist() == [264, AB, 511]
    assert processor.tokenizer.decode([264, ABCD, 511], skip_special_tokens=True) == "abcd"
    assert {265} <= processor.eos_token_ids
    assert len(processor.tokenizer) == processor.vocab_size == 512


def test_its_chat_template_is_applied(moonlight: Path) -> None:
    turn = processor_of(moonlight).encode("abcd").token_ids.tolist()
    assert turn == [264, *b"user", 268, ABCD, 266, *b"assistant", 268]


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path: Path) -> None:
    write(tmp_path)
    assert moonshot_tokenizer(tmp_path, VOCAB_SIZE).chat_template == TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert moonshot_tokenizer(tmp_path, VOCAB_SIZE).chat_template is None


def test_a_tokenizer_config_that_is_no_json(moonlight: Path, tmp_path: Path) -> None:
    write(tmp_path)
    for content, said in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(InputError, match=rf"tokenizer_config\.json: {said}"):
            is_moonshot(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ],
)
def test_what_tokenizers_and_processors_need_is_fetched_with_the_description(name: str) -> None:
    assert any(hub._matches(name, pattern) for pattern in hub.DESCRIPTIONS)
    assert not any(hub._matches(name, pattern) for pattern in hub.WEIGHTS)
