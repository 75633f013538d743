"""Errors as clients of OpenAI's API know them."""

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
    """What a client did wrong, or why it cannot be answered now."""

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
    """Return an error as the body of an answer."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


def refusal_of(errors: Sequence[Mapping[str, Any]], skip: int = 0) -> Refusal:
    """Return what a client is told of what pydantic found: the error that lies deepest."""
    first = max(errors, key=lambda each: len(each["loc"]))
    place = ".".join(str(each) for each in first["loc"][skip:]) or None
    return Refusal(400, f"{place or 'the message'}: {first['msg']}", place)


def as_refusal(error: Exception) -> HTTPException:
    """Return what a client is told of an error, which is logged if the client did nothing wrong."""
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
    """Return the answer that tells an error; in ASCII, since what it quotes may be no valid Unicode."""
    return Response(json.dumps(body_of(error)), error.status_code, error.headers, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Have all errors of an app told in this form."""

    async def told(request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            return answer_of(refusal_of(error.errors(), skip=1))
        return answer_of(as_refusal(error))

    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, told)
