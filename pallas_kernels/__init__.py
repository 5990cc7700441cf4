"""The kernels of the serving path: attention over the paged KV cache and the write into it.

One function each, with the backends behind it; every backend gives the same result to rounding. This package knows
JAX and nothing of models, schedulers or servers.
"""

from jserve.pallas_kernels.backends import Backend, check_supported, choose_backend
from jserve.pallas_kernels.block_copy import gather_blocks, scatter_blocks
from jserve.pallas_kernels.kv_write import kv_write
from jserve.pallas_kernels.kv_write_quantized import kv_write_quantized
from jserve.pallas_kernels.merge import merge_partials
from jserve.pallas_kernels.metadata import BatchMetadata, KVScales
from jserve.pallas_kernels.paged_attention import paged_attention, partial_attention

__all__ = [
    "Backend",
    "BatchMetadata",
    "KVScales",
    "check_supported",
    "choose_backend",
    "gather_blocks",
    "kv_write",
    "kv_write_quantized",
    "merge_partials",
    "paged_attention",
    "partial_attention",
    "scatter_blocks",
]
