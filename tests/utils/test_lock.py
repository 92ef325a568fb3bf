"""One writer a folder; a lock left by a dead process is free."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.utils.lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from bayesian_lora.utils.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_s_lock_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"pid {other.pid} on ") as refused, locked(tmp_path):
            pytest.fail("two writers")
        assert "output.dir" in str(refused.value)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert f"pid {other.pid}" in (tmp_path / LOCK).read_text(), "it died holding the lock"
    with locked(tmp_path):
        assert f"pid {other.pid}" not in (tmp_path / LOCK).read_text()


def test_it_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new"):
        raise ZeroDivisionError
    with locked(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).is_file()
    assert not (tmp_path / "new" / LOCK).exists(), "nothing is left of it"
