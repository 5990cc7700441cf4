"""`jserve serve`, but with an engine of simulated_engine.py, the first argument, in its engine process."""

from __future__ import annotations

import functools
import sys

import jserve.server.frontend
from jserve.cli import main

if __name__ == "__main__":
    maker = f"simulated_engine:{sys.argv[1]}"
    jserve.server.frontend.serve = functools.partial(jserve.server.frontend.serve, engine=maker)
    sys.exit(main(["serve", *sys.argv[2:]]))
