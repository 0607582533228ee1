"""A tokenizer for models without one: `byte_tokenizer`. A byte is a token, and nothing is downloaded."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
PAD_ID, BOS_ID, EOS_ID = NUM_BYTES, NUM_BYTES + 1, NUM_BYTES + 2
IMAGE_TOKEN = "<image>"


def byte_tokenizer(vocab_size: int, image_token_id: int | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with ids below `vocab_size`: the byte's value, then <pad> 256, <bos> 257 and <eos> 258.

    A text becomes <bos> and its bytes in UTF-8. <image> is `image_token_id`. Every other id of the vocabulary, which
    a random model generates as gladly as any, is written as its number: <1234>.
    """
    words = {word: value for value, word in byte_words().items()}
    named = {PAD_ID: "<pad>", BOS_ID: "<bos>", EOS_ID: "<eos>"}
    if image_token_id is not None:
        named[image_token_id] = IMAGE_TOKEN
    for token_id in range(NUM_BYTES, vocab_size):
        words[named.get(token_id, f"<{token_id}>")] = token_id
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(named.values()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def byte_words() -> dict[int, str]:
    """Return how GPT-2's byte-level alphabet writes each byte: itself where it can be seen, else a letter from U+0100.

    Source: github.com/openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [value for value in range(NUM_BYTES) if value not in seen]
    return {value: chr(value) for value in seen} | {value: chr(256 + i) for i, value in enumerate(hidden)}
