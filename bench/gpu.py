"""`make gpu`: everything that needs an NVIDIA GPU, in one command: GPU tests, then decode of a 13B-shaped model.

Uses the Python and packages that are installed; installs nothing and needs no network.
"""

from __future__ import annotations

import os
import subprocess
import sys

import jax

from bench.report import ROOT


def main() -> int:
    platforms = {device.platform for device in jax.devices()}
    if "gpu" not in platforms:
        print(
            f"bench.gpu: JAX sees no NVIDIA GPU here, only {', '.join(sorted(platforms))}: "
            "install jax[cuda12] and a driver, or run on a machine with one",
            file=sys.stderr,
        )
        return 2
    environment = os.environ | {"JAX_PLATFORMS": "cuda,cpu", "PYTHONPATH": str(ROOT)}
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "--import-mode=importlib", "-q", "tests"]
    decode = [sys.executable, "-m", "bench.decode", "--shape", "llama-2-13b", "--batch", "1,16,64", "--save", "gpu"]
    failed = [command for command in (tests, decode) if subprocess.run(command, cwd=ROOT, env=environment).returncode]
    for command in failed:
        print(f"bench.gpu: failed: {' '.join(command[2:])}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
