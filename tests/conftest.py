"""Tests run on two virtual CPU devices, so that tensor parallelism is tested on any machine."""

import os

# Before JAX is imported; a GPU job sets its own.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
