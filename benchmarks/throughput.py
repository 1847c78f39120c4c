"""Throughput of the op: forward, backward and decode for P perspectives, against what else is installed.

    python benchmarks/throughput.py                                     # small defaults, under two minutes on a CPU
    python benchmarks/throughput.py --json FILE --minutes 9             # again with --resume until it is done
    python benchmarks/throughput.py --shapes "1,8192,768" --perspectives 1,3 --json results.json --plot results.png
    python benchmarks/throughput.py --table results.json                # the Markdown table of a run

Every result is compared with float64 before it is timed; one that is wrong is named and not timed, and the exit code
is 1. Whoever fails is named with the error, and the run goes on. Progress goes to stderr, tables to stdout.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from throughput_cases import DTYPES, LAYOUTS, MODES
from throughput_contenders import IN_PLACE, SLOW_TO_START, contenders
from throughput_official import OFFICIAL, find_sources
from throughput_plots import plot, plot_length, plot_perspectives
from throughput_report import conditions, first_calls, not_run, read, summary, table
from throughput_run import Benchmark

SETS = {
    "quick": {
        "cpu": {"shapes": "1,2048,768;4,256,768"},
        "cuda": {"shapes": "8,4096,2048;1,16384,2048;32,1024,768"},
        "modes": "forward,forward+backward,decode",
        "perspectives": "1,2,3,4",
        "layouts": "aggregated",
    },
    "main": {
        "cpu": {"shapes": "1,2048,768;4,256,768"},
        "cuda": {
            "shapes": "8,1024,768;32,2048,1024;8,4096,4096;1,8192,2048;1,65536,2048",
            "decode": "1,2048;64,2048",
            "backends": ("triton", IN_PLACE, "flash-linear-attention", OFFICIAL),
        },
        "modes": ",".join(MODES),
        "perspectives": "1,2,3,4",
        "layouts": "aggregated",
    },
    "full": {
        "cpu": {"shapes": "1,2048,768;4,256,768;1,8192,768", "decode": "1,768;64,768"},
        "cuda": {
            "shapes": "1,1024,768;8,1024,768;32,2048,1024;8,4096,4096;1,8192,2048;1,65536,2048",
            "decode": "1,2048;64,2048;512,2048",
        },
        "modes": ",".join(MODES),
        "perspectives": "1,2,3,4,8",
        "layouts": ",".join(LAYOUTS),
    },
    "scaling": {
        "cpu": {"shapes": ";".join(f"1,{2**n},768" for n in range(9, 15))},
        "cuda": {"shapes": ";".join(f"1,{2**n},2048" for n in range(10, 18))},
        "modes": "forward,forward+backward",
        "perspectives": "1,2,3,4,8",
        "layouts": "aggregated",
    },
}
"""What runs by name; any of it can be replaced by the option of that name. "scaling" is for the two scaling plots. On a
GPU "main" takes some minutes with kernels compiled, "full" hours: 1440 rows, 500 of our kernels."""


def _selected(results: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The rows asked for; a shape takes its decoding steps with it."""
    shapes = [[B, length, C] for B, T, C in options.shapes or [] for length in (T, 1)]
    shapes += [[B, 1, C] for B, C in options.decode or []]
    wanted = {
        "shape": shapes,
        "mode": options.modes,
        "perspectives": options.perspectives,
        "dtype": options.dtypes,
        "implementation": options.backends,
    }
    rows = [
        row
        for row in results["rows"]
        if all(not chosen or row[name] in chosen for name, chosen in wanted.items())
        and (not options.layouts or row["perspectives"] == 1 or row["layout"] in options.layouts)
    ]
    return {**results, "rows": rows}


def _numbers(per_item: int, names: str) -> Callable[[str], list[tuple[int, ...]]]:
    def parse(text: str) -> list[tuple[int, ...]]:
        items = [tuple(int(n) for n in part.split(",")) for part in text.split(";")]
        if any(len(item) != per_item or min(item) < 1 for item in items):
            raise argparse.ArgumentTypeError(f"expected {names};{names};..., each at least 1; got {text!r}")
        return items

    return parse


def _perspectives(text: str) -> list[int]:
    values = [int(n) for n in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1; got {text!r}")
    return values


def _some_of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(names):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(names)}; got {text!r}")
        return chosen

    return parse


