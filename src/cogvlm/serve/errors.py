"""Whatever goes wrong as one answer of HTTP, in OpenAI's form or Ollama's.

A client never sees a traceback: what was not raised on purpose is logged here and told as "the
server failed".
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import CogVLMError, ImageError, InputError, MessageError, ResourceError
from ..remote import Upstream
from .front import Refused
from .protocol import explain

log = logging.getLogger("cogvlm.serve")
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
_KINDS |= {404: "not_found_error", 429: "rate_limit_error"}
# Our names of settings, and what they are called in a request.
_PARAMS = {"max_new_tokens": "max_tokens", "grammar": "response_format"}


@dataclass(frozen=True)
class Problem:
    """An error on its way to a client."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry: int | None = None  # seconds

    def body(self, path: str) -> dict[str, Any]:
        """In the form of the API that ``path`` belongs to."""
        # Half a surrogate pair may have come in with the request; it cannot go out again.
        message = self.message.encode("utf-8", "backslashreplace").decode()
        if path.startswith("/api/"):
            return {"error": message}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        param = self.param and self.param.encode("utf-8", "backslashreplace").decode()
        kind = _KINDS.get(self.status, default)
        return {
            "error": {"message": message, "type": kind, "param": param or None, "code": self.code}
        }

    def response(self, path: str) -> Response:
        """The whole answer."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        content = json.dumps(self.body(path), ensure_ascii=False).encode()
        return Response(content, self.status, headers, "application/json")


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an exception."""
    if isinstance(error, Refused):
        return Problem(error.status, str(error), error.code, error.param, error.retry)
    if isinstance(error, Upstream):
        if error.status >= 500:
            log.error("%s", error.detail)
        return Problem(error.status, _line(error), error.code, error.param, error.retry)
    if isinstance(error, RequestValidationError):
        field, sentence = explain(error.errors(), error.body)
        return Problem(400, sentence, None, field)
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail))
    if isinstance(error, InputError):
        return Problem(400, _line(error), None, _param(error))
    if isinstance(error, ResourceError):
        from ..engine.service import Busy

        if isinstance(error, Busy):
            return Problem(429, _line(error), "queue_full", retry=2)
        log.error("%s", _line(error))
        return Problem(503, _line(error), "no_resources")
    if isinstance(error, CogVLMError):
        log.error("%s", _line(error))
    else:
        log.error("a request failed", exc_info=error)
    return Problem(500, "the server failed on this request; its log says why", "internal")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _param(error: InputError) -> str | None:
    """The field of the request that an error is about, where it names one."""
    named = re.match(r"(grammar|[a-z_]+(?==|\[|: | has ))", str(error))
    if named:
        return _PARAMS.get(named[1], named[1])
    return "messages" if isinstance(error, (MessageError, ImageError)) else None
