"""Every test gets a clone of its own, in which nginx is already running. Run it with `make demo`, or

pytest examples/nginx --fcvm-image nginx:latest
"""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from pytest_fcvm import Clone


def fetch(url: str) -> int:
    """Return the HTTP status of a URL."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_home_page(fcvm_clone: Clone) -> None:
    assert fetch(fcvm_clone.url(80)) == 200


def test_wreck_it(fcvm_clone: Clone) -> None:
    fcvm_clone.succeed("rm -rf /usr/share/nginx /var/www /etc/nginx")
    assert fetch(fcvm_clone.url(80)) in (403, 404)


def test_the_next_clone_is_whole_again(fcvm_clone: Clone) -> None:
    assert fetch(fcvm_clone.url(80)) == 200


def test_look_inside(fcvm_clone: Clone) -> None:
    assert "nginx" in fcvm_clone.succeed("cat /proc/1/comm")
    fcvm_clone.write_text("/etc/nginx/conf.d/hello.conf", "server { listen 81; return 200 'hello'; }")
    fcvm_clone.succeed("nginx -s reload")
    fcvm_clone.wait_until_succeeds("grep -qi :0051 /proc/net/tcp")
    assert fetch(fcvm_clone.url(81)) == 200


@pytest.mark.parametrize("number", range(10))
def test_ten_more_clones(fcvm_clone: Clone, number: int) -> None:
    assert fetch(fcvm_clone.url(80, f"/?{number}")) == 200
