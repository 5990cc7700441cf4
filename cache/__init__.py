"""Where KV is kept: block pool, prefix index, what a request holds of them. Pure Python: no JAX, no I/O, no clock."""
