"""Peak memory of reading a large trace file, measured in its own process by benchmarks/trace_memory.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "trace_memory.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of a program is read from /proc")
def test_a_large_file_is_read_in_bounded_memory() -> None:
    command = [sys.executable, str(SCRIPT), "--tokens", "1000000"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    file, peak, start = (
        int(found[1])
        for pattern in (r"file (\d+) MB", r"memory (\d+) MB", r"import (\d+) MB")
        if (found := re.search(pattern, printed))
    )
    # 1e6 tokens of 16 * 8 ids and 14 bytes of keys; 32 MiB of the mapping, a batch of 9 MB more, and copies.
    assert file >= 142
    assert peak - start < 120
