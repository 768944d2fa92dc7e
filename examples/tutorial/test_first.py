"""The suite of docs/tutorial/first-suite.md. Run it with

pytest examples/tutorial --fcvm-image nginx:latest
"""

from __future__ import annotations

from pytest_fcvm import Clone

SITE = "server { listen 81; location / { default_type text/plain; return 200 'hello'; } }\n"


def test_it_answers(fcvm_clone: Clone) -> None:
    assert fcvm_clone.http(80).get("/").status_code == 200


def test_wreck_it(fcvm_clone: Clone) -> None:
    fcvm_clone.succeed("rm -rf /usr/share/nginx /var/www")
    assert fcvm_clone.http(80).get("/").status_code >= 400


def test_the_next_one_is_whole(fcvm_clone: Clone) -> None:
    assert fcvm_clone.http(80).get("/").status_code == 200


def test_another_site(fcvm_clone: Clone) -> None:
    fcvm_clone.write_text("/etc/nginx/conf.d/hello.conf", SITE)
    fcvm_clone.succeed("nginx -s reload")
    fcvm_clone.wait_until_succeeds("grep -q :0051 /proc/net/tcp")  # 81 in hexadecimal
    assert fcvm_clone.http(81).get("/").text == "hello"
