"""The commands `epsim measure network` and `epsim measure run`: parse, call, print."""

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epsim.cli_trace import Overrides, ScenarioPath
from epsim.console import print_in_full
from epsim.interrupt import run_in_parts

if TYPE_CHECKING:
    from epsim.measure.driver import RunJob, RunOptions

Dilation = Annotated[float, typer.Option(metavar="K", help="Devices and links K times slower (needs --emulate).")]
Emulate = Annotated[bool, typer.Option("--emulate", help="Devices are waits as long as the scenario says.")]
Unshaped = Annotated[bool, typer.Option("--unshaped", help="Plain loopback instead of network namespaces.")]
Rank = Annotated[
    int | None, typer.Option(min=0, metavar="R", help="This process is rank R of a real cluster: one command per rank.")
]
Master = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where rank 0 listens; with --rank.")]
Interface = Annotated[
    str | None, typer.Option(metavar="NAME", help="Network interface to use, e.g. eth0; with --rank.")
]
Threads = Annotated[int, typer.Option(min=1, metavar="N", help="Of each rank.")]
On = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Backend = Annotated[str, typer.Option(help="gloo, or nccl between GPUs.")]


def network(
    scenario: ScenarioPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Profile to write (YAML).")],
    emulate: Emulate = False,
    dilation: Dilation = 1.0,
    unshaped: Unshaped = False,
    rank: Rank = None,
    master: Master = None,
    interface: Interface = None,
    threads: Threads = 1,
    on: On = "cpu",
    backend: Backend = "gloo",
    overrides: Overrides = None,
) -> None:
    """Time messages between the ranks of a scenario as real runs send them; write what the simulator takes."""
    from epsim.atomic import check_outputs
    from epsim.measured.dilation import dilated
    from epsim.measured.network_file import network_file
    from epsim.report.measured import network_tables
    from epsim.scenario import load_scenario

    check_outputs({"-o": output}, (scenario,))
    _let_epsim_speak(rank)
    spec = dilated(load_scenario(scenario, overrides or ()), dilation)
    options = _options(emulate, dilation, unshaped, rank, None, 1, 1, threads, on, backend)
    from epsim.measure.driver import measure_network

    run_job = _run_job(options, rank, master, interface)
    profile, machine = run_in_parts(lambda: measure_network(spec, options, run_job), lambda: "no file was written")
    if rank:
        return
    content = network_file(profile, spec, machine, emulated=emulate)
    content.write(output)
    print_in_full(network_tables(content.summary()))
    typer.echo(f"wrote {output}; in a scenario: --set @{output}", err=True)


def run(
    scenario: ScenarioPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the runs.")],
    axis: Annotated[
        list[str] | None, typer.Option(metavar="PATH=V1,V2", help="Values of a field to measure; repeat for a grid.")
    ] = None,
    emulate: Emulate = False,
    dilation: Dilation = 1.0,
    launches: Annotated[int, typer.Option(min=1, max=1000, help="How often all processes start afresh.")] = 3,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Of each cell in a launch.")] = 5,
    way: Annotated[
        str | None, typer.Option(help="How emulated devices wait: sleep or spin (default: measured).")
    ] = None,
    device_profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="epsim measure device's, kept with the runs for predictions.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a folder that lacks launches.")] = False,
    unshaped: Unshaped = False,
    rank: Rank = None,
    master: Master = None,
    interface: Interface = None,
    threads: Threads = 1,
    on: On = "cpu",
    backend: Backend = "gloo",
    overrides: Overrides = None,
) -> None:
    """Run a scenario for real: a MoE model over ranks that replays the trace, after micro-benchmarks of its network."""
    from epsim.compare import parse_axes
    from epsim.errors import InputError
    from epsim.scenario import load_raw

    if rank is not None and resume:
        raise InputError("--resume: with --rank, a folder is one launch; name another folder")
    _let_epsim_speak(rank)
    axes = parse_axes(axis or ())
    raw = load_raw(scenario, overrides or ())
    options = _options(emulate, dilation, unshaped, rank, way, launches, runs, threads, on, backend)
    from epsim.measure.driver import measure_runs

    if emulate and device_profile is not None:
        raise InputError("--device-profile: is for real runs, and --emulate has none; leave one of them out")
    folder = None if rank else output
    run_job = _run_job(options, rank, master, interface)
    run_in_parts(
        lambda: measure_runs(
            raw, axes, options, folder, resume=resume, say=lambda text: typer.echo(text, err=True),
            device_profile=device_profile, run_job=run_job,
        ),
        lambda: _left(folder, rank),
    )  # fmt: skip
    if folder is not None:
        typer.echo(f"wrote {folder}; next: epsim validate measured {folder}", err=True)


