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
    """Base of all errors raised on purpose; `str()` includes the hint on a line of its own."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

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
    """The engine process ended while requests were under way."""


class InternalError(MxnError):
    """A bug in mxn."""
