"""How long a remote store may take, and how often it is asked again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from connectors.errors import BadInputError

__all__ = ["DEFAULT_LIMITS", "FIRST_ANSWER_VARIABLE", "RequestLimits", "limits_from_environment"]

FIRST_ANSWER_VARIABLE = "DATAFLOW_FIRST_ANSWER_S"
"""Environment variable that says `first_answer_s` of every store that is opened without limits of its own."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds on one request to a remote store. A call ends, with bytes or an error, whatever the server does.

    Attributes:
        connect_timeout_s: Longest time until a connection is made.
        read_timeout_s: Longest time without a byte, once connected.
        request_timeout_s: Longest time from the first byte sent to the last received, in one attempt.
        max_retries: Attempts after the first; 0 is none. What is tried again: refused, reset and cut connections,
            time-outs, 5xx and throttling, with growing and jittered pauses.
        max_pause_s: The longest pause between two attempts.
        retry_timeout_s: Time since the first attempt after which no other begins.
        first_answer_s: How long a store may be out of reach before its first answer (its name does not resolve, it
            refuses connections). After that, the settings are taken to be wrong. A store that has answered before is
            asked again for as long as the other limits say.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    request_timeout_s: float = 300.0
    max_retries: int = 12
    max_pause_s: float = 5.0
    retry_timeout_s: float = 60.0
    first_answer_s: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf and (value != 0 or field.name != "max_retries"):
                raise BadInputError(f"{field.name} must be greater than 0, got {value}")


DEFAULT_LIMITS = RequestLimits()


def limits_from_environment(environ: Mapping[str, str] = os.environ) -> RequestLimits:
    """Return the default limits, with what `FIRST_ANSWER_VARIABLE` says.

    Raises:
        BadInputError: It is not a number of seconds.
    """
    text = environ.get(FIRST_ANSWER_VARIABLE, "")
    if not text:
        return DEFAULT_LIMITS
    try:
        return RequestLimits(first_answer_s=float(text))
    except ValueError as error:
        raise BadInputError(f"{FIRST_ANSWER_VARIABLE} has to be a number of seconds above 0, not {text!r}") from error
