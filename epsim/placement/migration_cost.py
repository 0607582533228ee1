"""What crosses between devices when tokens migrate: `MigrationCost`, a mean over tokens, and steps that lower it.

A token goes on from the device of its primary expert (the first of its ids). In layer l it touches the devices D_l;
it leaves c, where it is, for those of D_l other than c, and their results travel to the new c but for its own. So

    vectors of a token = sum over l of (|D_l| - [c of l - 1 is in D_l]) + (|D_l| - 1)

and before layer 0 it is at its home, which is taken to be any device alike: [..] is |D_0| / R in the mean.
Letters: T tokens, L MoE layers, K top-k, E experts, R devices.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import numpy.typing as npt

from epsim.trace.meta import ExpertIds

Devices = npt.NDArray[np.int32]  # device of each expert in each layer, [L, E]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MigrationCost:
    """Hidden vectors that cross between devices per migrating token, dispatch and combine of all layers.

    ids_LTK: uint8 or uint16 [L, T, K], the primary expert at k = 0.
    """

    ids_LTK: ExpertIds
    num_experts: int
    num_devices: int

    @property
    def num_layers(self) -> int:
        return int(self.ids_LTK.shape[0])

    @property
    def touch_cost_L(self) -> Floats:
        """What touching a device costs in each layer, before what is saved where the token is there already."""
        cost_L = np.full(self.num_layers, 2.0)
        cost_L[0] -= 1.0 / self.num_devices
        return cost_L

    @cached_property
    def affinity_LEE(self) -> Floats:
        """Tokens whose primary expert is the first in a layer and that choose the second in the next, [L - 1, E, E]."""
        affinity_LEE = np.zeros((self.num_layers - 1, self.num_experts, self.num_experts))
        for layer in range(self.num_layers - 1):
            primary_T1 = self.ids_LTK[layer, :, :1].astype(np.int64)
            pair_TK = primary_T1 * self.num_experts + self.ids_LTK[layer + 1]
            counts = np.bincount(pair_TK.reshape(-1), minlength=self.num_experts**2)
            affinity_LEE[layer] = counts.reshape(self.num_experts, self.num_experts)
        return affinity_LEE

    def of(self, device_LE: Devices) -> float:
        """Return the vectors per token under a placement."""
        touch_cost_L, total = self.touch_cost_L, 0.0
        here_T = np.full(self.ids_LTK.shape[1], -1, np.int32)  # any device alike
        for layer, ids_TK in enumerate(self.ids_LTK):
            touched, stayed = _count(ids_TK, here_T, device_LE[layer], self.num_devices)
            total += touch_cost_L[layer] * touched - len(ids_TK) - stayed
            here_T = device_LE[layer][ids_TK[:, 0]]
        return float(total / max(1, self.ids_LTK.shape[1]))

    def assigned(self, device_LE: Devices) -> Devices:
        """Return a placement after sweeps over the layers, each placed at its best for its neighbours' affinity.

        With as many experts on each device, the best placement of one layer between given ones is an assignment of
        experts to slots. With K = 1 the affinity on one device is all that a placement decides, and no sweep raises the
        cost; with K > 1 it leaves out |D_l| and counts a device with several experts of a token several times.
        """
        from scipy.optimize import linear_sum_assignment  # here: slow to load

        device_LE = device_LE.copy()
        slots_per_device, forward = self.num_experts // self.num_devices, range(self.num_layers)
        best = -1.0
        while (kept := self._kept(device_LE)) > best:
            best = kept
            for layer in [*forward, *reversed(forward)]:
                weight_ER = self._weight_ER(device_LE, layer)
                expert_X, slot_X = linear_sum_assignment(np.repeat(weight_ER, slots_per_device, axis=1), maximize=True)
                held = weight_ER[np.arange(self.num_experts), device_LE[layer]].sum()
                if weight_ER[expert_X, slot_X // slots_per_device].sum() > held:
                    device_LE[layer, expert_X] = slot_X // slots_per_device
        return device_LE

    def _kept(self, device_LE: Devices) -> float:
        """Return the affinity between experts of consecutive layers that share a device."""
        same_LEE = device_LE[:-1, :, None] == device_LE[1:, None, :]
        return float((self.affinity_LEE * same_LEE).sum())

    def _weight_ER(self, device_LE: Devices, layer: int) -> Floats:
        """Return the affinity of each expert of a layer to what its neighbours have on each device."""
        weight_ER = np.zeros((self.num_experts, self.num_devices))
        one_hot_RR = np.eye(self.num_devices)
        if layer > 0:
            weight_ER += self.affinity_LEE[layer - 1].T @ one_hot_RR[device_LE[layer - 1]]
        if layer < self.num_layers - 1:
            weight_ER += self.affinity_LEE[layer] @ one_hot_RR[device_LE[layer + 1]]
        return weight_ER

    def relabelled(self, device_LE: Devices) -> Devices:
        """Return the placement with the groups of each layer on those devices where most tokens stay.

        Which experts share a device is left as it is. Exact: renaming the devices of a layer and of all after it
        changes nothing but how many tokens stay between it and the layer before.
        """
        from scipy.optimize import linear_sum_assignment

        device_LE = device_LE.copy()
        for layer in range(1, self.num_layers):
            here_T = device_LE[layer - 1][self.ids_LTK[layer - 1, :, 0]]
            stays_RR = _meet(self.ids_LTK[layer], here_T, device_LE[layer], self.num_devices)
            old_R, new_R = linear_sum_assignment(stays_RR, maximize=True)
            if stays_RR[old_R, new_R].sum() > np.trace(stays_RR):
                device_LE[layer:] = new_R.astype(np.int32)[device_LE[layer:]]
        return device_LE

    def swapped(self, device_LE: Devices) -> Devices:
        """Return the placement after swaps of two experts of a layer, as long as one lowers the cost."""
        device_LE = device_LE.copy()
        last, touch_cost_L = self.num_layers - 1, self.touch_cost_L
        nobody_T, nothing_TR = np.full(self.ids_LTK.shape[1], -1, np.int32), np.zeros((0, self.num_devices), np.int16)
        users = [_users(ids_TK, self.num_experts) for ids_TK in self.ids_LTK]
        waiting, turn = set(range(self.num_layers)), itertools.cycle(range(self.num_layers))  # where a swap may help
        while waiting:
            if (layer := next(turn)) not in waiting:
                continue
            here_T = nobody_T if layer == 0 else device_LE[layer - 1][self.ids_LTK[layer - 1, :, 0]]
            next_TR = nothing_TR
            if layer < last:
                next_TR = _held(self.ids_LTK[layer + 1], device_LE[layer + 1], self.num_devices)
            held_TR = _held(self.ids_LTK[layer], device_LE[layer], self.num_devices)
            tokens = self.ids_LTK[layer, :, 0].copy(), *users[layer], here_T, next_TR, held_TR
            if _swap_in_layer(*tokens, device_LE[layer], touch_cost_L[layer]):
                waiting |= {max(0, layer - 1), min(layer + 1, last)}
            else:
                waiting.remove(layer)
        return device_LE


@numba.njit(cache=True, nogil=True)
def _held(ids_TK, device_E, num_devices):  # type: ignore[no-untyped-def]
    """Return how many experts of each token each device holds, int16 [T, R]."""
    held_TR = np.zeros((ids_TK.shape[0], num_devices), np.int16)
    for t in range(ids_TK.shape[0]):
        for k in range(ids_TK.shape[1]):
            held_TR[t, device_E[ids_TK[t, k]]] += 1
    return held_TR


@numba.njit(cache=True, nogil=True)
def _meet(ids_TK, here_T, device_E, num_devices):  # type: ignore[no-untyped-def]
    """Return [device touched, device where the token is]: how many tokens."""
    meet_RR = np.zeros((num_devices, num_devices), np.int64)
    held_TR = _held(ids_TK, device_E, num_devices)
    for t in range(ids_TK.shape[0]):
        for device in range(num_devices):
            meet_RR[device, here_T[t]] += held_TR[t, device] > 0
    return meet_RR


@numba.njit(cache=True, nogil=True)
def _count(ids_TK, here_T, device_E, num_devices):  # type: ignore[no-untyped-def]
    """Return the devices that tokens touch, all together, and how many tokens touch the one on which they are."""
    touched, stayed = 0, 0
    held_TR = _held(ids_TK, device_E, num_devices)
    for t in range(ids_TK.shape[0]):
        for device in range(num_devices):
            touched += held_TR[t, device] > 0
        if here_T[t] >= 0 and held_TR[t, here_T[t]] > 0:
            stayed += 1
    return touched, stayed


def _users(ids_TK: ExpertIds, num_experts: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the tokens of each expert, one expert after the other, and where each begins, int64 [E + 1]."""
    order = np.argsort(ids_TK.reshape(-1), kind="stable")
    starts = np.searchsorted(ids_TK.reshape(-1)[order], np.arange(num_experts + 1))
    return order // ids_TK.shape[1], starts.astype(np.int64)


