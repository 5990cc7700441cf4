"""Recompute or swap a preempted request's KV: the study of the SC24 poster, beside its published numbers."""
