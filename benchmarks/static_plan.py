"""How long forward and backward would take on an H200 by how T is divided among programs. A model, and no measurement.

    python benchmarks/static_plan.py                  # P = 1 to 4, bfloat16; some minutes
    python benchmarks/static_plan.py --perspectives 3

A walk over a tile takes what the waits in its machine code say (static_schedule.py), for as many warps as a scheduler
then has; or what the memory takes, if that is longer, but for what the L2 cache still holds of the first walk's
reading. Programs that do not fit at once run in waves. Every launch costs
`LAUNCH` beside, and the scans their chunks, one after the other. Shown are the plan that ships and the best one.
"""

import argparse
import math
import os

os.environ["TRITON_INTERPRET"] = "0"

import torch

from static_report import DTYPES, LOAD, training_step
from static_sass import FastPath, fast_paths, machine_code
from static_schedule import COPY, SMS, Kernels, Walk, cycles
from trwkv.ops._compile import Launch, resources
from trwkv.ops._tuning import SEGMENT, chunk_length, config_for
from trwkv.ops.wkv import chunk
from trwkv.report import format_table

SHAPES = (
    (1, 1024, 768),
    (8, 1024, 768),
    (32, 2048, 1024),
    (8, 4096, 4096),
    (1, 8192, 2048),
    (1, 65536, 2048),
)


def walk(launch: Launch, channels: int, tokens: int) -> Walk:
    compiled = launch.compile(90)
    paths = fast_paths(machine_code(compiled), exponentials=tokens * channels // 32)
    total = sum(paths[1:], paths[0])
    warps = 65536 // (-(-resources(compiled).registers // 8) * 8 * 32) // 4
    return Walk(channels, tokens, tuple(n * cycles(total.trace, n, LOAD) for n in range(1, warps + 1)))


def scan(launch: Launch) -> float:
    loops: list[FastPath] = fast_paths(machine_code(launch.compile(90)), exponentials=0)
    longest = max(loops, key=lambda path: path.instructions)
    return cycles(longest.trace, 1, LOAD) / chunk.SCAN_AHEAD


def kernels(P: int, dtype: torch.dtype, weights: str) -> dict[str, Kernels]:
    """Compiled for sm_90: shared k and v, weights [P, C] or [B, T, P], as in training."""
    config, size = config_for(P), dtype.itemsize
    forward, backward = training_step(P, dtype, (1, 8192, 2048), weights)
    state = 12 * P / SEGMENT
    blocks = {
        "forward": (config.fwd_block_c, config.fwd_block_t),
        "backward": (config.bwd_block_c, config.bwd_block_t),
    }
    traffic = {"forward": (2 * size, 3 * size + state), "backward": (3 * size, 5 * size + state)}
    return {
        name: Kernels(
            walk(first, *blocks[name]), scan(between), walk(last, *blocks[name]), traffic[name]
        )
        for name, (first, between, last) in (("forward", forward), ("backward", backward))
    }  # fmt: skip


def plans(P: int, dtype: torch.dtype, weights: str = "PC") -> list[list[object]]:
    """A row for each shape and kernel."""
    config, rows = config_for(P), []
    for name, found in kernels(P, dtype, weights).items():
        for B, T, C in SHAPES:
            columns = B * math.ceil(C / found.results.channels)
            shipped = chunk_length(config, name, T, columns, SMS)
            lengths = [n * SEGMENT for n in range(1, math.ceil(T / SEGMENT) + 1)]
            best = min(lengths, key=lambda length: found.seconds(B, T, C, length))
            floor = B * T * C * (3 if name == "forward" else 5) * dtype.itemsize / COPY
            row: list[object] = [name, P, f"{B} x {T} x {C}", float(f"{1e6 * floor:.3g}")]
            for length in (shipped, best):
                seconds = found.seconds(B, T, C, length)
                row += [math.ceil(T / length), float(f"{1e6 * seconds:.3g}")]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--perspectives", default="1,2,3,4", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument(
        "--weights", choices=("PC", "BTP"), default="PC", help="their shape (default: %(default)s)"
    )
    options = parser.parse_args()
    header = ("kernel", "P", "B x T x C", "floor, us", "chunks", "us", "best: chunks", "us")
    rows = [
        row
        for P in map(int, options.perspectives.split(","))
        for row in plans(P, DTYPES[options.dtype], options.weights)
    ]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
