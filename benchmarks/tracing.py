"""What tracing costs: the same backlog drained with and without it, alternating.

Run: python benchmarks/tracing.py [--repeats 7] [--ratio 0.1] [--case cold|hot] [--quick]

As in benchmarks/service.py: 100 candidates a request, int8 blobs of 64 x 384, an engine that computes nothing, so that
whatever is not tracing is as cheap as it gets. Sampled requests go to an OTLP endpoint in a process of its own that
reads and forgets them, and metrics with them. Two costs, each from the ratio of two medians: of pairs per second, and
of the worker's processor time for a request, which says more on a machine that does other things meanwhile. The spread
tells how far to believe either. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from harness import bench
from service import COLD_SLOTS, HOT_IMAGES, NUM_IMAGES, Drained, drained

#: Answers every request with success, which is all that an exporter asks for.
SINK = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(server.server_port, flush=True)
server.serve_forever()
"""
CASES = {
    "cold": {"num_requests": 3000, "num_images": NUM_IMAGES, "num_slots": COLD_SLOTS},
    "hot": {"num_requests": 8000, "num_images": HOT_IMAGES, "num_slots": NUM_IMAGES},
}


@contextmanager
def sink() -> Iterator[str]:
    """The address of an OTLP endpoint that forgets."""
    process = subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables for whatever is started meanwhile."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="of each; the median counts")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the requests that is sampled")
    parser.add_argument("--case", choices=CASES, default="cold", help="whether the images have to be fetched")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, to see that it runs")
    arguments = parser.parse_args()
    case = dict(CASES[arguments.case])
    case["num_requests"] //= 10 if arguments.quick else 1
    found: dict[str, list[Drained]] = {"off": [], "on": []}
    with bench(NUM_IMAGES) as ready, sink() as address:
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": address,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": str(arguments.ratio),
        }
        for repeat in range(arguments.repeats):
            order = ("off", "on") if repeat % 2 == 0 else ("on", "off")  # what drifts meets both alike
            for name in order:
                with environment(tracing if name == "on" else {}):
                    found[name].append(drained(ready, **case))
                last = found[name][-1]
                print(f"{name:4}{last.pairs_per_s:10.0f} pairs/s{last.cpu_ms_per_request:8.3f} ms/request", flush=True)
    rates = {name: [each.pairs_per_s for each in runs] for name, runs in found.items()}
    times = {name: [each.cpu_ms_per_request for each in runs] for name, runs in found.items()}
    rate_cost = 1 - statistics.median(rates["on"]) / statistics.median(rates["off"])
    cpu_cost = statistics.median(times["on"]) / statistics.median(times["off"]) - 1
    print(
        f"tracing {arguments.ratio:.0%} of the requests: {rate_cost:.1%} of the rate, {cpu_cost:.1%} of processor time"
    )
    result = {
        "case": arguments.case,
        "ratio": arguments.ratio,
        "pairs_per_s": summary(rates, 0),
        "rate_cost": round(rate_cost, 4),
        "cpu_ms_per_request": summary(times, 4),
        "cpu_cost": round(cpu_cost, 4),
    }
    print(json.dumps(result))


def summary(found: Mapping[str, list[float]], digits: int) -> dict[str, dict[str, object]]:
    """Median, relative spread and every value, for each of the two."""
    return {
        name: {
            "median": round(statistics.median(values), digits),
            "spread": round((max(values) - min(values)) / statistics.median(values), 3),
            "every": [round(value, digits) for value in values],
        }
        for name, values in found.items()
    }


if __name__ == "__main__":
    main()
