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
    """The queue is full, or the request would not be served in time; it may succeed later (gRPC RESOURCE_EXHAUSTED)."""

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, predicted_ttft_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When it is worth another try."""
        self.predicted_ttft_s = predicted_ttft_s
        """What the time to first token would have been."""


class Unavailable(JserveError):
    """The server is loading, draining or broken (gRPC UNAVAILABLE)."""


class DeadlineExceeded(JserveError):
    """The request's own time limit has passed (gRPC DEADLINE_EXCEEDED)."""
