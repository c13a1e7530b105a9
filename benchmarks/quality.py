"""What reranking is worth, and what it costs: encoders, numbers of tokens, storage types and k, trained alike.

Run: python benchmarks/quality.py scenes [--seeds 3] [--jobs 2]

Every figure is what `python -m edje.evaluate` says of what `python -m edje.train` made, and each command is printed, so
that any one of them can be run alone. What has been trained or evaluated before is not done again: a run that was
stopped goes on. Draws docs/quality/*.svg and writes the tables; the last line of output is one JSON document.

The recipe itself is run once; its tower and first stage then serve all encoders, as a frozen tower does. Each encoder
starts from scratch, with as many seeds as asked for, on the same data, losses, negatives and number of steps. Of each
encoder R@1 of text-to-image search in int8, against GFLOP per pair.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from edje.evaluation.plots import Curve, Point, quality_vs_bytes, quality_vs_cost, quality_vs_k
from edje.evaluation.report import Report, read_report

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "edje" / "recipes"
STORAGES = ("fp16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared on a dataset."""

    recipe: str
    shared: tuple[str, ...]  # phases whose result, tower and first stage, all encoders of a seed share
    kinds: dict[str, tuple[str, ...]]  # encoder: changes to the recipe
    cascade_of: str  # the encoder whose late interaction picks for its layers
    cascade_budget: int
    tokens: tuple[int, ...]
    tokens_kind: str
    depths: tuple[int, ...]
    k: int


STUDIES = {
    "scenes": Study(
        recipe="scenes.toml",
        shared=("see",),
        kinds={
            # It has no late interaction: matching takes its place from the beginning.
            "full": (
                'joint.kind="full"',
                "joint.num_layers=5",
                "joint.text_layers=0",
                "joint.visual_layers=0",
                "joint.match_dim=0",
                "phase.1.losses={itm=1.0,grounding=0.5}",
                'phase.1.negatives={source="batch",per_sample=1,top_k=3}',
                "phase.2.losses={itm=1.0,grounding=0.25}",
            ),
            "late": ('joint.kind="late"',),
            "minimal": (),
            # Its words never meet the image, so there is nothing in which to ground them.
            "maxsim": (
                'joint.kind="maxsim"',
                "joint.num_layers=0",
                "joint.text_layers=4",
                "joint.visual_layers=4",
                "phase.1.losses={late_interaction=1.0}",
                "phase.2.losses={itm=1.0,late_interaction=0.25}",
            ),
        },
        cascade_of="minimal",
        cascade_budget=5,
        tokens=(8, 16, 32, 64),
        tokens_kind="minimal",
        depths=(5, 10, 20, 50),
        k=20,
    ),
}


class Runner:
    """Runs the two commands, each once for each thing asked."""

    def __init__(self, study: Study, folder: Path, common: Sequence[str], captions: int | None) -> None:
        self._study = study
        self._folder = folder
        self._common = common
        self._captions = captions

    def train(self, name: str, seed: int, changes: Sequence[str]) -> Path:
        """Train a variant unless it is there; returns its checkpoint."""
        out = self._folder / f"seed{seed}" / name
        if not (out / "checkpoint" / "config.json").exists():
            given = [word for change in (*self._common, f"seed={seed}", *changes) for word in ("--set", change)]
            self._run("edje.train", str(RECIPES / self._study.recipe), "--out", str(out), "--threads", "1", *given)
        return out / "checkpoint"

    def evaluate(self, checkpoint: Path, storage: str, scorer: str, depths: Sequence[int]) -> Report:
        """What evaluation says; kept beside the checkpoint."""
        name = f"{storage}-{scorer.replace(':', '')}-{'-'.join(map(str, depths))}.json"
        path = checkpoint.parent / name
        if not path.exists():
            words = [str(checkpoint), "--data", str(checkpoint.parent / "recipe.json"), "--direction", "text-to-image"]
            words += [word for k in depths for word in ("--k", str(k))]
            words += ["--storage", storage, "--scorer", scorer, "--out", str(path)]
            words += [] if self._captions is None else ["--captions", str(self._captions)]
            self._run("edje.evaluate", *words)
        return read_report(path.read_text())

    def _run(self, module: str, *words: str) -> None:
        command = [sys.executable, "-m", module, *words]
        print("$", shlex.join(["python", *command[1:]]), flush=True)
        with (self._folder / "log.txt").open("a") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise SystemExit(f"{module} ended with {done.returncode}; see {self._folder / 'log.txt'}")


