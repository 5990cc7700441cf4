"""The client against servers that end a stream in ways that ours does not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from jserve.errors import JserveError
from jserve.result import Chunk
from jserve.server import convert
from jserve.server.client import Client
from jserve.server.proto.jserve.v1 import jserve_pb2_grpc as pb_grpc


class CutsOff(pb_grpc.JserveServicer):
    """Says one word and cancels the call, as a proxy may."""

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield convert.chunk_to_pb(Chunk(text="half", token_ids=[1]))
        context.abort(grpc.StatusCode.CANCELLED, "the proxy restarts")


@contextmanager
def serving(servicer: pb_grpc.JserveServicer) -> Iterator[Client]:
    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_JserveServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client:
        yield client
    server.stop(0).wait()


def test_a_stream_that_somebody_else_cancels_does_not_look_complete() -> None:
    with serving(CutsOff()) as client, client.generate("x", stream=True) as stream:
        assert next(stream).text == "half"
        with pytest.raises(JserveError, match="CANCELLED: the proxy restarts"):
            next(stream)
