"""Throughput of the op: forward, forward+backward and decode for P perspectives, against what else is installed.

    python benchmarks/throughput.py                                     # small defaults, under two minutes on a CPU
    python benchmarks/throughput.py --shapes "1,8192,768" --perspectives 1,3 --json results.json --plot results.png
    python benchmarks/throughput.py --table results.json                # the Markdown table of a run

Every result is compared with float64 before it is timed; one that is wrong is named and not timed, and the exit code
is 1. Progress goes to stderr, the table and a summary to stdout.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from throughput_cases import (
    DECODE_TOKENS,
    LAYOUTS,
    MODES,
    Case,
    Contender,
    contenders,
    error_limit,
    errors,
    exact_results,
    make_inputs,
    work,
)
from throughput_measure import Clock, copy_speed, peak_memory, quantiles
from throughput_report import conditions, plot, summary, table
from trwkv.report import environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHAPES = {"cpu": "1,2048,768;4,256,768", "cuda": "8,4096,2048;1,16384,2048;32,1024,768"}


class Benchmark:
    """A run: the rows measured so far, those refused and those skipped."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.load = _load_average()
        self.clock = Clock(options.device)
        self.copy = copy_speed(self.clock, seconds=options.seconds)
        _say(f"copy: {self.copy / 1e9:.3g} GB/s")
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.skipped: list[str] = []

    def run(self) -> None:
        present = contenders(self.options.device)
        chosen = [present[name] for name in self.options.backends or present]
        for B, T, C in self.options.shapes:
            for mode in self.options.modes:
                if mode == "decode" and [B, 1, C] in [row["shape"] for row in self.rows]:
                    continue
                slow: dict[str, float] = {}
                for P in self.options.perspectives:
                    length = DECODE_TOKENS if mode == "decode" else T
                    layout, dtype = self.options.layout, DTYPES[self.options.dtype]
                    self._case(Case(mode, B, length, C, P, layout, dtype, self.options.device), chosen, slow)

    def _case(self, case: Case, chosen: list[Contender], slow: dict[str, float]) -> None:
        """Everyone's row for one case. `slow` maps a contender to its milliseconds per perspective."""
        inputs = make_inputs(case)
        exact = exact_results(case, inputs)
        for contender in chosen:
            predicted = slow.get(contender.name, 0.0) * case.P / 1e3
            if contender.max_tokens and contender.max_tokens < case.T:
                self._skip(case, contender, f"timed up to T = {contender.max_tokens} only")
            elif contender.many_calls and predicted > self.options.max_call_seconds:
                self._skip(case, contender, f"{case.P} calls would take about {predicted:.0f} s")
            else:
                row = self._row(case, contender, inputs, exact)
                if row:
                    slow[contender.name] = (
                        row["ms_median"] * (case.T if case.mode == "decode" else 1) / case.P
                    )

    def _row(
        self, case: Case, contender: Contender, inputs: Any, exact: dict[str, torch.Tensor]
    ) -> dict[str, Any] | None:
        fn = work(case, contender, inputs)
        found = errors(case, contender, inputs, fn(), exact)
        if not max(found.values()) <= error_limit(case.dtype):
            worst = max(found, key=lambda name: found[name])
            self.wrong.append(
                f"{contender.name} ({case}): {worst} is off by {found[worst]:.2g} of its largest value; "
                f"at most {error_limit(case.dtype):.2g} is allowed"
            )
            _say(f"WRONG, not timed: {self.wrong[-1]}")
            return None
        decoding = case.mode == "decode"
        samples = self.clock.samples(fn, seconds=self.options.seconds, flush=not decoding)
        samples = [ms / (case.T if decoding else 1) for ms in samples]
        p20, median, p80 = quantiles(samples)
        speed = case.necessary_bytes / (median / 1e3)
        self.rows.append(
            {
                "shape": [case.B, 1 if decoding else case.T, case.C],
                "mode": case.mode,
                "perspectives": case.P,
                "implementation": contender.name,
                "calls": case.P if contender.many_calls else 1,
                "ms_median": median,
                "ms_p20": p20,
                "ms_p80": p80,
                "tokens_per_second": case.tokens / (median / 1e3),
                "gb_per_second": speed / 1e9,
                "percent_of_copy": 100 * speed / self.copy,
                "peak_memory_mib": peak_memory(fn, case.device) / 2**20,
                "error": max(found.values()),
                "errors": found,
                "samples_ms": [float(f"{ms:.5g}") for ms in samples],
            }
        )
        _say(f"{case}: {contender.name} {median:.4g} ms, error {max(found.values()):.1e}")
        return self.rows[-1]

    def _skip(self, case: Case, contender: Contender, reason: str) -> None:
        self.skipped.append(f"{contender.name} ({case}): {reason}")
        _say(f"skipped: {self.skipped[-1]}")

    def results(self) -> dict[str, Any]:
        kept = ("device", "dtype", "layout", "seconds", "max_call_seconds")
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "commit": _commit(),
            "environment": environment(self.options.device),
            "options": {name: getattr(self.options, name) for name in kept},
            "load_average_before": self.load,
            "copy_gb_per_second": self.copy / 1e9,
            "rows": self.rows,
            "wrong": self.wrong,
            "skipped": self.skipped,
        }


