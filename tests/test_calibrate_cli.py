"""`epsim calibrate` as people call it: the report, the profile that it writes, and mistakes as one line."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epsim import cli
from epsim.calibrate import command
from epsim.calibrate.fit import Effort
from epsim.run import simulate
from epsim.scenario import load_scenario

SCENARIO = """\
name: small
model: olmoe
cluster: orin-2x-10gbe
trace: {kind: uniform, vision_tokens: 4, text_tokens: 4, output_tokens: 2}
simulation: {fidelity: analytic}
"""
PARAMETERS = """\
parameters:
  - {field: cluster.device_types.orin.layer_overhead, low: 0 ms, high: 100 ms, reason: the host}
  - {field: "cluster.links[ethernet].bandwidth", low: 1 Gbit/s, high: 10 Gbit/s, scale: log, reason: the cable}
"""
# Of a machine that takes 20 ms for each of 16 layers, however large the batch, and a little more for the head.
MEASURED = """\
transmission.mode,batch_size,ttft_s,tpot_s,note
sync,1,0.3216,0.3207,made up
sync,2,0.3216,,
async,1,0.3216,0.3207,
async,2,0.3216,0.3207,
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def epsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line in a folder with the files, and returns code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    effort = Effort(num_screened=4, num_short=2, short_steps=4, num_long=1, long_steps=20)
    monkeypatch.setattr(command, "DEFAULT_EFFORT", effort)  # the real one takes seconds longer
    for name, text in (("small.yaml", SCENARIO), ("fit.yaml", PARAMETERS), ("measured.csv", MEASURED)):
        (tmp_path / name).write_text(text)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["epsim", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


ASKED = ("calibrate", "measured.csv", "--scenario", "small.yaml", "--parameters", "fit.yaml", "--processes", "1")


def test_the_report_says_what_is_determined_and_what_is_not(epsim: Run) -> None:
    code, out, _ = epsim(*ASKED, "--json", "--compare", "transmission.mode=sync", "--hold-out", "batch_size=2")
    assert code == 0
    report = json.loads(out)
    overhead, bandwidth = report["parameters"]
    # The host's 20 ms hide all that the network does.
    assert overhead["value"] == pytest.approx(0.020, rel=0.02)
    assert overhead["determined"]
    assert overhead["specified"] == 0.0
    assert overhead["reason"] == "the host"
    assert bandwidth["undetermined_because"] == "reaches both bounds"
    assert bandwidth["text"]["high"] == "10 Gbit/s"
    assert [line.partition("=")[0] for line in report["set"]] == ["cluster.links[ethernet].bandwidth"]
    assert [scheme["name"] for scheme in report["schemes"]] == ["specified", "in sample", "held out batch_size=2"]
    assert [scheme["num_test"] for scheme in report["schemes"]] == [4, 4, 2]
    assert [scheme["errors"]["num_cells"] for scheme in report["schemes"]] == [7, 7, 3]
    assert report["schemes"][1]["errors"]["mean_abs_tpot"] < 0.01
    assert report["schemes"][1]["errors"]["speedup_ttft_points"] < 1
    assert len(report["cells"]) == report["num_cells"] == 7
    held_out = [cell["held out batch_size=2: predicted_s"] for cell in report["cells"]]
    assert [seconds is None for seconds in held_out] == [cell["batch_size"] == 1 for cell in report["cells"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--csv", "measured.csv"), "--csv measured.csv: is read for this"),
        (("--csv", "./small.yaml"), "--csv small.yaml: is read for this"),
        (("--device", "fit.yaml"), "--device fit.yaml: is read for this"),
        (("--device", "link.yaml"), "--device link.yaml: is read for this"),
        (("--device", "new.yaml", "--csv", "here/new.yaml"), "--csv here/new.yaml: is what --device writes"),
        (("--device", "other.yaml"), "--device other.yaml: is there already and is no device profile"),
    ],
)
def test_no_output_replaces_an_input_or_another_output(
    epsim: Run, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "calibrate", lambda *arguments: pytest.fail("computed"))
    Path("link.yaml").symlink_to("small.yaml")
    Path("here").symlink_to(".")
    Path("other.yaml").write_text("name: a cluster\n")
    before = {path: path.read_text() for path in Path().iterdir() if path.is_file()}
    code, _, err = epsim(*ASKED, *arguments)
    assert code == 2
    assert message in err
    assert {path: path.read_text() for path in Path().iterdir() if path.is_file()} == before


def test_the_command_of_a_profile_is_one_that_a_shell_takes(epsim: Run) -> None:
    overrides = ("--set", "cluster.links[ethernet].name=ether net", "--seed", "3")
    parameters = Path("fit.yaml").read_text().replace("links[ethernet]", "links[0]")
    Path("fit.yaml").write_text(parameters)
    assert epsim(*ASKED, *overrides, "-o", "fitted.yaml")[0] == 0
    (line,) = [line for line in Path("fitted.yaml").read_text().splitlines() if line.startswith("# command: ")]
    words = shlex.split(line.removeprefix("# command: "))
    assert words[:5] == ["epsim", "calibrate", "measured.csv", "--scenario", "small.yaml"]
    assert words[5:] == [*overrides[:2], "--parameters", "fit.yaml", *overrides[2:]]


def test_a_change_from_a_row_that_was_fitted_counts(epsim: Run) -> None:
    # The synchronous rows are fitted, the asynchronous ones predicted: changes go from fitted to predicted rows, those
    # of the naive rule from measured ones to its copies, which are the synchronous rows: 0 %, as measured.
    code, out, _ = epsim(
        *ASKED, "--json", "--compare", "transmission.mode=sync", "--hold-out", "transmission.mode=async"
    )
    assert code == 0
    report = json.loads(out)
    scheme = report["schemes"][2]
    assert (scheme["num_test"], scheme["errors"]["num_cells"]) == (2, 4)
    assert 0 <= scheme["errors"]["speedup_ttft_points"] < 1
    assert scheme["naive"]["speedup_ttft_points"] == pytest.approx(0, abs=1e-9)
    assert [cell["held out transmission.mode=async: predicted_s"] is None for cell in report["cells"]] == [True] * 3 + [
        False
    ] * 4


def test_tables_name_everything(epsim: Run) -> None:
    code, out, _ = epsim(*ASKED, "--folds", "2", "--cells", "--csv", "cells.csv")
    assert code == 0
    for words in (
        "7 measured cells of measured.csv; 2 parameters fitted, converged",
        "pair weight 3, ridge 0.001, loss scale 0.05, seed 0; 4 seeded points",
        "UNDETERMINED: reaches both bounds",
        "scenario as it is, nothing fitted",
        "all rows fitted (in sample)",
        "2 folds",
        "--set 'cluster.links[ethernet].bandwidth=",
    ):
        assert words in out
    assert len(Path("cells.csv").read_text().splitlines()) == 1 + 7


def test_a_profile_is_a_device_type_that_predicts_the_same(epsim: Run) -> None:
    arguments = (*ASKED, "--device", "fitted.yaml", "--json")
    report = json.loads(epsim(*arguments)[1])
    first = Path("fitted.yaml").read_bytes()
    epsim(*arguments)
    assert Path("fitted.yaml").read_bytes() == first
    assert str(Path.cwd()) not in first.decode()
    assert "# command: epsim calibrate measured.csv --scenario small.yaml --parameters fit.yaml\n" in first.decode()
    assert (
        "# search: pair weight 3, ridge 0.001, loss scale 0.05, seed 0; 4 seeded points, 2 followed" in first.decode()
    )
    overrides = ["cluster.device_types.orin=fitted.yaml", *report["set"], "workload.batch_sizes=[1, 2]"]
    sizes = simulate(load_scenario(Path("small.yaml"), overrides)).results["batch_sizes"]
    cell = report["cells"][0]
    assert (cell["transmission.mode"], cell["batch_size"], cell["metric"]) == ("sync", 1, "ttft_s")
    assert sizes[0]["ttft_s"]["mean"] == pytest.approx(cell["in sample: predicted_s"], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "transmission.mode=slow"), "no row has slow; known are sync, async"),
        (("--compare", "transmission.mode=sync,async"), "2 values; write the one that all others stand beside"),
        (("--folds", "1"), "--folds: 1 is not from 2 to 4"),
        (("--hold-out", "batch_size=1,2"), "holds out every row"),
        (("--processes", "0"), "--processes: 0 is not from 1 to 16"),
        (("--set", "cluster.links[0].name=wire"), "there is no entry ethernet; write one of 0, wire"),
        (("--parameters", "none.yaml"), "none.yaml: cannot be read"),
        (("--scenario", "none.yaml"), "none.yaml: cannot be read"),
        (("--device", "no/where.yaml"), "there is no folder no"),
        (("--device", "fitted.txt"), "--device fitted.txt: scenarios name profiles by a path that ends in .yaml"),
        (("--device", "fitted.yaml", "--parameters", "cable.yaml"), "--device: no device type is fitted"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(epsim: Run, arguments: tuple[str, ...], message: str) -> None:
    lines = PARAMETERS.splitlines(keepends=True)
    Path("cable.yaml").write_text(lines[0] + lines[2])
    before = sorted(Path().iterdir())
    code, out, err = epsim(*ASKED, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(Path().iterdir()) == before
