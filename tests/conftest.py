"""Tests run on two virtual CPU devices, so that tensor parallelism is tested on any machine.

Programs that many tests compile alike are compiled once: JAX keeps them beside pytest's own cache. The benchmarks are
run from the root, not installed: `bench` is made importable here without the root on sys.path. Random tests draw the
same examples in every run, so that a run tells of the change and not of luck; `make fuzz` draws new ones.
"""

import importlib.util
import os
import sys
from pathlib import Path

from hypothesis import settings

# Before JAX is imported; a GPU job sets its own.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

FOLDER = Path(__file__).resolve().parents[1] / "bench"

if "bench" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "bench", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])

settings.register_profile("same", derandomize=True)
settings.register_profile("fuzz", derandomize=False, print_blob=True)
settings.load_profile("same")
