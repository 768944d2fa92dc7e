"""The HTTP client of all measurements: GET until the answer is 200."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request

from pytest_fcvm.host.clock import Deadline, wait_until

__all__ = ["fetch_until_200"]

_ANSWER_S = 30.0
_EACH_S = 5.0
# The servers are on loopback: ignore the proxy of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch_until_200(url: str) -> None:
    """Request a URL every 2 ms until it answers 200. Raise TimeoutError after 30 s."""
    if not wait_until(lambda: _answers(url), Deadline(_ANSWER_S), interval_s=0.002, longest_interval_s=0.002):
        raise TimeoutError(f"{url} did not answer 200 within {_ANSWER_S:.0f} s")


def _answers(url: str) -> bool:
    try:
        with _OPENER.open(url, timeout=_EACH_S) as answer:
            answer.read()
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False
