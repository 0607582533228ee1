"""`Interpolation`: the time of an operation between the cells in which it was measured.

With two axes it is bilinear in the axes themselves, not in their logarithms: that is exact for
a + b x + c x y, the time of x experts (requests) with y pairs (tokens) each. With one axis it is piecewise linear.
Nothing to do takes no time. Below the smallest cell the time is that cell's, above the largest there is none.
"""

import numpy as np
import numpy.typing as npt

from epsim.cost.profile import OpTable
from epsim.errors import InputError

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64] | Floats
_OPTIONS = {  # of `epsim measure device`, that reach further
    "requests": "--max-requests",
    "outputs": "--max-requests",
    "tokens_per_request": "--max-prompt",
    "context": "--max-context",
    "tokens": "--max-tokens",
    "activated": "--max-experts",
    "pairs_per_expert": "--max-pairs",
    "vectors": "--max-vectors",
    "bytes": "--max-vectors",
    "images": "--max-images",
}


class Interpolation:
    """The times of one operation; the grid may end earlier in the second axis where the first is large."""

    def __init__(self, op: str, table: OpTable, origin: str) -> None:
        """origin: the profile, for messages."""
        self._op, self._axes, self._origin = op, table.axes, origin
        first_C = table.at_CA[:, 0]
        self._first = np.unique(first_C)
        self._columns = [
            (table.at_CA[first_C == first, -1], table.median_s_C[first_C == first]) for first in self._first
        ]
        if len(table.axes) == 1:
            self._first, self._columns = np.ones(1), [(first_C, table.median_s_C)]

    def __call__(self, *at: Numbers) -> Floats:
        """Return seconds at the values of the axes, one array for each, of one shape.

        Raises InputError for a value above the range.
        """
        first, last = (np.ones(at[0].shape), at[0]) if len(at) == 1 else at
        busy = (first > 0) & (last > 0)
        self._require_below(first, busy, float(self._first[-1]), 0)
        high = np.minimum(np.searchsorted(self._first, first), len(self._first) - 1)
        low = np.maximum(high - (self._first[high] > first), 0)  # the same column on it, and below the first
        ends = np.array([column[0][-1] for column in self._columns])
        self._require_below(last, busy, np.minimum(ends[low], ends[high]), len(self._axes) - 1)
        seconds_Cx = np.stack([np.interp(last, *column) for column in self._columns])
        low_s, high_s = (np.take_along_axis(seconds_Cx, index[None], axis=0)[0] for index in (low, high))
        width = self._first[high] - self._first[low]
        share = np.where(width > 0, (first - self._first[low]) / np.where(width > 0, width, 1), 0.0)
        return np.where(busy, low_s + share * (high_s - low_s), 0.0)

    def _require_below(self, asked: Numbers, busy: npt.NDArray[np.bool_], most: float | Floats, axis: int) -> None:
        beyond = busy & (asked > most * (1 + 1e-9))
        if not beyond.any():
            return
        name = self._axes[axis]
        worst = np.unravel_index(np.argmax(np.where(beyond, asked, 0)), asked.shape)
        least = self._first[0] if axis == 0 and len(self._axes) == 2 else self._columns[0][0][0]
        limit = float(np.broadcast_to(most, asked.shape)[worst])
        raise InputError(
            f"{self._origin}: {self._op} at {asked[worst]:g} {name.replace('_', ' ')}, measured from {least:g} to "
            f"{limit:g}; measure this scenario with `epsim measure device`, or with a larger {_OPTIONS[name]}"
        )
