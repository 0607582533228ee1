"""Moonshot's tokenizer without the code that its checkpoints bring along: `is_moonshot`, `moonshot_tokenizer`.

Moonlight-16B-A3B and its kin have their vocabulary in tiktoken.model, a line per token: its bytes in base64, and its
rank. tokenizer_config.json names the special tokens. All else is in Python: how text is split into pieces before bytes
are merged, and that the ids after the ranks belong to special tokens. It is restated here.

Source: huggingface.co/moonshotai/Moonlight-16B-A3B, tokenization_moonshot.py, class TikTokenTokenizer: pat_str,
__init__, encode (a copy: github.com/zxgx/mode-pd, modepd/model/moonshotai). How a piece is encoded:
github.com/openai/tiktoken, src/lib.rs, encode_ordinary and _byte_pair_merge.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from epsim.capture.models.byte_tokenizer import NUM_BYTES, byte_words
from epsim.capture.models.checkpoint import read_json
from epsim.errors import InputError

FILE_NAME = "tiktoken.model"
CLASS_NAME = "TikTokenTokenizer"
MODULES = ("tokenization_moonshot", "tokenization_kimi")
# Chinese characters by themselves; words, with what stands before and 's after, in lower and in upper case; digits by
# three; signs with the line breaks after; line breaks; space.
_CAPITAL, _SMALL = (rf"[{cases}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for cases in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_CAPITAL}*{_SMALL}+{_AFTER}",
        f"{_BEFORE}{_CAPITAL}+{_SMALL}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_ROLES = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}


def is_moonshot(folder: Path) -> bool:
    """Return whether a checkpoint has this tokenizer and no other, by what its tokenizer_config.json says.

    Raises InputError if that is not JSON.
    """
    if not (folder / FILE_NAME).is_file() or (folder / "tokenizer.json").is_file():
        return False
    settings = _settings(folder)
    if "auto_map" not in settings:
        return bool(settings.get("tokenizer_class") == CLASS_NAME)
    auto_map = settings["auto_map"]
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    slow = named[0] if isinstance(named, list) and named else named
    # "owner/model--module.Class" where the code is in another repository
    return str(slow).rpartition("--")[2] in {f"{module}.{CLASS_NAME}" for module in MODULES}


def moonshot_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer with ids below `vocab_size`: the ranks of tiktoken.model, then special tokens.

    A special token is always one id, also where a prompt spells it out. An id that nothing names is
    <|reserved_token_163589|>, with its number. Nothing is put before or after a text. One thing is not imitated:
    Moonshot's code cuts a text without any space, or of nothing but space, every 25 000 characters.

    Args:
        folder: of the checkpoint, with tiktoken.model and tokenizer_config.json.
        vocab_size: ids that the model embeds.

    Raises InputError if tiktoken.model is damaged or has more tokens than the model, and for special tokens that
    have no place after it.
    """
    path, settings = folder / FILE_NAME, _settings(folder)
    ranks = read_ranks(path)
    if len(ranks) > vocab_size:
        raise InputError(f"{path}: has {len(ranks)} tokens, and the model embeds {vocab_size} ids; get both again")
    special = _special_tokens(folder, settings, len(ranks), vocab_size)
    tokenizer = _byte_pairs(ranks)
    tokenizer.add_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=None if (folder / "chat_template.jinja").is_file() else settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **_roles(folder, settings, {token.content for token in special}),
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return token -> rank, by rank from 0; raises InputError with the line if the file is not of that kind."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            shown = line[:40].decode("ascii", "replace")
            raise InputError(
                f'{path}:{number}: "{shown}" is not a token in base64 and its rank; get the file again'
            ) from error
    in_order = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(in_order.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: its ranks are not 0 to {len(ranks) - 1}, each of one token; get the file again")
    if missing := [value for value in range(NUM_BYTES) if bytes([value]) not in ranks]:
        raise InputError(f"{path}: byte {missing[0]} is none of its tokens; get the file again")
    return in_order


def halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens that `token` is merged from, or None if merging does not lead to it.

    As tiktoken merges: of all neighbours that together are a token, those of the lowest rank, the leftmost first. What
    stands around a token's bytes does not change the order within, so that these are the only two.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = (parts[i] + parts[i + 1] for i in range(len(parts) - 1))
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(joined))
        if rank == len(ranks):
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _byte_pairs(ranks: Mapping[bytes, int]) -> Tokenizer:
    words = byte_words()
    spelled = {token: "".join(words[value] for value in token) for token in ranks}
    merged = filter(None, (halves(token, ranks) for token in ranks))
    merges = [(spelled[left], spelled[right]) for left, right in merged]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    # ignore_merges: a piece that is a token is that token, whether or not merging leads to it.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    in_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special_tokens(folder: Path, settings: Mapping[str, Any], first: int, vocab_size: int) -> list[AddedToken]:
    """Return the tokens of the ids from `first` to `vocab_size` - 1."""
    where = f"{folder}/tokenizer_config.json: added_tokens_decoder"
    named: dict[int, AddedToken] = {}
    for key, entry in dict(settings.get("added_tokens_decoder") or {}).items():
        try:
            token_id, content, special = int(key), str(entry["content"]), bool(entry.get("special", True))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            shown = json.dumps({key: entry})[:80]
            raise InputError(f'{where}: {shown} is not an id with its "content"; get the file again') from error
        if not first <= token_id < vocab_size:
            raise InputError(
                f'{where}: "{content}" has id {token_id}, and special tokens have ids from {first}, after {FILE_NAME}, '
                f"to {vocab_size - 1}, the last that the model embeds; get the files again"
            )
        named[token_id] = AddedToken(content, special=special, normalized=False)
    reserved = {
        token_id: AddedToken(f"<|reserved_token_{token_id}|>", special=True, normalized=False)
        for token_id in range(first, vocab_size)
    }
    tokens = list((reserved | named).values())
    if len({token.content for token in tokens}) < len(tokens):
        raise InputError(f"{where}: one token has two ids; get the file again")
    return tokens


def _roles(folder: Path, settings: Mapping[str, Any], special: set[str]) -> dict[str, str]:
    """Return which tokens begin and end a text, pad it, and stand for the unknown."""
    roles = {}
    for role, usual in _ROLES.items():
        found = settings.get(role) or usual
        roles[role] = str(found["content"] if isinstance(found, dict) else found)
        if roles[role] not in special:
            raise InputError(
                f'{folder}/tokenizer_config.json: {role} "{roles[role]}" is none of its added_tokens_decoder; '
                "get the file again"
            )
    return roles
