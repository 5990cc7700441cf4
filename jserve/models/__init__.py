"""Models: what one is (spec), is made of (layers), which there are (registry), where one lives (placement)."""

from jserve.models.family import CausalLM
from jserve.models.layers import Attend
from jserve.models.placement import build, init_random, param_shardings, parameters
from jserve.models.registry import parse_config
from jserve.models.spec import ModelSpec, RopeSpec

__all__ = [
    "Attend",
    "CausalLM",
    "ModelSpec",
    "RopeSpec",
    "build",
    "init_random",
    "param_shardings",
    "parameters",
    "parse_config",
]
