"""Do several temporal perspectives help, when, and at what cost? The claims of arXiv 2402.02625, at a small scale.

    python benchmarks/reproduce.py --config benchmarks/reproduce/cpu.yaml --data DATA

trains a base RWKV-4 on novels, gives it perspectives by the paper's recipe, one factor at a time, with several
seeds, and measures each. DATA holds the texts that the configuration file names. It can be stopped at any time, and
`--minutes 8` stops it by itself: the same command continues. Started twice, in two terminals, the two share the
work. What is done so far is in OUTPUT/results.json, and

    python benchmarks/reproduce.py --results OUTPUT/results.json --document docs/reproduction.md

writes the tables of the document anew, and its plots beside the results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trwkv.runs import number, read_json, write_json, write_whole


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = parser.add_argument_group("to run a study")
    run.add_argument("--config", type=Path, help="such as benchmarks/reproduce/cpu.yaml")
    run.add_argument("--data", type=Path, help="folder of the texts that the configuration names")
    run.add_argument("--output", type=Path, help="(default: runs/reproduce-NAME-OF-THE-CONFIGURATION)")
    run.add_argument("--cells", help="only these, separated by commas, and the bases they start from")
    run.add_argument("--minutes", type=number(float, above=True), help="stop after so long")
    run.add_argument("--device", default="cpu", help='"cpu" or "cuda" (default: %(default)s)')
    run.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    show = parser.add_argument_group("to show one")
    show.add_argument("--results", type=Path, help="results.json of a study")
    show.add_argument("--table", help="print this table")
    show.add_argument("--document", type=Path, help="a Markdown file whose tables to write anew")
    options = parser.parse_args(arguments)
    if (options.config is None) == (options.results is None):
        parser.error("expected either --config, to run a study, or --results, to show one")
    try:
        return _show(options) if options.results else _run(options, parser)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _show(options: argparse.Namespace) -> int:
    import reproduce_report as report

    results = read_json(options.results)
    if options.table:
        print(report.table(results, options.table))
    if options.document:
        report.plots(results, options.results)
        report.rewrite(options.document)
    if not options.table and not options.document:
        print("\n\n".join(f"{name}\n\n{report.table(results, name)}" for name in results["tables"]))
    return 0


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.data is None:
        parser.error("--data: expected the folder of the texts; got none")
    from transformers.utils import logging

    import reproduce_study as studies
    from trwkv.training import TrainingInterrupted

    logging.disable_progress_bar()
    study = studies.Study.read(options.config)
    chosen = options.cells.split(",") if options.cells else list(study.cells)
    if unknown := set(chosen) - set(study.cells):
        raise ValueError(f"--cells: unknown: {', '.join(sorted(unknown))}; known: {', '.join(study.cells)}")
    folder = options.output or Path("runs", f"reproduce-{options.config.stem}")
    folder.mkdir(parents=True, exist_ok=True)
    texts = studies.Texts(study, options.data, folder)
    runner = studies.Runner(study, texts, folder, options.device, options.bf16)
    for job in study.jobs():
        runner.check(*job)
    try:
        with _stopping_after(options.minutes):
            jobs = [(cell, seed) for cell, seed in study.jobs() if cell.name in chosen]
            while left := [job for job in jobs if not _is_done(runner, *job)]:
                ran = False
                for cell, seed in left:
                    if _ensure(runner, cell, seed, wait=False):
                        ran = True
                        _collect(runner, options)
                if not ran:  # others are at all that is left
                    _ensure(runner, *left[0], wait=True)
            with FileLock(folder / "cost.lock"):
                _measure_cost(runner, [study.cells[name] for name in chosen])
            _collect(runner, options)
    except (KeyboardInterrupt, TrainingInterrupted):
        print(f"\nStopped. What is done is kept in {folder}; the same command continues.")
        return 130
    print(f"Complete: {folder / 'results.json'}")
    return 0


@contextmanager
def _stopping_after(minutes: float | None) -> Iterator[None]:
    """Here SIGTERM, and the end of the time, stop the program as Ctrl-C does; training writes a checkpoint."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def time_is_up(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if minutes:
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, time_is_up)
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        if minutes:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_done(runner: Any, cell: Any, seed: int) -> bool:
    return (runner.place(cell.name, seed) / "result.json").exists()


def _ensure(runner: Any, cell: Any, seed: int, wait: bool) -> bool:
    """Run a cell unless it is done, or, without `wait`, another process is at it or its base. Whether it was run."""
    if _is_done(runner, cell, seed):
        return False
    if cell.start == "upcycled":
        base = runner.study.cells[cell.base]
        _ensure(runner, base, seed, wait)
        if not _is_done(runner, base, seed):
            return False
    place = runner.place(cell.name, seed)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / "lock", timeout=-1 if wait else 0):
            if _is_done(runner, cell, seed):
                return False
            print(f"\n{cell.name}, seed {seed}", flush=True)
            runner.run(cell, seed)
            return True
    except Timeout:
        return False


def _measure_cost(runner: Any, cells: list[Any]) -> None:
    """Once everything is trained, and nothing else runs, what a step of each cell takes."""
    path = runner.folder / "cost.json"
    known = read_json(path) if path.exists() else {}
    for cell in cells:
        if cell.name not in known:
            known[cell.name] = runner.cost(cell)
            write_json(path, known)


def _collect(runner: Any, options: argparse.Namespace) -> None:
    """Write results.json: every run so far, the configuration and the machine."""
    from trwkv.report import environment

    runs = [
        read_json(path)
        for cell, seed in runner.study.jobs()
        if (path := runner.place(cell.name, seed) / "result.json").exists()
    ]
    cost = runner.folder / "cost.json"
    content = {
        "config": options.config.name,
        "environment": environment(options.device),
        "bf16": options.bf16,
        "model": runner.study.model,
        "seeds": runner.study.seeds,
        "evaluation": runner.study.evaluation,
        "tables": runner.study.tables,
        "cells": {name: asdict(cell) for name, cell in runner.study.cells.items()},
        "cost": read_json(cost) if cost.exists() else {},
    }
    lines = ",\n".join(json.dumps(run) for run in runs)  # a line each: they are long
    text = json.dumps(content, indent=1)[:-2] + f',\n "runs": [\n{lines}\n]}}\n'
    with FileLock(runner.folder / "results.lock"):
        write_whole(runner.folder / "results.json", text)


if __name__ == "__main__":
    sys.exit(main())
