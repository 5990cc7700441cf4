"""GPUs that programs can be compiled for on a machine without one, and the compiler that does it.

XLA compiles for a GPU from its description alone (a GpuTargetConfigProto). It needs JAX's CUDA plugin, which must not
lie in the environment that serves on CPU: there JAX would try to start CUDA and complain. `install` puts it in a folder
of its own under the root, and `prepare` makes it, or the plugin of a machine with a GPU, known to this process.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from bench.report import ROOT
from jserve.errors import ConfigError

PTXAS = "nvidia-cuda-nvcc-cu12==12.9.86"
INSTALL = "python -m bench.a100 --install"


@dataclass(frozen=True)
class GpuTarget:
    """One kind of GPU, by the numbers that XLA's compiler asks for."""

    name: str
    kind: str
    """As the driver names it."""
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory_bytes: int
    bytes_per_s: int
    l2_bytes: int
    core_shared_bytes: int
    block_shared_bytes: int
    """What one block can ask for (opt-in)."""

    @property
    def arch(self) -> str:
        major, minor = self.capability
        return f"sm_{major}{minor}"

    def config(self) -> str:
        """The GpuTargetConfigProto as text."""
        major, minor = self.capability
        return f"""
        gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
            shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.block_shared_bytes}
            shared_memory_per_core: {self.core_shared_bytes}
            core_count: {self.cores} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.clock_ghz}
            memory_bandwidth: {self.bytes_per_s} l2_cache_size: {self.l2_bytes}
            device_memory_size: {self.memory_bytes}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "{self.kind}"
        """

    def mesh(self, tp: int = 1) -> Mesh:
        """`tp` such GPUs that nobody has, on the axis `tp`."""
        with quiet():
            topology = topologies.get_topology_desc(
                self.name, "cuda", target_config=self.config(), topology=f"1x1x{tp}"
            )
        return Mesh(np.array(topology.devices), ("tp",), axis_types=(AxisType.Auto,))


TARGETS = {
    target.name: target
    for target in (
        GpuTarget(
            name="a100-80gb",
            kind="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            cores=108,
            fpus_per_core=64,
            clock_ghz=1.41,
            memory_bytes=80 << 30,
            bytes_per_s=2_039_000_000_000,
            l2_bytes=40 << 20,
            core_shared_bytes=167_936,
            block_shared_bytes=166_912,
        ),
        GpuTarget(
            name="h200",
            kind="NVIDIA H200",
            capability=(9, 0),
            cores=132,
            fpus_per_core=128,
            clock_ghz=1.98,
            memory_bytes=143_771 << 20,
            bytes_per_s=4_800_000_000_000,
            l2_bytes=50 << 20,
            core_shared_bytes=233_472,
            block_shared_bytes=232_448,
        ),
    )
}


# --- the compiler -------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the plugin for this Python and JAX is kept."""
    return ROOT / ".a100" / f"{sys.implementation.cache_tag}-jax-{jax.__version__}"


def install() -> None:
    """Download the plugin and ptxas, about 220 MB, into `folder`. Raises ConfigError when pip cannot."""
    version = jax.__version__
    wanted = [f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}", PTXAS]
    # --no-deps: of CUDA's own libraries, which are gigabytes, compiling needs none.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder())]
    if subprocess.run([*pip, *wanted]).returncode:
        raise ConfigError(f"pip could not install {', '.join(wanted)}: see its message above")


def prepare() -> Path:
    """Make JAX of this process compile for CUDA and compute on CPU; returns the path of ptxas.

    Call it before JAX touches a device. Raises ConfigError where the plugin or ptxas is missing.
    """
    kept = folder()
    if kept.is_dir() and str(kept) not in sys.path:
        sys.path.append(str(kept))
    if not _has_plugin():
        raise ConfigError(f"JAX's CUDA plugin is not here: install it with `{INSTALL}` (about 220 MB, no GPU needed)")
    ptxas = _find_ptxas(kept)
    if ptxas is None:
        raise ConfigError(f"ptxas is not here: install it with `{INSTALL}`, or put CUDA's on PATH")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is read from a cache has not been compiled
    with quiet():
        jax.devices()  # finds the plugin
    return ptxas


def _has_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{major}_plugin") is not None for major in (12, 13))


def _find_ptxas(kept: Path) -> Path | None:
    """Ours; that of CUDA's wheels in this environment; or any on PATH."""
    packages = (kept, Path(sysconfig.get_path("platlib")))
    places = (root / "nvidia" / part / "bin" / "ptxas" for root in packages for part in ("cuda_nvcc", "cu13"))
    found = next((path for path in places if path.is_file()), None) or shutil.which("ptxas")
    return Path(found) if found else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without XLA's lines about the GPU that is not here; if anything fails, they are shown after all."""
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