def recall(report: Report, k: int) -> tuple[float, float]:
    """R@1 of the first stage and after reranking its best k."""
    for result in report.results:
        if result.comparison.k == k:
            row = result.comparison.row("R@1")
            return row.first_stage.value, row.reranked.value
    raise SystemExit(f"the report holds no k = {k}")


def shared_start(runner: Runner, study: Study) -> tuple[str, ...]:
    """Changes by which a run begins with the recipe's own tower and first stage."""
    base = runner.train("recipe", 0, ())
    return (f'start={{checkpoint="{base}",parts=["vision","first_stage"]}}', f"skip={json.dumps(study.shared)}")


def study_seed(runner: Runner, study: Study, start: Sequence[str], seed: int) -> dict[str, dict[str, float]]:
    """Every encoder with one seed: scorer -> R@1, first stage, GFLOP per pair at k."""
    found = {}
    for kind, changes in study.kinds.items():
        checkpoint = runner.train(kind, seed, (*start, *changes))
        scorers = {kind: "maxsim" if kind == "maxsim" else "torch"}
        if kind == study.cascade_of:
            scorers["cascade"] = f"cascade:{study.cascade_budget}"
        for name, scorer in scorers.items():
            report = runner.evaluate(checkpoint, "int8", scorer, (study.k,))
            before, after = recall(report, study.k)
            cost = report.results[0].cost
            found[name] = {"first_stage": before, "r1": after, "gflop": cost.per_pair_at(study.k) if cost else 0.0}
    return found


def token_curves(runner: Runner, study: Study, start: Sequence[str]) -> Iterator[tuple[int, str, Report]]:
    """One encoder with fewer and more tokens, in every storage type."""
    for num_tokens in study.tokens:
        changes = (*study.kinds[study.tokens_kind], f"adapter.num_tokens={num_tokens}", 'adapter.kind="decoder"')
        checkpoint = runner.train(f"tokens{num_tokens}", 0, (*start, *changes))
        for storage in STORAGES:
            yield num_tokens, storage, runner.evaluate(checkpoint, storage, "torch", (study.k,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--captions", type=int, help="ask with so many captions only")
    parser.add_argument("--set", action="append", default=[], help="a change to the recipe, for every run")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality")
    given = parser.parse_args()
    study = STUDIES[given.study]
    folder = ROOT / "build" / "quality" / given.study
    folder.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(study, folder, given.set, given.captions)

    start = shared_start(runner, study)
    wanted = list(product(range(given.seeds), study.kinds.items()))
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda one: runner.train(one[1][0], one[0], (*start, *one[1][1])), wanted))
    by_seed = [study_seed(runner, study, start, seed) for seed in range(given.seeds)]
    points = [
        Point(name, by_seed[0][name]["gflop"], tuple(found[name]["r1"] for found in by_seed)) for name in by_seed[0]
    ]
    first = statistics.fmean(found[study.tokens_kind]["first_stage"] for found in by_seed)
    title = f"{given.study}: text-to-image, k = {study.k}, int8"
    quality_vs_cost(points, given.out / f"{given.study}-cost.svg", title=title, first_stage=first)

    checkpoint = folder / "seed0" / study.tokens_kind / "checkpoint"
    depths = runner.evaluate(checkpoint, "int8", "torch", study.depths)
    curve = Curve(study.tokens_kind, tuple(Point("", k, (recall(depths, k)[1],)) for k in study.depths))
    quality_vs_k([curve], given.out / f"{given.study}-k.svg", title=f"{given.study}: int8", first_stage=first)

    by_bytes: dict[str, list[Point]] = {}
    for num_tokens, storage, report in token_curves(runner, study, start):
        size = report.payload_bytes_per_image
        point = Point("", size, (recall(report, study.k)[1],), note=str(num_tokens))
        by_bytes.setdefault(storage, []).append(point)
    if by_bytes:
        curves = [Curve(storage, tuple(found)) for storage, found in by_bytes.items()]
        quality_vs_bytes(curves, given.out / f"{given.study}-bytes.svg", title=title, first_stage=first)

    result = {
        "study": given.study,
        "k": study.k,
        "seeds": given.seeds,
        "encoders": by_seed,
        "by_k": {k: recall(depths, k)[1] for k in study.depths},
        "by_bytes": {s: {point.note: [point.x, *point.recalls] for point in found} for s, found in by_bytes.items()},
    }
    (given.out / f"{given.study}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
