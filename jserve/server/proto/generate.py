"""`make proto`: the Python stubs of jserve.v1, made with grpcio-tools and committed beside the schema."""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parents[3]
SCHEMA = "jserve/server/proto/jserve/v1/jserve.proto"


def generate(out: Path) -> int:
    """Write the stubs below `out`, by their path from the root. Returns protoc's exit code."""
    google = importlib.resources.files("grpc_tools") / "_proto"
    kinds = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    code: int = protoc.main(["protoc", f"-I{ROOT}", f"-I{google}", *kinds, SCHEMA])
    return code


if __name__ == "__main__":
    sys.exit(generate(ROOT))
