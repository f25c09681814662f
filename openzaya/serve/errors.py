"""Error answers in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong.

A client's fault is a 4xx whose message names the value, the limit and the remedy; 429 and 503 say when to come back.
A 500 is a defect of ours: its message says nothing of what is inside, the log does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from openzaya.errors import OpenZayaError

MAX_SHOWN_CHARACTERS = 80
"""Of a wrong value in a message."""

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer other than 2xx; raise it anywhere below an endpoint."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer; the same object ends a stream that had begun."""
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status_code, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request cannot be served as it stands."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    return ApiError(500, "the server failed at this request; its log has the reason under the request id")


def from_http(error: HTTPException) -> ApiError:
    """Any HTTP error, such as the router's 404 and 405."""
    if isinstance(error, ApiError):
        return error
    message = str(error.detail or HTTPStatus(error.status_code).phrase)
    if error.status_code == 404:
        message = "no such path; /openapi.json lists those there are"
    if error.status_code == 405:
        message = "this path does not take that method; /openapi.json lists those there are"
    return ApiError(error.status_code, message, code=_code(error.status_code), headers=error.headers)


def from_validation(errors: Sequence[Any], *, prefix: int = 0) -> ApiError:
    """The first of pydantic's errors as a 400. ``prefix``: leading parts of the place to leave out."""
    if not errors:
        return bad_request("the request is not valid")
    error = max(errors, key=_fit)
    param = _place(error, prefix)
    # Alternatives that fit equally badly are all named.
    equal = [one for one in errors if _fit(one) == _fit(error) and _place(one, prefix) == param]
    messages = [str(one.get("msg", "not valid")).removeprefix("Value error, ") for one in equal]
    message = " or ".join(dict.fromkeys(messages)).replace(" or Input should be ", " or ")
    if error.get("type") != "missing" and "input" in error:
        message += f"; found {shown(error['input'])}"
    return bad_request(f"{param}: {message}" if param else message, param)


def from_user_error(error: OpenZayaError) -> ApiError:
    """What the tokenizer, the template, a grammar or the engine has against a request."""
    return bad_request(str(error))


def shown(value: Any) -> str:
    """A value as JSON, cut to a readable length."""
    try:
        # Only the beginning is wanted: a long list or text need not be written out.
        head = value[:MAX_SHOWN_CHARACTERS] if isinstance(value, (str, list)) else value
        text = json.dumps(head, ensure_ascii=True, default=lambda other: type(other).__name__)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def _fit(error: Any) -> tuple[bool, int]:
    """How well an alternative of a union fits: one of the right type got further than one of another."""
    return not str(error.get("type", "")).endswith("_type"), len(error.get("loc", ()))


def _place(error: Any, prefix: int) -> str | None:
    return ".".join(str(part) for part in error.get("loc", ())[prefix:] if not _is_alternative(part)) or None


def _is_alternative(part: int | str) -> bool:
    """Whether a part of a place names a type of a union rather than a field: ``str``, ``list[TextPart]``, ``Tool``."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool") or part[:1].isupper())


def _code(status: int) -> str | None:
    return {404: "not_found", 405: "method_not_allowed"}.get(status)
