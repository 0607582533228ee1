"""A small grid measured here and now, and what is predicted of it from its own micro-benchmarks."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")
from epsim.cli import app
from epsim.measure.launch import namespaces_reason
from epsim.measured.folder import MeasuredRuns
from epsim.scenario import load_scenario

ROOT = Path(__file__).parent.parent
TWO_RANKS = str(ROOT / "scenarios/testbed/two-ranks.yaml")
SMALL = [
    "--set", "trace={kind: uniform, vision_tokens: 16, text_tokens: 8, output_tokens: 4}",
    "--set", "model.vision.image_size=32", "--set", "workload.batch_sizes=[4]",
]  # fmt: skip
REASON = namespaces_reason()
pytestmark = pytest.mark.alone


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_grid_that_is_measured_here_is_predicted(tmp_path: Path) -> None:
    """Emulated in slow motion, so that a busy machine matters little; the bounds leave it room all the same."""
    folder = tmp_path / "runs"
    measure = [
        "measure", "run", TWO_RANKS, "--emulate", "--dilation", "10", "--launches", "1", "--runs", "2", *SMALL,
        "--axis", "transmission.mode=sync,async", "--axis", "transmission.dedup=none,device", "-o", str(folder),
    ]  # fmt: skip
    done = CliRunner().invoke(app, measure, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["validate", "measured", str(folder), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout)
    assert report["options"]["shaped"]
    assert report["errors"]["ttft_s"]["num_cells"] == 4
    assert report["errors"]["ttft_s"]["mean_percent"] < 5
    assert report["errors"]["tpot_s"]["mean_percent"] < 15
    clear = report["gain_errors"]["ttft_s"][-1]
    assert clear["num_right_sign"] == clear["num_clear"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dilation", "10"], "--dilation: 10 is for emulated devices; add --emulate, or leave it out"),
        (["--emulate", "--way", "nap"], '--way: "nap" is not known; write sleep or spin'),
        (["--emulate", "--device", "tpu"], '--device: "tpu" is not known; write cpu or cuda'),
        (["--emulate", "--backend", "mpi"], '--backend: "mpi" is not known; write gloo or nccl'),
        (["--emulate", "--rank", "0"], "--master: None is not where rank 0 listens; write e.g. 192.168.1.10:29500"),
        (["--emulate", "--rank", "0", "--master", "127.0.0.1:99999"], "--master: 127.0.0.1:99999 is not where"),
        (
            ["--emulate", "--rank", "0", "--master", "127.0.0.1:29500", "--interface", "none0"],
            "--interface: none0 is not one of this machine's; write one of ",
        ),
        (["--emulate", "--backend", "nccl"], "--backend: nccl is between GPUs; write --device cuda with it, or gloo"),
        (["--emulate", "--device-profile", "any.json"], "--device-profile: is for real runs, and --emulate has none"),
        (["--emulate", "--resume"], "holds no measured runs; leave --resume out to begin"),
        (["--emulate", "--master", "a:1"], "--master, --interface: are for --rank"),
        (
            ["--unshaped"],
            "--device-profile: real runs are predicted from one; write it first with epsim measure device",
        ),
        (
            ["--unshaped", "--device-profile", "none.json"],
            "none.json: cannot be read: No such file or directory; name a device profile",
        ),
        (
            ["--emulate", "--unshaped", "--axis", "cluster.links[cable].bandwidth=1 Gbit/s,2 Gbit/s"],
            "--axis: links differ between cells, but this network is not shaped",
        ),
        (
            ["--emulate", "--unshaped", "--set", "parallelism.kind=pd", "--set", "placement={policy: contiguous}"],
            "parallelism.kind: pd has no engine to be measured; write ep",
        ),
        (["--emulate", "--unshaped", "--set", "@no.yaml"], "--set @no.yaml: cannot be read"),
        (["--emulate", "--unshaped", "--dilation", "0.5"], "--dilation: 0.5 is not from 1 to 1000"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    from epsim.errors import InputError

    with pytest.raises(InputError) as raised:
        CliRunner().invoke(
            app, ["measure", "run", TWO_RANKS, "-o", str(tmp_path / "runs"), *arguments], catch_exceptions=False
        )
    assert message in str(raised.value)
    assert not (tmp_path / "runs" / "measured.json").exists()


def test_a_master_that_is_not_known_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from epsim.errors import InputError

    def unknown(host: str, *more: Any, **options: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    command = ["measure", "run", TWO_RANKS, "--emulate", "--rank", "1", "--master", "there:29500"]
    with pytest.raises(InputError, match=r"^--master: there is not known here"):
        CliRunner().invoke(app, [*command, "-o", str(tmp_path / "runs")], catch_exceptions=False)


def test_a_device_profile_that_does_not_reach_far_enough_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """It was measured for batches of up to 16."""
    from epsim.errors import InputError

    profile = ROOT / "epsim/validate/data/measured/two-ranks-real/device.json"
    command = ["measure", "run", str(ROOT / "scenarios/testbed/two-ranks-fp32.yaml"), "--device-profile", str(profile)]
    with pytest.raises(InputError, match=r"cluster\.device_types\.small\.profile .*measured from"):
        CliRunner().invoke(
            app, [*command, "--set", "workload.batch_sizes=[64]", "-o", str(tmp_path / "runs")], catch_exceptions=False
        )
    assert not (tmp_path / "runs").exists()


@contextlib.contextmanager
def one_command_per_rank(out: Path, *more: str, num_ranks: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the command of each of two ranks, or of the first, as on their own hosts; none is left after the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "epsim", "measure", "run", TWO_RANKS, "--emulate", "--launches", "1",
        *SMALL, "-o", str(out), "--master", f"127.0.0.1:{port}", "--interface", "lo", *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(num_ranks):
            started = subprocess.Popen(
                [*command, "--rank", str(rank)], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
            )
            ranks.append(stack.enter_context(started))
            stack.callback(started.kill)
        yield ranks


def test_a_command_for_each_rank_measures_together_and_what_it_finds_goes_into_a_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On plain loopback, which is everywhere; it says that nothing is shaped."""
    with one_command_per_rank(tmp_path / "runs", "--runs", "1") as ranks:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    done = CliRunner().invoke(app, ["validate", "measured", str(tmp_path / "runs"), "--cells"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "UNSHAPED network" in done.stdout

    runs = MeasuredRuns.read(tmp_path / "runs")  # as `measure network` would find it: half a minute less
    found = {key: runs.networks[0][key] for key in ("raw", "shapes")}
    monkeypatch.setattr("epsim.measure.driver.measure_network", lambda *given: (found, runs.machine))
    path = tmp_path / "network.yaml"
    command = ["measure", "network", TWO_RANKS, "--unshaped", "--emulate", *SMALL, "-o", str(path)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "UNSHAPED" in done.stdout
    usual, measured = (load_scenario(Path(TWO_RANKS), changes) for changes in ([], [f"@{path}"]))
    assert measured.cluster.links[0].bandwidth != usual.cluster.links[0].bandwidth
    assert measured.cluster.links[0].latency > 0
    messaging = measured.cluster.device_types["small"].messaging
    assert messaging is not None
    assert 1e-6 < messaging.send_overhead < 0.1
    assert measured.transmission.connections == "pair"


def test_the_rank_that_is_left_ends_soon_and_names_the_other(tmp_path: Path) -> None:
    with one_command_per_rank(tmp_path / "runs") as ranks:
        for rank in ranks:
            assert rank.stderr is not None
            assert rank.stderr.readline().startswith("network 1 of 1")
        time.sleep(5.0)  # by then they measure
        ranks[1].kill()
        _, said = ranks[0].communicate(timeout=10)
    assert ranks[0].returncode == 1, said
    assert said.strip().splitlines()[-1].startswith("epsim: rank 1 is gone"), said
    assert not (tmp_path / "runs" / "measured.json").exists()


def test_a_rank_that_waits_for_others_listens_to_ctrl_c(tmp_path: Path) -> None:
    with one_command_per_rank(tmp_path / "runs", num_ranks=1) as (rank,):
        assert rank.stderr is not None
        assert rank.stderr.readline().startswith("network 1 of 1")
        time.sleep(2.0)
        rank.send_signal(signal.SIGINT)
        _, said = rank.communicate(timeout=10)
    assert rank.returncode == 130, said
    assert said.startswith("epsim: interrupted; "), said
