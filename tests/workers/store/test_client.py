"""The contract of a token store, held by the twin and by a real Redis; and what a real one does when it fails."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from services import RedisServer
from workers.errors import Misconfigured, Transient
from workers.store.client import RedisStore
from workers.store.memory import MemoryStore


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.services)])
def store(request):
    made = MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_url"))
    yield made
    made.close()


def test_a_missing_value_is_none_in_its_place(store, unique_prefix):
    store.put_many({unique_prefix + "a": b"1", unique_prefix + "c": b"\x00\xff"})

    assert store.get_many([unique_prefix + name for name in "abc"]) == [b"1", None, b"\x00\xff"]


def test_a_key_asked_for_twice_is_answered_twice(store, unique_prefix):
    store.put_many({unique_prefix: b"1"})

    assert store.get_many([unique_prefix, unique_prefix]) == [b"1", b"1"]


def test_writing_twice_leaves_the_later_value(store, unique_prefix):
    store.put_many({unique_prefix: b"1"})
    store.put_many({unique_prefix: b"2"})

    assert store.get_many([unique_prefix]) == [b"2"]


def test_nothing_asked_for_is_nothing_answered(store):
    store.put_many({})

    assert store.get_many([]) == []


def test_ten_thousand_keys_come_back_in_order(store, unique_prefix):
    keys = [f"{unique_prefix}{number}" for number in range(10_000)]
    store.put_many({key: key.encode() for key in keys[::2]})

    values = store.get_many(keys)

    assert values[::2] == [key.encode() for key in keys[::2]]
    assert values[1::2] == [None] * 5_000


def test_four_threads_at_once_get_their_own_answers(store, unique_prefix):
    start = threading.Barrier(4)

    def write_and_read(number: int) -> bool:
        blobs = {f"{unique_prefix}{number}.{place}": bytes([number]) * 20_000 for place in range(20)}
        start.wait()
        for _ in range(10):
            store.put_many(blobs)
            if store.get_many(list(blobs)) != list(blobs.values()):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write_and_read, range(4)))


def test_the_twin_is_away_when_told_so_and_then_back():
    store = MemoryStore()
    store.put_many({"a": b"1"})

    store.away = True
    for call in (store.ping, lambda: store.get_many(["a"]), lambda: store.put_many({"a": b"2"})):
        with pytest.raises(Transient):
            call()
    store.away = False

    assert store.get_many(["a"]) == [b"1"]


def test_a_store_that_was_never_there_is_transient_and_no_secret_is_told():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for scheme, tail in (("redis", ""), ("redis+cluster", ""), ("redis+sentinel", "/tokens")):
            store = RedisStore(f"{scheme}://worker:s3cret@127.0.0.1:{port}{tail}")

            with pytest.raises(Transient, match=r"worker:\*\*\*@127\.0\.0\.1") as away:
                store.ping()

            assert "s3cret" not in str(away.value)


@pytest.mark.parametrize("option", ["colour=red", "socket_timeout=soon"])
def test_an_option_the_client_does_not_know_is_refused_at_once(option):
    with pytest.raises(Misconfigured, match=option.partition("=")[0]):
        RedisStore(f"redis://localhost/0?{option}")


@pytest.mark.services
def test_a_restarted_server_answers_the_next_calls(private_redis):
    server = private_redis()
    store = RedisStore(server.url)
    store.put_many({"a": b"1"})

    server.kill()
    with pytest.raises(Transient):
        store.get_many(["a"])
    server.start()

    assert store.get_many(["a"]) == [b"1"]
    store.close()


@pytest.mark.services
def test_a_server_that_hangs_is_given_up_after_the_time_limit(private_redis):
    server = private_redis()
    store = RedisStore(server.url, timeout_s=0.2)
    store.put_many({"a": b"1"})

    server.freeze()
    with pytest.raises(Transient):
        store.get_many(["a"])
    server.thaw()

    assert store.get_many(["a"]) == [b"1"]
    store.close()


@pytest.mark.services
def test_a_wrong_password_is_for_a_person_to_mend(private_redis):
    server = private_redis({"requirepass": "right"})
    right, wrong, none = (RedisStore(f"redis://{login}127.0.0.1:{server.port}") for login in (":right@", ":wr0ng@", ""))

    right.ping()
    for store in (wrong, none):
        with pytest.raises(Misconfigured, match="password") as refused:
            store.get_many(["a"])
        assert "wr0ng" not in str(refused.value)


@pytest.mark.services
def test_a_user_without_permission_is_for_a_person_to_mend(private_redis):
    server = private_redis()
    with redis.Redis(port=server.port) as admin:
        admin.execute_command("ACL SETUSER reader on >pw ~vt:* +mget +ping")
    store = RedisStore(f"redis://reader:pw@127.0.0.1:{server.port}/0")

    assert store.get_many(["vt:a"]) == [None]
    with pytest.raises(Misconfigured, match="permission"):
        store.put_many({"vt:a": b"1"})
    store.close()


@pytest.mark.services
def test_a_full_store_is_transient_and_says_so(private_redis):
    server = private_redis({"maxmemory": "2mb"})
    store = RedisStore(server.url)

    with pytest.raises(Transient, match="full"):
        store.put_many({str(number): bytes(100_000) for number in range(40)})
    store.close()


@pytest.mark.services
def test_a_value_of_another_type_is_no_blob_and_is_replaced(private_redis):
    server = private_redis()
    with redis.Redis(port=server.port) as admin:
        admin.lpush("list", "x")
    store = RedisStore(server.url)

    assert store.get_many(["list"]) == [None]
    store.put_many({"list": b"1"})
    assert store.get_many(["list"]) == [b"1"]
    store.close()


@pytest.mark.services
def test_a_cluster_is_found_through_any_node_and_spreads_the_keys(private_redis):
    servers = [private_redis({"cluster-enabled": "yes", "appendonly": "no"}) for _ in range(2)]
    halves = [(0, 8191), (8192, 16383)]
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(redis.Redis(port=server.port)) for server in servers]
        for node, half in zip(nodes, halves, strict=True):
            node.execute_command("CLUSTER ADDSLOTS", *range(half[0], half[1] + 1))
        nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", servers[1].port)
        wait_until(lambda: all(b"cluster_state:ok" in raw_cluster_info(node) for node in nodes))
        store = RedisStore(f"redis+cluster://127.0.0.1:{servers[1].port}")
        keys = [f"vt:model:{number}" for number in range(200)]

        store.put_many({key: key.encode() for key in keys})

        assert store.get_many([*keys, "vt:none", keys[0]]) == [*(key.encode() for key in keys), None, keys[0].encode()]
        assert all(node.dbsize() > 50 for node in nodes)
        with pytest.raises(Misconfigured, match=r"redis\+cluster"):
            [RedisStore(server.url).get_many(keys[:1]) for server in servers]
        store.close()


@pytest.mark.services
def test_a_single_server_is_no_cluster(private_redis):
    server = private_redis()

    with pytest.raises(Misconfigured, match="redis://"):
        RedisStore(f"redis+cluster://127.0.0.1:{server.port}").ping()


@pytest.mark.services
def test_a_cluster_that_is_away_is_transient_and_comes_back(private_redis):
    server = private_redis({"cluster-enabled": "yes"})
    with redis.Redis(port=server.port) as node:
        node.execute_command("CLUSTER ADDSLOTS", *range(16384))
        wait_until(lambda: b"cluster_state:ok" in raw_cluster_info(node))
    store = RedisStore(f"redis+cluster://127.0.0.1:{server.port}")
    store.put_many({"a": b"1"})

    server.kill()
    for _ in range(3):
        with pytest.raises(Transient):
            store.get_many(["a"])
    server.start()

    wait_until(lambda: answers(store))
    assert store.get_many(["a"]) == [b"1"]
    store.close()


class SentinelServer(RedisServer):
    """The same program as a sentinel of one master."""

    def _command(self):
        config = self.folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor tokens 127.0.0.1 {self.settings['master']} 1\n"
        )
        return [super()._command()[0], str(config), "--sentinel"]


@pytest.mark.services
def test_the_sentinels_are_asked_for_the_master(private_redis, tmp_path):
    master = private_redis()
    sentinel = SentinelServer(tmp_path / "sentinel", {"master": str(master.port)})
    sentinel.start()
    try:
        store = RedisStore(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/tokens/1")
        store.put_many({"a": b"1"})

        assert store.get_many(["a"]) == [b"1"]
        with redis.Redis(port=master.port, db=1) as direct:
            assert direct.get("a") == b"1"
        with pytest.raises(Transient, match="no sentinel that answers knows"):
            RedisStore(f"redis+sentinel://127.0.0.1:{sentinel.port}/nobody").ping()
        store.close()
    finally:
        sentinel.stop()


def raw_cluster_info(node: redis.Redis) -> bytes:
    port = node.connection_pool.connection_kwargs["port"]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"CLUSTER INFO\r\n")
        return connection.recv(65_536)


def answers(store: RedisStore) -> bool:
    try:
        store.ping()
        store.get_many(["a"])
    except Transient:
        return False
    return True


def wait_until(holds) -> None:
    """Servers find each other in their own time; pytest-timeout ends what never holds."""
    pause = threading.Event()
    while not holds():
        pause.wait(0.05)
