"""Choosing a backend: "auto" takes what works, and asking for what cannot work says what to do instead."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jserve.errors import ConfigError
from jserve.pallas_kernels import backends, check_supported, choose_backend, native


@pytest.fixture(autouse=True)
def _forget_choices() -> None:
    choose_backend.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    native._ensure_registered.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_auto_takes_pallas_on_gpus_and_native_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: None)
    assert choose_backend("auto", "gpu") == choose_backend("auto", "cuda") == "pallas"
    assert choose_backend("auto", "cpu") == "native"
    assert choose_backend("auto", "tpu") == "xla"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(3):
            choose_backend("xla", "cpu")
    assert [record.getMessage() for record in caplog.records] == ["attention backend: xla (as configured)"]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_falls_back_to_xla_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        assert choose_backend("auto", "cpu") == "xla"
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler .* is on PATH: install one"):
        choose_backend("native", "cpu")


@pytest.mark.parametrize(("requested", "platform"), [("pallas", "cpu"), ("native", "gpu")])
def test_a_backend_on_the_wrong_platform_is_refused(requested: str, platform: str) -> None:
    with pytest.raises(ConfigError, match=f"'{requested}'.* platform is '{platform}': use 'auto'"):
        choose_backend(requested, platform)


def test_a_gpu_too_old_for_the_kernels_is_refused_and_xla_only_taken_if_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = SimpleNamespace(compute_capability="7.5", device_kind="Tesla T4")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [old])
    with pytest.raises(
        ConfigError, match=r"needs compute capability 8\.0 \(Ampere\), and Tesla T4 has 7\.5: set .* 'xla'"
    ):
        choose_backend("auto", "gpu")
    assert choose_backend("xla", "gpu") == "xla"
    old.compute_capability = "12.0"
    assert choose_backend("auto", "gpu") == "pallas"


def test_heads_and_dtypes_without_a_kernel_are_refused_at_start_up() -> None:
    for head_dim in (8, 64, 80, 96, 128):
        check_supported("pallas", head_dim=head_dim, dtype=jnp.bfloat16)
        check_supported("native", head_dim=head_dim, dtype=jnp.float32)
    for wrong in (512, 84):
        with pytest.raises(ConfigError, match=f"head_dim is {wrong}, .* multiples of 8 up to 256: set .* to 'xla'"):
            check_supported("pallas", head_dim=wrong, dtype=jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"'float16', which the native .* use float32 or bfloat16"):
        check_supported("native", head_dim=64, dtype=jnp.float16)


def test_caches_and_options_without_a_kernel_are_refused_at_start_up() -> None:
    for backend in ("xla", "pallas"):
        for kv_dtype in (None, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
            check_supported(backend, head_dim=64, dtype=jnp.bfloat16, kv_dtype=kv_dtype, window=128, soft_cap=30.0)
    with pytest.raises(ConfigError, match=r"is 'float16', .* in bfloat16: use bfloat16 or int8 or float8_e4m3fn"):
        check_supported("pallas", head_dim=64, dtype=jnp.bfloat16, kv_dtype=jnp.float16)
    with pytest.raises(ConfigError, match=r"is 'int8', which the native .*: use float32$"):
        check_supported("native", head_dim=64, dtype=jnp.float32, kv_dtype=jnp.int8)
    with pytest.raises(ConfigError, match=r"sliding window of 128 .* set runner.attention_backend to 'xla'"):
        check_supported("native", head_dim=64, dtype=jnp.float32, window=128)
    for block_size in (1, 8, 16, 256):
        check_supported("pallas", head_dim=64, dtype=jnp.bfloat16, block_size=block_size)
    with pytest.raises(ConfigError, match=r"cache.block_size is 2048, .* takes 1 to 1024"):
        check_supported("pallas", head_dim=64, dtype=jnp.bfloat16, block_size=2048)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_kernels_compile_wherever_there_is_a_compiler() -> None:
    assert native.unavailable() is None


def test_source_that_does_not_compile_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if problem := native.unavailable():
        pytest.skip(f"native backend: {problem}")
    broken = tmp_path / "broken.cc"
    broken.write_text("this is not C++;")
    native._ensure_registered.cache_clear()
    monkeypatch.setattr(native, "_SOURCES", [broken])
    monkeypatch.setenv("JSERVE_CACHE_DIR", str(tmp_path))
    assert "could not compile the kernels" in str(native.unavailable())
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if problem := native.unavailable():
        pytest.skip(f"native backend: {problem}")
    (tmp_path / "native").write_text("a file where the folder should be")
    native._ensure_registered.cache_clear()
    monkeypatch.setenv("JSERVE_CACHE_DIR", str(tmp_path))
    assert "set JSERVE_CACHE_DIR to a writable folder" in str(native.unavailable())


def test_the_compiled_kernels_are_kept_and_published_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if problem := native.unavailable():
        pytest.skip(f"native backend: {problem}")
    monkeypatch.setenv("JSERVE_CACHE_DIR", str(tmp_path))
    built = native._built()
    assert [p.name for p in (tmp_path / "native").iterdir()] == [built.name]
    stamp = built.stat().st_mtime_ns
    assert native._built() == built
    assert built.stat().st_mtime_ns == stamp
