"""The one table between jserve's errors and gRPC's status codes, read both ways."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from jserve.errors import DeadlineExceeded, InvalidRequest, JserveError, NotFound, Overloaded, Unavailable, Unsupported

_CODES: dict[type[JserveError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_DETAILS, _PREDICTION = "grpc-status-details-bin", "predicted-ttft-s"
_ERRORS = {code: kind for kind, code in _CODES.items()}


def code_of(error: JserveError) -> grpc.StatusCode:
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def trailers_of(error: JserveError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata: when to try again (google.rpc.RetryInfo), and what the time to first token would be."""
    if not isinstance(error, Overloaded):
        return ()
    trailers: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        status = status_pb2.Status(code=code_of(error).value[0], message=str(error))
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(1e9 * error.retry_after_s))
        status.details.add().Pack(retry)
        trailers.append((_DETAILS, status.SerializeToString()))
    if error.predicted_ttft_s is not None:
        trailers.append((_PREDICTION, f"{error.predicted_ttft_s:.6g}"))
    return tuple(trailers)


def error_of(call: grpc.RpcError) -> JserveError:
    """What a failed call means to a client."""
    code: grpc.StatusCode = call.code()
    details = call.details() or "no details"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _overloaded(call, details)
    return _ERRORS.get(code, JserveError)(details if code in _ERRORS else f"{code.name}: {details}")


def _overloaded(call: grpc.RpcError, details: str) -> Overloaded:
    trailers = dict(call.trailing_metadata() or ())
    error = Overloaded(details)
    if _PREDICTION in trailers:
        error.predicted_ttft_s = float(trailers[_PREDICTION])
    for detail in status_pb2.Status.FromString(trailers.get(_DETAILS, b"")).details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            error.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return error
