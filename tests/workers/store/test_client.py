"""The contract of a token store, held by the twin and by a real Redis; and what a real one does when it fails."""

import contextlib
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.source_position import SourcePosition, may_replace, removal_marker, value_head
from resp_server import RespServer, SmallRedis
from services import RedisServer
from workers.errors import Misconfigured, Transient
from workers.store.client import RedisStore
from workers.store.memory import MemoryStore


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.services)])
def store(request):
    made = MemoryStore() if request.param == "memory" else RedisStore(request.getfixturevalue("redis_url"))
    yield made
    made.close()


def test_a_missing_value_is_none_at_its_position(store, unique_prefix):
    store.put_many({unique_prefix + "a": b"1", unique_prefix + "c": b"\x00\xff"})

    assert store.get_many([unique_prefix + name for name in "abc"]) == [b"1", None, b"\x00\xff"]


def test_a_key_asked_for_twice_is_answered_twice(store, unique_prefix):
    store.put_many({unique_prefix: b"1"})

    assert store.get_many([unique_prefix, unique_prefix]) == [b"1", b"1"]


def value(offset: int, timestamp_ms: int, content: bytes = b"") -> bytes:
    return value_head(3, SourcePosition(offset, timestamp_ms)) + content


def test_writing_twice_leaves_the_second_value(store, unique_prefix):
    store.put_many({unique_prefix: b"1"})
    store.put_many({unique_prefix: b"2"})

    assert store.get_many([unique_prefix]) == [b"2"]


def test_a_value_of_an_earlier_event_does_not_replace_one_of_a_later_event(store, unique_prefix):
    key, other = unique_prefix, unique_prefix + "other"
    later = value(20, 2_000, b"later")

    assert store.put_many({key: later, other: value(1, 1)}) == [True, True]
    assert store.put_many({key: value(10, 1_000, b"earlier"), other: value(2, 2)}) == [False, True]

    assert store.get_many([key, other]) == [later, value(2, 2)]


def test_the_same_event_may_be_written_again(store, unique_prefix):
    assert store.put_many({unique_prefix: value(20, 2_000, b"first")}) == [True]
    assert store.put_many({unique_prefix: value(20, 2_000, b"again")}) == [True]

    assert store.get_many([unique_prefix]) == [value(20, 2_000, b"again")]


def test_an_event_of_a_topic_that_was_created_again_replaces_by_its_timestamp(store, unique_prefix):
    store.put_many({unique_prefix: value(1_000, 5_000)})

    assert store.put_many({unique_prefix: value(0, 6_000, b"new topic")}) == [True]


def test_a_removal_marker_keeps_earlier_events_out_for_its_lifetime(store, unique_prefix):
    store.put_many({unique_prefix: value(10, 1_000)})
    marker = removal_marker(SourcePosition(20, 2_000))
    assert store.put_many({unique_prefix: marker}, lifetime_s=60.0) == [True]

    assert store.put_many({unique_prefix: value(15, 1_500)}) == [False]
    assert store.get_many([unique_prefix]) == [marker]
    assert store.put_many({unique_prefix: value(30, 3_000)}) == [True]


def test_a_value_outlives_the_marker_that_it_replaces(store, unique_prefix):
    store.put_many({unique_prefix: removal_marker(SourcePosition(1, 1))}, lifetime_s=0.05)
    store.put_many({unique_prefix: value(2, 2)})
    threading.Event().wait(0.1)

    assert store.get_many([unique_prefix]) == [value(2, 2)]


def test_a_marker_is_gone_after_its_lifetime(store, unique_prefix):
    store.put_many({unique_prefix: removal_marker(SourcePosition(1, 1))}, lifetime_s=0.05)
    threading.Event().wait(0.1)

    assert store.get_many([unique_prefix]) == [None]
    assert store.put_many({unique_prefix: value(0, 0)}) == [True]


NUMBERS = st.integers(0, 2**53 - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writes=st.lists(
        st.tuples(st.integers(0, 2**53 - 1), st.integers(0, 2**53 - 1)) | st.binary(max_size=45), max_size=6
    )
)
def test_the_store_and_the_published_rule_agree_on_every_write(store, unique_prefix, writes):
    stored = None
    key = f"{unique_prefix}{uuid.uuid4().hex}"
    for write in writes:
        new = write if isinstance(write, bytes) else value(*write)
        wins = may_replace(new, stored)

        assert store.put_many({key: new}) == [wins]
        stored = new if wins else stored
        assert store.get_many([key]) == [stored]


