"""The benchmark of training overhead runs, and its rows are those of SMoES table S13."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training_overhead.py"


def test_a_row_for_each_method_beside_the_paper(tmp_path: Path) -> None:
    size = ["--layers", "1", "--experts", "32", "--text-tokens", "4", "--steps", "1", "--repeats", "2"]
    run = ["--reduced", "--device", "cpu", "--threads", "1", "--json", str(tmp_path / "rows.json")]
    subprocess.run([sys.executable, str(SCRIPT), *size, *run], check=True, capture_output=True)
    soft, hard, attention, gaussian = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (soft["ratio"], soft["added_s_per_layer"], soft["paper_ratio"]) == (1, 0, 1)
    # Table S13, 32 experts: 0.80, 0.81 and 0.93 s beside 0.74.
    assert hard["paper_ratio"] == pytest.approx(1.081, abs=1e-3)
    assert attention["paper_ratio"] == pytest.approx(1.095, abs=1e-3)
    assert gaussian["paper_ratio"] == pytest.approx(1.257, abs=1e-3)
    # Bins keep 2 modalities x 32 experts. The Gaussian adds a count, 256 means and 256 variances for each modality,
    # and one flag each for whether it has begun.
    assert (soft["num_buffers"], hard["num_buffers"], attention["num_buffers"]) == (0, 64, 64)
    assert gaussian["num_buffers"] == 64 + 2 * (1 + 2 * 256) + 2
    # A layer: 4 matrices of attention, 32 experts of 3 matrices, a router, 4 norms (two of them of q and k). Embedding
    # and head of 513 tokens, a last norm. The rest is the reduced vision encoder and the projector.
    layer = 4 * 256**2 + 32 * 3 * 256 * 128 + 32 * 256 + 4 * 256
    assert 0 < soft["num_parameters"] - layer - 2 * 513 * 256 - 256 < 4e5
