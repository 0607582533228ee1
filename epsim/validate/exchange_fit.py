"""From loads to times: `Constants`, two per library and kind of operation, fitted to some rows (`fit_constants`).

time = latency + latency of the route + max(NVLink's time / share, the network's time)

latency: what the library takes without any byte. share: the part of NVLink's specified rate that its kernels reach; in
DeepEP's normal mode with REFERENCE_SMS SMs, and in proportion with others, up to the specification.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epsim.validate.exchange_data import Measured
from epsim.validate.exchange_load import Load

REFERENCE_SMS = 20


@dataclass(frozen=True, kw_only=True)
class Constants:
    """latency_s, nvlink_share: as the module says."""

    latency_s: float
    nvlink_share: float

    def predict_s(self, load: Load, num_sms: int = 0) -> float:
        """Return the time of an operation; num_sms: 0 where a library has no such choice."""
        return self.latency_s + load.latency_s + max(self._nvlink_s(load, num_sms), load.network_s)

    def limit(self, load: Load, num_sms: int = 0) -> str:
        """Return what takes the larger part of the time: "latency", "nvlink" or "network"."""
        parts_s = {
            "latency": self.latency_s + load.latency_s,
            "nvlink": self._nvlink_s(load, num_sms),
            "network": load.network_s,
        }
        return max(parts_s, key=parts_s.__getitem__)

    def _nvlink_s(self, load: Load, num_sms: int) -> float:
        share = self.nvlink_share * (num_sms / REFERENCE_SMS if num_sms else 1.0)
        return load.nvlink_s / min(share, 1.0)


def fit_constants(rows: Sequence[Measured], loads: Sequence[Load], latency_s: float | None = None) -> Constants:
    """Return the constants with the least squares of relative errors over rows that NVLink alone limits.

    latency_s: given, only the share is fitted (where there is a single row). Rows on which the network has a part, or
    whose SMs differ from REFERENCE_SMS, cannot be fitted.
    """
    if any(load.network_s > 0 for load in loads) or any(row.num_sms not in (0, REFERENCE_SMS) for row in rows):
        raise ValueError("constants are fitted to rows of one node, with the SMs that they refer to")
    time_s, route_s, busy_s = (
        np.array(values)
        for values in (
            [row.time_s for row in rows],
            [load.latency_s for load in loads],
            [load.nvlink_s for load in loads],
        )
    )
    if latency_s is not None:
        left, weight = (time_s - route_s - latency_s) / time_s, busy_s / time_s
        return Constants(latency_s=latency_s, nvlink_share=float(weight @ weight / (weight @ left)))
    matrix = np.stack([1 / time_s, busy_s / time_s], axis=1)
    (fitted_s, per_share), *_ = np.linalg.lstsq(matrix, 1 - route_s / time_s, rcond=None)
    return Constants(latency_s=float(fitted_s), nvlink_share=float(1 / per_share))
