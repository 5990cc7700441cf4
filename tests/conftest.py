"""Tests run on two virtual CPU devices, so that tensor parallelism is tested on any machine.

Programs that many tests compile alike are compiled once: JAX keeps them beside pytest's own cache.
"""

import os
from pathlib import Path

# Before JAX is imported; a GPU job sets its own.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
