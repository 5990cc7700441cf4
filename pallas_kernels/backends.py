"""Which implementation of the kernels runs: C++ on CPU, portable XLA, or Pallas on NVIDIA GPUs.

Chosen once at start-up; what cannot work is refused here, by name, rather than in the middle of a step.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jserve.config import AttentionBackend
from jserve.errors import ConfigError
from jserve.pallas_kernels import native
from jserve.pallas_kernels.quantization import QUANTIZED_DTYPES

logger = logging.getLogger(__name__)

Backend = Literal["native", "xla", "pallas"]


@functools.cache
def choose_backend(requested: AttentionBackend, platform: str) -> Backend:
    """The backend to run on a JAX platform ("cpu", "gpu", "cuda"); "auto" takes the fastest that works there.

    Raises ConfigError when the backend asked for cannot work. Compiles the native kernels when they are chosen.
    """
    gpu = platform in ("gpu", "cuda")
    chosen, why = _automatic(platform, gpu) if requested == "auto" else (requested, "as configured")
    if chosen == "pallas" and not gpu:
        raise ConfigError(
            f"runner.attention_backend is 'pallas', which needs an NVIDIA GPU; the platform is {platform!r}: use 'auto'"
        )
    if chosen == "pallas" and (problem := _too_old()):
        raise ConfigError(
            f"the pallas attention backend {problem}: set runner.attention_backend to 'xla', which is slow"
        )
    if chosen == "native" and platform != "cpu":
        raise ConfigError(
            f"runner.attention_backend is 'native', which runs on CPU; the platform is {platform!r}: use 'auto'"
        )
    if chosen == "native" and (problem := native.unavailable()):
        raise ConfigError(f"runner.attention_backend is 'native', but {problem}; or use 'xla', which is slower")
    logger.info("attention backend: %s (%s)", chosen, why)
    return chosen


def check_supported(
    backend: Backend,
    *,
    head_dim: int,
    dtype: DTypeLike,
    kv_dtype: DTypeLike | None = None,
    block_size: int | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    """Raises ConfigError, naming what there is, when `backend` has no kernel for this; None is the model's dtype,
    any block size, and no window or soft cap."""
    name, kv_name = jnp.dtype(dtype).name, jnp.dtype(dtype if kv_dtype is None else kv_dtype).name
    if name not in _DTYPES[backend]:
        taken = " or ".join(_DTYPES[backend])
        raise ConfigError(f"dtype is {name!r}, which the {backend} attention backend does not take: use {taken}")
    kv_taken = (name, *(QUANTIZED_DTYPES if backend != "native" else ()))
    if kv_name not in kv_taken:
        raise ConfigError(
            f"the KV cache's dtype is {kv_name!r}, which the {backend} attention backend does not take for a model in "
            f"{name}: use {' or '.join(kv_taken)}"
        )
    if backend == "native" and (window is not None or soft_cap is not None):
        raise ConfigError(
            f"the model has a sliding window of {window} and a soft cap of {soft_cap}, and the native attention "
            "backend takes neither: set runner.attention_backend to 'xla'"
        )
    if backend == "pallas":
        if head_dim > _PALLAS_MAX_HEAD_DIM or head_dim % _PALLAS_HEAD_DIM_STEP:
            raise ConfigError(
                f"head_dim is {head_dim}, and the pallas attention backend takes multiples of {_PALLAS_HEAD_DIM_STEP} "
                f"up to {_PALLAS_MAX_HEAD_DIM}: set runner.attention_backend to 'xla'"
            )
        if block_size is not None and not 1 <= block_size <= _PALLAS_MAX_BLOCK_SIZE:
            raise ConfigError(
                f"cache.block_size is {block_size}, and the pallas attention backend takes 1 to "
                f"{_PALLAS_MAX_BLOCK_SIZE}: use 16 or 32"
            )


_DTYPES: dict[Backend, tuple[str, ...]] = {
    "native": ("float32", "bfloat16"),
    "xla": ("float32", "bfloat16", "float16"),
    "pallas": ("float32", "bfloat16", "float16"),
}
_MIN_COMPUTE_CAPABILITY = "8.0"
_PALLAS_HEAD_DIM_STEP = 8
"""Numbers of 16 bits that a thread loads at once."""
_PALLAS_MAX_HEAD_DIM = 256
_PALLAS_MAX_BLOCK_SIZE = 1024


def _too_old() -> str | None:
    """What is wrong with this machine's GPU, if it has one."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return None
    found = str(getattr(device, "compute_capability", _MIN_COMPUTE_CAPABILITY))
    if tuple(map(int, found.split("."))) >= tuple(map(int, _MIN_COMPUTE_CAPABILITY.split("."))):
        return None
    return f"needs compute capability {_MIN_COMPUTE_CAPABILITY} (Ampere), and {device.device_kind} has {found}"


def _automatic(platform: str, gpu: bool) -> tuple[Backend, str]:
    if gpu:
        return "pallas", "the platform is an NVIDIA GPU"
    if platform != "cpu":
        return "xla", f"there are no kernels for platform {platform!r}"
    if problem := native.unavailable():
        return "xla", f"slower than native: {problem}"
    return "native", "the platform is a CPU with a C++ compiler"
