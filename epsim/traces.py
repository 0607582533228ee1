"""From the `trace` section of a scenario to a `TraceSource` (`trace_and_load`) or to a file (`write_trace`)."""

import itertools
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from epsim.errors import TraceError
from epsim.model import ModelCard
from epsim.scenario.spec import (
    FileTraceSpec,
    PublishedTraceSpec,
    ScenarioSpec,
    SyntheticTraceSpec,
    TraceSpec,
    WorkloadSpec,
    ZipfTraceSpec,
)
from epsim.trace import RoutingTrace, TraceShape, TraceSource, concatenate, synthetic
from epsim.trace.file import TraceFile, TraceWriter, copy_trace
from epsim.trace.statistics import expert_load

MAX_IDS_IN_MEMORY = 2**32  # expert ids of a synthetic trace, of 1 or 2 bytes each
MAX_TRACES_KEPT, MAX_IDS_KEPT = 16, 2**28  # for the next scenario; two are kept however many ids they have

TraceAndLoad = tuple[TraceSource, npt.NDArray[np.int64]]
_kept: dict[Hashable, TraceAndLoad] = {}  # the last used one last

_DENSE_SHAPE = TraceShape(layer_ids=(0,), num_experts=1, topk=1)  # every token goes to the one expert of one layer


def trace_shape(model: ModelCard) -> TraceShape:
    """Return the shape of a synthetic trace of a model; for a dense one, of which only lengths count, a stand-in."""
    if model.moe is None:
        return _DENSE_SHAPE
    return TraceShape(layer_ids=model.moe_layer_ids, num_experts=model.num_experts, topk=model.topk)


def num_requests_needed(workload: WorkloadSpec) -> int:
    """Return how many requests the largest batch size takes."""
    return max(workload.batch_sizes) * workload.num_batches


def trace_and_load(spec: TraceSpec, model: ModelCard, num_requests: int) -> TraceAndLoad:
    """Return the trace (`open_trace`) and its expert loads, int64 [modality, L, E].

    Kept, because the scenarios of a comparison mostly share their trace, and each is checked before one is simulated.
    """
    key = _key(spec, model, num_requests)
    found = _kept.pop(key, None)
    if found is None:
        trace = open_trace(spec, model, num_requests)
        found = trace, expert_load(trace)
    _kept[key] = found
    while len(_kept) > MAX_TRACES_KEPT or (len(_kept) > 2 and _num_ids_kept() > MAX_IDS_KEPT):
        del _kept[next(iter(_kept))]
    return found


def checked_trace(spec: TraceSpec, model: ModelCard, workload: WorkloadSpec) -> TraceAndLoad:
    """Return `trace_and_load`; TraceError unless the trace fits the model and has the requests of the workload."""
    trace, load_MLE = trace_and_load(spec, model, num_requests_needed(workload))
    _check_trace(trace, model, workload)
    return trace, load_MLE


def _check_trace(trace: TraceSource, model: ModelCard, workload: WorkloadSpec) -> None:
    meta = trace.meta
    shape = trace_shape(model)
    for noun, found, wanted in (
        ("experts", meta.num_experts, shape.num_experts),
        ("top-k", meta.topk, shape.topk),
        ("MoE layers", meta.layer_ids, shape.layer_ids),
    ):
        if found != wanted and model.moe is not None:  # of a dense model only the lengths count
            raise TraceError(
                f"trace: {trace.name} has {noun} {_brief(found)}, model {model.name} has {_brief(wanted)}; "
                "name the model that the trace was taken from"
            )
    if model.vision is None and trace.requests.num_vision_tokens_Q.any():
        raise TraceError(
            f"trace: {trace.name} has vision tokens, model {model.name} no vision encoder; add model.vision, or use a "
            "trace of text alone, e.g. trace.vision_tokens: 0"
        )
    have, need = len(trace.requests.request_id_Q), num_requests_needed(workload)
    if have < need:
        raise TraceError(
            f"workload.batch_sizes: {max(workload.batch_sizes)} x num_batches {workload.num_batches} needs {need} "
            f"requests, {trace.name} has {have}; use smaller or fewer batches, or a longer trace"
        )


