"""PostgreSQL and Redis: the snapshot is of the final server, and every test may break all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import redis

from pytest_fcvm import Clone, Prepare, Snapshot, SnapshotFactory, VmSpec

PASSWORD = "correct horse"


def connect(clone: Clone) -> psycopg.Connection[tuple[Any, ...]]:
    host, port = clone.endpoint(5432)
    return psycopg.connect(
        host=host, port=port, user="postgres", password=PASSWORD, connect_timeout=30, autocommit=True
    )


def load_rows(base: Clone) -> None:
    with connect(base) as db:
        db.execute("CREATE TABLE parts AS SELECT n AS id, md5(n::text) AS name FROM generate_series(1, 10000) AS n")


@pytest.fixture(scope="module")
def postgres(fcvm_snapshot_factory: SnapshotFactory, image: Callable[[str], str]) -> Snapshot:
    spec = VmSpec(image=image("postgres"), env={"POSTGRES_PASSWORD": PASSWORD}, mem_mib=384)
    return fcvm_snapshot_factory(spec, prepare=Prepare(load_rows))


def test_the_snapshot_is_of_the_final_server(postgres: Snapshot) -> None:
    log = postgres.logs()
    assert "PostgreSQL init process complete" in log
    assert log.rindex("ready to accept connections") > log.index("init process complete")
    with postgres.clone() as clone, connect(clone) as db:
        assert db.execute("SHOW listen_addresses").fetchone() == ("*",)
        assert clone.succeed("tr '\\0' ' ' < /proc/1/cmdline").startswith("postgres -D")


def test_rows_loaded_once_are_in_every_clone_whatever_the_last_test_broke(postgres: Snapshot) -> None:
    for _ in range(2):
        with postgres.clone() as clone:
            with connect(clone) as db:
                assert db.execute("SELECT count(*) FROM parts").fetchone() == (10000,)
                db.execute("DROP TABLE parts")
            clone.succeed("rm -rf /var/lib/postgresql/data/base && kill -9 $(pgrep -o postgres) || true")


def test_the_service_runs_as_the_images_user(postgres: Snapshot) -> None:
    with postgres.clone() as clone:
        assert clone.succeed("stat -c %U /proc/1").strip() == "postgres"


def test_redis_forgets_between_clones(fcvm_snapshot_factory: SnapshotFactory, image: Callable[[str], str]) -> None:
    snapshot = fcvm_snapshot_factory(VmSpec(image=image("redis")))
    for _ in range(2):
        with snapshot.clone() as clone:
            host, port = clone.endpoint(6379)
            with redis.Redis(host=host, port=port, socket_timeout=30) as db:
                assert db.dbsize() == 0
                db.set("key", "value")
                assert db.get("key") == b"value"
