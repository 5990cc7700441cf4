"""The one table between jserve's errors and gRPC's status codes, read both ways."""

from __future__ import annotations

import grpc

from jserve.errors import DeadlineExceeded, InvalidRequest, JserveError, NotFound, Overloaded, Unavailable, Unsupported

_CODES: dict[type[JserveError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_ERRORS = {code: kind for kind, code in _CODES.items()}


def code_of(error: JserveError) -> grpc.StatusCode:
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def error_of(call: grpc.RpcError) -> JserveError:
    """What a failed call means to a client."""
    code: grpc.StatusCode = call.code()
    details = call.details() or "no details"
    return _ERRORS.get(code, JserveError)(details if code in _ERRORS else f"{code.name}: {details}")
