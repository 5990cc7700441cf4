"""Which implementation of the kernels runs: C++ on CPU, portable XLA, or Pallas on NVIDIA GPUs.

Chosen once at start-up; what cannot work is refused here, by name, rather than in the middle of a step.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jserve.config import AttentionBackend
from jserve.errors import ConfigError
from jserve.pallas_kernels import native, pallas_triton

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
    if chosen == "native" and platform != "cpu":
        raise ConfigError(
            f"runner.attention_backend is 'native', which runs on CPU; the platform is {platform!r}: use 'auto'"
        )
    if chosen == "native" and (problem := native.unavailable()):
        raise ConfigError(f"runner.attention_backend is 'native', but {problem}; or use 'xla', which is slower")
    logger.info("attention backend: %s (%s)", chosen, why)
    return chosen


def check_supported(backend: Backend, *, head_dim: int, dtype: DTypeLike) -> None:
    """Raises ConfigError when `backend` has no kernel for heads of `head_dim` in `dtype`."""
    name = jnp.dtype(dtype).name
    if name not in _DTYPES[backend]:
        taken = " or ".join(_DTYPES[backend])
        raise ConfigError(f"dtype is {name!r}, which the {backend} attention backend does not take: use {taken}")
    if backend == "pallas" and (problem := pallas_triton.unsupported(head_dim)):
        raise ConfigError(f"{problem}: set runner.attention_backend to 'xla'")


_DTYPES: dict[Backend, tuple[str, ...]] = {
    "native": ("float32", "bfloat16"),
    "xla": ("float32", "bfloat16", "float16"),
    "pallas": ("float32", "bfloat16", "float16"),
}


def _automatic(platform: str, gpu: bool) -> tuple[Backend, str]:
    if gpu:
        return "pallas", "the platform is an NVIDIA GPU"
    if platform != "cpu":
        return "xla", f"there are no kernels for platform {platform!r}"
    if problem := native.unavailable():
        return "xla", f"slower than native: {problem}"
    return "native", "the platform is a CPU with a C++ compiler"
