"""A signal ends a command with one line and a status, whatever the command makes of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import sys, time
from pathlib import Path
from jserve.interrupts import Interrupts, scratch

def begun():
    print("begun", flush=True)
"""


def run(body: str, *numbers: int, folder: Path | None = None) -> tuple[int, str, str]:
    """Status, output and errors of a program that gets a signal each time that it says "begun"."""
    program = f"{BEGIN}\nwith Interrupts('it'):\n" + "".join(f"    {line}\n" for line in body.splitlines())
    command = [sys.executable, "-c", program, *([str(folder)] if folder else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for number in numbers:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def test_without_a_signal_nothing_changes() -> None:
    assert run("print('done')") == (0, "done\n", "")
    code, _, err = run("raise ValueError('a defect')")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_what_runs(number: int, status: int) -> None:
    body = "try:\n    begun(); time.sleep(60)\nfinally:\n    print('unwound')"
    assert run(body, number) == (status, "unwound\n", f"it: ended by {signal.Signals(number).name}\n")


def test_what_becomes_of_the_interrupt_does_not_matter() -> None:
    body = "try:\n    begun(); time.sleep(60)\nexcept KeyboardInterrupt:\n    raise ImportError('said a C extension')"
    assert run(body, signal.SIGINT) == (130, "", "it: ended by SIGINT\n")


def test_an_interrupt_that_is_swallowed_ends_the_process_all_the_same() -> None:
    body = "while True:\n    try:\n        begun(); time.sleep(60)\n    except KeyboardInterrupt:\n        pass"
    code, _, err = run(body, signal.SIGINT)
    assert (code, err) == (130, "it: ended by SIGINT\n")


def test_a_second_signal_does_not_wait_for_the_first_to_unwind() -> None:
    body = "try:\n    begun(); time.sleep(60)\nfinally:\n    begun(); time.sleep(60)"
    assert run(body, signal.SIGTERM, signal.SIGINT) == (143, "", "it: ended by SIGTERM\n")


def test_an_import_is_not_unwound(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\ntry:\n    print('begun', flush=True); time.sleep(60)\nfinally:\n    print('unwound')\n"
    )
    body = "sys.path.insert(0, sys.argv[1])\nimport slow"
    assert run(body, signal.SIGINT, folder=tmp_path) == (130, "", "it: ended by SIGINT\n")


@pytest.mark.parametrize("leaving", ["time.sleep(0)", "time.sleep(60)"])
def test_scratch_folders_go_however_it_ends(tmp_path: Path, leaving: str) -> None:
    folder = tmp_path / "scratch"
    body = (
        "with scratch(Path(sys.argv[1])) as folder:\n    folder.mkdir(); (folder / 'part').write_text('x')\n"
        f"    try:\n        begun(); time.sleep(60)\n    finally:\n        {leaving}"
    )
    assert run(body, signal.SIGINT, folder=folder) == (130, "", "it: ended by SIGINT\n")
    assert not folder.exists()
