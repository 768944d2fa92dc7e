"""The HTTP client of a clone: where a request breaks, it says what the guest knows of the port."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from pytest_fcvm.errors import FcvmError

__all__ = ["make_client"]

_TIMEOUT_S = 30.0


def make_client(url: str, explain: Callable[[], str]) -> httpx.Client:
    """Return a client that ignores proxy settings. `explain` returns why nothing answers at its URL, "" if unknown."""
    return httpx.Client(base_url=url, transport=_Transport(httpx.URL(url), explain), timeout=_TIMEOUT_S)


class _Transport(httpx.HTTPTransport):
    """Raise httpx's own errors: only what they say is another."""

    def __init__(self, url: httpx.URL, explain: Callable[[], str]) -> None:
        super().__init__(trust_env=False)
        self._place, self._explain = (url.host, url.port), explain

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. Raise httpx.TransportError."""
        try:
            return super().handle_request(request)
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            if (request.url.host, request.url.port) != self._place or not (reason := self._reason()):
                raise
            raise type(error)(f"{reason}: {error}", request=request) from error

    def _reason(self) -> str:
        try:
            return self._explain()
        except FcvmError as error:
            return error.message
