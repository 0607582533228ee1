"""`RooflineCost`: seconds that each part of a step takes on each device, from the model card and the device's spec.

Every part takes launch_overhead + max(FLOPs / effective FLOP rate, bytes / effective memory bandwidth), and nothing
where it has no work (Williams et al. 2009). The effective FLOP rate may rise with the rows (tokens) of the kernel, as
small matrices do not fill a device. Letters: L MoE layers, C chunks, R devices.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.errors import ScenarioError
from epsim.model import ModelCard

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.number]

REFERENCE_ROWS = 1024  # a kernel of so many rows reaches compute_efficiency


@dataclass(frozen=True, kw_only=True)
class HomeWork:
    """What the home tokens of a step ask of each device, int64 [R] each.

    decode: whether this is a decode step (latent attention then works on the compressed cache).
    tokens_R: tokens that pass through the layers. requests_R: requests that they belong to.
    kv_tokens_R: cached tokens whose keys and values are read in each layer.
    attention_pairs_R: (query, key) pairs in each layer, causal.
    images_R: images that the vision encoder sees in this step.
    outputs_R: tokens for which the language-model head is computed.
    """

    decode: bool
    tokens_R: Counts
    requests_R: Counts
    kv_tokens_R: Counts
    attention_pairs_R: Counts
    images_R: Counts
    outputs_R: Counts


class RooflineCost:
    """Times of the parts of a step on the devices of a cluster."""

    def __init__(self, model: ModelCard, cluster: Cluster) -> None:
        self._model = model
        devices = cluster.devices
        for device in devices:
            if model.compute_dtype not in device.flops_per_s:
                raise ScenarioError(
                    f'model.compute_dtype: "{model.compute_dtype}" has no rate on {device.name}; write '
                    f"cluster.device_types.{device.type_name}.flops.{model.compute_dtype}, or use "
                    f"{' or '.join(device.flops_per_s)}"
                )
        self._peak_flops_per_s_R = np.array([d.flops_per_s[model.compute_dtype] for d in devices])
        self._efficiency_frac_R = np.array([d.compute_efficiency_frac for d in devices])
        self._efficiency_exponent_R = np.array([d.efficiency_exponent for d in devices])
        self._bytes_per_s_R = np.array([d.memory_bytes_per_s * d.memory_efficiency_frac for d in devices])
        self._launch_s_R = np.array([d.launch_overhead_s for d in devices])
        self._request_s_R = np.array([d.request_overhead_s for d in devices])
        self._expert_overhead_s_R = np.array([d.expert_overhead_s for d in devices])
        self.layer_floor_s_R = np.array([d.layer_overhead_s for d in devices])

    def _roofline(self, rows_R: Counts, flops_R: Numbers, num_bytes_R: Numbers) -> Floats:
        """Efficiency is min(1, compute_efficiency * (rows / 1024)^efficiency_exponent)."""
        fill_R = (np.maximum(rows_R, 1) / REFERENCE_ROWS) ** self._efficiency_exponent_R
        flops_per_s_R = self._peak_flops_per_s_R * np.minimum(1.0, self._efficiency_frac_R * fill_R)
        busy_s = np.maximum(flops_R / flops_per_s_R, num_bytes_R / self._bytes_per_s_R)
        return np.where(flops_R > 0, self._launch_s_R + busy_s, 0.0)

    def _activation_bytes(self, tokens: Counts) -> Floats:
        """A hidden vector read and one written for each token."""
        return np.asarray(2.0 * tokens * self._model.hidden_bytes_per_token, dtype=np.float64)

    def attention_s_R(self, work: HomeWork) -> Floats:
        """One layer: projections and scores; weights, KV cache read and written, activations; per-request overhead."""
        m = self._model
        flops = work.tokens_R * m.attention_projection_flops_per_token
        per_pair = m.decode_attention_flops_per_pair if work.decode else m.attention_flops_per_pair
        flops = flops + work.attention_pairs_R * per_pair
        kv_bytes = (work.kv_tokens_R + work.tokens_R) * m.kv_bytes_per_token
        num_bytes = np.where(work.tokens_R > 0, m.attention_bytes, 0) + kv_bytes
        seconds_R = self._roofline(work.tokens_R, flops, num_bytes + self._activation_bytes(work.tokens_R))
        return np.asarray(seconds_R + work.requests_R * self._request_s_R, dtype=np.float64)

    def router_s_R(self, work: HomeWork) -> Floats:
        """One MoE layer's gate."""
        m = self._model
        num_bytes = m.router_bytes + self._activation_bytes(work.tokens_R)
        return self._roofline(work.tokens_R, work.tokens_R * m.router_flops_per_token, num_bytes)

    def dense_ffn_s_R(self, work: HomeWork) -> Floats:
        """The feed-forward part of one dense layer."""
        m = self._model
        num_bytes = m.dense_ffn_bytes + self._activation_bytes(work.tokens_R)
        return self._roofline(work.tokens_R, work.tokens_R * m.dense_ffn_flops_per_token, num_bytes)

    def shared_experts_s_R(self, work: HomeWork) -> Floats:
        """The shared experts of one MoE layer, computed at the token's home (every home holds a copy)."""
        m = self._model
        num_bytes = m.shared_expert_bytes + self._activation_bytes(work.tokens_R)
        return self._roofline(work.tokens_R, work.tokens_R * m.shared_expert_flops_per_token, num_bytes)

    def experts_s(self, pairs_xR: Counts, activated_xR: Counts) -> Floats:
        """Routed experts of one kernel: [..., R] pairs and activated slots to seconds, last axis the device.

        The weights of each activated expert are read once: launch_overhead + activated * expert_overhead
        + max(pairs * FLOPs per token, activated * weight bytes + activations).
        """
        m = self._model
        num_bytes = activated_xR * m.expert_bytes + self._activation_bytes(pairs_xR)
        seconds = self._roofline(pairs_xR, pairs_xR * m.expert_flops_per_token, num_bytes)
        return np.asarray(seconds + activated_xR * self._expert_overhead_s_R, dtype=np.float64)

    def pack_s(self, vectors_xR: Counts) -> Floats:
        """Gathering vectors to send: nothing; a spec says what of it counts in `launch_overhead` and `staging`."""
        return np.zeros(vectors_xR.shape)

    def serve_s(self, vectors_xR: Counts) -> Floats:
        """What an arrival takes beside its experts: nothing, as `pack_s`."""
        return np.zeros(vectors_xR.shape)

    def reduce_s(self, vectors_xR: Counts) -> Floats:
        """Adding up vectors that came back: nothing, as `pack_s`."""
        return np.zeros(vectors_xR.shape)

    def vision_s_R(self, work: HomeWork) -> Floats:
        """Vision encoder and projector for the step's images."""
        vision = self._model.vision
        if vision is None:
            return np.zeros(len(self._launch_s_R))
        num_bytes = np.where(work.images_R > 0, vision.weight_bytes, 0)
        return self._roofline(work.images_R * vision.num_patches, work.images_R * vision.flops_per_image, num_bytes)

    def head_s_R(self, work: HomeWork) -> Floats:
        """The language-model head for the step's output tokens."""
        m = self._model
        num_bytes = m.lm_head_bytes + self._activation_bytes(work.outputs_R)
        return self._roofline(work.outputs_R, work.outputs_R * m.lm_head_flops_per_token, num_bytes)
