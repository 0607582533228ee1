"""The expert-parallel engine computes what one process computes: all modes and dedups, over loopback."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from epsim.batch import step_plans, step_tokens
from epsim.cluster import build_cluster
from epsim.measure.decoder import AttentionBatch, Decoder, KvCache
from epsim.measure.home_step import token_ids
from epsim.measure.launch import launch
from epsim.run import assemble
from epsim.scenario import ScenarioSpec, load_scenario
from epsim.sim import simulate_step
from epsim.trace import Modality

ROOT = Path(__file__).parent.parent
SMALL = [
    "model.hidden_size=32", "model.num_layers=3", "model.moe.expert_ffn_size=16", "model.vocab_size=64",
    "model.moe.num_experts=16", "model.moe.topk=4", "model.moe.num_shared_experts=1", "model.moe.num_dense_layers=1",
    "model.dense_ffn_size=24", "model.attention={kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8}",
    "model.compute_dtype=fp32", "model.weight_dtype_bytes=4", "model.activation_dtype_bytes=4",
    "model.kv_dtype_bytes=4",
    "trace={kind: uniform, vision_tokens: 36, text_tokens: 9, output_tokens: 4}", "workload.batch_sizes=[5]",
]  # fmt: skip
FP32 = ["transmission.dispatch_dtype=fp32", "transmission.combine_dtype=fp32"]
DEVICE = torch.device(os.environ.get("EPSIM_TEST_DEVICE", "cpu"))
TOLERANCE = 1e-5 if DEVICE.type == "cpu" else 1e-4
JOB = {"kind": "run", "threads": 1, "device": DEVICE.type, "backend": "gloo", "runs": 1, "emulated": False}
MODES = (
    "transmission.mode=sync", "transmission.mode=async", "transmission.mode=two_batch",
    "transmission={mode: async, num_chunks: 3}", "transmission={mode: sync, overlap_shared: true}",
)  # fmt: skip


def scenario(path: str, *changes: str) -> ScenarioSpec:
    return load_scenario(ROOT / path, [*SMALL, *changes, *FP32])


def on_device(values: Any) -> torch.Tensor:
    return torch.from_numpy(values).to(DEVICE)


def single_process(spec: ScenarioSpec) -> list[dict[int, torch.Tensor]]:
    """Return the last hidden vector of every request after each step, from one decoder that holds all experts."""
    deployment = assemble(spec)
    card = deployment.model
    num_layers, num_experts = len(card.moe_layer_ids), card.num_experts
    experts_LX = np.tile(np.arange(num_experts, dtype=np.int32), (num_layers, 1))
    decoder = Decoder(card, experts_LX=experts_LX, seed=0, device=DEVICE, dtype=torch.float32)
    batch_size = spec.workload.batch_sizes[0]
    cache = KvCache(card, num_requests=batch_size, max_tokens=100, device=DEVICE, dtype=torch.float32)
    seen = []
    with torch.inference_mode():
        for tokens in step_tokens(deployment, deployment.trace.requests.request_id_Q[:batch_size], None):
            ascending = np.argsort(tokens.request_T, kind="stable")
            request_T, position_T = tokens.request_T[ascending], tokens.position_T[ascending].astype(np.int64)
            hidden = decoder.embed(on_device(token_ids(request_T, position_T)))
            if tokens.step == 0:
                is_vision = on_device(tokens.modality_T[ascending] == Modality.VISION)
                for request in range(batch_size):  # the same pixels in every image
                    hidden[is_vision & on_device(request_T == request)] = decoder.vision(1)
            batch = AttentionBatch(
                request_T=on_device(request_T), position_T=on_device(position_T), decode=tokens.step > 0
            )
            ids = on_device(tokens.topk_expert_ids_TLK[ascending].astype(np.int64))
            for layer in range(num_layers):
                hidden = decoder.attend(layer, hidden, batch, cache)
                normed, weights = decoder.route(layer, hidden, ids[:, layer])
                rows, choices = torch.meshgrid(
                    torch.arange(len(ids), device=DEVICE), torch.arange(card.topk, device=DEVICE), indexing="ij"
                )
                out = decoder.experts(
                    layer, normed, rows.reshape(-1), ids[:, layer].reshape(-1), weights[rows, choices].reshape(-1)
                )
                shared = decoder.shared(layer, normed)
                hidden = hidden + out + (0 if shared is None else shared)
            seen.append({int(q): hidden[np.flatnonzero(request_T == q)[-1]].cpu() for q in np.unique(request_T)})
    return seen


def run_on_ranks(specs: list[ScenarioSpec], *, shaped: bool = False) -> list[dict[str, Any]]:
    cells = [{"id": i, "scenario": spec.model_dump(mode="json", by_alias=True)} for i, spec in enumerate(specs)]
    said: list[dict[str, Any]] = []
    cluster = build_cluster(specs[0].cluster.model_dump())
    launch(cluster, {**JOB, "cells": cells, "with_outputs": True}, said.append, shaped=shaped)
    return [line for line in said if "cell" in line]


def planned_bytes(spec: ScenarioSpec) -> np.ndarray:  # type: ignore[type-arg]
    """Return what the simulator says is sent from rank to rank in all steps."""
    deployment, size = assemble(spec), spec.workload.batch_sizes[0]
    total_RR = np.zeros((deployment.cluster.num_devices,) * 2)
    for plan in step_plans(deployment, deployment.trace.requests.request_id_Q[:size], None):
        total_RR += simulate_step(plan, deployment.cluster, "event")[0].delivered_bytes_RR
    return total_RR


def check_outputs(specs: list[ScenarioSpec]) -> None:
    expected = single_process(specs[0])
    for spec, cell in zip(specs, run_on_ranks(specs), strict=True):
        np.testing.assert_array_equal(cell["runs"][0]["sent_bytes_RR"], planned_bytes(spec), str(spec.transmission))
        for step, (found, wanted) in enumerate(zip(cell["outputs"], expected, strict=True)):
            assert sorted(map(int, found)) == sorted(wanted), spec.transmission
            for request, vector in found.items():
                error = (torch.tensor(vector) - wanted[int(request)]).abs().max() / wanted[int(request)].abs().max()
                assert error < TOLERANCE, (spec.transmission, step, request, float(error))


def test_two_ranks_compute_what_one_process_does() -> None:
    homes = (
        "homes.policy=balanced", "homes.policy=by_modality", "homes.policy=balanced", "homes.policy=balanced",
        "homes={policy: by_modality, kv_transfer: exposed}",
    )  # fmt: skip
    specs = [
        scenario("scenarios/testbed/two-ranks.yaml", mode, f"transmission.dedup={dedup}", home)
        for dedup in ("none", "device", "node")
        for mode, home in zip(MODES, homes, strict=True)
    ]
    check_outputs(specs)


def test_two_nodes_with_gateways_compute_what_one_process_does() -> None:
    """Four ranks: with node-level dedup tokens go by gateways, which pass on and add up."""
    small = "cluster.devices[0].each={i: 2, j: 2}", "cluster.links[port].each={i: 2, j: 2}"
    specs = [
        scenario("scenarios/testbed/two-nodes.yaml", *small, mode, f"transmission.dedup={dedup}")
        for dedup in ("node", "device")
        for mode in MODES
    ]
    check_outputs(specs)
