"""Routing traces: which experts every token of every request went to, in memory, on disk, or made up.

`RoutingTrace` and `TraceFile` are the two `TraceSource`s. Only what needs no pyarrow is imported here;
files are in `epsim.trace.file`, generators in `epsim.trace.synthetic`.
"""

from epsim.trace.check import check_trace
from epsim.trace.meta import Modality, Phase, TraceMeta, TraceShape
from epsim.trace.routing import RequestTable, RoutingTrace, TraceSource, concatenate

__all__ = [
    "Modality",
    "Phase",
    "RequestTable",
    "RoutingTrace",
    "TraceMeta",
    "TraceShape",
    "TraceSource",
    "check_trace",
    "concatenate",
]