def _left(folder: Path | None, rank: int | None) -> str:
    """Say what a grid that is interrupted leaves; not an empty folder."""
    from epsim.measured.folder import FILE

    if folder is None or not folder.exists():
        return "no file was written"
    with contextlib.suppress(OSError):
        folder.rmdir()
    if rank is None and (folder / FILE).exists():
        return f"complete launches are in {folder}; go on with --resume"
    return "no launch was complete"


def _let_epsim_speak(rank: int | None) -> None:
    """Silence torch, before it is imported: epsim says itself which rank is gone."""
    if rank is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _options(
    emulate: bool, dilation: float, unshaped: bool, rank: int | None, way: str | None, launches: int, runs: int,
    threads: int, on: str, backend: str,
) -> "RunOptions":  # fmt: skip
    """Return the options of a run, with whether its network is shaped; say so where it cannot be."""
    from epsim.capture.extra import require_trace_extra
    from epsim.errors import InputError

    require_trace_extra()
    from epsim.measure.device import device_named

    device_named(on)
    if backend not in ("gloo", "nccl"):
        raise InputError(f'--backend: "{backend}" is not known; write gloo or nccl')
    if backend == "nccl" and on != "cuda":
        raise InputError("--backend: nccl is between GPUs; write --device cuda with it, or gloo")
    if way not in (None, "sleep", "spin"):
        raise InputError(f'--way: "{way}" is not known; write sleep or spin')
    if dilation != 1 and not emulate:
        raise InputError(f"--dilation: {dilation:g} is for emulated devices; add --emulate, or leave it out")
    from epsim.measure.driver import RunOptions
    from epsim.measure.launch import namespaces_reason

    if rank is not None:
        launches = 1  # the processes are there once
    shaped = rank is None and not unshaped
    if shaped and (reason := namespaces_reason()):
        typer.echo(f"{reason}; running on plain loopback, UNSHAPED: bandwidths of the scenario do not hold", err=True)
        shaped = False
    return RunOptions(
        emulated=emulate, dilation=dilation, way=way, shaped=shaped, num_launches=launches, num_runs=runs,  # type: ignore[arg-type]
        threads=threads, device=on, backend=backend,  # type: ignore[arg-type]
    )  # fmt: skip


def _run_job(options: "RunOptions", rank: int | None, master: str | None, interface: str | None) -> "RunJob":
    """Return how ranks do a job: as processes here, or this process as one of them."""
    from epsim.errors import InputError

    if rank is None:
        if master or interface:
            raise InputError("--master, --interface: are for --rank, with which this process is one rank of a cluster")
        return options.run_job
    host, _, port = (master or "").rpartition(":")
    if master is None or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise InputError(f"--master: {master} is not where rank 0 listens; write e.g. 192.168.1.10:29500")
    known = [name for _, name in socket.if_nameindex()]
    if interface is not None and interface not in known:
        raise InputError(f"--interface: {interface} is not one of this machine's; write one of {', '.join(known)}")
    try:
        socket.getaddrinfo(host, None, family=socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--master: {host} is not known here ({error}); write a name or address of rank 0's host"
        ) from error
    from epsim.measure.here import JobsHere

    return JobsHere(rank, master, interface)
