"""What one rank process does: `python -m epsim.measure.rank --rank R --master HOST:PORT`, or `run_rank` in place.

All ranks get the same job (JSON, on standard input) and go through it in step; rank 0 writes what came out as lines
of JSON.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from epsim.errors import EpsimError
from epsim.measure.compute import ModelWork
from epsim.measure.emulate import Waiter, WaitingWork
from epsim.measure.engine import Engine, RunRecord
from epsim.measure.launch import PEER_LOST
from epsim.measure.machine import CpuTime, foreign_cpu_frac, machine_facts
from epsim.measure.network import measure_network
from epsim.measure.program import PARTS
from epsim.measure.transport import PeerLost, Transport, now_s
from epsim.measure.work import Work
from epsim.measured.folder import DISTURBED_FRAC
from epsim.process_end import leave
from epsim.run import assemble
from epsim.scenario import ScenarioSpec, check_scenario

MOST_REPEATS = 3
_PR_SET_PDEATHSIG = 1
Emit = Callable[[dict[str, Any]], None]


def run_rank(job: dict[str, Any], transport: Transport, emit: Emit) -> None:
    """Do a job together with the other ranks; emit is called on rank 0 alone."""
    torch.set_num_threads(job["threads"])
    say = emit if transport.rank == 0 else _nothing
    device = torch.device(job["device"])
    facts = transport.gather(machine_facts(device))
    say({"machine": facts[0], "ranks_on": sorted({f"{fact['cpu']}, {fact.get('gpu', 'no GPU')}" for fact in facts})})
    if job["kind"] == "network":
        say({"network": _undisturbed(lambda: measure_network(transport, job, device), transport)})
        return
    job["way"] = transport.gather(job.get("way"))[0]  # as the micro-benchmarks found, which rank 0 alone may know
    for cell in job["cells"]:
        say(_run_cell(job, cell, transport, device))


def _undisturbed(measure: Callable[[], dict[str, Any]], transport: Transport) -> dict[str, Any]:
    """Return what `measure` finds, repeated while others take much of the machine: of several, the least disturbed."""
    found: list[dict[str, Any]] = []
    while len(found) < MOST_REPEATS:
        before, start_s = CpuTime.now(), now_s()
        content = measure()
        after = CpuTime.now()
        own_s = sum(transport.gather(after.own_s - before.own_s))
        frac = transport.gather(foreign_cpu_frac(before, after, own_s, now_s() - start_s))[0]
        found.append({**content, "foreign_cpu_frac": round(frac, 3)})
        if frac <= DISTURBED_FRAC:
            break
    return min(found, key=lambda content: content["foreign_cpu_frac"])


def _run_cell(job: dict[str, Any], cell: dict[str, Any], transport: Transport, device: torch.device) -> dict[str, Any]:
    """Run one scenario `job["runs"]` times, and once before that is not counted."""
    spec = check_scenario(cell["scenario"])
    engine = _engine(job, spec, transport, device)
    with torch.inference_mode():
        engine.run()
        runs: list[dict[str, Any]] = []
        repeated = 0
        while len(runs) < job["runs"]:
            run = _watched_run(engine, transport)
            if run["foreign_cpu_frac"] > DISTURBED_FRAC and repeated < MOST_REPEATS * job["runs"]:
                repeated += 1
                continue
            runs.append(run)
    engine.close()
    outcome = {"cell": cell["id"], "runs": runs, "num_repeated": repeated}
    if job.get("with_outputs"):
        outcome["outputs"] = _outputs(engine.work, transport)
    return outcome


def _engine(job: dict[str, Any], spec: ScenarioSpec, transport: Transport, device: torch.device) -> Engine:
    deployment = assemble(spec)
    work: Work
    if job["emulated"]:
        work = WaitingWork(transport.rank, Waiter(job["way"]))
    else:
        work = ModelWork(transport.rank, deployment, spec, device=device)
    batch_size = spec.workload.batch_sizes[0]
    return Engine(
        deployment,
        spec.transmission,
        deployment.trace.requests.request_id_Q[:batch_size],
        spec.workload.max_output_tokens,
        transport=transport,
        work=work,
        overlap_kv=spec.homes.kv_transfer == "overlapped",
    )


def _watched_run(engine: Engine, transport: Transport) -> dict[str, Any]:
    """Run once and return, on every rank, what all of them saw."""
    before = CpuTime.now()
    record = engine.run()
    after = CpuTime.now()
    seen: list[tuple[RunRecord, float]] = transport.gather((record, after.own_s - before.own_s))
    records = [record for record, _ in seen]
    step_s = np.max([record.step_s for record in records], axis=0)
    wall_s = float(step_s.sum()) + max(record.kv_s for record in records)
    own_s = sum(own_s for _, own_s in seen)
    frac = foreign_cpu_frac(before, after, own_s, wall_s)
    parts_s_RP = np.stack([record.parts_s_SPL for record in records])
    return {
        "step_s": step_s.tolist(),
        "kv_s": max(record.kv_s for record in records),
        "foreign_cpu_frac": transport.gather(frac)[0],
        "sent_bytes_RR": [record.sent_bytes_R.tolist() for record in records],
        "parts": PARTS,
        "prefill_parts_s_RPL": _rounded(parts_s_RP[:, 0]),
        "decode_parts_s_RPL": _rounded(parts_s_RP[:, 1:].mean(axis=1)) if parts_s_RP.shape[1] > 1 else None,
    }


def _outputs(work: Any, transport: Transport) -> list[dict[int, Any]]:
    """Return the last hidden vector of every request, by step, from whichever rank is its home."""
    own = [{q: hidden_H.float().tolist() for q, hidden_H in zip(*step[:2], strict=True)} for step in work.outputs]
    return [
        {q: vector for part in parts for q, vector in part.items()}
        for parts in zip(*transport.gather(own), strict=True)
    ]


def _rounded(seconds: Any) -> Any:
    return np.round(seconds, 7).tolist()


def _nothing(content: dict[str, Any]) -> None:
    """Ranks other than 0 have nothing to say."""


def main() -> None:
    """Entry point of a rank process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank does not outlive who started it
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--master", required=True)
    parser.add_argument("--interface")
    options = parser.parse_args()
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")  # the protocol; whatever else is printed goes to stderr
    os.dup2(2, 1)

    def emit(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    try:
        transport = Transport(options.rank, job["num_ranks"], options.master, job["backend"], options.interface)
        run_rank(job, transport, emit)
        code = 0
    except EpsimError as error:
        print(f"rank {options.rank}: {error}", file=sys.stderr)
        code = PEER_LOST if isinstance(error, PeerLost) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    main()
