"""Every error that mxn raises on purpose.

    MxnError
    ├─ UserError(ValueError)      the caller can fix it, and the message says how
    │  ├─ ConfigError             unknown or invalid setting
    │  ├─ UnsupportedError        model, op, dtype or chip combination that is not provided
    │  ├─ NotFoundError           a model, file or device that does not exist
    │  ├─ CapacityError           asks for more than exists
    │  └─ ForbiddenError          this key may not do this
    ├─ AuthError                  no key, or one that is unknown, expired or revoked
    ├─ RateLimitError             too many requests or tokens in this minute
    ├─ QuotaError                 a budget is used up; retrying does not help
    ├─ OverloadedError            no replica has room in time; retrying later does help
    ├─ DeadlineError              a time limit of the request passed
    ├─ ChipError                  hardware or driver failed; carries the device id
    ├─ EngineDiedError            the engine process ended while requests were under way
    ├─ PeerError                  a rank of a training job died or did not answer in time
    └─ InternalError              our bug

A message says what, the value and the limit; `hint` is one action the caller can take.
"""

from __future__ import annotations


class MxnError(Exception):
    """Base of all errors raised on purpose; `str()` includes the hint on a line of its own.

    `code` is an OpenAI error code where one fits, such as ``context_length_exceeded``.
    """

    code: str | None = None

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UserError(MxnError, ValueError):
    """The caller can fix it."""


class ConfigError(UserError):
    """A setting is unknown or has an impossible value."""


class UnsupportedError(UserError):
    """This model, op, dtype or chip combination is not provided."""


class NotFoundError(UserError):
    """The named model, file or device does not exist."""


class CapacityError(UserError):
    """More was asked for than exists."""


class ForbiddenError(UserError):
    """The key is valid and may not do this."""

    code = "permission_denied"


class AuthError(MxnError):
    """No API key was given, or one that is unknown, expired or revoked."""

    code = "invalid_api_key"


class RateLimitError(MxnError):
    """A limit per minute is reached. `kind` says which: requests, input_tokens, output_tokens."""

    code = "rate_limit_exceeded"

    def __init__(
        self, message: str, *, kind: str, retry_after_s: float, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.retry_after_s = retry_after_s


class QuotaError(MxnError):
    """A budget has no room for this request. `retry_after_s`: only requests under way hold the
    room, so it may be there soon; None: it is spent."""

    code = "insufficient_quota"

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class OverloadedError(MxnError):
    """No replica has room for the request before its deadline."""

    code = "overloaded"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class DeadlineError(MxnError):
    """A time limit of the request passed."""

    code = "request_timeout"


class ChipError(MxnError):
    """Hardware or its driver failed."""

    def __init__(self, message: str, *, device: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.device = device


class EngineDiedError(MxnError):
    """The engine process ended while requests were under way, or is being restarted.

    `retry_after_s` is when a new request has a chance; None: it will not come back by itself.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class PeerError(MxnError):
    """Another rank of a training job died, or did not send or take a message in time."""

    def __init__(self, message: str, *, rank: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rank = rank


class InternalError(MxnError):
    """A bug in mxn."""
