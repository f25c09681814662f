"""Request bodies: JSON read strictly, so that nothing that JSON cannot hold gets behind this point.

Refused with 400: bytes that are not UTF-8, NaN and infinities, numbers beyond 64 bits or the range of a double,
halves of surrogate pairs, and nesting deeper than any sane schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from openzaya.serve.errors import bad_request

MAX_DEPTH = 64
MAX_DIGITS = 4000
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictRequest(Request):
    """A request whose ``json`` is read by :func:`parse_json`."""

    async def json(self) -> Any:
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose endpoint gets a :class:`StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def parse_json(body: bytes) -> Any:
    """The value of a JSON text; raises ``ApiError`` (400) with what is wrong."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_number)
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    # Each level opens a bracket: few brackets need no closer look.
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE_ESCAPE.search(text) is not None:
        _check_surrogates(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"the body holds {name}, which is not JSON; send a finite number or null")


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else None
    if value is None or not -(2**63) <= value < 2**64:
        raise bad_request(f"the body holds the integer {digits[:24]}..., beyond 64 bits; send a smaller one")
    return value


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise bad_request(f"the body holds the number {digits[:24]}, beyond a double's range; send a smaller one")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(child for child in item.values() if isinstance(child, (dict, list)))
            elif isinstance(item, list):
                inner.extend(child for child in item if isinstance(child, (dict, list)))
        if not inner:
            return
        level = inner
    raise _too_deep()


def _check_surrogates(value: Any) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(item[error.start])
                raise bad_request(
                    f"the body holds half of a surrogate pair, \\u{code:04x}; send whole characters"
                ) from None
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _too_deep() -> Exception:
    return bad_request(f"the body is nested deeper than {MAX_DEPTH} levels; flatten it")