def _selected(results: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The rows of the shapes and perspectives asked for; a shape takes its decoding steps with it."""
    shapes = [[B, length, C] for B, T, C in options.shapes or [] for length in (T, 1)]
    rows = [
        row
        for row in results["rows"]
        if (not shapes or row["shape"] in shapes)
        and (not options.perspectives or row["perspectives"] in options.perspectives)
    ]
    return {**results, "rows": rows}


def _load_average() -> float | None:
    """Programs that were running in the last minute: above zero they shared the machine with this one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _commit() -> str:
    """The commit that ran, marked "-dirty" if what was measured differs from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).parent.parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "trwkv", "benchmarks/*.py")
    return (commit or "unknown") + ("-dirty" if changed else "")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes = [tuple(int(n) for n in part.split(",")) for part in text.split(";")]
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(f"expected B,T,C;B,T,C;..., each at least 1; got {text!r}")
    return shapes


def _perspectives(text: str) -> list[int]:
    values = [int(n) for n in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1; got {text!r}")
    return values


def _modes(text: str) -> list[str]:
    modes = text.split(",")
    if not set(modes) <= set(MODES):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(MODES)}; got {text!r}")
    return modes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--shapes", type=_shapes, metavar="B,T,C;...", help=f"default: {DEFAULT_SHAPES}")
    parser.add_argument("--perspectives", type=_perspectives, metavar="P,P", help="default: 1,2,3,4")
    parser.add_argument(
        "--modes", type=_modes, default=list(MODES), help=f"some of {','.join(MODES)} (default: all)"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="aggregated", help="who has its own k, v and output"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of k and v (default: float32, bfloat16 on a GPU)")
    parser.add_argument(
        "--backends", metavar="NAME,NAME", help="implementations (default: all that are present)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on a row (default: 0.5)")
    parser.add_argument(
        "--max-call-seconds", type=float, default=5.0, help="skip P calls of a peer that take longer"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a PNG")
    parser.add_argument(
        "--table", type=Path, metavar="RESULTS", help="print (with --plot: draw) earlier results only"
    )
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.table is None:
        options.shapes = options.shapes or _shapes(DEFAULT_SHAPES[options.device])
        options.perspectives = options.perspectives or [1, 2, 3, 4]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if options.backends:
        options.backends, present = options.backends.split(","), contenders(options.device)
        if not set(options.backends) <= set(present):
            parser.error(
                f"--backends: expected some of {','.join(present)}; got {','.join(options.backends)}"
            )
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.table:
        results = _selected(json.loads(options.table.read_text()), options)
    else:
        if options.threads:
            torch.set_num_threads(options.threads)
        benchmark = Benchmark(options)
        benchmark.run()
        results = benchmark.results()
    print("\n".join([table(results), "", conditions(results), "", *summary(results)]))
    if options.json and not options.table:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    for line in results["wrong"]:
        _say(f"WRONG, not timed: {line}")
    return 1 if results["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
