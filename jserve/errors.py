"""The errors that jserve shows to its users.

Each message names the thing, the value and the way out. The server turns each class into one gRPC status; the
command line prints the message alone, without a traceback.
"""

from __future__ import annotations


class JserveError(Exception):
    """Base of every error that is meant for the user's eyes."""


class ConfigError(JserveError):
    """A setting is wrong or contradicts another one (found at start-up)."""


class ModelError(JserveError):
    """A model, checkpoint or tokenizer cannot be found, read or understood."""


class InvalidRequest(JserveError):
    """The request can never be served as it stands (gRPC INVALID_ARGUMENT)."""


class NotFound(JserveError):
    """The request names something that this server does not have (gRPC NOT_FOUND)."""


class Unsupported(JserveError):
    """This model lacks what the request needs, such as a chat template (gRPC FAILED_PRECONDITION)."""


class Overloaded(JserveError):
    """The queue is full; the same request may succeed later (gRPC RESOURCE_EXHAUSTED)."""


class Unavailable(JserveError):
    """The server is loading, draining or broken (gRPC UNAVAILABLE)."""


class DeadlineExceeded(JserveError):
    """The request's own time limit has passed (gRPC DEADLINE_EXCEEDED)."""
