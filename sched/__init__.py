"""Who runs next: queues, step plans and their policies. Pure Python: no JAX, no I/O, no clock, no threads."""
