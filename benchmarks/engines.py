"""Measures pairs per second of the engines on this processor, compared with other common implementations.

Run: python benchmarks/engines.py [--repeats 5] [--pairs 64] [--threads N] [--plot docs/engines.svg]

MiniLM-L12's shape with random weights, 64 visual tokens in int8 and 18 text tokens. All run in one process, in turn
and several times; medians are compared:

- the authors' code: transformers' BertForMaskedLM over the embedded sequence with vocabulary head, then the pooler
- sentence-transformers' CrossEncoder over texts of the same number of tokens
- this project's engine for each encoder, from text ids and slots to logits with dequantisation; one query for all pairs

Then how much a logit depends on its batch, with free and fixed shapes; images per second of towers, alone and with the
adapter; and the start-up time by step. The last line of output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from edje.config import EdjeConfig, JointConfig  # noqa: E402
from edje.evaluation.plots import COLOURS  # noqa: E402
from edje.init import write_untrained  # noqa: E402
from edje.model.flops import cost_of  # noqa: E402
from edje.model.variants import VARIANTS  # noqa: E402
from edje.tower_config import TimmVisionConfig  # noqa: E402
from protocols.quantize import quantize  # noqa: E402
from rivals import AuthorsWay, text_cross_encoder  # noqa: E402
from trt.contract import Engine  # noqa: E402
from trt.load import load_engine  # noqa: E402

NUM_VISUAL, NUM_TEXT, TOKEN_DIM = 64, 18, 384
TEXT = [2, *range(1000, 998 + NUM_TEXT), 3]
CASCADE_BUDGET = 5
_RANDOM = np.random.default_rng(0)

#: A program that loads and warms an engine, and prints the time of each step.
START_UP = """
import json, sys, time
marks = {"interpreter": time.time()}
import torch
marks["import torch"] = time.time()
from pathlib import Path
from trt.load import load_engine
import trt.runtimes.torch_engine
marks["import the rest"] = time.time()
torch.set_num_threads(int(sys.argv[2]))
engine = load_engine("torch", Path(sys.argv[1]), storage="int8", num_slots=10_000, max_pairs=512, max_images=1,
                     num_threads=None, device="cpu")
marks["load the checkpoint"] = time.time()
engine.warm_up()
marks["warm up"] = time.time()
print(json.dumps(marks))
"""


def shapes() -> dict[str, JointConfig]:
    """Return the compared encoders: the paper's, and those with late or no fusion of text and image."""
    late = VARIANTS["paper-l16-late"].joint
    return {
        "full": VARIANTS["paper-l16"].joint,
        "late": late,
        "minimal": VARIANTS["paper-l16-minimal"].joint,
        "maxsim": replace(late, kind="maxsim", num_layers=0),
    }


def opened(checkpoint: Path, num_slots: int, **options: bool) -> Engine:
    return load_engine(
        "torch",
        checkpoint,
        storage="int8",
        num_slots=num_slots,
        max_pairs=max(num_slots, 1),
        max_images=4,
        num_threads=None,
        device="cpu",
        **options,
    )


def encoder(folder: Path, kind: str, joint: JointConfig, num_slots: int, **options: bool) -> Engine:
    """Return an engine for an encoder, with random tokens in its slots and a small tower, which is not timed."""
    tiny = VARIANTS["tiny"]
    if not folder.exists():
        config = replace(tiny, name=kind, adapter=replace(tiny.adapter, num_tokens=NUM_VISUAL), joint=joint)
        write_untrained(config, folder, seed=0)
    engine = opened(folder, num_slots, **options)
    random = np.random.default_rng(0)
    to_tokens, to_scales, rows = engine.slab.stage(range(num_slots))
    for row in rows:
        values, scales = quantize("int8", random.normal(size=(NUM_VISUAL, TOKEN_DIM)).astype(np.float32))
        to_tokens[row], to_scales[row] = np.frombuffer(values, np.uint8), np.frombuffer(scales, np.uint8)
    engine.slab.publish(range(num_slots), rows)
    return engine


def new_texts(number: int) -> list[list[int]]:
    """Return new texts, because engines cache the rows of encoded texts."""
    middle = _RANDOM.integers(1000, 30_000, (number, NUM_TEXT - 2))
    return [[2, *row.tolist(), 3] for row in middle]


