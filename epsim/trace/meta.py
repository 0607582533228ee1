"""What a trace says about itself: `TraceMeta`, and the codes of its columns, `Phase` and `Modality`.

A `TraceMeta` goes into a file as one line of JSON (`to_json`, `from_json`).
"""

import dataclasses
import json
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray

from epsim.errors import TraceError

FORMAT_VERSION = 1
ORIGINS = ("captured", "imported", "synthetic")
MAX_EXPERTS = 65536
RUN = "run"

ExpertIds = NDArray[np.uint8] | NDArray[np.uint16]


class Phase(IntEnum):
    """The code in `phase_T`: what the forward pass that routed a token was doing."""

    PREFILL = 0
    DECODE = 1


class Modality(IntEnum):
    """The code in `modality_T`. Generated tokens are text, whatever their ids."""

    TEXT = 0
    VISION = 1


@dataclass(frozen=True, kw_only=True)
class TraceShape:
    """The MoE layers that a trace covers: real layer ids, ascending; logical experts and top-k of each."""

    layer_ids: tuple[int, ...]
    num_experts: int
    topk: int

    def __post_init__(self) -> None:
        for name, low, high, bound in (
            ("num_experts", 1, MAX_EXPERTS, f"{MAX_EXPERTS}"),
            ("topk", 1, self.num_experts, f"num_experts = {self.num_experts}"),
        ):
            value = getattr(self, name)
            if not _is_int(value) or not low <= value <= high:
                raise TraceError(f"trace.{name}: {value!r} must be an integer from {low} to {bound}")
        ids = self.layer_ids
        if not isinstance(ids, tuple) or not ids or not all(_is_int(i) and i >= 0 for i in ids):
            raise TraceError(f"trace.layer_ids: {ids!r} must be a non-empty tuple of integers >= 0")
        if any(a >= b for a, b in pairwise(ids)):
            raise TraceError(f"trace.layer_ids: {ids!r} must ascend without repeats")

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return len(self.layer_ids)

    @property
    def expert_id_dtype(self) -> np.dtype[Any]:
        """dtype of expert ids: uint8 up to 256 experts, uint16 above."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)


@dataclass(frozen=True, kw_only=True)
class TraceMeta(TraceShape):
    """Where a trace comes from and which layers it covers.

    Attributes:
        model: name of the model card, "" if there is none.
        origin: "captured" (hooks on a model that ran), "imported" (another system's file) or "synthetic".
        description: what it was captured or imported from, or the synthetic parameters; text, or a JSON object, of
            which `words` reads out what is not an object itself.
        seed: of the synthetic generator or the sampled capture, None if nothing was random.
        software: what wrote it, e.g. "epsim 0.1.0".
        mock: True if a captured model had random weights or was fed random tokens: nobody's real routing.
        format_version: of the file format, 1.
    """

    model: str
    origin: str
    description: str
    seed: int | None = None
    software: str = ""
    mock: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.origin not in ORIGINS:
            raise TraceError(f"trace.origin: {self.origin!r} is not one of {', '.join(ORIGINS)}")
        for name in ("model", "description", "software"):
            if not isinstance(getattr(self, name), str):
                raise TraceError(f"trace.{name}: {getattr(self, name)!r} must be text")
        if not (self.seed is None or _is_int(self.seed)):
            raise TraceError(f"trace.seed: {self.seed!r} must be an integer or null")
        if not isinstance(self.mock, bool):
            raise TraceError(f"trace.mock: {self.mock!r} must be true or false")
        if self.format_version != FORMAT_VERSION:
            raise TraceError(f"trace.format_version: {self.format_version!r} must be {FORMAT_VERSION}")

    def to_json(self) -> str:
        """Return the metadata as one line of JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def of(cls, shape: TraceShape, **about: Any) -> Self:
        """Return the metadata of a trace of this shape; `about` are the other fields."""
        return cls(layer_ids=shape.layer_ids, num_experts=shape.num_experts, topk=shape.topk, **about)

    @property
    def kind(self) -> str:
        """The origin, and that a capture is MOCK: what no output leaves out."""
        return f"{self.origin}, MOCK" if self.mock else self.origin

    @property
    def run(self) -> dict[str, Any] | None:
        """What the description of a captured trace has under `RUN`: all that a repetition needs; None without."""
        run = (self._described() or {}).get(RUN)
        return run if self.origin == "captured" and isinstance(run, dict) else None

    @property
    def num_requests_asked(self) -> int | None:
        """How many requests a captured trace's run was to do, more than it holds if it was cut; None if unknown."""
        try:
            num: int = (self.run or {})["requests"]["num_requests"]
        except (KeyError, TypeError):
            return None
        return num

    @property
    def words(self) -> str:
        """The description, for people."""
        fields = self._described()
        if fields is None:
            return self.description
        return ", ".join(f"{name} {value}" for name, value in fields.items() if not isinstance(value, dict))

    def _described(self) -> dict[str, Any] | None:
        try:
            fields = json.loads(self.description)
        except ValueError:
            return None
        return fields if isinstance(fields, dict) else None

    @staticmethod
    def from_json(text: str | bytes) -> "TraceMeta":
        """Return the metadata in `text`; raises TraceError (without a file name) if it is not such."""
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise TraceError("its metadata is not a JSON object; the file is damaged")
        version = fields.get("format_version")
        if _is_int(version) and version > FORMAT_VERSION:
            raise TraceError(
                f"format_version {version} is newer than {FORMAT_VERSION}, the one epsim reads; update epsim"
            )
        names = {field.name for field in dataclasses.fields(TraceMeta)}
        if wrong := sorted(names ^ set(fields)):
            raise TraceError(f"its metadata lacks or should not have the keys {', '.join(wrong)}")
        if isinstance(fields["layer_ids"], list):
            fields["layer_ids"] = tuple(fields["layer_ids"])
        return TraceMeta(**fields)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
