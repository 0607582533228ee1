"""What a captured trace says of itself, and how the run is found in it again: `make_meta`, `options_of_trace`.

The description in the metadata is a JSON object: some words, and under "run" all that a repetition needs.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from epsim import __version__
from epsim.capture.model import MoeModel
from epsim.capture.models.processor import Processor
from epsim.capture.options import CaptureOptions
from epsim.capture.workload import Workload
from epsim.errors import InputError, TraceError
from epsim.trace.file import TraceFile
from epsim.trace.meta import RUN, TraceMeta

CIRCUMSTANCES = ("device", "torch", "transformers")  # of run.model: may change the last bits, and so a close pick


def make_meta(
    options: CaptureOptions, model: MoeModel, processor: Processor, workload: Workload, *, mock_statistics: bool
) -> TraceMeta:
    """Return the trace's metadata: its description says in words what ran, and under "run" how to run it again.

    mock_statistics: statistics of random tokens are given.
    """
    how = model.source
    weights = f"random (seed {options.model.seed})" if model.random_weights else options.model.checkpoint
    description = {
        "weights": weights,
        "requests": workload.words,
        "ran on": f"{how['device']} in {how['dtype']}",
        **({"note": options.note} if options.note else {}),
        RUN: {
            "options": options.to_mapping(),
            "model": dict(how),
            "processor": {**processor.origin, "eos_token_ids": sorted(processor.eos_token_ids)},
            "requests": workload.provenance,
            "statistics_sha256": [_sha256(Path(file)) for file in options.statistics],
            "num_threads": torch.get_num_threads(),
        },
    }
    drew_something = model.random_weights or options.requests.path is None or options.fitted_scores
    return TraceMeta.of(
        model.shape,
        model=model.name,
        origin="captured",
        description=json.dumps(description),
        seed=options.model.seed if drew_something else None,
        software=f"epsim {__version__}, torch {how['torch']}, transformers {how['transformers']}",
        mock=model.random_weights or options.requests.mock or mock_statistics,
    )


def options_of_trace(path: Path) -> tuple[CaptureOptions, TraceMeta, int]:
    """Return the options with which a trace was captured, its metadata, and how many requests it holds.

    Raises TraceError if it was not captured.
    """
    trace = TraceFile.open(path)
    meta = trace.meta
    if meta.run is None:
        raise TraceError(f"{path}: was not captured by epsim trace; there is nothing to repeat")
    try:
        return CaptureOptions.from_mapping(meta.run["options"]), meta, len(trace.requests)
    except (KeyError, TraceError) as error:
        raise TraceError(f"{path}: its metadata does not say how it was captured ({error})") from error


def require_same_run(path: Path, meta: TraceMeta, repeated: TraceMeta, say: Callable[[str], None]) -> None:
    """Raise InputError unless `meta` runs what `repeated`, the metadata of `path`, did; `say` what may differ.

    Another model or other requests are an error; another device, library or number of threads may change last bits.
    """
    now, then = meta.run, repeated.run
    assert now is not None
    assert then is not None
    circumstances = [(name, then["model"].pop(name, None), now["model"].pop(name, None)) for name in CIRCUMSTANCES]
    circumstances.append(("threads", then.pop("num_threads", None), now.pop("num_threads", None)))
    changed = [key for key in now if now[key] != then.get(key)]
    if changed:
        what = ", ".join(f"{key} ({_differences(now[key], then.get(key))})" for key in changed)
        raise InputError(f"{path}: cannot be repeated, for what it names changed since: {what}; capture anew instead")
    for name, old, new in circumstances:
        if old != new:
            say(f"{path} was captured with {name} {old}, this run has {new}: bytes may differ")


def _differences(now: Any, then: Any) -> str:
    """Return the names of what differs inside, or both values."""
    if isinstance(now, dict) and isinstance(then, dict):
        return ", ".join(key for key in {**then, **now} if now.get(key) != then.get(key))
    return f"{then} then, {now} now"


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
