"""jserve: a serving runtime for multi-turn LLM conversations on JAX/XLA.

`LLM` runs the engine in this process (notebooks, scripts); `jserve serve` runs it behind gRPC.
Names are imported on first use, so that `jserve --help` does not wait for JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jserve.llm import LLM
    from jserve.request import SamplingParams, Terms
    from jserve.server.client import Client

__version__ = "0.1.0"
__all__ = ["LLM", "Client", "SamplingParams", "Terms", "__version__"]

_HOMES = {
    "LLM": "jserve.llm",
    "SamplingParams": "jserve.request",
    "Terms": "jserve.request",
    "Client": "jserve.server.client",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jserve' has no attribute {name!r}; it has {', '.join(__all__)}")