PARSERS = {
    "shapes": _numbers(3, "B,T,C"),
    "decode": _numbers(2, "B,C"),
    "perspectives": _perspectives,
    "modes": _some_of(MODES),
    "layouts": _some_of(LAYOUTS),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--set", choices=SETS, help="what runs by default: quick on a CPU, main on a GPU")
    add("--shapes", type=PARSERS["shapes"], metavar="B,T,C;...", help="default: the set's")
    add(
        "--decode",
        type=PARSERS["decode"],
        metavar="B,C;...",
        help="decoded (default: the set's, or B, C of shapes)",
    )
    add("--perspectives", type=_perspectives, metavar="P,P", help="default: the set's")
    add("--modes", type=PARSERS["modes"], metavar="MODE,MODE", help=f"some of {','.join(MODES)}")
    add(
        "--layout",
        dest="layouts",
        type=PARSERS["layouts"],
        metavar="LAYOUT,...",
        help=f"who has its own k, v and output: some of {','.join(LAYOUTS)}",
    )
    add(
        "--dtype",
        dest="dtypes",
        type=_some_of(tuple(DTYPES)),
        metavar="DTYPE,...",
        help="of k and v (default: float32, bfloat16 on a GPU)",
    )
    add(
        "--backends",
        type=lambda text: text.split(","),
        metavar="NAME,NAME",
        help=f"implementations (default: all that are present; {','.join(SLOW_TO_START)} not in the quick set)",
    )
    add(
        "--official-cuda",
        type=Path,
        metavar="PATH",
        help="a folder with RWKV-LM's wkv_op.cpp and wkv_cuda.cu",
    )
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--seconds", type=float, default=0.5, help="to spend on a row (default: 0.5)")
    add("--minutes", type=float, default=float("inf"), help="begin no row after this time")
    add("--max-call-seconds", type=float, default=5.0, help="skip P calls of a peer that take longer")
    add(
        "--first-call",
        action="store_true",
        help="also what a fresh process waits for (first case, every mode)",
    )
    _output_options(parser)
    return parser


def _output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", type=Path, metavar="PATH", help="write everything measured, after every row")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in the --json file: what it has is not run again",
    )
    add("--retry", action="store_true", help="with --resume: run again what failed or was wrong")
    add(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="profile the first case instead; timelines go to the folder",
    )
    add("--plot", type=Path, metavar="PATH", help="draw a PNG: milliseconds over P")
    add("--plot-length", type=Path, metavar="PATH", help="draw a PNG: milliseconds over T, against a copy")
    add("--plot-perspectives", type=Path, metavar="PATH", help="draw a PNG: time over P, P = 1 being 1")
    add("--table", type=Path, metavar="RESULTS", help="print (with --plot...: draw) earlier results only")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.table:
        try:
            options.earlier = read(options.table)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--table: expected results that --json wrote; got {options.table} ({error!r})")
        return options
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    _fill_in(options)
    if options.device == "cpu" and "decode-graph" in options.modes:
        parser.error("--modes: decode-graph is a CUDA graph; got device cpu")
    if options.official_cuda:
        if options.device == "cpu":
            parser.error("--official-cuda: it runs on a GPU; got device cpu")
        try:
            find_sources(options.official_cuda, torch.float32)
        except (OSError, ValueError) as error:
            parser.error(f"--official-cuda: {error}")
    present = [*contenders(options.device), *([OFFICIAL] if options.official_cuda else [])]
    if options.backends is None:
        chosen = SETS[options.set][options.device].get("backends", present)
        options.backends = [
            x for x in present if x in chosen and (options.set != "quick" or x not in SLOW_TO_START)
        ]
    elif not set(options.backends) <= set(present):
        parser.error(f"--backends: expected some of {','.join(present)}; got {','.join(options.backends)}")
    if options.retry and not options.resume:
        parser.error("--retry: needs --resume")
    if options.resume and not options.json:
        parser.error("--resume: needs --json, the file to go on with")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that exists; got {options.json}")
    if options.json and options.json.exists() and not options.resume and not options.profile:
        parser.error(f"--json: {options.json} exists; --resume goes on with it, or remove it first")
    return options


def _fill_in(options: argparse.Namespace) -> None:
    """The set's value of every option that was not given."""
    options.set = options.set or ("main" if options.device == "cuda" else "quick")
    chosen = {**SETS[options.set], **SETS[options.set][options.device]}
    if options.device == "cpu":
        chosen["modes"] = chosen["modes"].removesuffix(",decode-graph")
    options.dtypes = options.dtypes or ["bfloat16" if options.device == "cuda" else "float32"]
    if options.shapes:
        chosen.pop("decode", None)
    for name, of_text in PARSERS.items():
        if getattr(options, name) is None and name in chosen:
            setattr(options, name, of_text(chosen[name]))
    if options.decode is None:
        options.decode = list(dict.fromkeys((B, C) for B, _, C in options.shapes))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.table:
        results = _selected(options.earlier, options)
    else:
        if options.threads:
            torch.set_num_threads(options.threads)
        benchmark = Benchmark(options)
        if options.profile:
            print("\n\n".join(benchmark.profile(options.profile)))
            return 0
        benchmark.run()
        results = benchmark.results
    if results["rows"]:
        print("\n".join([table(results), "", conditions(results), "", *summary(results)]))
    for line in [*first_calls(results), *not_run(results)]:
        print(line)
    for draw, path in (
        (plot, options.plot),
        (plot_length, options.plot_length),
        (plot_perspectives, options.plot_perspectives),
    ):
        if path:
            draw(results, path)
    for kind in ("wrong", "failed"):
        for line in results[kind]:
            print(f"{kind.upper()}, not timed: {line}", file=sys.stderr)
    return 1 if results["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
