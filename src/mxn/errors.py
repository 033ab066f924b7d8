"""Every error that mxn raises on purpose.

    MxnError
    ├─ UserError(ValueError)      the caller can fix it, and the message says how
    │  ├─ ConfigError             unknown or invalid setting
    │  ├─ UnsupportedError        model, op, dtype or chip combination that is not provided
    │  ├─ NotFoundError           a model, file or device that does not exist
    │  └─ CapacityError           asks for more than exists
    ├─ ChipError                  hardware or driver failed; carries the device id
    ├─ EngineDiedError            the engine process ended while requests were under way
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


class InternalError(MxnError):
    """A bug in mxn."""
