"""vLLM's routed experts, on each response with `enable_return_routed_experts`.

Older: `prompt_routed_experts` [prompt, L, K] on the response and `routed_experts` [generated, L, K] on each choice.
Newer: one array `routed_experts` [prompt + generated - 1, L, K] on each choice. Lists, arrays, or .npy as base64.
Letters: T tokens, L MoE layers, K top-k.
"""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from epsim.errors import FormatError
from epsim.formats.options import Options, check_topk, choose_layers, names, needed_num_experts
from epsim.formats.reading import Ints, ints, mapping
from epsim.formats.responses import DAMAGED, count, read_responses, token_ids
from epsim.formats.routed_requests import Recording, RoutedRequest, write_requests

NAME = "vllm-routed-experts"
_AXES = ("token", "layer", "expert")


def read(paths: list[Path], output: Path, options: Options) -> list[str]:
    """Write the trace; each choice of each response is a request."""
    num_experts = needed_num_experts(options, str(paths[0]))
    requests: list[RoutedRequest] = []
    versions: set[str] = set()
    dropped = 0
    for path in paths:
        for where, response in read_responses(path):
            for request, num_cached in _requests(response, where):
                requests.append(request)
                dropped += num_cached
            if isinstance(version := response.get("system_fingerprint"), str):
                versions.add(version)
    if not requests:
        raise FormatError(f"{paths[0]}: has no responses with a choice; write them as the server gave them")
    topk = requests[0].ids_TLK.shape[2]
    rows, layer_ids = choose_layers(requests[0].ids_TLK.shape[1], options, requests[0].where)
    check_topk(topk, options, requests[0].where)
    recording = Recording(
        layer_ids=layer_ids,
        num_experts=num_experts,
        topk=topk,
        with_token_ids=any(request.token_id_T is not None for request in requests),
        about={
            "system": "vLLM",
            "format": NAME,
            "files": names(paths),
            "version": ", ".join(sorted(versions)) or "unknown",
        }
        | {"cached_prompt_tokens_left_out": dropped},
    )
    return write_requests(output, recording, (take_layers(request, rows) for request in requests), options)


def take_layers(request: RoutedRequest, rows: list[int]) -> RoutedRequest:
    """Return the request with some of its layers; as it is, for the check to come, if it does not have them."""
    ids_TLK = request.ids_TLK
    if rows[-1] < ids_TLK.shape[1] and rows != list(range(ids_TLK.shape[1])):
        ids_TLK = ids_TLK[:, rows]
    return RoutedRequest(
        where=request.where, ids_TLK=ids_TLK, num_prompt=request.num_prompt, token_id_T=request.token_id_T
    )


def _requests(response: dict[str, Any], where: str) -> Iterator[tuple[RoutedRequest, int]]:
    """Yield each choice of a response, and how many cached tokens at its beginning are not in it."""
    choices = response.get("choices", response.get("outputs"))
    if choices is None:
        choices = [response]
    if not isinstance(choices, list):
        raise FormatError(f"{where}: choices: is not a list; write the response as the server gave it")
    prompt_ids_T = token_ids(response, "prompt_token_ids", where)
    prompt = response.get("prompt_routed_experts")
    prompt_TLK = None if prompt is None else _array(prompt, f"{where}: prompt_routed_experts")
    for c, choice in enumerate(choices):
        place = where if choice is response else f"{where}: choices[{c}]"
        holder = mapping(choice, place, "a choice (a JSON object)")
        if choice is not response and holder.get("prompt_routed_experts") is not None:
            raise FormatError(
                f"{place}: prompt_routed_experts: stands in a choice; write it in the response, beside the choices"
            )
        routed = holder.get("routed_experts")
        if routed is None and prompt_TLK is None:
            raise FormatError(f"{place}: routed_experts: is missing; serve with --enable-return-routed-experts")
        num_prompt = _num_prompt(response, prompt_ids_T, prompt_TLK, where)
        nothing = prompt_TLK is not None and (routed is None or (isinstance(routed, list) and not routed))
        ids_TLK = None if nothing else _array(routed, f"{place}: routed_experts")
        all_TLK = _join(prompt_TLK, ids_TLK, place)
        generated_ids_T = token_ids(holder, "token_ids", place)
        generated = None if generated_ids_T is None else len(generated_ids_T)
        if generated is None and len(choices) == 1:
            generated = count(response, "usage", "completion_tokens", where)
        if generated is not None:
            of_prompt = num_prompt if prompt_TLK is None else 0
            _check_rows(0 if ids_TLK is None else len(ids_TLK), of_prompt, generated, place)
        ids_T = _token_ids(prompt_ids_T, generated_ids_T, len(all_TLK))
        yield _without_cached(all_TLK, num_prompt, ids_T, place)


