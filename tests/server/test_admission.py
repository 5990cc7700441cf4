"""Refused in time, on the wire: RESOURCE_EXHAUSTED with google.rpc.RetryInfo and the prediction in the trailers."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from running_server import Server, StartServer

from jserve.errors import InvalidRequest, Overloaded
from jserve.request import Terms
from jserve.server.client import Client
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.server.proto.jserve.v1 import jserve_pb2_grpc as pb_grpc

LONG = [7] * 900


def test_a_first_token_that_would_come_too_late_is_refused_with_when_to_retry(server: Server, client: Client) -> None:
    client.generate([1] * 600, max_tokens=1)  # so that the server knows what a prompt takes
    with pytest.raises(Overloaded, match="the first token is predicted in") as refused:
        client.generate(LONG, max_tokens=1, terms=Terms(slo_ttft_s=1e-4))
    assert refused.value.predicted_ttft_s is not None
    assert refused.value.predicted_ttft_s > 1e-4
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 0.1
    assert client.generate(LONG, max_tokens=1, terms=Terms(slo_ttft_s=60.0)).output_tokens == 1


def test_the_trailers_are_what_google_rpc_says(server: Server, client: Client) -> None:
    client.generate([1] * 600, max_tokens=1)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=LONG), terms=pb.Terms(slo_ttft_s=1e-4))
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as failed:
        list(pb_grpc.JserveStub(channel).Generate(request))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(failed.value.trailing_metadata())
    assert float(trailers["predicted-ttft-s"]) > 1e-4
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert status.message == failed.value.details()
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() >= 1e8


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (pb.Terms(priority=1000), "priority is 1000: use a whole number from -100 to 100"),
        (pb.Terms(slo_ttft_s=-1), "slo_ttft_s is -1.0"),
        (pb.Terms(slo_ttft_s=50), "slo_ttft_s is 50, and the call's deadline is in"),
        (pb.Terms(tenant="x" * 300), "tenant has 300 characters"),
    ],
)
def test_terms_that_cannot_be_kept_are_invalid(server: Server, terms: pb.Terms, message: str) -> None:
    request = pb.GenerateRequest(text="hello", terms=terms)
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError, match=message) as failed:
        list(pb_grpc.JserveStub(channel).Generate(request, timeout=20))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_client_finds_wrong_terms_itself(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="priority is 1000"):
        client.generate("hello", terms=Terms(priority=1000))


def test_a_server_that_orders_by_priority_serves_terms(start_server: StartServer) -> None:
    server = start_server("--order", "priority", "--chunk", "adaptive", "--tenant-weights", "gold=3")
    with server.client() as client:
        terms = Terms(priority=3, tenant="gold", slo_tpot_s=0.5)
        assert client.generate("hello", max_tokens=3, terms=terms).output_tokens == 3