@numba.njit(cache=True, nogil=True)
def _swap_in_layer(primary_T, users, starts_E, here_T, next_TR, held_TR, device_E, touch_cost):  # type: ignore[no-untyped-def]
    """Swap pairs of experts of two devices wherever that lowers the cost; return whether any was swapped.

    next_TR: experts of the next layer that each device holds, no rows for the last layer. device_E, held_TR: changed.
    """
    improved = False
    num_experts = len(device_E)
    mark_T = np.zeros(len(primary_T), np.uint8)
    for a in range(num_experts):
        for b in range(a + 1, num_experts):
            if device_E[a] == device_E[b]:
                continue
            for expert, bit in ((a, 1), (b, 2)):
                for i in range(starts_E[expert], starts_E[expert + 1]):
                    mark_T[users[i]] |= bit
            change = 0.0
            for expert, other in ((a, b), (b, a)):
                source, target = device_E[expert], device_E[other]
                for i in range(starts_E[expert], starts_E[expert + 1]):
                    t = users[i]
                    if mark_T[t] != 3:  # not a token of both
                        left = held_TR[t, source] == 1
                        new = held_TR[t, target] == 0
                        change += touch_cost * (int(new) - int(left))
                        change += int(left and here_T[t] == source) - int(new and here_T[t] == target)
                    if primary_T[t] == expert and len(next_TR) > 0:
                        change += int(next_TR[t, source] > 0) - int(next_TR[t, target] > 0)
            if change < -1e-6:
                improved = True
                for expert, other in ((a, b), (b, a)):
                    for i in range(starts_E[expert], starts_E[expert + 1]):
                        held_TR[users[i], device_E[expert]] -= 1
                        held_TR[users[i], device_E[other]] += 1
                device_E[a], device_E[b] = device_E[b], device_E[a]
            for expert in (a, b):
                for i in range(starts_E[expert], starts_E[expert + 1]):
                    mark_T[users[i]] = 0
    return improved
