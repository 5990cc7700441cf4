"""The C++ kernels: compiled for this CPU on first use, kept in the cache directory, registered with XLA.

The shared object's name is a hash of everything that shaped it, so a new source, compiler flag, jaxlib or CPU makes a
new one, and an old one is never loaded by mistake.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jaxlib.version
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int32, Shaped

from jserve.config import cache_root
from jserve.errors import ConfigError
from jserve.pallas_kernels.metadata import BatchMetadata

Pages = Sequence[Shaped[Array, "blocks ..."]]

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.cc"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
_COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: it may assume that NaN and infinity do not exist, and reorder sums that must not depend on the batch.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden")
_MATH_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_LIMIT_S = 300
_ATTENTION = "jserve_paged_attention"
_KV_WRITE = "jserve_kv_write"
_MATMUL = "jserve_matmul"
_GATHER = "jserve_gather_blocks"
_SCATTER = "jserve_scatter_blocks"
_COPY_OUT = "jserve_copy_blocks_out"
_COPY_IN = "jserve_copy_blocks_in"
_SECONDS = jax.ShapeDtypeStruct((), np.float32)
_SYMBOLS = {
    _ATTENTION: "JservePagedAttention",
    _KV_WRITE: "JserveKvWrite",
    _MATMUL: "JserveMatmul",
    _GATHER: "JserveGatherBlocks",
    _SCATTER: "JserveScatterBlocks",
    _COPY_OUT: "JserveCopyBlocksOut",
    _COPY_IN: "JserveCopyBlocksIn",
}


def attend(
    q: Float[Array, "tokens heads dim"],
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    meta: BatchMetadata,
    scale: float,
) -> Float[Array, "tokens heads dim"]:
    _ensure_registered()
    call: Callable[..., Array] = jax.ffi.ffi_call(_ATTENTION, jax.typeof(q))
    return call(q, k_cache, v_cache, meta.query_start, meta.context_len, meta.block_table, scale=np.float32(scale))


def write(
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    kv_slot: Int32[Array, "tokens"],
) -> tuple[Array, Array]:
    _ensure_registered()
    results = (jax.typeof(k_cache), jax.typeof(v_cache))
    call = jax.ffi.ffi_call(_KV_WRITE, results, input_output_aliases={0: 0, 1: 1})
    k_cache, v_cache = call(k_cache, v_cache, k, v, kv_slot)
    return k_cache, v_cache


def matmul(
    x: Float32[Array, "rows ins"], weight: Float32[Array, "outs ins"], live: Int32[Array, ""]
) -> Float32[Array, "rows outs"]:
    _ensure_registered()
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), np.float32)
    product: Array = jax.ffi.ffi_call(_MATMUL, result)(x, weight, live)
    return product


def gather(k: Pages, v: Pages, ids: Int32[Array, "n"]) -> Shaped[Array, "n layers 2 ..."]:
    _ensure_registered()
    result = jax.ShapeDtypeStruct((ids.shape[0], len(k), 2, *k[0].shape[1:]), k[0].dtype)
    buffer: Array = jax.ffi.ffi_call(_GATHER, result)(ids, *k, *v)
    return buffer


def scatter(
    k: Pages, v: Pages, ids: Int32[Array, "n"], buffer: Shaped[Array, "n layers 2 ..."]
) -> tuple[list[Array], list[Array]]:
    _ensure_registered()
    pools = [*k, *v]
    aliases = {2 + i: i for i in range(len(pools))}
    call = jax.ffi.ffi_call(_SCATTER, [jax.typeof(pool) for pool in pools], input_output_aliases=aliases)
    written = list(call(ids, buffer, *pools))
    return written[: len(k)], written[len(k) :]


def copy_out(k: Pages, v: Pages, places: Int32[Array, "n 3"]) -> Float32[Array, ""]:
    """See `block_copy.copy_blocks_out`."""
    _ensure_registered()
    seconds: Array = jax.ffi.ffi_call(_COPY_OUT, _SECONDS)(places, *k, *v)
    return seconds


def copy_in(k: Pages, v: Pages, places: Int32[Array, "n 3"]) -> tuple[Float32[Array, ""], list[Array], list[Array]]:
    """See `block_copy.copy_blocks_in`."""
    _ensure_registered()
    pools = [*k, *v]
    results = [_SECONDS, *(jax.typeof(pool) for pool in pools)]
    aliases = {1 + i: 1 + i for i in range(len(pools))}
    call = jax.ffi.ffi_call(_COPY_IN, results, input_output_aliases=aliases)
    seconds, *written = call(places, *pools)
    return seconds, written[: len(k)], written[len(k) :]


def unavailable() -> str | None:
    """Why the kernels cannot be used here and what to do about it, or None after making them ready."""
    try:
        _ensure_registered()
    except ConfigError as error:
        return str(error)
    return None


@functools.cache
def _ensure_registered() -> None:
    try:
        library = ctypes.CDLL(str(_built()))
    except OSError as error:
        raise ConfigError(
            f"the C++ kernels cannot be kept in or loaded from {cache_root() / 'native'} ({error}): "
            "set JSERVE_CACHE_DIR to a writable folder on a file system that allows programs to run"
        ) from error
    for target, symbol in _SYMBOLS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")


def _built() -> Path:
    """The shared object for this source, these flags, this jaxlib and this CPU, compiled if it is not there yet."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise ConfigError(f"no C++ compiler ({', '.join(_COMPILERS)}) is on PATH: install one, such as g++")
    identity = "\0".join((*_FLAGS, *_MATH_FLAGS, jaxlib.version.__version__, compiler, _cpu_identity()))
    sources = b"\0".join(path.read_bytes() for path in (*_SOURCES, *_HEADERS))
    name = hashlib.sha256(sources + identity.encode()).hexdigest()[:32]
    target = cache_root() / "native" / f"{name}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    """Compiles beside `target` and renames, so that another process sees a whole file or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    partial = Path(name)
    sources = [str(path) for path in _SOURCES]
    command = [compiler, *_FLAGS, *_MATH_FLAGS, "-isystem", jax.ffi.include_dir(), *sources, "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S, check=False)
        if done.returncode != 0:
            problem = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:500])
            raise ConfigError(f"{compiler} could not compile the kernels ({problem}): install a C++17 compiler")
        partial.replace(target)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{compiler} took more than {_COMPILE_LIMIT_S} s to compile the kernels") from error
    finally:
        partial.unlink(missing_ok=True)


def _cpu_identity() -> str:
    """What -march=native depends on: a cache directory may be shared by machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(wanted)}))
