"""Which rows the constants are fitted to and which are held out: `Study`, `run_studies`.

Each study is one library at one version; each of its kinds of operation has its own two constants.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from epsim.cluster import Cluster
from epsim.traffic import MessageFormat
from epsim.validate.exchange_cluster import exchange_cluster
from epsim.validate.exchange_data import GPUS_PER_NODE, Measured, load_deepep, load_deepep_v1, load_nccl
from epsim.validate.exchange_fit import Constants, Limit, fit_constants
from epsim.validate.exchange_load import Floats, Load, combine_bytes, dispatch_bytes, load_of
from epsim.validate.exchange_nccl import COLLECTIVES, collective_load
from epsim.validate.exchange_routing import MAX_DRAWN_TOKENS, Exchange, draw_exchange, masked

NUM_DRAWS = 4
EXCHANGES = ("dispatch", "combine")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table, and where its constants come from.

    table: of the data; of it device (None: all) and the rows of min_nodes and more. kinds: operations. dedup: of its
    messages. is_fitted: which rows; limit: the kind of link whose share is fitted to them. latency_of: the study whose
    latency is taken over, so that only the share is fitted, and if no row is fitted nothing. is_masked, rdma_only: what
    the benchmark does (`masked`, `exchange_cluster`).
    """

    key: str
    title: str
    table: str
    fitted_to: str
    is_fitted: Callable[[Measured], bool]
    kinds: tuple[str, ...] = EXCHANGES
    dedup: str = "none"
    device: str | None = None
    limit: Limit = "nvlink"
    min_nodes: int = 1
    latency_of: str | None = None
    is_masked: bool = False
    rdma_only: bool = False

    def has(self, row: Measured) -> bool:
        """Whether a row belongs to this study."""
        is_known = row.table == self.table and row.kind in self.kinds and self.device in (None, row.device)
        return is_known and row.num_nodes >= self.min_nodes


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row with its prediction. fitted: the constants come from it too. limit: what takes most of the time.

    bare_s: predicted without constants, by the specification alone.
    """

    study: str
    row: Measured
    published_s: float
    predicted_s: float
    fitted: bool
    limit: str
    bare_s: float

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted_s / self.published_s - 1


def _one_node(row: Measured) -> bool:
    return row.num_ranks == GPUS_PER_NODE


def _smallest_shape(row: Measured) -> bool:
    return (row.hidden, row.experts, row.topk) == (2048, 128, 8)


def _two_gpus_half(row: Measured) -> bool:
    return row.num_ranks == 2 and row.dtype == "half"


def _two_nodes(row: Measured) -> bool:
    return (row.num_nodes, row.experts) == (2, 256)


def _nothing(row: Measured) -> bool:
    return False


DEEPEP_STUDIES = (
    Study(
        key="low-latency", title="DeepEP low latency, hidden 7168, 1 to 8 nodes", table="low-latency",
        fitted_to="the rows of one node", is_fitted=_one_node, is_masked=True,
    ),
    Study(
        key="low-latency-network", title="The same, by constants of the network", table="low-latency", min_nodes=2,
        fitted_to="the rows of two nodes, 256 experts", is_fitted=_two_nodes, limit="network", is_masked=True,
    ),
    Study(
        key="normal", title="DeepEP normal, hidden 7168, 1 to 8 nodes, 4 to 24 SMs", table="normal", dedup="node",
        fitted_to="the rows of one node (20 SMs)", is_fitted=_one_node,
    ),
    Study(
        key="low-latency-0.5.12", title="DeepEP low latency, other shapes, one node", table="low-latency-0.5.12",
        fitted_to="the rows of hidden 2048, 128 experts, top-8", is_fitted=_smallest_shape,
    ),
    Study(
        key="v1-low-latency", title="DeepEP V1's own table, low latency", table="v1-low-latency",
        fitted_to="the row EP8 (share; latency of `low-latency`)", is_fitted=_one_node, latency_of="low-latency",
        is_masked=True,
    ),
    Study(
        key="v1-low-latency-first", title="DeepEP V1's first release, low latency, RDMA only",
        table="v1-low-latency-first", fitted_to="nothing (latency of `low-latency`)", is_fitted=_nothing,
        latency_of="low-latency", is_masked=True, rdma_only=True,
    ),
    Study(
        key="v1-normal", title="DeepEP V1's own table, normal", table="v1-normal", dedup="node",
        fitted_to="the row EP8 (share; latency of `normal`)", is_fitted=_one_node, latency_of="normal",
    ),
    Study(
        key="v1-normal-first", title="DeepEP V1's first release, normal", table="v1-normal-first", dedup="node",
        fitted_to="nothing (constants of `v1-normal`)", is_fitted=_nothing, latency_of="v1-normal",
    ),
)  # fmt: skip
NCCL_STUDIES = tuple(
    Study(
        key=f"nccl-{device.lower()}", title=f"NCCL on one node of {device}", table="nccl", device=device,
        kinds=COLLECTIVES, fitted_to="the rows of 2 GPUs, half", is_fitted=_two_gpus_half,
    )
    for device in ("H100", "A100")
)  # fmt: skip
STUDIES = (*DEEPEP_STUDIES, *NCCL_STUDIES)


def run_studies() -> tuple[list[Cell], dict[tuple[str, str], Constants]]:
    """Return a cell for every row of the packaged data, and the constants by study and kind."""
    rows = [*load_deepep(), *load_deepep_v1(), *load_nccl()]
    cells: list[Cell] = []
    constants: dict[tuple[str, str], Constants] = {}
    for study in STUDIES:
        for kind in study.kinds:
            own = [row for row in rows if study.has(row) and row.kind == kind]
            cells += _run(study, kind, own, constants)
    return cells, constants


def _run(study: Study, kind: str, rows: Sequence[Measured], constants: dict[tuple[str, str], Constants]) -> list[Cell]:
    """Fit, predict, and add the constants of the study and kind to `constants`."""
    loads = [row_load(study, row) for row in rows]
    timed = [replace(row, time_s=published_s(study, row), counted_bytes_per_s=0.0) for row in rows]
    train = [i for i, row in enumerate(rows) if study.is_fitted(row)]
    found = _constants(study, kind, [timed[i] for i in train], [loads[i] for i in train], constants)
    constants[study.key, kind] = found
    return [
        Cell(
            study=study.key,
            row=row,
            published_s=timed[i].time_s,
            predicted_s=found.predict_s(loads[i], row.num_sms),
            fitted=i in train,
            limit=found.limit(loads[i], row.num_sms),
            bare_s=Constants().predict_s(loads[i]),
        )
        for i, row in enumerate(rows)
    ]


def _constants(
    study: Study,
    kind: str,
    train: Sequence[Measured],
    loads: Sequence[Load],
    known: Mapping[tuple[str, str], Constants],
) -> Constants:
    other = None if study.latency_of is None else known[study.latency_of, kind]
    if train:
        return fit_constants(train, loads, study.limit, None if other is None else other.latency_s)
    if other is None:
        raise ValueError(f"{study.key}: no rows to fit and no other study's constants")
    return other


def row_load(study: Study, row: Measured) -> Load:
    """Return the load of a row; of an exchange the mean over the draws."""
    if row.table == "nccl":
        return collective_load(row)
    # What a load does not depend on is left out, so that rows that differ in nothing else share one.
    return _exchange_load(study, replace(row, table="", time_s=1.0, counted_bytes_per_s=0.0, notify_s=0.0, num_sms=0))


@cache
def _exchange_load(study: Study, row: Measured) -> Load:
    cluster, form = exchange_cluster(row.device, row.num_ranks, study.rdma_only), _message_format(row.hidden)
    loads = [load_of(cluster, *_bytes(study, row.kind, exchange, form, cluster)) for exchange in _exchanges(study, row)]
    return Load(
        nvlink_s=float(np.mean([load.nvlink_s for load in loads])),
        network_s=float(np.mean([load.network_s for load in loads])),
        latency_s=max(load.latency_s for load in loads),
    )


def _message_format(hidden: int) -> MessageFormat:
    return MessageFormat.of(hidden, "fp8", "bf16")


def _bytes(
    study: Study, kind: str, exchange: Exchange, form: MessageFormat, cluster: Cluster
) -> tuple[Floats, Floats | None]:
    if kind == "dispatch":
        return dispatch_bytes(exchange, form, study.dedup, cluster.node_of_device_R)
    return combine_bytes(exchange, form, study.dedup)


def _exchanges(study: Study, row: Measured) -> list[Exchange]:
    """Return the draws of a row."""
    drawn = min(row.num_tokens, MAX_DRAWN_TOKENS)
    is_even = row.num_tokens > drawn
    shape = (row.device, row.num_ranks, drawn, row.topk, row.experts, study.dedup == "node")
    exchanges = [_drawn(*shape, number) for number in range(1 if is_even else NUM_DRAWS)]
    if study.is_masked:
        exchanges = [masked(exchange, drawn, row.topk) for exchange in exchanges]
    if not is_even:
        return exchanges
    node_R = exchange_cluster(row.device, row.num_ranks).node_of_device_R
    return [exchange.even(node_R).scaled(row.num_tokens / drawn) for exchange in exchanges]


@cache
def _drawn(
    device: str, num_ranks: int, num_tokens: int, topk: int, experts: int, is_grouped: bool, number: int
) -> Exchange:
    rng = np.random.default_rng([num_ranks, num_tokens, topk, experts, number])
    return draw_exchange(exchange_cluster(device, num_ranks), num_tokens, topk, experts, is_grouped, rng)


def published_s(study: Study, row: Measured) -> float:
    """Return the published time; of DeepEP V1's bandwidths the time that they stand for, by what its tests count.

    Counted is, within a node, every device that a token goes to, and between nodes every node, the sender's own too.
    """
    if row.counted_bytes_per_s == 0:
        return row.time_s
    (exchange, *_), form = _exchanges(study, row), _message_format(row.hidden)
    vectors_RX = exchange.tokens_RR if row.num_nodes == 1 else exchange.node_tokens_RN
    vector_bytes = form.dispatch_vector_bytes if row.kind == "dispatch" else form.combine_vector_bytes
    return float(vectors_RX.sum(axis=1).mean()) * vector_bytes / row.counted_bytes_per_s
