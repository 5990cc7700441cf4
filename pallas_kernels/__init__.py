"""The kernels of the serving path: attention over the paged KV cache and the write into it.

One function each, with the backends behind it; every backend gives the same result to rounding. This package knows
JAX and nothing of models, schedulers or servers.
"""

from jserve.pallas_kernels.backends import Backend, check_supported, choose_backend
from jserve.pallas_kernels.kv_write import kv_write
from jserve.pallas_kernels.metadata import BatchMetadata
from jserve.pallas_kernels.paged_attention import paged_attention

__all__ = ["Backend", "BatchMetadata", "check_supported", "choose_backend", "kv_write", "paged_attention"]