def one_query(engine: Engine, num_pairs: int) -> Callable[[], object]:
    """Return a call that encodes a new query and scores all its candidates."""
    queries, slots = np.zeros(num_pairs, np.int32), np.arange(num_pairs, dtype=np.int32)
    return lambda: engine.score_pairs(engine.encode_queries(new_texts(1)), queries, slots)


def cascade(engine: Engine, num_pairs: int) -> Callable[[], object]:
    """Return a call that scores all candidates by late interaction, and the best `CASCADE_BUDGET` by the layers."""
    queries, slots = np.zeros(num_pairs, np.int32), np.arange(num_pairs, dtype=np.int32)

    def call() -> object:
        encoded = engine.encode_queries(new_texts(1))
        match = engine.match_pairs(encoded, queries, slots)  # type: ignore[attr-defined]
        best = np.argsort(-match)[:CASCADE_BUDGET].astype(np.int32)
        return engine.score_pairs(encoded, queries[:CASCADE_BUDGET], best)

    return call


def seconds(paths: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the times of every path, run in turn `repeats` times after one round of warm-up."""
    took: dict[str, list[float]] = {name: [] for name in paths}
    for repeat in range(repeats + 1):
        for name, path in paths.items():
            began = time.perf_counter()
            path()
            if repeat:
                took[name].append(time.perf_counter() - began)
    return took


def pairs_per_s(folder: Path, num_pairs: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return rate, GFLOP per pair and GFLOP/s of every path."""
    visual = torch.randn(num_pairs, NUM_VISUAL, TOKEN_DIM)
    text = torch.tensor([TEXT]).expand(num_pairs, -1)
    authors, authors_bf16 = AuthorsWay().eval(), AuthorsWay().eval().bfloat16()
    cross, pair = text_cross_encoder(folder / "cross", NUM_TEXT + NUM_VISUAL + 1)
    texts = [pair] * num_pairs
    paths: dict[str, Callable[[], object]] = {
        "authors, fp32": lambda: authors.score(text, visual),
        "authors, bf16": lambda: authors_bf16.score(text, visual),
        "CrossEncoder, fp32": lambda: cross.predict(texts, batch_size=num_pairs, show_progress_bar=False),
    }
    for kind, joint in shapes().items():
        paths[kind] = one_query(encoder(folder / kind, kind, joint, num_pairs), num_pairs)
    minimal = encoder(folder / "minimal", "minimal", shapes()["minimal"], num_pairs)
    paths[f"cascade:{CASCADE_BUDGET} over minimal"] = cascade(minimal, num_pairs)
    fixed = encoder(folder / "full", "full", shapes()["full"], num_pairs, fixed_buckets=True)
    paths["full, fixed shapes"] = one_query(fixed, num_pairs)
    found = {}
    for name, times in seconds(paths, repeats).items():
        rate = num_pairs / statistics.median(times)
        found[name] = {"pairs_per_s": round(rate, 1), "spread": round((max(times) - min(times)) / min(times), 2)}
        kind = name.partition(",")[0]
        if kind in shapes():
            gflop = cost_of(shapes()[kind], NUM_TEXT, NUM_VISUAL).per_pair / 1e9
            found[name] |= {"gflop_per_pair": round(gflop, 4), "gflop_per_s": round(gflop * rate, 1)}
    return found


def moved_by_batch(folder: Path) -> dict[str, dict[str, float]]:
    """Return the largest change of a pair's logit between a batch of one and every index of larger batches."""
    found = {}
    for kind, joint in shapes().items():
        found[kind] = {}
        for name, is_fixed in (("free", False), ("fixed shapes", True)):
            engine = encoder(folder / kind, kind, joint, 40, fixed_buckets=is_fixed)
            queries = engine.encode_queries([TEXT])
            one = np.zeros(1, np.int32)
            alone = np.array([engine.score_pairs(queries, one, np.array([slot], np.int32))[0] for slot in range(40)])
            worst = 0.0
            for size in (2, 5, 8, 31, 32, 40):
                slots = np.roll(np.arange(40, dtype=np.int32), size)[:size]
                logits = engine.score_pairs(queries, np.zeros(size, np.int32), slots)
                worst = max(worst, float(np.abs(logits - alone[slots]).max()))
            found[kind][name] = worst
    return found


def towers() -> dict[str, EdjeConfig]:
    """Return the towers to time, each with the paper's adapter."""
    b16 = VARIANTS["paper-b16"]
    mobile = TimmVisionConfig("mobilenetv2_100", dim=1280, tokens_per_image=49, pooled_dim=1280, num_heads=8)
    at_224 = replace(b16.preprocess, image_size=224)
    return {
        "SigLIP 2 B/16-384": b16,
        "MobileNetV2 (49 x 1280)": replace(b16, name="mobilenet", vision=mobile, preprocess=at_224),
    }


def images_per_s(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return images per second of the engine (bytes to tokens) and of the tower alone."""
    found = {}
    for name, config in towers().items():
        checkpoint = folder / config.name
        write_untrained(config, checkpoint, seed=0)
        engine = opened(checkpoint, 1)
        size = config.preprocess.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3, size, size), np.uint8)
        vision, ready = engine._model.edje.vision, torch.randn(2, 3, size, size)  # type: ignore[attr-defined]

        def bare(vision: torch.nn.Module = vision, ready: torch.Tensor = ready) -> None:
            with torch.inference_mode():
                vision(ready.to(next(vision.parameters()).dtype))

        times = seconds({"tower": bare, "engine": lambda e=engine, p=pixels: e.encode_images(p)}, repeats)
        found[name] = {each: round(2 / statistics.median(took), 2) for each, took in times.items()}
    return found


def start_up(checkpoint: Path, repeats: int) -> dict[str, float]:
    """Return the median seconds of each start-up step."""
    steps: dict[str, list[float]] = {}
    for _ in range(repeats):
        last = time.time()
        command = [sys.executable, "-c", START_UP, str(checkpoint), str(torch.get_num_threads())]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for step, at in json.loads(done.stdout).items():
            steps.setdefault(step, []).append(at - last)
            last = at
    return {step: round(statistics.median(took), 2) for step, took in steps.items()}


def plot(rates: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw bars, from the slowest path to the fastest."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    names = sorted(rates, key=lambda name: rates[name]["pairs_per_s"])
    figure, axes = pyplot.subplots(figsize=(7.2, 0.5 * len(names) + 0.8), layout="constrained")
    heights = [rates[name]["pairs_per_s"] for name in names]
    ours = {kind: COLOURS[0] for kind in shapes()}
    bars = axes.barh(names, heights, color=[ours.get(name.partition(",")[0], "#999999") for name in names])
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.set(xscale="log", xlabel=f"pairs per second, {NUM_VISUAL} visual and {NUM_TEXT} text tokens", xmargin=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="repeats of every measurement; the median counts")
    parser.add_argument("--pairs", type=int, default=64, help="number of candidates of the query")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's choice")
    parser.add_argument("--plot", type=Path, help="file to draw the rates to")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)  # libraries warn about weights, which are random on purpose
    with tempfile.TemporaryDirectory(prefix="edje-engines-") as name:
        folder = Path(name)
        rates = pairs_per_s(folder, arguments.pairs, arguments.repeats)
        moved = moved_by_batch(folder)
        encoded = images_per_s(folder, arguments.repeats)
        started = start_up(folder / "full", min(3, arguments.repeats))
    table = Table("path", "pairs/s", "x authors fp32", "GFLOP a pair", "GFLOP/s")
    base = rates["authors, fp32"]["pairs_per_s"]
    for path, row in rates.items():
        cells = (f"{row[cell]:g}" if cell in row else "" for cell in ("gflop_per_pair", "gflop_per_s"))
        table.add_row(path, f"{row['pairs_per_s']:,.0f}", f"{row['pairs_per_s'] / base:.1f}", *cells)
    Console().print(table)
    if arguments.plot:
        plot(rates, arguments.plot)
    result = {
        "threads": torch.get_num_threads(),
        "pairs": arguments.pairs,
        "rates": rates,
        "moved_by_batch": moved,
        "images_per_s": encoded,
        "start_up_s": started,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
