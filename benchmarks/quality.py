"""Compares quality and cost of encoders, token numbers, storage types and k, all trained in the same way.

Run: python benchmarks/quality.py scenes|flickr8k [--seeds 3] [--jobs 2]

Trains with `python -m edje.train` and evaluates with `python -m edje.evaluate`; prints each command, so that each can
be run alone. Finished trainings and evaluations are not repeated: the same command resumes a run. Writes plots and
tables to docs/quality; the last line of output is one JSON document.

Scenes: all encoders use the tower and the first stage of the shipped model, so runs of several machines can be
compared. Each encoder starts from random weights, with the same data, losses, negatives and number of steps; `full` has
no late interaction and is trained by matching against more negatives instead. Flickr8k: all encoders are trained by the
recipe in one epoch, `full` by matching only. The figure is R@1 of text-to-image search in int8 against GFLOP per
pair. A cascade of budget 0 ranks by its late interaction only.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from edje.evaluation.report import Report, read_report
from quality_shown import show
from studies import STUDIES, Study

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "edje" / "recipes"
STORAGES = ("fp16", "int8", "int4")


class Runner:
    """Runs trainings and evaluations, each of them once."""

    def __init__(self, study: Study, folder: Path, common: Sequence[str], captions: int | None) -> None:
        self._study = study
        self._folder = folder
        self._common = common
        self._captions = captions

    def checkpoint(self, name: str, seed: int) -> Path:
        return self._folder / f"seed{seed}" / name / "checkpoint"

    def train(self, name: str, seed: int, changes: Sequence[str]) -> None:
        """Train a variant unless its checkpoint exists."""
        checkpoint = self.checkpoint(name, seed)
        if not (checkpoint / "config.json").exists():
            given = [word for change in (*self._common, f"seed={seed}", *changes) for word in ("--set", change)]
            self._run(
                "edje.train",
                str(RECIPES / self._study.recipe),
                "--out",
                str(checkpoint.parent),
                "--threads",
                "1",
                *given,
            )

    def evaluate(self, checkpoint: Path, storage: str, scorer: str, depths: Sequence[int]) -> Report:
        """Return the report of an evaluation, which is stored next to the checkpoint."""
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
    """Return R@1 of the first stage, and R@1 after reranking its best k."""
    for result in report.results:
        if result.comparison.k == k:
            row = result.comparison.row("R@1")
            return row.first_stage.value, row.reranked.value
    raise SystemExit(f"the report holds no k = {k}")


def runs_of(
    study: Study, num_seeds: int, start: Sequence[str], tokens: Sequence[int]
) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Yield the trainings of a study: name, seed and changes to the recipe, seed by seed."""
    for seed in range(num_seeds):
        for kind, changes in study.kinds.items():
            yield kind, seed, (*start, *changes)
    for num_tokens in tokens:
        # A decoder has any number of tokens; the adapter of the recipes has one for each patch.
        adapter = (f"adapter.num_tokens={num_tokens}", 'adapter.kind="decoder"', "adapter.places=true")
        yield tokens_name(num_tokens), 0, (*start, *study.kinds[study.tokens_kind], *adapter)


def tokens_name(num_tokens: int) -> str:
    return f"tokens{num_tokens}"


def encoder_results(runner: Runner, study: Study, seed: int) -> dict[str, dict[str, float]]:
    """Return every encoder's results with one seed: for each scorer R@1 before and after, and GFLOP per pair, at k."""
    found = {}
    for kind in study.kinds:
        depths = {"torch": study.depths}
        if kind == study.cascade_of:  # a cascade's scores depend on k, so each k is a separate evaluation
            depths |= {f"cascade:{budget}": (study.k,) for budget in study.cascade_budgets}
        for scorer, ks in depths.items():
            report = runner.evaluate(runner.checkpoint(kind, seed), "int8", scorer, ks)
            before, after = recall(report, study.k)
            cost = report.results[0].cost
            found[kind if scorer == "torch" else scorer] = {
                "first_stage": before,
                "r1": after,
                "gflop": cost.per_pair_at(study.k) if cost else 0.0,
            }
    return found


def depth_results(runner: Runner, study: Study, kind: str) -> dict[int, float]:
    """Return R@1 of one encoder by the number of candidates."""
    report = runner.evaluate(runner.checkpoint(kind, 0), "int8", "torch", study.depths)
    return {k: recall(report, k)[1] for k in study.depths}


def token_results(runner: Runner, study: Study, tokens: Sequence[int]) -> list[dict[str, object]]:
    """Return R@1 at k of one encoder with each number of tokens, the recipe's included, in every storage type."""
    checkpoints = {tokens_name(num_tokens): num_tokens for num_tokens in tokens}
    config = json.loads((runner.checkpoint(study.tokens_kind, 0) / "config.json").read_text())
    checkpoints[study.tokens_kind] = config["config"]["adapter"]["num_tokens"]
    found: list[dict[str, object]] = []
    for name, num_tokens in sorted(checkpoints.items(), key=lambda each: each[1]):
        for storage in STORAGES:
            report = runner.evaluate(runner.checkpoint(name, 0), storage, "torch", (study.k,))
            size, r1 = report.payload_bytes_per_image, recall(report, study.k)[1]
            adapter = "decoder" if name != study.tokens_kind else config["config"]["adapter"]["kind"]
            found.append({"tokens": num_tokens, "adapter": adapter, "storage": storage, "bytes": size, "r1": r1})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--encoders", default="", help="names of encoders, separated by commas; default: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each with one thread")
    parser.add_argument("--captions", type=int, help="number of captions to use as queries")
    parser.add_argument("--set", action="append", default=[], help="a change to the recipe, for every run")
    parser.add_argument("--no-tokens", action="store_true", help="train with the recipe's number of tokens only")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality")
    given = parser.parse_args()
    study = STUDIES[given.study]
    if given.encoders:
        if unknown := set(given.encoders.split(",")) - study.kinds.keys():
            parser.error(f"--encoders: {given.study} has no {min(unknown)!r}; choose from {', '.join(study.kinds)}")
        if study.tokens_kind not in given.encoders.split(","):
            parser.error(f"--encoders: add {study.tokens_kind!r}; the table of tokens and bytes needs it")
        study = replace(study, kinds={kind: study.kinds[kind] for kind in given.encoders.split(",")})
    folder = ROOT / "build" / "quality" / given.study
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(study, folder, given.set, given.captions)
    tokens = () if given.no_tokens else study.tokens

    start: tuple[str, ...] = ()
    if study.base is not None:
        base = ROOT / study.base
        parts = f'start={{checkpoint="{base}",parts=["vision","first_stage"]}}'
        start = (parts, f'vocabulary="{base}"', f"skip={json.dumps(study.shared)}")
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda run: runner.train(*run), runs_of(study, given.seeds, start, tokens)))

    result = {
        "study": given.study,
        "k": study.k,
        "captions": given.captions,
        "encoders": [encoder_results(runner, study, seed) for seed in range(given.seeds)],
        "by_k": {kind: depth_results(runner, study, kind) for kind in study.kinds},
        "tokens_kind": study.tokens_kind,
        "by_tokens": token_results(runner, study, tokens),
    }
    show(result, given.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
