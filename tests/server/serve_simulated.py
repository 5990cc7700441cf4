"""`jserve serve`, but with the simulated engine in its engine process."""

from __future__ import annotations

import functools
import sys

import jserve.server.frontend
from jserve.cli import main

jserve.server.frontend.serve = functools.partial(jserve.server.frontend.serve, engine="simulated_engine:make")

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
