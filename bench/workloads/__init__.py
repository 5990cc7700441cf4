"""The work of the benchmarks. All of it is of the one stream type, `jserve.simulation.workload.Workload`.

`dialogues` has real words, for servers; `lengths` has lengths alone, for simulations; `streams` gives any of them to
either, by name or file.
"""
