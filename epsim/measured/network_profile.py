"""From the micro-benchmarks of a network to figures of the simulator: `NetworkProfile.overrides`.

One-way time of n bytes: A + max(0, (f n + h - burst) / rate), where rate and burst are what the shaper was told (Linux
tbf), and A, f and h are fitted. A has the time that posting a send takes its caller (`send_overhead`) and the rest,
which is the latency of the links. N sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.measured.dilation import without_messages
from epsim.measured.dry_run import MODES, dry_spec, receive_overhead_s
from epsim.scenario import ScenarioSpec, apply_override, check_scenario
from epsim.sim.step import Mode

Floats = npt.NDArray[np.float64]
SIZES = (1, 600, 2400, 9600, 38400, 153600, 614400)  # bytes, measured
_SMALL_BYTES = 4096  # messages up to this size cost what a message costs, and no more
_NEGLIGIBLE_S_PER_BYTE = 1e-13


@dataclass(frozen=True, kw_only=True)
class LinkFit:
    """One-way times of a pair: latency_s (A less the send), frame_overhead f - 1, message_header h, how well it fits.

    ack_overhead: by what share messages of the other direction slow this one down. mean_error: of the one-way times.
    bytes_per_s: of the narrowest link, as the scenario has it. found_bytes_per_s: the same, but fitted where nothing is
    shaped.
    """

    latency_s: float
    frame_overhead: float
    message_header_bytes: float
    ack_overhead: float
    bytes_per_s: float
    found_bytes_per_s: float
    mean_error: float


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """raw: what was measured (`epsim.measure.network.measure_network`), with `shapes` of the scenario's links.

    shapes: for each entry of cluster.links bandwidth and burst in SI units, or None where nothing shapes it.
    """

    raw: Mapping[str, Any]
    shapes: Sequence[Mapping[str, float]] | None
    _receive_s: dict[str, float] = field(default_factory=dict, repr=False, compare=False)  # by mode, once worked out

    def as_dict(self) -> dict[str, Any]:
        return {"raw": dict(self.raw), "shapes": self.shapes}

    @property
    def send_overhead_s(self) -> float:
        """What posting the send of a small message takes its caller."""
        return self._small("send")

    @property
    def post_receive_s(self) -> float:
        """What posting the receive of a small message takes its caller: a part of what receiving costs."""
        return self._small("receive")

    def receive_overhead_s(self, spec: ScenarioSpec, cluster: Cluster) -> float:
        """What a received message takes in the scenario's mode, from dry runs (`epsim.measured.dry_run`)."""
        return self._receive_overhead_s(spec, spec.transmission.mode, cluster)

    def receive_overheads_s(self, spec: ScenarioSpec, cluster: Cluster) -> dict[Mode, float]:
        """Return the same for every mode."""
        return {mode: self._receive_overhead_s(spec, mode, cluster) for mode in MODES}

    def _receive_overhead_s(self, spec: ScenarioSpec, mode: Mode, cluster: Cluster) -> float:
        if mode not in self._receive_s:
            self._receive_s[mode] = self._dry_receive_s(spec, mode, cluster)
        return self._receive_s[mode]

    def _dry_receive_s(self, spec: ScenarioSpec, mode: Mode, cluster: Cluster) -> float:
        dry = dry_spec(without_messages(spec), mode)

        def with_receive(seconds: float) -> ScenarioSpec:
            return with_overrides(dry, self.terms(dry, cluster, seconds))

        return receive_overhead_s(self.raw["dry_step_s"][mode], with_receive)

    def _small(self, what: str) -> float:
        cells = [cell for pair in self.raw["pairs"] for cell in pair["cells"] if cell["bytes"] <= _SMALL_BYTES]
        return float(np.median([cell[what]["s"] for cell in cells]))

    @property
    def background_bytes_per_s(self) -> float | None:
        """Bytes moved per second of compute that moving them costs; None where that is nothing.

        With computing ranks the slowdown of compute beside a stream; with waiting ones the time that posting a
        longer send takes its caller.
        """
        seconds_per_byte = self.raw["interference_s_per_byte"]
        if seconds_per_byte is None:
            cells = self.raw["pairs"][0]["cells"]
            seconds_per_byte = np.polyfit([c["bytes"] for c in cells], [c["send"]["s"] for c in cells], 1)[0] / 2
        return None if seconds_per_byte < _NEGLIGIBLE_S_PER_BYTE else float(1 / seconds_per_byte)

    def fits(self, cluster: Cluster) -> list[LinkFit]:
        """Return the fit of each measured pair."""
        return [self._fit(pair, cluster) for pair in self.raw["pairs"]]

    def _fit(self, pair: Mapping[str, Any], cluster: Cluster) -> LinkFit:
        sizes_N = np.array([cell["bytes"] for cell in pair["cells"]], dtype=np.float64)
        one_way_N = np.array([cell["one_way"]["s"] for cell in pair["cells"]])
        # What a wire takes is nearer to the lower quartile: other work on the machine only makes it longer.
        wire_N, both_N = (np.array([cell[way]["p25_s"] for cell in pair["cells"]]) for way in ("one_way", "both_ways"))
        narrow = min(cluster.route(*pair["pair"]), key=lambda link: link.bytes_per_s)
        if self.shapes is None:
            return self._fit_unshaped(sizes_N, one_way_N, narrow.bytes_per_s)
        burst = next(s["burst"] for s in self.shapes if np.isclose(s["bandwidth"], narrow.bytes_per_s))
        base_s = float(np.median(one_way_N[sizes_N <= _SMALL_BYTES]))
        fastest_s = float(np.median(wire_N[sizes_N <= _SMALL_BYTES]))
        long_N = sizes_N > 2 * burst
        wire_bytes_N = (wire_N[long_N] - fastest_s) * narrow.bytes_per_s + burst  # f n + h
        weight_N = 1 / wire_N[long_N]
        design = np.stack([sizes_N[long_N], np.ones(long_N.sum())], axis=1)
        factor, header = np.linalg.lstsq(design * weight_N[:, None], wire_bytes_N * weight_N, rcond=None)[0]
        header = max(0.0, float(header))
        predicted_N = base_s + np.maximum(0.0, factor * sizes_N + header - burst) / narrow.bytes_per_s
        slower = (both_N[-1] - fastest_s) / max(wire_N[-1] - fastest_s, 1e-9) - 1
        return LinkFit(
            latency_s=max(0.0, base_s - self.send_overhead_s),
            frame_overhead=max(0.0, float(factor) - 1),
            message_header_bytes=header,
            ack_overhead=min(1.0, max(0.0, float(slower))),
            bytes_per_s=narrow.bytes_per_s,
            found_bytes_per_s=narrow.bytes_per_s,
            mean_error=float(np.abs(predicted_N / one_way_N - 1).mean()),
        )

    def _fit_unshaped(self, sizes_N: Floats, one_way_N: Floats, bytes_per_s: float) -> LinkFit:
        weight_N = 1 / one_way_N
        design = np.stack([sizes_N, np.ones(len(sizes_N))], axis=1)
        s_per_byte, base_s = np.linalg.lstsq(design * weight_N[:, None], one_way_N * weight_N, rcond=None)[0]
        predicted_N = base_s + s_per_byte * sizes_N
        return LinkFit(
            latency_s=max(0.0, float(base_s) - self.send_overhead_s),
            frame_overhead=0.0,
            message_header_bytes=0.0,
            ack_overhead=0.0,
            bytes_per_s=bytes_per_s,
            found_bytes_per_s=float(1 / max(s_per_byte, 1e-12)),
            mean_error=float(np.abs(predicted_N / one_way_N - 1).mean()),
        )

    def overrides(self, spec: ScenarioSpec, cluster: Cluster) -> dict[str, Any]:
        """Return the fields of a scenario on this network that the profile sets, as `--set` takes them."""
        return self.terms(spec, cluster, self.receive_overhead_s(spec, cluster))

    def terms(self, spec: ScenarioSpec, cluster: Cluster, receive_s: float) -> dict[str, Any]:
        """Return the same fields for a given overhead of a received message."""
        found: dict[str, Any] = {"transmission.connections": "pair"}
        if spec.transmission.mode == "sync":
            found["transmission.barriers"] = "own"
        fits = self.fits(cluster)
        direct = min(fits, key=lambda fit: fit.latency_s)
        hops = {i: len(cluster.route(*pair["pair"])) for i, pair in enumerate(self.raw["pairs"])}
        per_hop_s = direct.latency_s / hops[fits.index(direct)]
        for number, link in enumerate(spec.cluster.links):
            own = [fit for fit in fits if np.isclose(fit.bytes_per_s, link.bandwidth)] or [direct]
            fit, latency_s = own[0], per_hop_s
            if fit is not direct:  # a link that only far pairs use has the rest of their latency
                latency_s = max(0.0, fit.latency_s - (hops[fits.index(fit)] - 1) * per_hop_s)
            path = f"cluster.links[{number}]"
            if self.shapes is not None:
                found[f"{path}.burst"] = f"{self.shapes[number]['burst']:.0f} B"
                found[f"{path}.message_header"] = f"{fit.message_header_bytes:.1f} B"
            else:
                found[f"{path}.bandwidth"] = f"{fit.found_bytes_per_s:.6g} B/s"
            found[f"{path}.frame_overhead"] = round(fit.frame_overhead, 6)
            found[f"{path}.ack_overhead"] = round(fit.ack_overhead, 6)
            found[f"{path}.latency"] = f"{latency_s * 1e6:.3f} us"
            found[f"{path}.message_overhead"] = "0 s"
        messaging = {
            "send_overhead": f"{self.send_overhead_s * 1e6:.3f} us",
            "receive_overhead": f"{receive_s * 1e6:.3f} us",
        }
        if self.background_bytes_per_s is not None:
            messaging["background_bandwidth"] = f"{self.background_bytes_per_s:.6g} B/s"
        for name in spec.cluster.device_types:
            found[f"cluster.device_types.{name}.messaging"] = messaging
            found[f"cluster.device_types.{name}.step_overhead"] = f"{self.raw['barrier']['s'] * 1e6:.3f} us"
        return found


def with_overrides(spec: ScenarioSpec, overrides: Mapping[str, Any], origin: str = "network profile") -> ScenarioSpec:
    """Return the scenario with fields changed; origin: who does it, for errors."""
    raw = spec.model_dump(mode="json", by_alias=True)
    for path, value in overrides.items():
        apply_override(raw, path, value, origin=origin)
    return check_scenario(raw)