def test_existence_is_reported_for_each_key(store, unique_prefix):
    store.put_many({unique_prefix + "a": value(1, 1, b"tokens"), unique_prefix + "c": removal_marker(SourcePosition())})

    assert store.exist_many([unique_prefix + name for name in "abc"]) == [True, False, False]
    assert store.exist_many([]) == []


def test_a_probe_leaves_nothing_behind(store, unique_prefix):
    store.probe([unique_prefix], writes=False)
    store.probe([unique_prefix, unique_prefix + "other:"], writes=True)

    assert store.put_many({unique_prefix: b"1"}) == [True]


def test_nothing_asked_for_is_nothing_answered(store):
    store.put_many({})

    assert store.get_many([]) == []


def test_ten_thousand_keys_come_back_in_order(store, unique_prefix):
    keys = [f"{unique_prefix}{number}" for number in range(10_000)]
    store.put_many({key: key.encode() for key in keys[::2]})

    values = store.get_many(keys)

    assert values[::2] == [key.encode() for key in keys[::2]]
    assert values[1::2] == [None] * 5_000


def test_four_threads_at_once_read_the_values_they_wrote(store, unique_prefix):
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


def test_the_twin_can_be_made_unreachable_and_reachable_again():
    store = MemoryStore()
    store.put_many({"a": b"1"})

    store.away = True
    for call in (
        lambda: store.probe([""], writes=True),
        lambda: store.get_many(["a"]),
        lambda: store.put_many({"a": b"2"}),
    ):
        with pytest.raises(Transient):
            call()
    store.away = False

    assert store.get_many(["a"]) == [b"1"]


@pytest.mark.parametrize("url", ["redis://cache..example:6379", f"rediss://{'a' * 64}.example"])
def test_a_host_that_cannot_be_a_name_is_misconfigured_at_the_start_and_retried_later(url):
    store = RedisStore(url)

    with pytest.raises(Misconfigured, match="not a valid host name"):
        store.probe(["vt:"], writes=False)
    with pytest.raises(Transient, match="not a valid host name"):
        store.get_many(["vt:a"])
    store.close()


def test_an_unreachable_store_is_transient_and_its_error_shows_no_secret():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for scheme, tail in (("redis", ""), ("redis+cluster", ""), ("redis+sentinel", "/tokens")):
            store = RedisStore(f"{scheme}://worker:s3cret@127.0.0.1:{port}{tail}")

            with pytest.raises(Transient, match=r"worker:\*\*\*@127\.0\.0\.1") as away:
                store.get_many(["a"])

            assert "s3cret" not in str(away.value)


@pytest.mark.parametrize("option", ["colour=red", "socket_timeout=soon", "decode_responses=True", "ssl_colour=red"])
def test_an_option_that_a_store_does_not_take_is_refused_at_once(option):
    with pytest.raises(Misconfigured, match=option.partition("=")[0]):
        RedisStore(f"rediss://localhost/0?{option}")


@pytest.mark.services
def test_a_restarted_server_answers_the_next_calls(private_redis):
    server = private_redis()
    store = RedisStore(server.url)
    store.put_many({"a": b"1"})

    server.kill()
    with pytest.raises(Transient):
        store.get_many(["a"])
    server.start()

    wait_until(lambda: answers(store))  # it loads its file first
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
def test_a_wrong_password_is_misconfigured_at_the_start_and_retried_later(private_redis):
    server = private_redis({"requirepass": "right"})
    right, wrong, none = (RedisStore(f"redis://{login}127.0.0.1:{server.port}") for login in (":right@", ":wr0ng@", ""))

    right.probe(["vt:"], writes=True)
    for store in (wrong, none):
        with pytest.raises(Misconfigured, match="password") as refused:
            store.probe(["vt:"], writes=False)
        assert "wr0ng" not in str(refused.value)
        with pytest.raises(Transient, match="password"):
            store.get_many(["vt:a"])
    with redis.Redis(port=server.port, password="right") as admin:
        admin.config_set("requirepass", "wr0ng")

    wrong.probe(["vt:"], writes=True)


READS, WRITES = "+mget", "+mget +getrange +set +evalsha +eval"


