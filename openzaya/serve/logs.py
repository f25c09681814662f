"""The server's log: one JSON object a line on the error stream. Nothing is sent anywhere.

A request's line holds its id, method, path, status, milliseconds and token counts. Messages and prompts are written
only where the operator asked for it.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import secrets
import sys
from typing import Any

LOGGER = logging.getLogger("openzaya.serve")
MAX_PATH_CHARACTERS = 200

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; ``extra={"fields": {...}}`` adds members."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def set_up_logging() -> None:
    """Send the server's log, and warnings of the HTTP library, to the error stream."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("openzaya.serve", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log_event(event: str, **fields: Any) -> None:
    LOGGER.info(event, extra={"fields": fields})


def log_exception(event: str, error: BaseException, **fields: Any) -> None:
    """A defect of ours, with its traceback."""
    LOGGER.error(event, exc_info=(type(error), error, error.__traceback__), extra={"fields": fields})


def request_id(wanted: str | None) -> str:
    """The client's id where it is harmless in a header and a log, else a fresh one."""
    if wanted is not None and _REQUEST_ID.fullmatch(wanted):
        return wanted
    return "req_" + secrets.token_hex(12)
