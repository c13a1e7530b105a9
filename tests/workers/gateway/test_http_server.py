"""The gateway's listening socket."""

from __future__ import annotations

import socket

import pytest

from workers.errors import Misconfigured
from workers.gateway.http_server import listening_socket


def test_answers_do_not_wait_for_acknowledgements():
    with listening_socket("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on


def test_a_port_that_is_in_use_is_misconfigured():
    with listening_socket("127.0.0.1", 0) as listener:
        listener.listen()

        with pytest.raises(Misconfigured, match="cannot listen on"):
            listening_socket("127.0.0.1", listener.getsockname()[1])
