"""How much CPU others took while something was measured: without it a number from a shared machine means little."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.servers import Server, family

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Noise:
    """Counts from its making on. What this process takes is not noise, nor what the server's do, if there is one."""

    def __init__(self, server: Server | None = None) -> None:
        self._server = server
        self._start = self._seconds()

    def others_cores(self) -> float:
        """Cores that all other processes took, in the mean since the start."""
        elapsed_s, busy_s, own_s = (now - then for now, then in zip(self._seconds(), self._start, strict=True))
        return max(0.0, busy_s - own_s) / elapsed_s

    def _seconds(self) -> tuple[float, float, float]:
        """Of the clock, of all busy cores, of our own processes."""
        own = os.times()
        servers = family(self._server.process.pid) if self._server is not None else ()
        ours_s = own.user + own.system + sum(map(_process_s, servers))
        return time.perf_counter(), _busy_s(), ours_s


def _busy_s() -> float:
    """/proc/stat counts, in ticks: user, nice, system, idle, iowait, irq, softirq, steal."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def _process_s(pid: int) -> float:
    """User and system time: fields 14 and 15 of /proc/PID/stat, that is 11 and 12 after the command's name."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S