def _brief(value: object) -> str:
    return f"{value[0]}..{value[-1]} ({len(value)})" if isinstance(value, tuple) and value else str(value)


def _key(spec: TraceSpec, model: ModelCard, num_requests: int) -> Hashable:
    """Return what decides on a trace: for a file, also its present time of change and size."""
    if not isinstance(spec, FileTraceSpec) or not Path(spec.path).exists():
        return spec, model, num_requests
    status = Path(spec.path).stat()
    return spec, status.st_mtime_ns, status.st_size


def _num_ids_kept() -> int:
    return sum(trace.topk_expert_ids_TLK.size for trace, _ in _kept.values() if isinstance(trace, RoutingTrace))


def open_trace(spec: TraceSpec, model: ModelCard, num_requests: int) -> TraceSource:
    """Open the trace file, or draw the synthetic trace with `num_requests` unless the spec says how many.

    Raises TraceError if the file cannot be read, or the synthetic trace would not fit into memory.
    """
    if isinstance(spec, FileTraceSpec):
        return TraceFile.open(Path(spec.path))
    workload = _workload(spec, model, num_requests)
    _check_size(workload, model)
    return concatenate(list(_draw(spec, model, workload)))


def write_trace(spec: ScenarioSpec, path: Path, *, compress: bool) -> None:
    """Write the trace that a scenario draws or names to a file, piece by piece."""
    compression: Literal["zstd"] | None = "zstd" if compress else None
    if isinstance(spec.trace, FileTraceSpec):
        copy_trace(TraceFile.open(Path(spec.trace.path)), path, compression)
        return
    model = ModelCard.from_mapping(spec.model.model_dump())
    parts = _draw(spec.trace, model, _workload(spec.trace, model, num_requests_needed(spec.workload)))
    first = next(parts)
    with TraceWriter(path, first.meta, compression=compression) as writer:
        for part in itertools.chain([first], parts):
            writer.write(part)


def _workload(spec: SyntheticTraceSpec, model: ModelCard, num_requests: int) -> synthetic.SyntheticWorkload:
    if isinstance(spec, PublishedTraceSpec):
        own = {"tokens_per_image": model.vision.tokens_per_image} if model.vision else {}
        return synthetic.published_workload(
            spec.benchmark,
            **own,
            num_requests=spec.requests or num_requests,
            num_images=spec.images,
            num_text_tokens=spec.text_tokens,
            num_decode_tokens=None if spec.output_tokens is None else spec.output_tokens - 1,
        )
    return synthetic.SyntheticWorkload(
        num_requests=spec.requests or num_requests,
        num_vision_tokens=spec.vision_tokens,
        num_text_tokens=spec.text_tokens,
        num_decode_tokens=spec.output_tokens - 1,
    )


def _draw(spec: SyntheticTraceSpec, model: ModelCard, workload: synthetic.SyntheticWorkload) -> Iterator[RoutingTrace]:
    """Return the synthetic trace piece by piece."""
    shape = trace_shape(model)
    if model.moe is None and isinstance(spec, PublishedTraceSpec):
        shape = synthetic.OLMOE_SHAPE  # the model of table S10
    options: dict[str, Any] = {"shape": shape, "workload": workload, "seed": spec.seed, "model": model.name}
    if isinstance(spec, PublishedTraceSpec):
        return synthetic.published(spec.benchmark, spec.method, **options)
    if isinstance(spec, ZipfTraceSpec):
        return synthetic.zipf(exponent=spec.exponent, **options)
    return synthetic.uniform(**options)


def _check_size(workload: synthetic.SyntheticWorkload, model: ModelCard) -> None:
    num_tokens = workload.num_vision_tokens + workload.num_text_tokens + workload.num_decode_tokens
    shape = trace_shape(model)
    num_ids = workload.num_requests * num_tokens * shape.num_layers * shape.topk
    if num_ids > MAX_IDS_IN_MEMORY:
        raise TraceError(
            f"trace: {workload.num_requests} requests x {num_tokens} tokens x {shape.num_layers} layers x "
            f"top-{shape.topk} are {num_ids:.2g} expert ids, more than the {MAX_IDS_IN_MEMORY:.2g} that are drawn in "
            "memory; use fewer or smaller batches, or shorter requests"
        )
