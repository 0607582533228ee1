"""What a rank does between messages: the protocol `Work`, and `Arrival`, tokens that came from another rank.

`epsim.measure.compute.ModelWork` runs a real model; `epsim.measure.emulate.WaitingWork` waits as long as a device would
take. Letters: V vectors of a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from epsim.measure.layout import Leg, Part, StepLayout
from epsim.sim import StepPlan


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Tokens at home on `home` that this rank computes: num_vectors of them in `data`.

    data: a dispatch message; or, at the gateway that got them, what `Work.split` made of one.
    """

    layer: int
    chunk: int
    home: int
    num_vectors: int
    data: Any


class Work(Protocol):
    """The compute of one rank, called by its program in order; `front` of layer 0 starts a step's layers."""

    def prepare(self, layouts: Sequence[StepLayout], plans: Sequence[StepPlan]) -> None:
        """Get to know all steps of the batch, once, outside what is timed."""

    def begin(self, step: int) -> None:
        """A step starts; with step 0, a batch."""

    def front(self, layer: int, batch: int) -> None:
        """Attention and router of a micro-batch of the home tokens (layer 0 of batch 0: the vision encoder, too)."""

    def pack(self, layer: int, chunk: int, leg: Leg, out: torch.Tensor) -> None:
        """Write the dispatch of a leg into a message."""

    def shared(self, layer: int, batch: int) -> None:
        """Shared experts for the home tokens."""

    def experts(self, layer: int, batch: int, arrivals: list[Arrival]) -> None:
        """All routed experts for the home tokens of a micro-batch and everything that arrived, in one go."""

    def local(self, layer: int) -> None:
        """The routed experts for the home tokens alone."""

    def remote(self, arrival: Arrival) -> None:
        """The routed experts for one arrival."""

    def result(self, arrival: Arrival, out: torch.Tensor) -> None:
        """Write the results for an arrival into a message."""

    def accept(self, layer: int, chunk: int, leg: Leg, data: torch.Tensor) -> None:
        """Add the results that came back for a leg."""

    def finish_layer(self, layer: int, batch: int) -> None:
        """All results of a micro-batch are back: what is left to do before the next front."""

    def split(
        self, data: torch.Tensor, num_vectors: int, destination: int, out: torch.Tensor | None
    ) -> tuple[Part, Any]:
        """At a gateway: the part of a message for a rank of its node, into `out`, or (None) kept for `remote`."""

    def gather(self, total: torch.Tensor | None, part: Part, arrived: Any, num_vectors: int) -> torch.Tensor | None:
        """At a gateway: add one rank's results (a message, or an `Arrival` computed here) to a total."""

    def gathered(self, total: torch.Tensor | None, out: torch.Tensor) -> None:
        """Write a node's total into a message."""

    def cached(self, layer: int, requests: list[int], out: torch.Tensor) -> None:
        """Write a layer's keys and values of requests into a message."""

    def load(self, layer: int, requests: list[int], data: torch.Tensor) -> None:
        """Take over a layer's keys and values from a message."""

    def head(self) -> None:
        """The language-model head of the step's last home tokens."""
