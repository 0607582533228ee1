"""Which requests of a trace a placement is fitted to and which it is judged on: `Split`, `split_requests`.

Letters: Q requests.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.errors import InputError
from epsim.trace import RequestTable

Ids = npt.NDArray[np.int32]
FEWEST_REQUESTS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Request ids, ascending, in two parts that share none."""

    seed: int
    fit_ids: Ids
    held_out_ids: Ids

    def __post_init__(self) -> None:
        if np.intersect1d(self.fit_ids, self.held_out_ids).size:
            raise ValueError("a request must not be in both parts")

    @property
    def test_to_fit(self) -> float:
        """Requests held out per request fitted to."""
        return len(self.held_out_ids) / len(self.fit_ids)


def split_requests(requests: RequestTable, fit_share: float, seed: int) -> Split:
    """Return a random split in which prompts with images and prompts of text alone are shared out in proportion.

    Of each kind, fit_share is fitted to, to the nearest request, a half more. Raises InputError where a part has none.
    """
    if not 0 < fit_share < 1:
        raise InputError(f"--fit-share: {fit_share} is not between 0 and 1; write e.g. 0.5")
    if len(requests) < FEWEST_REQUESTS:
        raise InputError(
            f"trace: {len(requests)} requests are too few to fit to some and judge on others; "
            f"use {FEWEST_REQUESTS} or more"
        )
    rng = np.random.default_rng(seed)
    has_image_Q = requests.num_vision_tokens_Q > 0
    fit_Q = np.zeros(len(requests), dtype=bool)
    for kind_Q in (has_image_Q, ~has_image_Q):
        places = rng.permutation(np.flatnonzero(kind_Q))
        fit_Q[places[: int(fit_share * len(places) + 0.5)]] = True
    if fit_Q.all() or not fit_Q.any():
        part = "held out" if fit_Q.all() else "fitted to"
        raise InputError(
            f"--fit-share: {fit_share} of {len(requests)} requests leaves none that is {part}; write one nearer to 0.5"
        )
    ids_Q = requests.request_id_Q
    return Split(seed=seed, fit_ids=ids_Q[fit_Q], held_out_ids=ids_Q[~fit_Q])
