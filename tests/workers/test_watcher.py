"""What is known of a process after its end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers.host.watcher import Remains, Watcher, log_tail


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_memory_of_a_process_is_known_after_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "memory = bytearray(b'x' * 200_000_000); print('ready', flush=True); input()"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=out)
    try:
        while "ready" not in log.read_text():
            time.sleep(0.01)
        watcher = Watcher()
        watcher.watch(process.pid)
    finally:
        process.kill()
        process.communicate()
    remains = watcher.remains(process.pid, [str(log), str(tmp_path / "absent")])
    assert remains.memory_bytes is not None
    assert 200_000_000 < remains.memory_bytes < 300_000_000
    assert remains.peak_memory_bytes is not None
    assert remains.peak_memory_bytes >= remains.memory_bytes
    assert remains.free_bytes
    assert remains.log == "ready"
    # It is forgotten, and one that nobody watched is not known.
    assert watcher.remains(process.pid, []) == Remains(
        seconds_before=pytest.approx(0, abs=60)  # type: ignore[arg-type]
    )


def test_of_a_log_only_the_last_lines_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(":actor_name:Worker\n" + "".join(f"line {i}\n" for i in range(100_000)))
    kept = log_tail(log).splitlines()
    assert kept == [f"line {i}" for i in range(100_000 - len(kept), 100_000)]
    assert 10 <= len(kept) <= 100
    log.write_bytes(b"x" * 100_000)
    assert 0 < len(log_tail(log)) <= 10_000
