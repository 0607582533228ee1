"""Peak memory and time of simulating a large trace file: ten million tokens of OLMoE's shape by default.

Run: python benchmarks/large_trace.py [--requests 10000] [--fidelity analytic]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIMULATE = """
import sys
from pathlib import Path
from epsim.run import simulate
from epsim.scenario import load_scenario
outcome = simulate(load_scenario(Path(sys.argv[1]), sys.argv[2:]))
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_016, help="a multiple of 32")
    parser.add_argument("--fidelity", default="event")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, trace = Path(folder) / "scenario.json", Path(folder) / "trace.arrow"
        scenario = {
            "name": "large trace",
            "model": "olmoe",
            "cluster": "orin-2x-10gbe",
            "trace": {"kind": "uniform", "vision_tokens": 576, "text_tokens": 390, "output_tokens": 34},
            "transmission": {"mode": "async"},
            "workload": {"batch_sizes": [32], "num_batches": args.requests // 32},
            "simulation": {"fidelity": args.fidelity},
        }
        path.write_text(json.dumps(scenario))  # JSON is YAML
        subprocess.run([sys.executable, "-m", "epsim.cli", "trace", "make", path, "-o", trace], check=True)
        num_tokens = args.requests // 32 * 32 * (576 + 390 + 33)
        begin = time.perf_counter()
        command = [sys.executable, "-c", SIMULATE, str(path), f"trace={trace}"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - begin
        print(
            f"{num_tokens / 1e6:.1f}e6 tokens, {trace.stat().st_size / 1e9:.2f} GB, {args.fidelity}: "
            f"{seconds:.1f} s, peak resident memory {int(printed) * 1024 / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
