"""The figures of `epsim trace stats --plot`: which there are, what they show, and that they name the trace."""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.captured import captured_like

from epsim import cli
from epsim.report.figure import figure_style
from epsim.report.routing_panels import MODALITY_COLOURS, chosen_layers
from epsim.report.routing_plots import _distribution, _experts, _measures, draw_routing, left_out
from epsim.report.score_plots import score_figure
from epsim.trace import RoutingTrace
from epsim.trace.file import TraceWriter
from epsim.trace_stats import sample_request, trace_stats

FIGURES = [
    "expert-specialization.png",
    "modality-scores-attention.png",
    "modality-scores-gaussian.png",
    "routing-distribution.png",
    "specialization-by-layer.png",
]


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with figure_style():
        yield
        import matplotlib.pyplot as plt

        plt.close("all")


def size(file: bytes) -> tuple[int, int]:
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", file[16:24])
    return width, height


def drawn(trace: RoutingTrace) -> dict[str, bytes]:
    return draw_routing(trace_stats(trace), sample_request(trace))


def stairs(ax: Any) -> dict[str, Any]:
    return {patch.get_label(): patch.get_data() for patch in ax.patches}


def test_the_same_trace_gives_the_same_files() -> None:
    files = drawn(captured_like())
    assert sorted(files) == FIGURES
    assert all(600 < width < 2000 and 200 < height < 2000 for width, height in map(size, files.values()))
    assert drawn(captured_like()) == files


def test_large_and_tiny_traces_can_be_drawn() -> None:
    large = drawn(captured_like(layer_ids=range(1, 49), num_experts=128, topk=8))
    tiny = drawn(captured_like(layer_ids=(0,), num_experts=2, topk=1, num_requests=1, lengths=(1, 1, 0)))
    assert sorted(large) == sorted(tiny) == FIGURES
    assert all(width < 2000 and height < 2000 for width, height in map(size, large.values()))


def test_text_alone_leaves_out_what_compares() -> None:
    trace = captured_like(lengths=(0, 6, 2))
    assert sorted(drawn(trace)) == [name for name in FIGURES if "specialization" not in name]
    assert left_out(trace_stats(trace)) == ["no figures of specialisation: the trace has no vision tokens"]
    (first, *_) = _distribution(trace_stats(trace)).axes
    assert set(stairs(first)) == {"text tokens"}


def test_the_distribution_stacks_the_loads_by_text_bias() -> None:
    stats = trace_stats(captured_like(), num_bins=4)
    layer, ax = stats["layers"][1], _distribution(stats).axes[1]
    order = layer["experts_by_text_bias"]
    vision = np.array(layer["expert_load"]["prefill_vision"])[order]
    shown = stairs(ax)
    assert shown["vision tokens"].values.tolist() == vision.tolist()
    assert shown["text tokens"].baseline.tolist() == vision.tolist()
    assert shown["text tokens"].values.tolist() == np.array(layer["expert_load"]["all"])[order].tolist()
    assert [line.get_xdata()[0] for line in ax.lines] == [3, 6, 9]  # 12 experts in 4 bins
    assert ax.get_title() == f"layer 2, MSI {layer['msi']:.2f}"


def test_the_curves_are_the_measures_and_infinity_is_marked() -> None:
    stats = trace_stats(captured_like(layer_ids=range(6), num_requests=12))
    upper, _ = _measures(stats).axes
    msi, divergence = (line.get_ydata().tolist() for line in upper.lines)
    assert msi == [layer["msi"] for layer in stats["layers"]]
    assert divergence == [layer["jensen_shannon_bits"] for layer in stats["layers"]]
    stats["layers"][2] |= {"mrd_distance_nats": None, "num_one_sided_experts": 1}
    lower = _measures(stats).axes[1]
    exact, smoothed, infinite = lower.lines
    expected = [at for at, layer in enumerate(stats["layers"]) if layer["mrd_distance_nats"] is None]
    assert 2 in expected
    assert len(expected) < 6
    assert np.flatnonzero(np.isnan(exact.get_ydata())).tolist() == infinite.get_xdata().tolist() == expected
    assert smoothed.get_ydata().tolist() == [layer["mrd_distance_smoothed_nats"] for layer in stats["layers"]]
    assert infinite.get_ydata().tolist() == [smoothed.get_ydata()[at] for at in expected]


def test_the_heat_map_has_every_expert_and_marks_idle_ones() -> None:
    stats = trace_stats(captured_like())
    stats["layers"][0]["specialization_score"][3] = None
    figure = _experts(stats)
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (3, 12)
    assert np.ma.getmaskarray(np.ma.masked_invalid(shown))[0].tolist() == [False] * 11 + [True]
    assert shown[1].tolist() == sorted(stats["layers"][1]["specialization_score"])
    assert "grey: never chosen" in figure.get_supxlabel()


def test_scores_are_shares_of_a_modality_and_a_map_of_one_request() -> None:
    trace = captured_like()
    stats, sample = trace_stats(trace), sample_request(trace)
    assert sample is not None
    figure = score_figure(stats, "gaussian", sample)
    shown, histogram = stairs(figure.axes[0]), stats["layers"][0]["modality_scores"]["gaussian"]["histogram"]
    assert shown["vision tokens"].values.sum() == pytest.approx(100)
    assert shown["text tokens"].values == pytest.approx(100 * np.array(histogram["text"]) / sum(histogram["text"]))
    given, scores = (ax.images[0].get_array() for ax in figure.axes[3:5])
    assert scores.tolist() == np.array(sample["scores"]["gaussian"]).T.tolist()
    assert given.tolist() == [[0] * 7 + [1] * 5]  # the prompt: 7 vision tokens, then 5 of text


def test_every_figure_names_the_trace_and_says_mock() -> None:
    trace = captured_like()
    stats = trace_stats(trace)
    stats["trace"]["name"] = "/out/$x_1$ ünï 画.arrow"
    figures = [_distribution(stats), _measures(stats), _experts(stats), score_figure(stats, "attention", None)]
    for figure in figures:
        text = " ".join(figure.get_supxlabel().split())
        assert "/out/$x_1$ ünï 画.arrow. routing: captured, MOCK: made up" in text
    assert sorted(draw_routing(stats, sample_request(trace))) == FIGURES


def test_many_layers_are_thinned_evenly_with_both_ends() -> None:
    assert chosen_layers(range(48), 4) == [0, 16, 31, 47]
    assert chosen_layers([1, 3], 16) == [1, 3]


def test_colours_differ_in_grey() -> None:
    from matplotlib.colors import to_rgb

    vision, text = (np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722]) for colour in MODALITY_COLOURS.values())
    assert vision - text > 0.2


def test_the_command_writes_and_names_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = captured_like()
    monkeypatch.chdir(tmp_path)
    with TraceWriter("t.arrow", trace.meta) as writer:
        writer.write(trace)
    monkeypatch.setattr(sys, "argv", ["epsim", "trace", "stats", "t.arrow", "--plot", "new/figures"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    printed = capsys.readouterr()
    assert exit_info.value.code == 0
    assert sorted(path.name for path in (tmp_path / "new/figures").iterdir()) == FIGURES
    assert all(f"new/figures/{name}" in printed.err for name in FIGURES)
