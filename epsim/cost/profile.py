"""`DeviceProfile`: how long the parts of a decoder take on a device, as measured, and its file (JSON).

An operation (`OpTable`) has one or two axes and a row per cell of its grid; C cells, A axes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.atomic import whole_file
from epsim.errors import InputError
from epsim.model import ModelCard

Floats = npt.NDArray[np.float64]

FORMAT = 1  # of the file
AXES: dict[str, tuple[str, ...]] = {
    "prefill_attention": ("requests", "tokens_per_request"),  # one decoder layer, norm and residual included
    "decode_attention": ("requests", "context"),  # the same; cached tokens per request, the new one included
    "router": ("tokens",),  # norm, logits, softmax, gate weights
    "dense_ffn": ("tokens",),
    "shared_experts": ("tokens",),
    "experts": ("activated", "pairs_per_expert"),  # routed ones of one device in one call
    "pack": ("vectors",),  # a dispatch: gathered and encoded, with codes and gate weights
    "serve": ("vectors",),  # a dispatch decoded, and its results encoded
    "reduce": ("vectors",),  # a combine: decoded and added to where they belong
    "to_host": ("bytes",),
    "to_device": ("bytes",),
    "vision": ("images",),  # encoder and projector
    "head": ("outputs",),  # final norm, logits, argmax
}
SECONDS = ("median_s", "p25_s", "p75_s", "min_s", "max_s")
_SAME_TIMES = {"name", "num_layers", "num_dense_layers", "tie_embeddings", "compute_dtype"}


@dataclass(frozen=True, kw_only=True, eq=False)
class OpTable:
    """The cells of one operation.

    axes: what the columns of at_CA are. at_CA: float64 [C, A], rows in ascending order, none twice. median_s_C,
    p25_s_C, p75_s_C, min_s_C, max_s_C: float64 seconds over the repeats. repeats_C: int64, how many.
    """

    axes: tuple[str, ...]
    at_CA: Floats
    median_s_C: Floats
    p25_s_C: Floats
    p75_s_C: Floats
    min_s_C: Floats
    max_s_C: Floats
    repeats_C: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        num_cells = len(self.at_CA)
        if not num_cells or self.at_CA.shape != (num_cells, len(self.axes)):
            raise ValueError(f"at_CA has shape {self.at_CA.shape}, with {len(self.axes)} axes")
        rows = [tuple(row) for row in self.at_CA.tolist()]
        if rows != sorted(set(rows)):
            raise ValueError("the cells do not ascend")
        for name, array in vars(self).items():
            if name.endswith("_C") and array.shape != (num_cells,):
                raise ValueError(f"{name} has shape {array.shape}, not ({num_cells},)")
        if not (self.at_CA > 0).all() or not (self.repeats_C > 0).all():
            raise ValueError("a cell is not above 0, or has no repeats")
        low_to_high = np.stack([self.min_s_C, self.p25_s_C, self.median_s_C, self.p75_s_C, self.max_s_C])
        if not np.isfinite(low_to_high).all() or (low_to_high[0] < 0).any() or (np.diff(low_to_high, axis=0) < 0).any():
            raise ValueError("times are not finite, below 0, or their quartiles do not ascend")

    @property
    def spread_C(self) -> Floats:
        """Quartile distance over median, 0 where the median is 0."""
        return (self.p75_s_C - self.p25_s_C) / np.maximum(self.median_s_C, np.finfo(float).tiny)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceProfile:
    """What was measured, on what, and how.

    shapes: sizes of the model's parts by their path in the card (`shapes_of`). ops: by name, those of AXES that the
    model and the device have. wire: in which dtypes vectors were sent (`wire_name`). versions: of torch and python.
    num_processes: how many measured at once, each with num_threads threads.
    """

    model: str
    shapes: Mapping[str, int]
    dtype: str
    wire: str
    device: str
    machine: str
    versions: Mapping[str, str]
    date: str
    num_processes: int
    num_threads: int
    ops: Mapping[str, OpTable]

    def __post_init__(self) -> None:
        for name, op in self.ops.items():
            if op.axes != AXES.get(name):
                raise ValueError(f"{name} has axes {op.axes}, not {AXES.get(name)}")


def wire_name(dispatch_dtype: str, combine_dtype: str) -> str:
    """Return, as profiles have it, in which dtypes vectors are sent."""
    return f"{dispatch_dtype}, {combine_dtype}"


def shapes_of(card: ModelCard) -> dict[str, int]:
    """Return the sizes that times depend on, by their path in the card; not how many layers there are."""
    found: dict[str, int] = {}
    for where, part in (("", card), ("attention.", card.attention), ("moe.", card.moe), ("vision.", card.vision)):
        if part is None:
            continue
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, int) and (where == "vision." or field.name not in _SAME_TIMES):
                found[where + field.name] = value
    found.pop("moe.shared_expert_ffn_size", None)
    if card.moe is not None:
        found["moe.shared_ffn_size"] = card.moe.shared_ffn_size
        found.pop("moe.num_shared_experts")
    return found


def write_profile(path: Path, profile: DeviceProfile) -> None:
    """Write a profile, whole or not at all; a line per cell."""
    head = {name: value for name, value in vars(profile).items() if name != "ops"}
    lines = json.dumps({"epsim_device_profile": FORMAT, **head}, indent=1).removesuffix("\n}")
    ops = ",\n".join(f'  "{name}": {_op_text(op)}' for name, op in profile.ops.items())
    with whole_file(path) as part:
        part.write_text(f'{lines},\n "ops": {{\n{ops}\n }}\n}}\n', encoding="utf-8")


def _op_text(op: OpTable) -> str:
    columns = [*op.axes, *SECONDS, "repeats"]
    seconds_C5 = np.stack([getattr(op, f"{name}_C") for name in SECONDS], axis=1)
    rows = (
        json.dumps([*(int(x) if x == int(x) else x for x in at), *(float(f"{s:.6g}") for s in seconds), int(repeats)])
        for at, seconds, repeats in zip(op.at_CA.tolist(), seconds_C5.tolist(), op.repeats_C, strict=True)
    )
    body = ",\n".join(f"    {row}" for row in rows)
    return f'{{"columns": {json.dumps(columns)}, "cells": [\n{body}\n  ]}}'


def read_profile(path: Path) -> DeviceProfile:
    """Return the profile in a file.

    Raises InputError if there is none, or it is damaged or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; name a device profile") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); name a file of `epsim measure device`") from error
    found = content.get("epsim_device_profile") if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: is no device profile of format {FORMAT}; write one with `epsim measure device`")
    del content["epsim_device_profile"]
    try:
        content["ops"] = {name: _op(value) for name, value in content["ops"].items()}
        return DeviceProfile(**content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is damaged: {error}; measure once more with `epsim measure device`") from error


def _op(content: Mapping[str, Any]) -> OpTable:
    columns, cells = content["columns"], np.array(content["cells"], dtype=np.float64)
    num_axes = len(columns) - len(SECONDS) - 1
    if columns[num_axes:] != [*SECONDS, "repeats"]:
        raise ValueError(f"columns {columns}")
    seconds = {f"{name}_C": cells[:, num_axes + i] for i, name in enumerate(SECONDS)}
    axes, repeats_C = tuple(columns[:num_axes]), cells[:, -1].astype(np.int64)
    return OpTable(axes=axes, at_CA=cells[:, :num_axes], repeats_C=repeats_C, **seconds)
