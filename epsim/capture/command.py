"""The whole of `epsim trace`: from `CaptureOptions` to a trace file, `capture_trace`; once more, `repeat_options`.

Progress is told to a `Reporter`.
"""

import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from epsim import __version__
from epsim.capture.batches import Batch
from epsim.capture.capture import Advance, CaptureOutcome, capture_batches
from epsim.capture.load import load_model
from epsim.capture.model import MoeModel
from epsim.capture.options import CaptureOptions, statistics_path
from epsim.errors import TraceError
from epsim.trace.file import TraceFile
from epsim.trace.meta import TraceMeta
from epsim.trace.writer import Compression


class Reporter(Protocol):
    """Who is told how far a capture is."""

    def say(self, line: str) -> None:
        """Take one line, e.g. that the model is loaded."""

    def count(self, label: str, num_requests: int) -> Advance:
        """Start counting requests and tokens of a pass over all requests."""
