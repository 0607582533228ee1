"""`PredictedTime`: a local search, layer by layer, on the simulator's own time of the layer.

Letters: L MoE layers, E experts, R devices, F phase (prefill, decode), T tokens, K top-k.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError
from epsim.placement.balanced_coactivation import BalancedCoactivation
from epsim.placement.coactivation import Coactivation
from epsim.placement.objective import FitTokens
from epsim.placement.placement import Placement
from epsim.placement.policies import Contiguous, ModalityBins
from epsim.placement.problem import LayerClock, PlacementPolicy, PlacementProblem

Floats = npt.NDArray[np.float64]
Devices = npt.NDArray[np.int64]

STARTS: dict[str, Callable[[], PlacementPolicy]] = {
    start.kind: start for start in (Contiguous, ModalityBins, Coactivation, BalancedCoactivation)
}
_MAX_TOKENS = 16384  # of the trace, to guess by; what decides is the clock
_LEAST_GAIN_FRAC = 1e-9  # less is rounding


class PredictedTime:
    """The shortest time of each layer that a local search finds by the simulator's closed form.

    A layer starts from the best of the starts and goes on to the first swap of two experts that is faster, until
    `max_evaluations` times have been asked for (the starts included) or no swap is faster. Swaps come in the order of
    what they promise: a more even load in prefill or in decode for the device that has the most, or fewer transfers
    (costs of the homes, and co-activation); the three take turns. Never slower than its starts, by that clock.
    """

    kind: ClassVar[str] = "predicted_time"

    def __init__(self, *, max_evaluations: int = 400, start: Sequence[str] = tuple(STARTS), seed: int = 0) -> None:
        """start: keys of STARTS. seed: of the order of swaps that promise the same."""
        self.max_evaluations, self.start, self.seed = max_evaluations, tuple(start), seed

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        tokens = FitTokens.of(problem.require_trace(self.kind), _MAX_TOKENS)
        if problem.clock is None:
            raise PlacementError(
                "placement.policy: predicted_time goes with experts spread over all devices; "
                "write parallelism.kind: ep, or another policy"
            )
        clock = problem.clock()
        starts = [STARTS[kind]().place(problem).device_of_expert_RLE[0] for kind in self.start]
        order_LE = np.empty((problem.num_layers, problem.num_experts), dtype=np.int64)
        for layer in range(problem.num_layers):
            guess = _Guess(problem, tokens, layer, np.random.default_rng([self.seed, layer]))
            found_E = self._search(clock, layer, [device_LE[layer] for device_LE in starts], guess)
            order_LE[layer] = np.argsort(found_E, kind="stable")
        return problem.placement(self.kind, order_LE)

    def _search(
        self, clock: LayerClock, layer: int, starts: Sequence[npt.NDArray[np.integer]], guess: "_Guess"
    ) -> Devices:
        distinct = list(dict.fromkeys(tuple(device_E.tolist()) for device_E in starts))[: self.max_evaluations]
        times = [clock.seconds(layer, np.array(devices)) for devices in distinct]
        best_s, left = min(times), self.max_evaluations - len(times)
        device_E = np.array(distinct[times.index(best_s)])
        tried_EE = np.full((len(device_E),) * 2, -1)  # when; a swap is new again when one of its devices has changed
        changed_R = np.zeros(guess.num_devices, dtype=np.int64)
        improved = True
        while improved and left > 0:
            improved = False
            for first, second in guess.swaps(device_E, tried_EE < np.maximum.outer(*[changed_R[device_E]] * 2)):
                if left == 0:
                    break
                tried_EE[first, second] = tried_EE[second, first] = self.max_evaluations - left
                left -= 1
                device_E[[first, second]] = device_E[[second, first]]
                seconds = clock.seconds(layer, device_E)
                if seconds < best_s * (1.0 - _LEAST_GAIN_FRAC):
                    best_s, improved = seconds, True
                    changed_R[device_E[[first, second]]] = self.max_evaluations - left
                    break
                device_E[[first, second]] = device_E[[second, first]]
        return device_E


class _Guess:
    """What swaps of two experts of a layer promise, from the routing of the fitted tokens.

    load_FE: pairs. together_EE: tokens with both experts, diagonal 0. cost_ER: what the tokens of an expert pay in
    transfers if it is on a device and nothing else is.
    """

    def __init__(self, problem: PlacementProblem, tokens: FitTokens, layer: int, rng: np.random.Generator) -> None:
        self.num_devices, num_experts = problem.num_devices, problem.num_experts
        ids_TK = tokens.ids_LTK[layer].astype(np.int64)
        chosen_TE = np.zeros((len(ids_TK), num_experts), dtype=np.float32)
        np.put_along_axis(chosen_TE, ids_TK, 1.0, axis=1)
        device_cost_FR = problem.objective.device_cost_FR
        self._load_FE = np.stack([chosen_TE[tokens.phase_T == phase].sum(axis=0, dtype=np.float64) for phase in (0, 1)])
        self._cost_ER = self._load_FE.T @ device_cost_FR
        # Two experts of a token on one device save a transfer, at what one costs on average.
        share_F = self._load_FE.sum(axis=1) / max(1.0, self._load_FE.sum())
        self._together_EE = (chosen_TE.T @ chosen_TE).astype(np.float64) * float(share_F @ device_cost_FR.mean(axis=1))
        np.fill_diagonal(self._together_EE, 0.0)
        self._tie_EE = rng.random((num_experts, num_experts))

    def swaps(self, device_E: Devices, is_new_EE: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """Yield all pairs of experts on different devices: new ones first, of these the most promising."""
        first, second = np.nonzero(np.triu(device_E[:, None] != device_E, 1))
        gains = [*self._load_gains(device_E), self._transfer_gain(device_E)]
        tie = self._tie_EE[first, second]
        places = np.empty((len(gains), len(first)), dtype=np.int64)
        for place, gain_EE in zip(places, gains, strict=True):
            place[np.lexsort((tie, -gain_EE[first, second]))] = np.arange(len(first))
        order = np.lexsort((tie, places.min(axis=0), ~is_new_EE[first, second]))
        yield from zip(first[order].tolist(), second[order].tolist(), strict=True)

    def _load_gains(self, device_E: Devices) -> Iterator[Floats]:
        """For each phase yield by how much swaps even out the load of the device with the most, [E, E].

        Of loads p > q that a swap brings nearer by d, the sum of squares falls by 2 d (p - q - d).
        """
        for load_E in self._load_FE:
            load_R = np.bincount(device_E, weights=load_E, minlength=self.num_devices)
            by_EE = load_E[:, None] - load_E
            gain_EE = by_EE * (load_R[device_E][:, None] - load_R[device_E] - by_EE)
            heaviest_E = device_E == load_R.argmax()
            yield np.where(heaviest_E[:, None] | heaviest_E, gain_EE, np.minimum(gain_EE, 0.0))

    def _transfer_gain(self, device_E: Devices) -> Floats:
        """Return how many transfers swaps save, about, [E, E]."""
        experts = np.arange(len(device_E))
        value_ER = self._together_EE @ (device_E[:, None] == np.arange(self.num_devices)) - self._cost_ER
        own_E = value_ER[experts, device_E]
        there_EE = value_ER[:, device_E]  # what the first is worth on the device of the second
        return np.asarray(there_EE + there_EE.T - own_E[:, None] - own_E - 2.0 * self._together_EE)
