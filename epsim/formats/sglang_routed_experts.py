"""SGLang's routed experts, on each response with `return_routed_experts`: base64 of int32, flattened [tokens, L, K].

Tokens: those of prompt and output but the last. They stand in meta_info (native API) or sglext (OpenAI's API). SGLang
has a row per layer of the model, dense ones too. Letters: T tokens, L layers, K top-k.
"""

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from epsim.errors import FormatError
from epsim.formats.options import Options, choose_layers, names, needed_num_experts
from epsim.formats.reading import Ints, mapping
from epsim.formats.responses import count, read_responses, token_ids
from epsim.formats.routed_requests import Recording, RoutedRequest, write_requests
from epsim.formats.vllm_routed_experts import take_layers
from epsim.scenario.describe import show

NAME = "sglang-routed-experts"
_HOLDERS = ("meta_info", "sglext")


def read(paths: list[Path], output: Path, options: Options) -> list[str]:
    """Write the trace; each response is a request."""
    num_experts, topk = needed_num_experts(options, str(paths[0])), options.known_topk
    if topk is None:
        raise FormatError(f"{paths[0]}: does not say how many experts a token has; write --topk or --model")
    requests = [request for path in paths for request in _requests(path, topk)]
    rows, layer_ids = choose_layers(requests[0].ids_TLK.shape[1], options, requests[0].where)
    recording = Recording(
        layer_ids=layer_ids,
        num_experts=num_experts,
        topk=topk,
        with_token_ids=any(request.token_id_T is not None for request in requests),
        about={"system": "SGLang", "format": NAME, "files": names(paths)},
    )
    return write_requests(output, recording, (take_layers(request, rows) for request in requests), options)


def _requests(path: Path, topk: int) -> Iterator[RoutedRequest]:
    if path.suffix == ".npz":
        raise FormatError(f"{path}: SGLang answers in JSON; write the responses as .json or .jsonl")
    for where, response in read_responses(path):
        choices = response.get("choices")
        holders = [(where, response)]
        if isinstance(choices, list):
            places = [(f"{where}: choices[{i}]", choice) for i, choice in enumerate(choices)]
            holders += [(place, mapping(choice, place, "a choice (a JSON object)")) for place, choice in places]
        found = [(place, holder, text) for place, holder in holders if (text := _routed(holder, place)) is not None]
        if not found:
            raise FormatError(f"{where}: routed_experts: is missing; ask for it with return_routed_experts")
        for place, holder, text in found:
            yield _request(text, holder, response, place, topk)


def _routed(holder: dict[str, Any], where: str) -> str | None:
    """Return the text of the routed experts, None if there are none here."""
    for name in _HOLDERS:
        part = holder.get(name)
        value = part.get("routed_experts") if isinstance(part, dict) else None
        if value is not None:
            if not isinstance(value, str):
                raise FormatError(f"{where}: {name}.routed_experts: {show(value)} is not text; SGLang writes base64")
            return value
    return None


def _request(text: str, holder: dict[str, Any], response: dict[str, Any], where: str, topk: int) -> RoutedRequest:
    num_prompt = _count(holder, response, "prompt_tokens", where)
    num_tokens = num_prompt + _count(holder, response, "completion_tokens", where) - 1
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: routed_experts: is not base64; write it as the server gave it") from error
    if num_tokens < 1 or num_prompt < 1 or not raw or len(raw) % (4 * topk * num_tokens):
        raise FormatError(
            f"{where}: routed_experts: {len(raw)} bytes are not int32 for {num_tokens} tokens (prompt and output but "
            f"the last) with top-{topk} in each layer; write the whole text, or another --topk"
        )
    ids_TLK: Ints = np.frombuffer(raw, dtype="<i4").reshape(num_tokens, -1, topk).astype(np.int64)
    ids_T = _token_ids(response, where, num_tokens)
    return RoutedRequest(where=where, ids_TLK=ids_TLK, num_prompt=min(num_prompt, num_tokens), token_id_T=ids_T)


def _count(holder: dict[str, Any], response: dict[str, Any], key: str, where: str) -> int:
    for part, section in ((holder, "meta_info"), (response, "meta_info"), (response, "usage")):
        if (number := count(part, section, key, where)) is not None:
            return number
    raise FormatError(f"{where}: meta_info.{key}: is missing; write how many tokens there are")


def _token_ids(response: dict[str, Any], where: str, num_tokens: int) -> Ints | None:
    """Return token ids if those of the prompt were kept beside the response, as `prompt_token_ids`."""
    prompt_T = token_ids(response, "prompt_token_ids", where)
    if prompt_T is None:
        return None
    output_T = token_ids(response, "output_ids", where)
    ids_T = prompt_T if output_T is None else np.concatenate((prompt_T, output_T))
    padded_T = np.full(num_tokens, -1, dtype=np.int64)
    padded_T[: len(ids_T)] = ids_T[:num_tokens]
    return padded_T
