"""What tracing costs: the same backlog drained with and without it, alternating.

Run: python benchmarks/tracing.py [--repeats 7] [--ratio 0.1] [--case cold|hot] [--quick]

As in benchmarks/service.py: 100 candidates a request, int8 blobs of 64 x 384, an engine that computes nothing, so that
whatever is not tracing is as cheap as it gets. Sampled requests go to an OTLP endpoint in a process of its own that
reads and forgets them, and metrics with them. The cost is one minus the ratio of the medians; the spread tells how far
to believe it. The last line of output is one JSON document.
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
from service import COLD_SLOTS, HOT_IMAGES, NUM_IMAGES, drained

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
    rates: dict[str, list[float]] = {"off": [], "on": []}
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
                    rates[name].append(drained(ready, **case))
                print(f"{name:4}{rates[name][-1]:10.0f} pairs/s", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    cost = 1 - medians["on"] / medians["off"]
    print(f"tracing {arguments.ratio:.0%} of the requests costs {cost:.1%} of the throughput")
    result = {
        "case": arguments.case,
        "ratio": arguments.ratio,
        "pairs_per_s": {name: round(rate) for name, rate in medians.items()},
        "cost": round(cost, 4),
        "spread": {name: round((max(found) - min(found)) / medians[name], 3) for name, found in rates.items()},
        "every_rate": {name: [round(rate) for rate in found] for name, found in rates.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
