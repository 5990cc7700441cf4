"""How much memory this machine, or its container, still has."""

from __future__ import annotations

import os
import re
from pathlib import Path


def available_host_bytes() -> int:
    """Memory that could be had without swapping, within the container's limit if there is one."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = 1024 * int(found[1])
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    return free