def _join(prompt_TLK: Ints | None, ids_TLK: Ints | None, place: str) -> Ints:
    """Return the rows of prompt and generated tokens; the last generated token is never routed, so a void row goes."""
    if prompt_TLK is not None and ids_TLK is not None:
        if prompt_TLK.shape[1:] != ids_TLK.shape[1:]:
            raise FormatError(
                f"{place}: routed_experts: has [layer][expert] {list(ids_TLK.shape[1:])}, prompt_routed_experts "
                f"{list(prompt_TLK.shape[1:])}; write both of one model"
            )
        last = ids_TLK[-1]
        void = (last == -1).all() or (ids_TLK.shape[2] > 1 and (last == 0).all())
        return np.concatenate((prompt_TLK, ids_TLK[:-1] if void else ids_TLK))
    joined = prompt_TLK if ids_TLK is None else ids_TLK
    assert joined is not None
    return joined


def _num_prompt(response: dict[str, Any], prompt_ids_T: Ints | None, prompt_TLK: Ints | None, where: str) -> int:
    """Return the length of the prompt; what says it must agree."""
    said = {
        "prompt_routed_experts": None if prompt_TLK is None else len(prompt_TLK),
        "prompt_token_ids": None if prompt_ids_T is None else len(prompt_ids_T),
        "usage.prompt_tokens": count(response, "usage", "prompt_tokens", where),
    }
    known = {name: number for name, number in said.items() if number is not None}
    if not known:
        raise FormatError(
            f"{where}: does not say how long the prompt is; write prompt_token_ids, or usage.prompt_tokens, beside it"
        )
    (first, number), *others = known.items()
    for name, other in others:
        if other != number:
            raise FormatError(f"{where}: {name}: {other} tokens, {first} has {number}; write those of one request")
    return number


def _check_rows(found: int, of_prompt: int, generated: int, place: str) -> None:
    """Raise FormatError unless there is a row for each token; that of the last generated one only stands in the older
    form, without the prompt (`of_prompt` 0), and need not."""
    expected = [of_prompt + generated - 1] if of_prompt else [max(generated - 1, 0), generated]
    if found not in expected:
        rows = "prompt and generated tokens - 1 are" if of_prompt else "generated tokens, perhaps without the last, are"
        raise FormatError(
            f"{place}: routed_experts: has {found} rows, {rows} {' or '.join(map(str, expected))}; write a row for each"
        )


def _without_cached(all_TLK: Ints, num_prompt: int, ids_T: Ints | None, place: str) -> tuple[RoutedRequest, int]:
    """Return the request without rows of tokens whose prefix was cached, -1 throughout, at its beginning."""
    void_T = (all_TLK == -1).all(axis=(1, 2))
    num_cached = int(np.argmin(void_T)) if not void_T.all() else len(void_T)
    if num_prompt > len(all_TLK) or num_cached >= num_prompt:
        raise FormatError(
            f"{place}: routed_experts: {len(all_TLK)} rows, {num_cached} of them cached, do not reach past a prompt of "
            f"{num_prompt} tokens; write the whole array"
        )
    kept_TLK = all_TLK[num_cached:]
    if (kept_TLK == -1).any():
        t = int(np.argmax((kept_TLK == -1).any(axis=(1, 2)))) + num_cached
        raise FormatError(f"{place}: token {t}: has -1 after the cached prefix; rows of tokens that ran have experts")
    request = RoutedRequest(
        where=place,
        ids_TLK=kept_TLK,
        num_prompt=num_prompt - num_cached,
        token_id_T=None if ids_T is None else ids_T[num_cached:],
    )
    return request, num_cached


def _token_ids(prompt_T: Ints | None, generated_T: Ints | None, num_tokens: int) -> Ints | None:
    """Return the id of each token that has a row, -1 where it is not known."""
    if prompt_T is None:
        return None
    ids_T = np.concatenate((prompt_T, generated_T if generated_T is not None else np.zeros(0, dtype=np.int64)))
    padded_T = np.full(num_tokens, -1, dtype=np.int64)
    padded_T[: len(ids_T)] = ids_T[:num_tokens]
    return padded_T


def _array(value: object, where: str) -> Ints:
    """Return [token, layer, expert] from nested lists, an array, or an .npy file as base64."""
    if isinstance(value, str):
        try:
            value = np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
        except DAMAGED as error:
            raise FormatError(
                f"{where}: is text, but no .npy array as base64; write it as the server gave it"
            ) from error
    array_TLK = ints(value, _AXES, where)
    if not array_TLK.size:
        raise FormatError(f"{where}: is empty, {list(array_TLK.shape)}; write a row per token")
    return array_TLK
