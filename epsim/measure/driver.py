"""A grid of runs from start to end: `measure_runs` measures its networks, then launches its cells, again and again.

Each launch starts all processes afresh: what differs from launch to launch is part of the noise that is reported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from epsim.atomic import write_all, write_errors
from epsim.cluster import Cluster, build_cluster
from epsim.cost.profile import read_profile
from epsim.errors import InputError
from epsim.measure.home_step import dtype_of
from epsim.measure.launch import launch
from epsim.measure.topology import shape_of, topology_of
from epsim.measured.device_profile import with_device_profile
from epsim.measured.dilation import without_messages
from epsim.measured.dry_run import MODES, dry_spec
from epsim.measured.folder import DEVICE_FILE, FILE, MeasuredRuns
from epsim.measured.grid import Cell, cells_of, network_key
from epsim.measured.network_profile import SIZES
from epsim.run import check, simulate
from epsim.scenario import ScenarioSpec

Say = Callable[[str], None]
Hear = Callable[[dict[str, Any]], None]
RunJob = Callable[[Cluster, dict[str, Any], Hear], None]  # has all ranks do a job; what rank 0 says is heard
Pause = Literal["wait", "compute"]
PING_PONGS = 60


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How cells are run.

    emulated: devices are waits, `way` how (None: chosen by measuring). dilation: how much slower devices and links are.
    shaped: between network namespaces, with the bandwidths of the scenario; else whatever network there is.
    """

    emulated: bool
    dilation: float
    way: Literal["sleep", "spin"] | None = None
    shaped: bool
    num_launches: int
    num_runs: int
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Literal["gloo", "nccl"] = "gloo"

    def run_job(self, cluster: Cluster, job: dict[str, Any], hear: Hear) -> None:
        """Have the ranks do a job as processes of this machine."""
        launch(cluster, job, hear, shaped=self.shaped)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def pause(self) -> Pause:
        """What ranks do between messages, in the micro-benchmarks as in the runs."""
        return "wait" if self.emulated else "compute"

    def job(self, kind: str, **more: Any) -> dict[str, Any]:
        """Return a job for the ranks."""
        return {"kind": kind, "threads": self.threads, "device": self.device, "backend": self.backend, **more}


def measure_network(spec: ScenarioSpec, options: RunOptions, run_job: RunJob) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the profile of a scenario's network (`NetworkProfile` as a mapping), and the machine; rank 0 has both."""
    cluster = build_cluster(spec.cluster.model_dump())
    said: dict[str, Any] = {}
    job = options.job(
        "network",
        pairs=_pairs(cluster),
        sizes=list(SIZES),
        repeats=PING_PONGS,
        pause=options.pause,
        way=options.way,
        dry={mode: dry_spec(without_messages(spec), mode).model_dump(mode="json", by_alias=True) for mode in MODES},
    )
    run_job(cluster, job, said.update)
    shapes = None
    if options.shaped:
        rates = [link.bandwidth for link in spec.cluster.links]
        shapes = [{"bandwidth": rate, "burst": shape_of(rate).burst_bytes} for rate in rates]
    return {"raw": said.get("network"), "shapes": shapes}, said.get("machine", {})


def _pairs(cluster: Cluster) -> list[list[int]]:
    """Return the first pair of ranks for each kind of route, by the bandwidths along it."""
    found: dict[tuple[float, ...], list[int]] = {}
    for other in range(1, cluster.num_devices):
        found.setdefault(tuple(link.bytes_per_s for link in cluster.route(0, other)), [0, other])
    return list(found.values())


def measure_runs(
    raw: dict[str, Any],
    axes: dict[str, list[Any]],
    options: RunOptions,
    folder: Path | None,
    *,
    resume: bool,
    say: Say,
    device_profile: Path | None = None,
    run_job: RunJob | None = None,
) -> None:
    """Measure every cell of a grid and write the folder after every network and launch.

    folder: None where another rank writes. device_profile: kept with the runs; real ones are predicted from it.
    run_job: how ranks do a job (default: processes of this machine).
    """
    run_job = run_job or options.run_job
    cells = cells_of(raw, axes, options.dilation)
    for cell in cells:
        _check(cell, options)
    groups: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        groups.setdefault(network_key(cell.spec), []).append(number)
    if len(groups) > 1 and not options.shaped:
        raise InputError(
            "--axis: links differ between cells, but this network is not shaped; leave cluster.links alone"
        )
    if not options.emulated:
        say("predicting every cell from the device profile, as a check that it reaches that far")
        _check_profile(_device_profile_path(device_profile, folder, resume=resume), cells)
    runs = _begin(raw, axes, options, folder, resume=resume)
    if folder is not None and device_profile is not None:
        write_all({folder / DEVICE_FILE: device_profile.read_bytes()})
    known = {network["key"] for network in runs.networks}
    for key, numbers in groups.items():
        if key not in known:
            say(f"network {len(runs.networks) + 1} of {len(groups)}: micro-benchmarks")
            profile, machine = measure_network(cells[numbers[0]].spec, options, run_job)
            runs.networks.append({"key": key, **profile})
            runs.machine = machine
            _write(runs, folder)
    for number in range(len(runs.launches), options.num_launches):
        done: dict[str, Any] = {"machine": {}, "cells": {}}
        for group, numbers in enumerate(groups.values()):
            say(f"launch {number + 1} of {options.num_launches}, network {group + 1} of {len(groups)}")
            way = runs.network_of(cells[numbers[0]]).raw["way"] if folder is not None else "sleep"
            _launch(cells, numbers, options, way, run_job, done, say)
        runs.launches.append(done)
        _write(runs, folder)