@pytest.mark.services
@pytest.mark.parametrize(
    ("permissions", "may_read", "may_write"),
    [
        (f"~vt:m:* {READS}", True, False),
        (f"~vt:m:* {WRITES}", True, True),
        (f"~* {WRITES} -mget", False, False),
        (f"~other:* {WRITES}", False, False),
        (f"~vt:m:* {WRITES} -set", True, False),
        (f"~vt:m:* {WRITES} -evalsha -eval", True, True),  # compared here instead
        (f"~vt:m:* {WRITES} -getrange", True, False),
    ],
)
def test_permissions_are_tried_at_the_start(private_redis, permissions, may_read, may_write):
    server = private_redis()
    with redis.Redis(port=server.port) as admin:
        admin.execute_command(f"ACL SETUSER worker on >pw {permissions}")
    store = RedisStore(f"redis://worker:pw@127.0.0.1:{server.port}/0")

    for writes, may in ((False, may_read), (True, may_write)):
        with contextlib.nullcontext() if may else pytest.raises(Misconfigured, match=r"permission|allow the user"):
            store.probe(["vt:m:"], writes=writes)
    store.close()


@pytest.mark.services
def test_a_user_who_may_not_run_scripts_still_keeps_the_later_value(private_redis):
    server = private_redis()
    with redis.Redis(port=server.port) as admin:
        admin.execute_command("ACL SETUSER worker on >pw ~* +mget +getrange +set")
    store = RedisStore(f"redis://worker:pw@127.0.0.1:{server.port}/0")

    assert store.put_many({"a": value(20, 2_000), "b": b"1"}) == [True, True]
    assert store.put_many({"a": value(10, 1_000), "b": value(1, 1)}) == [False, True]
    store.close()


@pytest.mark.services
def test_a_permission_that_is_taken_away_is_waited_for(private_redis):
    server = private_redis()
    store = RedisStore(f"redis://worker:pw@127.0.0.1:{server.port}/0")
    with redis.Redis(port=server.port) as admin:
        admin.execute_command("ACL SETUSER worker on >pw ~* +@all")
        store.probe(["vt:"], writes=True)
        admin.execute_command("ACL SETUSER worker -set")
        with pytest.raises(Transient, match=r"NOPERM|can't run this command"):
            store.put_many({"a": b"1"})
        admin.execute_command("ACL SETUSER worker +set")

    assert store.put_many({"a": b"1"}) == [True]
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
        for server in servers:
            with pytest.raises(Misconfigured, match=r"redis\+cluster"):
                RedisStore(server.url).probe(["vt:"], writes=False)
        store.probe(["vt:", "th:"], writes=True)
        assert store.put_many({key: value(20, 2_000, b"x") for key in keys}) == [True] * 200
        assert store.put_many({key: value(10, 1_000) for key in keys}) == [False] * 200
        assert store.exist_many([*keys, "vt:none"]) == [True] * 200 + [False]
        store.close()


@pytest.mark.services
def test_a_single_server_is_no_cluster(private_redis):
    server = private_redis()

    with pytest.raises(Misconfigured, match="redis://"):
        RedisStore(f"redis+cluster://127.0.0.1:{server.port}").probe(["vt:"], writes=False)


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
        with pytest.raises(Transient, match="no reachable sentinel knows"):
            RedisStore(f"redis+sentinel://127.0.0.1:{sentinel.port}/nobody").get_many(["a"])
        store.close()
    finally:
        sentinel.stop()


@pytest.mark.services
def test_a_script_that_the_server_has_forgotten_is_sent_again(private_redis):
    server = private_redis()
    store = RedisStore(server.url)
    store.put_many({"a": value(20, 2_000)})
    with redis.Redis(port=server.port) as admin:
        admin.script_flush()

    assert store.put_many({"a": value(10, 1_000), "b": value(1, 1)}) == [False, True]
    store.close()


@pytest.mark.services
def test_a_server_that_is_busy_with_a_script_is_waited_for(private_redis):
    server = private_redis({"lua-time-limit": "50"})
    store = RedisStore(server.url)
    store.put_many({"a": b"1"})
    with redis.Redis(port=server.port) as admin, redis.Redis(port=server.port) as other:
        busy = threading.Thread(target=run_long, args=(other,))
        busy.start()
        wait_until(lambda: is_busy(store))
        with pytest.raises(Transient, match="BUSY"):
            store.put_many({"a": b"2"})
        admin.script_kill()
        busy.join()

    assert store.get_many(["a"]) == [b"1"]
    store.close()


