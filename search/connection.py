"""HTTP requests to `secateur serve`. Every failure is an InputError, in the words of the server if it has any.

Redirects are refused, so that a token goes to no other server.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit

from secateur.cost_models.core import InputError
from secateur.cost_models.reading import MAX_BYTES, parse_json

TOKEN_VARIABLE = "SECATEUR_TOKEN"

JSON, PROBLEM = "application/json", "application/problem+json"

GATEWAY = (502, 503, 504)
"""Answers of a reverse proxy whose server does not answer."""

MAX_PROBLEM = 2**20
"""Bytes of an error that are read."""

Part = TypeVar("Part")


class Unreachable(InputError):
    """The server does not answer; it may do so later."""


def server_address(url: str) -> str:
    """Return the address without a slash at its end.

    Raises:
        InputError: if it is no address of a server, or holds a password.
    """
    wrong = f"{url[:200]!r} is no address of a server: it must read like http://gpu-box:8265 or https://gpu-box."
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputError(wrong) from None
    if parts.username is not None or parts.password is not None:
        raise InputError(f"The address of a server holds no user or password. Give the token in {TOKEN_VARIABLE}.")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise InputError(wrong)
    if not url.isascii() or any(sign <= " " or sign == "\x7f" for sign in url.strip()):
        raise InputError(wrong)
    return url.strip().rstrip("/")


def token_from_environment() -> str | None:
    """Return the token in SECATEUR_TOKEN; None: it is not set."""
    return os.environ.get(TOKEN_VARIABLE) or None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **options: Any) -> None:
        """Make the redirect an error."""


class Connection:
    """Sends requests to one server.

    Args:
        url: see `server_address`.
        token: None: requests are sent without.
        timeout: seconds until a server that does not answer is an error.
    Raises:
        InputError: if the token cannot be one.
    """

    def __init__(self, url: str, token: str | None, timeout: float):
        self.url, self._timeout = url, timeout
        self._token = None if token is None else token.strip()
        if self._token is not None and (not self._token.isascii() or not self._token.isprintable() or " " in self._token):
            raise InputError(
                f"The token in {TOKEN_VARIABLE} or `token` cannot be one. `secateur serve token` prints it in one line."
            )
        self._opener = urllib.request.build_opener(_NoRedirects)

    def open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> Answer:
        """Send a request and return the answer, to be closed.

        Args:
            method: of HTTP.
            path: of the resource.
            query: parameters of the address.
            body: a file is sent piece by piece.
            headers: besides the token.
            seconds: until a server that does not answer is an error; None: `timeout`.
        Raises:
            InputError: if the server refuses.
            Unreachable: if it does not answer.
        """
        url = f"{self.url}{path}?{urlencode(query)}" if query else f"{self.url}{path}"
        request = urllib.request.Request(url, body, dict(headers or {}), method=method)
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        timeout = self._timeout if seconds is None else seconds
        with explained(self.url, timeout):
            return Answer(self._opener.open(request, timeout=timeout), self.url, timeout)

    def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Return the object of JSON with which the server answers a request; see `open`."""
        value = self._value(method, path, **options)
        if not isinstance(value, dict):
            raise self.no_service("it answered no object of JSON")
        return value

    def ask_list(self, path: str, query: Mapping[str, Any]) -> list[Any]:
        """Return the list of JSON with which the server answers a request."""
        value = self._value("GET", path, query=query)
        if not isinstance(value, list):
            raise self.no_service("it answered no list of JSON")
        return value

    def send(self, path: str, value: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """Post an object of JSON; return the one with which the server answers."""
        body = json.dumps(value).encode()
        return self.ask("POST", path, body=body, headers={"Content-Type": JSON}, seconds=seconds)

    def _value(self, method: str, path: str, **options: Any) -> Any:
        with self.open(method, path, **options) as answer:
            self.check_type(answer, JSON)
            content = answer.read(MAX_BYTES)
        return parse_json(content.decode("utf-8", errors="replace"), f"The answer of {self.url}")

    def check_type(self, answer: Answer, expected: str) -> None:
        """Raise InputError unless the answer has this content type."""
        if answer.content_type != expected:
            raise self.no_service(f"it answered {answer.content_type}")

    def part(self, document: object, name: str, kind: type[Part]) -> Part:
        """Return a value of an answer; raise InputError if there is none of this type."""
        value = document.get(name) if isinstance(document, dict) else None
        if not isinstance(value, kind):
            raise self.no_service(f"its answer has no `{name}`")
        return value

    def no_service(self, reason: str) -> InputError:
        """Return the error for a server of another kind."""
        return InputError(_no_service(self.url, reason))


class Answer:
    """An answer whose content is read piece by piece."""

    def __init__(self, response: Any, url: str, timeout: float):
        self.headers: Mapping[str, str] = response.headers
        self.content_type = str(response.headers.get_content_type())
        self._response, self._url, self._timeout = response, url, timeout

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._response.close()

    def read(self, most: int) -> bytes:
        """Return the next bytes; none at the end."""
        with explained(self._url, self._timeout):
            return bytes(self._response.read(most))

    def readline(self, most: int) -> bytes:
        """Return the next line; nothing at the end."""
        with explained(self._url, self._timeout):
            return bytes(self._response.readline(most))


@contextmanager
def explained(url: str, timeout: float) -> Iterator[None]:
    """Turn failures of a connection into InputError.

    Args:
        url: address of the server, for the message.
        timeout: seconds, for the message.
    """
    try:
        yield
    except HTTPError as error:
        with error:
            raise _refusal(url, error) from None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        raise _failure(url, cause, timeout) from None


def _refusal(url: str, error: HTTPError) -> InputError:
    """Return the error for an answer that is an error of HTTP."""
    if error.code in GATEWAY:
        return Unreachable(f"{url} answers {error.code} {error.reason}: the service behind this address does not run.")
    if 300 <= error.code < 400:
        return InputError(f"{url} redirects to {error.headers.get('Location', 'another address')}. Name that address.")
    if error.headers.get_content_type() != PROBLEM:
        return InputError(_no_service(url, f"it answered {error.code} {error.reason}"))
    try:
        document = parse_json(error.read(MAX_PROBLEM).decode("utf-8", errors="replace"), url)
        sentences = [str(one) for one in document["errors"]] or [str(document["title"])]
    except (OSError, http.client.HTTPException, InputError, KeyError, TypeError):
        sentences = [f"{url} answers {error.code} {error.reason}."]
    if error.code in (404, 405) and sentences == [error.reason]:
        return InputError(f"The service at {url} does not know this request; it runs another version of secateur.")
    if error.code == 401:
        text = f"{url} does not accept the token, or needs one. The operator makes one with `secateur serve token`."
        return InputError(f"{text} Give it as `token`, or in {TOKEN_VARIABLE}.", f"{text} Put it into {TOKEN_VARIABLE}.")
    return InputError("\n".join(sentences))


def _failure(url: str, error: Exception, timeout: float) -> InputError:
    """Return the error for a connection that fails."""
    if isinstance(error, ssl.SSLCertVerificationError):
        trust = "If an authority of your own has signed it, name the authority's file in SSL_CERT_FILE."
        return InputError(f"{url}: the server's certificate is not trusted: {error.verify_message}. {trust}")
    if isinstance(error, ssl.SSLError):
        return InputError(
            f"{url}: TLS fails: {error.reason or error}. If the server speaks plain HTTP, the address begins with http://."
        )
    if isinstance(error, TimeoutError):
        return Unreachable(f"{url} has not answered for {timeout:g} seconds.")
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split()) or type(error).__name__
    return Unreachable(f"{url} does not answer: {reason}. Check the address, and that `secateur serve` runs there.")


def _no_service(url: str, reason: str) -> str:
    return f"{url} is no secateur service: {reason}. `secateur serve` prints its address."
