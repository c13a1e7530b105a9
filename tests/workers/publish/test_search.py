"""`python -m workers.publish search` against a gateway."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gateway_harness import GatewayBench
from workers.gateway.api_keys import new_key
from workers.publish.__main__ import app
from workers.publish.search import filters_of


@pytest.fixture
def bench():
    key, entry = new_key("me")
    made = GatewayBench(options={"api_keys": entry})
    made.key = key
    made.add_images("[bold]a", "b", place="sea")
    yield made
    made.close()


def run(bench, *arguments: str):
    address = f"http://127.0.0.1:{bench.port}"
    return CliRunner().invoke(app, ["search", "a dog", "--gateway", address, "--key", bench.key, *arguments])


def lines_of(done) -> list[str]:
    """Standard output without the log lines of the gateway, which runs in this process."""
    return [line for line in done.stdout.splitlines() if "[debug" not in line]


def test_pictures_come_ranked_with_their_ids_as_text(bench):
    done = run(bench)

    assert done.exit_code == 0
    assert [line.split()[0::3] for line in lines_of(done)[1:]] == [["1", "b"], ["2", "[bold]a"]]


def test_the_answer_as_json_is_the_gateways(bench):
    assert json.loads(lines_of(run(bench, "--json", "--top-n", "1"))[0])["results"][0]["image_id"] == "b"


def test_a_filter_is_sent(bench):
    assert json.loads(lines_of(run(bench, "--json", "--filter", "place=lake"))[0])["results"] == []


def test_a_degraded_answer_says_so(bench):
    bench.worker.rule = bench.worker.expired

    assert "not reranked: the deadline passed" in run(bench).stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--key", "wrong"), "an API key is needed"),
        (("--gateway", "http://127.0.0.1:1"), "is it running?"),
        (("--filter", "place"), "'place' is not key=value"),
    ],
)
def test_a_failure_is_a_sentence(bench, arguments, sentence):
    done = run(bench, *arguments)

    assert done.exit_code != 0
    assert sentence in done.stderr


def test_conditions_of_one_key_are_alternatives():
    assert filters_of(["a=1", "b=x=y", "a=2"]) == {"a": ["1", "2"], "b": ["x=y"]}