def run_long(client: redis.Redis) -> None:
    with contextlib.suppress(redis.RedisError):
        client.eval("while true do end", 0)


def is_busy(store: RedisStore) -> bool:
    try:
        store.get_many(["a"])
    except Transient as error:
        return "BUSY" in str(error)
    return False


@pytest.mark.services
def test_after_a_failover_behind_one_address_the_next_attempt_reaches_the_new_master(private_redis):
    first, second = private_redis(), private_redis()
    with Relay(first.port) as relay:
        store = RedisStore(f"redis://127.0.0.1:{relay.port}/0")
        store.put_many({"a": b"1"})
        with redis.Redis(port=first.port) as admin:
            admin.execute_command("REPLICAOF", "127.0.0.1", str(second.port))
        relay.target = second.port  # the address leads to the new master; open connections stay

        with pytest.raises(Transient, match="READONLY"):
            store.put_many({"a": b"2"})
        assert store.put_many({"a": b"2"}) == [True]
        store.close()


class Relay:
    """One address in front of servers that change: new connections go to `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "reply",
    [
        b"-upstream failure\r\n",
        b"-BUSY Redis is busy running a script.\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-MASTERDOWN Link with MASTER is down\r\n",
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"-MISCONF Redis is configured to save RDB snapshots\r\n",
        b"-NOREPLICAS Not enough good replicas to write.\r\n",
        b"-ERR max number of clients reached\r\n",
        b"-ERR DISABLED You can't write or read against a disabled instance\r\n",
        b"-no upstream host\r\n",
        b"-\r\n",
        b"-\xff\xfe\r\n",
    ],
)
def test_an_error_reply_that_passes_or_is_unknown_is_retried(reply):
    replies = [reply] * 3
    small = SmallRedis()
    with RespServer(lambda command: replies.pop() if replies else small(command)) as server:
        store = RedisStore(server.url)

        with pytest.raises(Transient):
            store.get_many(["a"])
        with pytest.raises(Transient):
            store.put_many({"a": b"1"})
        with pytest.raises(Transient):
            store.probe(["vt:"], writes=True)

        assert store.put_many({"a": b"1"}) == [True]
        assert store.get_many(["a"]) == [b"1"]
        store.close()


@pytest.mark.parametrize("reply", [b":7\r\n", b"+PONG\r\n", b"$3\r\nabc\r\n", b"*0\r\n", b"HTTP/1.1 400 Bad\r\n\r\n"])
def test_a_reply_of_another_shape_is_an_error_and_not_a_value(reply):
    with RespServer(lambda command: reply) as server:
        store = RedisStore(server.url)

        with pytest.raises(Transient):
            store.get_many(["a"])
        with pytest.raises(Transient):
            store.put_many({"a": b"1"})
        store.close()


@pytest.mark.parametrize(
    "unknown",
    [
        b"-ERR unknown command 'EVALSHA'\r\n",
        b"-ERR unsupported command 'eval'\r\n",
        b"-ERR command EVALSHA is not allowed in this plan\r\n",
        None,
    ],
    ids=["unknown", "unsupported", "not allowed", "closes the connection"],
)
def test_a_proxy_without_scripts_is_written_to_after_a_comparison(unknown):
    small = SmallRedis()

    def answer(command: list[bytes]) -> bytes | None:
        return small(command) if command[0] in (b"MGET", b"GETRANGE", b"SET") else unknown

    with RespServer(answer) as server:
        store = RedisStore(server.url)
        store.probe(["vt:"], writes=True)

        assert store.put_many({"a": value(20, 2_000), "b": b"1"}) == [True, True]
        assert store.put_many({"a": value(10, 1_000), "b": b"2"}) == [False, True]
        assert store.get_many(["a", "b"]) == [value(20, 2_000), b"2"]
        assert not {b"HELLO", b"CLIENT", b"PING"} & set(server.commands)
        store.close()


def raw_cluster_info(node: redis.Redis) -> bytes:
    port = node.connection_pool.connection_kwargs["port"]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"CLUSTER INFO\r\n")
        return connection.recv(65_536)


def answers(store: RedisStore) -> bool:
    try:
        store.get_many(["a"])
    except Transient:
        return False
    return True


def wait_until(holds) -> None:
    """Servers find each other in their own time; pytest-timeout ends what never holds."""
    pause = threading.Event()
    while not holds():
        pause.wait(0.05)
