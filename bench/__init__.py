"""Benchmarks of jserve: each module is a command, `python -m bench.NAME --json`, run from the repository root."""
