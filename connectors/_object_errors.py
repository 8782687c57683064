"""obstore's exceptions as ours, without a word of what a server or a client put into them.

A provider's message may carry an access key, a signature or a signed URL: S3 answers a wrong signature with all it was
computed from. So nothing of it is passed on but the HTTP status, the provider's error code and a key that the client
refuses, and the provider's exception is not chained.
"""

from __future__ import annotations

import re

from obstore import exceptions as obstore_errors

from connectors.errors import (
    BadInputError,
    ChangedError,
    DataError,
    ErrorKind,
    NotFoundError,
    PermissionDeniedError,
    ThrottledError,
    TransientError,
)

__all__ = ["translated"]

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
# Of a key that the client itself refuses, as it does those of a listing.
_PATH = re.compile(r'Path "([^"]*)"')
# Asked by the client when it was given no credentials; what fails then is not the object.
_CREDENTIAL_SERVICES = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/", "/metadata/identity")

# Without a status: phrases of the client that tell the kinds of failure apart.
_TIMED_OUT = ("kind: Timeout", "TimedOut")
_UNREACHABLE = ("kind: Connect",)
_RANGES_NOT_SUPPORTED = "Range request not supported"
_NO_RANGES = (
    "Received non-partial response",
    _RANGES_NOT_SUPPORTED,
    "Content-Range header not present",
    "CONTENT_RANGE header",
    "Requested ",
)
_NO_LENGTH = ("Content-Length Header missing",)
_CONNECTION = ("HTTP error", "Error performing")


def translated(error: Exception, uri: str) -> DataError:
    """Return our error for one that obstore raised for `uri`."""
    text = str(error)
    status = _STATUS.search(text)
    code = _CODE.search(text)
    answer = f" ({code[1]})" if code else f" (status {status[1]})" if status else ""
    if any(service in text and service not in uri for service in _CREDENTIAL_SERVICES):
        return _no_credentials(uri)
    match error:
        case FileNotFoundError() if answer != " (status 405)":  # of a HEAD that the server does not know
            return NotFoundError(f"no object at {uri}{answer}", uri=uri)
        case obstore_errors.PermissionDeniedError() | obstore_errors.UnauthenticatedError():
            return _denied(uri, answer)
        case obstore_errors.PreconditionError() | obstore_errors.NotModifiedError():
            return _changed(uri)
        case obstore_errors.AlreadyExistsError():
            return TransientError(f"{uri} is being changed by another{answer}; try again", uri=uri)
        case obstore_errors.InvalidPathError() | ValueError():
            named = _PATH.search(text)
            what = f"{uri}: the key {named[1]!r}" if named else f"the key of {uri}"
            message = f"{what} cannot be read: it has an empty, '.' or '..' part or a control character; rename it"
            return BadInputError(message, uri=uri)
        case obstore_errors.NotSupportedError() if _RANGES_NOT_SUPPORTED not in text:
            return BadInputError(f"the store of {uri} does not offer this operation", uri=uri)
    if status:
        return _of_status(int(status[1]), code[1] if code else "", uri, answer)
    return _of_text(text, uri)


def _of_status(status: int, code: str, uri: str, answer: str) -> DataError:
    if status in (401, 403):
        return _denied(uri, answer)
    if status == 404:
        return NotFoundError(f"no object at {uri}{answer}", uri=uri)
    if status == 412:
        return _changed(uri)
    if status == 416:
        return BadInputError(f"a range of {uri} begins past its end", kind=ErrorKind.BAD_RANGE, uri=uri)
    if status in (429, 503) or code == "SlowDown":
        return ThrottledError(f"the store of {uri} asks for fewer requests{answer}", uri=uri)
    if status in (408, 409) or (status >= 500 and status != 501):
        return TransientError(f"the store of {uri} failed{answer}; try again", uri=uri)
    return BadInputError(f"the store of {uri} refuses the request{answer}", uri=uri)


def _of_text(text: str, uri: str) -> DataError:
    if any(phrase in text for phrase in _TIMED_OUT):
        return TransientError(f"the store of {uri} did not answer in time", kind=ErrorKind.TIMEOUT, uri=uri)
    if any(phrase in text for phrase in _UNREACHABLE):
        message = f"no connection to the store of {uri}; check its endpoint"
        return TransientError(message, kind=ErrorKind.UNREACHABLE, uri=uri)
    if any(phrase in text for phrase in _NO_RANGES):
        return DataError(f"the store of {uri} answers other ranges than asked", kind=ErrorKind.PROTOCOL, uri=uri)
    if any(phrase in text for phrase in _NO_LENGTH):
        return DataError(f"the store of {uri} does not say how many bytes it has", kind=ErrorKind.PROTOCOL, uri=uri)
    if any(phrase in text for phrase in _CONNECTION):
        return TransientError(f"the connection to the store of {uri} broke", uri=uri)
    return DataError(f"the client of the store of {uri} failed in a way it does not explain", uri=uri)


def _no_credentials(uri: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the like of your provider) "
        "in the environment, or AWS_SKIP_SIGNATURE=true for a public bucket",
        uri=uri,
    )


def _denied(uri: str, answer: str) -> PermissionDeniedError:
    return PermissionDeniedError(f"the store refuses access to {uri}{answer}; check the credentials", uri=uri)


def _changed(uri: str) -> ChangedError:
    return ChangedError(f"{uri} was changed since it was opened; open the dataset again", uri=uri)
