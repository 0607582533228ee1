"""Everything that `epsim trace stats` says of a trace: `trace_stats`, under a `Spread`, and `sample_request`."""

from epsim.trace_stats.spread import Spread
from epsim.trace_stats.stats import sample_request, trace_stats

__all__ = ["Spread", "sample_request", "trace_stats"]