def _write(runs: MeasuredRuns, folder: Path | None) -> None:
    if folder is not None:
        runs.write(folder)


def _check(cell: Cell, options: RunOptions) -> None:
    """Raise InputError for what cannot be run, before anything is measured."""
    spec = cell.spec
    deployment, _ = check(spec)
    if spec.parallelism.kind != "ep":
        raise InputError(f"parallelism.kind: {spec.parallelism.kind} has no engine to be measured; write ep")
    if deployment.model.moe is None:
        raise InputError(f"model: {spec.model.name} has no experts to spread over ranks; name a MoE model")
    if options.shaped:
        topology_of(deployment.cluster)
    if options.emulated:
        _check_emulated(spec, options)
    else:
        dtype_of(spec)
    nccl_can = spec.transmission.mode == "sync" or (
        spec.transmission.mode == "async" and spec.transmission.num_chunks == 1
    )
    if options.backend == "nccl" and not (nccl_can and spec.homes.policy == "balanced"):
        raise InputError(
            f"--backend: nccl keeps one order of messages, which mode {spec.transmission.mode} with these chunks or "
            "homes does not; write gloo"
        )


def _check_emulated(spec: ScenarioSpec, options: RunOptions) -> None:
    for name, kind in spec.cluster.device_types.items():
        if kind.layer_overhead:
            raise InputError(
                f"cluster.device_types.{name}.layer_overhead: emulated devices have no host to wait for; write 0 s"
            )
        if kind.profile is not None and options.dilation != 1:
            raise InputError(
                f"cluster.device_types.{name}.profile: measured times are not slowed down; leave --dilation out"
            )


def _begin(
    raw: dict[str, Any], axes: dict[str, list[Any]], options: RunOptions, folder: Path | None, *, resume: bool
) -> MeasuredRuns:
    """Return the folder's runs so far, or none."""
    if folder is not None and (folder / FILE).exists():
        if not resume:
            raise InputError(f"{folder}: holds measured runs already; name another folder, or go on with --resume")
        runs = MeasuredRuns.read(folder)
        then = {**runs.options, "num_launches": options.num_launches}
        if (runs.scenario, runs.axes, then) != (raw, axes, options.as_dict()):
            raise InputError(f"{folder}: holds runs of another scenario, grid or options; name another folder")
        runs.options = options.as_dict()
        return runs
    if resume:
        raise InputError(f"--resume: {folder} holds no measured runs; leave --resume out to begin")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"-o: {folder} is a file; name a folder")
    if folder is not None:
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return MeasuredRuns(scenario=raw, axes=axes, options=options.as_dict())


def _launch(
    cells: Sequence[Cell], numbers: list[int], options: RunOptions, way: str, run_job: RunJob, done: dict[str, Any],
    say: Say,
) -> None:  # fmt: skip
    """Launch the cells of one network once and put what they did into `done`."""

    def hear(line: dict[str, Any]) -> None:
        if "cell" in line:
            done["cells"][str(line["cell"])] = _kept(line)
            say(f"  {cells[line['cell']].label}: TTFT {_ttft_ms(line):.4g} ms")
        elif "machine" in line:
            done["machine"] = line["machine"]

    jobs = [
        {"id": number, "scenario": without_messages(cells[number].spec).model_dump(mode="json", by_alias=True)}
        for number in numbers
    ]
    job = options.job("run", cells=jobs, runs=options.num_runs, emulated=options.emulated, way=way)
    cluster = build_cluster(cells[numbers[0]].spec.cluster.model_dump())
    run_job(cluster, job, hear)


def _ttft_ms(line: dict[str, Any]) -> float:
    return 1e3 * float(np.mean([run["step_s"][0] for run in line["runs"]]))


def _kept(line: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a cell's runs: every step of every run, parts and bytes as means or once."""
    runs = line["runs"]
    return {
        "step_s": [[round(s, 7) for s in run["step_s"]] for run in runs],
        "kv_s": [round(run["kv_s"], 7) for run in runs],
        "foreign_cpu_frac": [round(run["foreign_cpu_frac"], 3) for run in runs],
        "num_repeated": line["num_repeated"],
        "sent_bytes_RR": runs[0]["sent_bytes_RR"],
        "parts": runs[0]["parts"],
        "prefill_parts_s_RP": _mean(runs, "prefill_parts_s_RPL"),
        "decode_parts_s_RP": _mean(runs, "decode_parts_s_RPL"),
    }


def _mean(runs: list[dict[str, Any]], name: str) -> Any:
    """Return seconds by rank and part, summed over layers, mean over runs."""
    if runs[0][name] is None:
        return None
    return np.round(np.mean([run[name] for run in runs], axis=0).sum(axis=2), 7).tolist()


def _device_profile_path(path: Path | None, folder: Path | None, *, resume: bool) -> Path:
    """Return the file of the profile that real runs will be predicted from; InputError where there is none."""
    if path is None and resume and folder is not None and (folder / DEVICE_FILE).exists():
        path = folder / DEVICE_FILE
    if path is None:
        raise InputError("--device-profile: real runs are predicted from one; write it first with epsim measure device")
    return path


def _check_profile(path: Path, cells: Sequence[Cell]) -> None:
    """Raise InputError if a cell cannot be predicted from the profile: better now than after the runs."""
    profile = read_profile(path)
    for cell in cells:
        wanted = str(dtype_of(cell.spec)).removeprefix("torch.")
        if profile.dtype != wanted:
            raise InputError(
                f"--device-profile: was measured in {profile.dtype}, and model.compute_dtype "
                f"{cell.spec.model.compute_dtype} runs in {wanted}; measure that, or write the other dtype"
            )
        simulate(with_device_profile(cell.spec, path))
