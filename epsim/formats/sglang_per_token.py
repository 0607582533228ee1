"""SGLang's recorder in mode `per_token` → a routing trace: requests are rebuilt from positions, as files name none.

`_Batch` follows the requests of a rank from pass to pass. What it assumes is in docs/formats.md.
Letters: T tokens, L MoE layers, K top-k.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from epsim.errors import FormatError
from epsim.formats.options import Options, names
from epsim.formats.reading import Ints
from epsim.formats.routed_requests import Recording, RoutedRequest, write_requests
from epsim.formats.sglang_passes import DECODE, MIXED, Pass, read_passes

NAME = "sglang-per-token"
_OTHERWISE = "take each forward pass as a request of its own with --passes-as-requests"


def read(paths: list[Path], output: Path, options: Options) -> list[str]:
    """Write the trace; requests are in the order of their ranks, and on a rank of their first tokens."""
    if options.passes_as_requests and options.drop_unrecorded_prefix:
        raise FormatError("--drop-unrecorded-prefix: has no meaning with --passes-as-requests; leave one of them out")
    recorded = read_passes(paths, options)
    requests: list[RoutedRequest] = []
    for rank, passes in recorded.passes.items():
        if options.passes_as_requests:
            requests += [_whole_pass(one) for one in passes]
            continue
        batch = _Batch(rank=rank, drop_unrecorded_prefix=options.drop_unrecorded_prefix)
        for one in passes:
            batch.take(one)
        requests += [request.routed() for request in batch.all]
    recording = Recording(
        layer_ids=recorded.layer_ids,
        num_experts=recorded.num_experts,
        topk=recorded.topk,
        with_token_ids=True,
        about={
            "system": "SGLang",
            "format": NAME,
            "files": names(paths),
            "version": "unknown",
            "requests": "one per forward pass" if options.passes_as_requests else "rebuilt from positions",
            "map": "from --placement" if options.placement is not None else "last_physical_to_logical_map",
        },
    )
    return write_requests(output, recording, requests, options)


def _whole_pass(one: Pass) -> RoutedRequest:
    return RoutedRequest(
        where=one.where, ids_TLK=one.ids_TLK, num_prompt=len(one.ids_TLK), token_id_T=_token_ids(one.input_ids_T)
    )


def _token_ids(ids_T: Ints) -> Ints:
    """Return ids, -1 for those that are none: SGLang writes placeholders of any size for images."""
    return np.where((ids_T >= 0) & (ids_T < 2**31), ids_T, -1)


@dataclass(kw_only=True, eq=False)
class _Request:
    """A request so far: the position of its next token, and the parts that were recorded."""

    where: str
    next_position: int
    num_prompt: int = 0
    decoding: bool = False
    ids: list[Ints] = field(default_factory=list)
    tokens: list[Ints] = field(default_factory=list)

    def add(self, one: Pass, rows: slice) -> None:
        self.ids.append(one.ids_TLK[rows])
        self.tokens.append(one.input_ids_T[rows])
        num_tokens = rows.stop - rows.start
        self.next_position += num_tokens
        if not self.decoding:
            self.num_prompt += num_tokens

    def routed(self) -> RoutedRequest:
        return RoutedRequest(
            where=self.where,
            ids_TLK=np.concatenate(self.ids),
            num_prompt=self.num_prompt,
            token_id_T=_token_ids(np.concatenate(self.tokens)),
        )


@dataclass(kw_only=True, eq=False)
class _Batch:
    """The requests of a rank.

    running: those that may go on, in the order in which a decode pass has them. held: prompts that were not among the
    requests of a decode pass; their prefill may still go on.
    """

    rank: int
    drop_unrecorded_prefix: bool
    all: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    held: list[_Request] = field(default_factory=list)

    def take(self, one: Pass) -> None:
        """Give the tokens of a pass to their requests; raises FormatError if that goes in no way, or in several."""
        if one.mode == DECODE:
            self._decode(one, 0)
            return
        bounds = np.concatenate(([0], np.cumsum(one.extend_lens)))
        num_decodes = self._num_decodes(one, bounds) if one.mode == MIXED else 0
        num_extends = len(one.extend_lens) - num_decodes
        first = int(bounds[num_extends])
        wanted = [int(p) for p in one.position_T[first:]]
        prompts = [self._extend(one, slice(int(bounds[i]), int(bounds[i + 1])), wanted) for i in range(num_extends)]
        if num_decodes:
            self._decode(one, first)
            self.running = [*prompts, *self.running]  # after a mixed pass SGLang has the prompts first
        else:
            self.running += prompts

    def _num_decodes(self, one: Pass, bounds: NDArray[np.int64]) -> int:
        """Return how many requests at the end of a mixed pass decode: those that extend by one token, not their first.

        The first request of the pass is none of them: there is a prompt, and one that goes on stands before new ones.
        With a prefix that may be left out, those before the running ones may be such prompts.
        """
        starts, lens = one.position_T[bounds[:-1]], one.extend_lens
        number = 0
        while number < len(lens) - 1 and lens[-1 - number] == 1 and starts[-1 - number] != 0:
            number += 1
        come_to = [request.next_position for request in self.running]
        while self.drop_unrecorded_prefix and _embed([int(p) for p in starts[len(lens) - number :]], come_to) is None:
            number -= 1
        return number

    def _extend(self, one: Pass, rows: slice, wanted: list[int]) -> _Request:
        """Give tokens to a new request, or to one whose prefill goes on; return it, no longer among the waiting."""
        position_T = one.position_T[rows]
        start = int(position_T[0])
        if (np.diff(position_T) != 1).any():
            t = int(np.argmax(np.diff(position_T) != 1))
            raise FormatError(
                f"{one.where}: positions: {position_T[t + 1]} after {position_T[t]} in one request; they ascend by 1, "
                f"or else {_OTHERWISE}"
            )
        request = self._continued(one, start, wanted) if start else None
        if request is None:
            request = _Request(where=f"{one.where}, token {rows.start}", next_position=start)
            self.all.append(request)
        for waiting in (self.running, self.held):
            if request in waiting:
                waiting.remove(request)
        request.add(one, rows)
        return request

    def _continued(self, one: Pass, start: int, wanted: list[int]) -> _Request | None:
        """Return the request whose prefill goes on at a position; None for a new one whose beginning is left out.

        wanted: positions of the tokens that the pass decodes, for which the other running requests must do.
        """
        come = [r for r in (*self.running, *self.held) if not r.decoding and r.next_position == start]
        fitting = [r for r in come if _embed(wanted, [q.next_position for q in self.running if q is not r]) is not None]
        if len(fitting) == 1:
            return fitting[0]
        if come:
            raise FormatError(
                f"{one.where}: positions: an extend begins at {start}, where {len(come)} requests have come to; "
                f"which goes on, and which decodes, cannot be told, {_OTHERWISE}"
            )
        if self.drop_unrecorded_prefix:
            return None
        raise FormatError(
            f"{one.where}: positions: an extend begins at {start}, where no request has come to: its beginning was "
            f"cached, or not recorded; leave that out with --drop-unrecorded-prefix, or {_OTHERWISE}"
        )

    def _decode(self, one: Pass, first: int) -> None:
        """Give each token from `first` on to a running request that has come to its position, in order.

        Running requests that have no token here have ended, or if they have not decoded yet, are held.
        """
        wanted = [int(p) for p in one.position_T[first:]]
        come_to = [request.next_position for request in self.running]
        earliest, latest = _embed(wanted, come_to), _embed(wanted[::-1], come_to[::-1])
        if earliest is None or latest is None:
            raise FormatError(
                f"{one.where}: positions: no running requests have come to the positions of its "
                f"{len(wanted)} decoded tokens, in order; record from the start of all requests, or {_OTHERWISE}"
            )
        latest = [len(come_to) - 1 - i for i in reversed(latest)]
        if earliest != latest:
            t = next(i for i, (a, b) in enumerate(zip(earliest, latest, strict=True)) if a != b)
            raise FormatError(
                f"{one.where}: positions: decoded token {first + t} at {wanted[t]} may be of more than one request, as "
                f"one of them has ended; {_OTHERWISE}"
            )
        kept = [self.running[i] for i in earliest]
        self.held += [r for i, r in enumerate(self.running) if i not in set(earliest) and not r.decoding]
        for t, request in enumerate(kept, start=first):
            request.decoding = True
            request.add(one, slice(t, t + 1))
        self.running = kept


def _embed(wanted: list[int], offered: list[int]) -> list[int] | None:
    """Return for each wanted value the first place after the one before that offers it; None if there is none."""
    places: list[int] = []
    i = 0
    for value in wanted:
        while i < len(offered) and offered[i] != value:
            i += 1
        if i == len(offered):
            return None
        places.append(i)
        i += 1
    return places
