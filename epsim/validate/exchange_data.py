"""The published times of exchanges: `Measured` rows, and `load_deepep`, `load_deepep_v1`, `load_nccl` that read them.

Sources and licences stand in the heads of the packaged files.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from epsim.errors import InputError
from epsim.scenario.yaml_text import parse_yaml
from epsim.validate.published import data_text

DEEPEP_NAME, DEEPEP_V1_NAME, NCCL_NAME = "exchange-deepep.csv", "exchange-deepep-v1.yaml", "exchange-nccl.csv"
GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One published time of one operation.

    table: of the packaged data. kind: dispatch, combine, or the name of a collective. num_ranks: GPUs, 8 to a node.
    num_tokens, hidden, topk, experts: per rank, of an exchange of tokens; 0 for collectives. num_sms: given to the
    kernel, 0 where the data does not say. dtype, num_bytes: of collectives, as nccl-tests counts them. time_s: of the
    operation. notify_s: of the kernel that goes before it, timed apart (DeepEP's normal mode). counted_bytes_per_s:
    what is published in the place of a time (DeepEP V1, normal), time_s is 0 there.
    """

    table: str
    kind: str
    device: str
    num_ranks: int
    time_s: float
    num_tokens: int = 0
    hidden: int = 0
    topk: int = 0
    experts: int = 0
    num_sms: int = 0
    notify_s: float = 0.0
    counted_bytes_per_s: float = 0.0
    dtype: str = ""
    num_bytes: int = 0

    def __post_init__(self) -> None:
        if not (self.time_s > 0) != (self.counted_bytes_per_s > 0):
            raise InputError(f"{self.table}, {self.kind}: {self.time_s} s is no time; write one above 0")
        if self.num_ranks < 1 or (self.num_ranks > GPUS_PER_NODE and self.num_ranks % GPUS_PER_NODE):
            raise InputError(f"{self.table}, {self.kind}: {self.num_ranks} GPUs are no whole nodes of 8; write e.g. 16")

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // GPUS_PER_NODE)


def load_deepep() -> list[Measured]:
    """Return the rows of the tables low-latency, low-latency-0.5.12 and normal, dispatch and combine."""
    return read_deepep(data_text(DEEPEP_NAME), DEEPEP_NAME)


def read_deepep(text: str, name: str) -> list[Measured]:
    """Return the rows of a CSV of exchanges; InputError where a number is none. name: of the file, for messages."""
    found = []
    for line, row in _records(text):
        with_number = _Numbers(row, f"{name}, line {line}")
        found += [
            Measured(
                table=row["table"],
                kind=kind,
                device=row["device"],
                num_ranks=GPUS_PER_NODE * with_number.integer("nodes"),
                num_tokens=with_number.integer("tokens"),
                hidden=with_number.integer("hidden"),
                topk=with_number.integer("topk"),
                experts=with_number.integer("experts"),
                num_sms=with_number.integer("sms"),
                time_s=with_number.microseconds(f"{kind}_us"),
                notify_s=with_number.microseconds(f"{kind}_notify_us"),
            )
            for kind in ("dispatch", "combine")
        ]
    return found


def load_nccl() -> list[Measured]:
    """Return the rows of the table nccl."""
    found = []
    for line, row in _records(data_text(NCCL_NAME)):
        with_number = _Numbers(row, f"{NCCL_NAME}, line {line}")
        found += [
            Measured(
                table="nccl",
                kind=row["op"],
                device=row["device"],
                num_ranks=with_number.integer("gpus"),
                dtype=row["dtype"],
                num_bytes=int(column),
                time_s=with_number.microseconds(column),
            )
            for column in row
            if column.isdecimal()
        ]
    return found


def load_deepep_v1() -> list[Measured]:
    """Return the rows of DeepEP V1's own tables: v1-normal (GB/s), v1-low-latency, and of both the first release's."""
    content = parse_yaml(data_text(DEEPEP_V1_NAME))
    found = []
    for mode, section in (("normal", content["normal"]), ("low-latency", content["low_latency"])):
        for release, suffix in (("rows", ""), ("first", "-first")):
            for row in section[release]:
                found += [
                    _v1_row(
                        f"v1-{mode}{suffix}", kind, row["ep"], section["tokens"], float(row[kind]), content["setup"]
                    )
                    for kind in ("dispatch", "combine")
                ]
    return found


def _v1_row(table: str, kind: str, ep: int, num_tokens: int, value: float, setup: dict[str, Any]) -> Measured:
    is_rate = "normal" in table
    return Measured(
        table=table,
        kind=kind,
        device="H800",
        num_ranks=ep,
        num_tokens=num_tokens,
        hidden=setup["hidden"],
        topk=setup["topk"],
        experts=setup["experts"],
        num_sms=setup["sms"] if is_rate else 0,
        time_s=0.0 if is_rate else value / 1e6,
        counted_bytes_per_s=value * 1e9 if is_rate else 0.0,
    )


def _records(text: str) -> Iterable[tuple[int, dict[str, str]]]:
    """Yield the number of the line and the fields of each record; lines that start with # are comments."""
    numbered = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line and not line.startswith("#")]
    reader = csv.DictReader(line for _, line in numbered)
    yield from zip((n for n, _ in numbered[1:]), reader, strict=True)


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a record; an empty field is 0."""

    row: dict[str, str]
    where: str

    def integer(self, column: str) -> int:
        return int(self._number(column))

    def microseconds(self, column: str) -> float:
        """Return seconds."""
        return self._number(column) / 1e6

    def _number(self, column: str) -> float:
        text = self.row[column]
        try:
            value = float(text or 0)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise InputError(f'{self.where}, column {column}: "{text}" is no number from 0; write e.g. 16.28')
        return value
