"""`make demo`: the main job in two turns. Starts a real server, talks to it over gRPC, shows what the cache saved."""

from __future__ import annotations

import re
import subprocess
import sys

from jserve.errors import JserveError, Unavailable
from jserve.interrupts import Interrupts
from jserve.server.client import Client

QUESTIONS = ("What is the capital of France?", "And what river runs through it?")


def main() -> int:
    command = [sys.executable, "-P", "-m", "jserve.cli", "serve", "--port", "0"]
    print("demo: starting `jserve serve` with the embedded model (the first start downloads and compiles)", flush=True)
    with Interrupts("demo"), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            talk(wait_until_ready(server))
        except JserveError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
        finally:
            server.terminate()
            server.wait()
    print(f"demo: the server has drained and ended with code {server.returncode}")
    return server.returncode


def wait_until_ready(server: subprocess.Popen[str]) -> str:
    """The address that the server says it is ready on."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if found := re.match(r"jserve: ready on (\S+)", line):
            return found[1]
    raise Unavailable("the server ended before it was ready: see its message above")


def talk(address: str) -> None:
    with Client(address) as client:
        messages = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            reply = client.chat(messages)
            messages.append({"role": "assistant", "content": reply.text})
            print(f"\nuser:      {question}\nassistant: {reply.text}")
            print(
                f"           {reply.prompt_tokens} prompt tokens, {reply.cached_tokens} of them cached; "
                f"{reply.output_tokens} output tokens; first token after {reply.ttft_s:.3f} s"
            )
    print()


if __name__ == "__main__":
    sys.exit(main())
