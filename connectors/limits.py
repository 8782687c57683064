"""How long a remote store may take, and how often it is asked again."""

from __future__ import annotations

from dataclasses import dataclass, fields

from connectors.errors import BadInputError

__all__ = ["DEFAULT_LIMITS", "RequestLimits"]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds on one request to a remote store. A call ends, with bytes or an error, whatever the server does.

    Attributes:
        connect_timeout_s: Until a connection stands.
        read_timeout_s: Without a byte, once connected.
        request_timeout_s: From the first byte sent to the last received, of one attempt.
        max_retries: Attempts after the first; 0 is none. Retried are refused, reset and cut connections, time-outs, 5xx
            and throttling, with growing and jittered pauses.
        max_pause_s: The longest pause between two attempts.
        retry_timeout_s: Since the first attempt, after which no other begins.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    request_timeout_s: float = 300.0
    max_retries: int = 12
    max_pause_s: float = 5.0
    retry_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name != "max_retries"):
                raise BadInputError(f"{field.name} must be greater than 0, got {value}")


DEFAULT_LIMITS = RequestLimits()
