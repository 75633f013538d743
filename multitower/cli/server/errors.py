"""Errors in the format of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ...base.logs import logger


class Refusal(HTTPException):
    """A request is invalid, or cannot be answered now."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def body_of(error: HTTPException) -> dict[str, Any]:
    """Return the JSON body of an error."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


def refusal_of(errors: Sequence[Mapping[str, Any]], skip: int = 0) -> Refusal:
    """Convert pydantic's errors: report the most deeply nested one."""
    first = max(errors, key=lambda each: len(each["loc"]))
    place = ".".join(str(each) for each in first["loc"][skip:]) or None
    return Refusal(400, f"{place or 'the message'}: {first['msg']}", place)


def as_refusal(error: Exception) -> HTTPException:
    """Convert an exception to an HTTP error; unexpected exceptions are logged."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, ValueError):
        return Refusal(400, str(error))
    if isinstance(error, TimeoutError):
        return Refusal(504, str(error), code="timeout")
    if isinstance(error, ConnectionError):
        return Refusal(503, str(error), code="closing", headers={"Retry-After": "5"})
    logger.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed to answer; its log says why")


def answer_of(error: HTTPException) -> Response:
    """Return the response for an error, in ASCII because it may quote invalid Unicode."""
    return Response(json.dumps(body_of(error)), error.status_code, error.headers, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Make an app return all errors in this format."""

    async def told(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return answer_of(refusal_of(error.errors(), skip=1))
        return answer_of(as_refusal(error))

    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, told)
