"""From loads to times: `Constants`, two per library and kind of operation, fitted to some rows (`fit_constants`).

time = latency + latency of the route + max(NVLink's time / share, the network's time / share)

latency: what the library takes without any byte. share: the part of the specified rate that it reaches. Fitted is the
share of one of the two; the other is 1, as specified. NVLink's is that of REFERENCE_SMS SMs in DeepEP's normal mode,
where SMs copy, and in proportion with others, up to the specification.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from epsim.validate.exchange_data import Measured
from epsim.validate.exchange_load import Load

REFERENCE_SMS = 20
Limit = Literal["nvlink", "network"]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """latency_s, nvlink_share, network_share: as the module says."""

    latency_s: float = 0.0
    nvlink_share: float = 1.0
    network_share: float = 1.0

    def predict_s(self, load: Load, num_sms: int = 0) -> float:
        """Return the time of an operation; num_sms: 0 where a library has no such choice."""
        return self.latency_s + load.latency_s + max(self._busy_s(load, num_sms).values())

    def limit(self, load: Load, num_sms: int = 0) -> str:
        """Return what takes the larger part of the time: "latency", "nvlink" or "network"."""
        parts_s = {"latency": self.latency_s + load.latency_s, **self._busy_s(load, num_sms)}
        return max(parts_s, key=parts_s.__getitem__)

    def _busy_s(self, load: Load, num_sms: int) -> dict[str, float]:
        share = self.nvlink_share * (num_sms / REFERENCE_SMS if num_sms else 1.0)
        return {"nvlink": load.nvlink_s / min(share, 1.0), "network": load.network_s / self.network_share}


def fit_constants(
    rows: Sequence[Measured], loads: Sequence[Load], limit: Limit = "nvlink", latency_s: float | None = None
) -> Constants:
    """Return the constants with the least squares of relative errors over rows that one kind of link limits.

    limit: that kind; its share is fitted. latency_s: given, only the share is fitted (where there is a single row).
    ValueError for rows that the other kind of link may limit, and for SMs that differ from REFERENCE_SMS.
    """
    times_s = {
        "nvlink": np.array([load.nvlink_s for load in loads]),
        "network": np.array([load.network_s for load in loads]),
    }
    busy_s = times_s.pop(limit)
    (other_s,) = times_s.values()
    if (other_s >= busy_s).any() or any(row.num_sms not in (0, REFERENCE_SMS) for row in rows):
        raise ValueError(f"a share is fitted to rows that {limit} limits, with the SMs that it refers to")
    time_s = np.array([row.time_s for row in rows])
    left = 1 - np.array([load.latency_s for load in loads]) / time_s
    if latency_s is None:
        (latency_s, slope), *_ = np.linalg.lstsq(np.stack([1 / time_s, busy_s / time_s], axis=1), left, rcond=None)
    else:
        weight = busy_s / time_s
        slope = weight @ (left - latency_s / time_s) / (weight @ weight)
    return Constants(latency_s=float(latency_s), **{f"{limit}_share": float(1 / slope)})
