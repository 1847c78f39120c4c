"""What the compiled kernels cost, without a GPU: registers, spills, and instructions per element of the fast path.

    python benchmarks/static_report.py   # P = 1 to 4, weights [P, C] and [B, T, P], sm_80 and sm_90; minutes
    python benchmarks/static_report.py --perspectives 1 --capabilities 90 --dtypes bfloat16
    python benchmarks/static_report.py --json FILE --check   # exit code 1 on spills, narrow loads, too much, long waits

An element is one token of one channel. A tile's loop is found in the machine code by the exponentials unrolled in it;
its path around the exact branch (which holds a loop of its own) is counted. The prediction for an H200 (132 SMs, 1.98
GHz, four issue slots and 16 special-function results per SM and clock, 4.3 TB/s) is the largest of issue, special
functions and memory: it ignores latency, so it is a floor, and no measurement. The last columns are what the waits
written into the instructions add (static_schedule.py), without the memory's limit: with one warp for each scheduler and
with as many as the registers allow, if loads find their data in the L2 cache (300 cycles), where prefetches bring it.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch

from static_sass import FastPath, fast_paths, machine_code
from static_schedule import CLOCK, COPY, SMS, cycles
from trwkv.ops._compile import Launch, record_launches, resources
from trwkv.ops._tuning import INSTRUCTION_BUDGET, config_for
from trwkv.ops.wkv import chunk
from trwkv.report import environment

ISSUE = SMS * CLOCK * 4 * 32  # instructions of one lane per second
SPECIAL = SMS * CLOCK * 16
LOAD = 300  # cycles, of one that the L2 cache answers
C = 1024
SPILLS_OUTSIDE_TILES = 32  # bytes, with weights [B, T, P]: 24 on sm_80 at P = 3, read once a segment
LONGEST_WAITS = 3.6  # of one warp's time to what its instructions alone take
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def training_step(
    P: int, dtype: torch.dtype, shape: tuple[int, int, int], weights: str
) -> tuple[list[Launch], list[Launch]]:
    """Launches of forward and backward but for the sum of shares, shared k and v, weights [P, C] or [B, T, P]."""
    B, T, C = shape
    w, k = torch.empty(P, C), torch.empty(shape, dtype=dtype)
    common = (w, w, k, k, torch.empty(B, T, P) if weights == "BTP" else w, None, None, False)
    with record_launches() as forward:
        output, _, saved = chunk.chunk_forward(*common, save=True)
    with record_launches() as backward:
        chunk.chunk_backward(output, None, *common, saved)
    backward = [launch for launch in backward if launch.name != "wkv_block_sums_kernel"]
    return forward, backward


def launches(P: int, dtype: torch.dtype, weights: str = "PC") -> dict[str, Launch]:
    """A training step's walks over tiles: "forward" and "backward", and the first ones where T is divided."""
    first_forward, first_backward = training_step(P, dtype, (1, 8192, C), weights)
    # Enough to fill the machine: one chunk per row.
    forward, backward = training_step(P, dtype, (64, 2048, C), weights)
    found = {
        "sums": first_forward[0], "adjoints": first_backward[0],
        "forward": forward[-1], "backward": backward[-1],
    }  # fmt: skip
    if weights == "BTP":
        del found["sums"]  # which does not know of weights
    return found


def row(name: str, launch: Launch, P: int, dtype: str, weights: str, capability: int) -> dict[str, Any]:
    config = config_for(P)
    channels, tokens = (
        (config.fwd_block_c, config.fwd_block_t)
        if name in ("sums", "forward")
        else (config.bwd_block_c, config.bwd_block_t)
    )
    compiled = launch.compile(capability)
    cost = resources(compiled)
    paths = fast_paths(machine_code(compiled), exponentials=tokens * channels // 32)
    total = sum(paths[1:], paths[0]) if paths else FastPath({}, 0)
    elements = tokens * channels / 32  # of one lane
    accesses = {"sums": 2, "forward": 3, "adjoints": 3, "backward": 5}[name]
    size = DTYPES[dtype].itemsize
    issue = total.instructions / elements / ISSUE * 1e12
    special = total.count("MUFU", "F2I", "FRND", "I2F") / elements / SPECIAL * 1e12
    memory = accesses * size / COPY * 1e12
    warps = 65536 // (-(-cost.registers // 8) * 8 * 32) // 4  # of each scheduler
    one, full = (
        cycles(total.trace, n, LOAD) / (32 * elements) / (4 * SMS * CLOCK) * 1e12 if total.trace else 0.0
        for n in (1, warps)
    )
    return {
        "kernel": name, "P": P, "dtype": dtype, "weights": weights, "sm": capability, "block": [channels, tokens],
        "registers": cost.registers, "spill_bytes": cost.spill_bytes,
        "spills_per_tile": total.count("LDL", "STL"), "loops": len(paths),
        "instructions_per_element": total.instructions / elements,
        "special_per_element": total.count("MUFU", "F2I", "FRND", "I2F") / elements,
        "fma_per_element": total.count("FFMA", "FMUL", "FADD") / elements,
        "loads_per_element": total.count("LDG") / elements, "stores_per_element": total.count("STG") / elements,
        "narrowest_load": total.narrowest("LDG"), "narrowest_store": total.narrowest("STG"),
        "contiguous_bytes": channels // 32 * size,  # of a token, in one lane
        "budget": INSTRUCTION_BUDGET[name, weights].get(P),
        "ps_issue": issue, "ps_special": special, "ps_memory": memory, "ps_floor": max(issue, special, memory),
        "warps": warps, "ps_one_warp": one, "ps_full": full,
    }  # fmt: skip


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What `--check` objects to."""
    found = []
    for r in rows:
        label = f"{r['kernel']} P = {r['P']} {r['weights']} {r['dtype']} sm_{r['sm']}"
        allowed = SPILLS_OUTSIDE_TILES if r["weights"] == "BTP" and not r["spills_per_tile"] else 0
        if r["spill_bytes"] > allowed:
            found.append(f"{label}: {r['spill_bytes']} bytes spilled, {r['spills_per_tile']} accesses a tile")
        expected = 2 if r["kernel"] == "backward" else 1  # it walks each tile forwards, then back
        if r["loops"] != expected:
            found.append(f"{label}: expected {expected} tile loops; found {r['loops']}")
        for what in ("load", "store"):
            if what == "store" and r["kernel"] in ("sums", "adjoints"):
                continue  # they store nothing before their end
            if r["weights"] == "BTP":
                continue  # one number for all lanes, among the rest
            width = r[f"narrowest_{what}"]
            if width is None or width < min(16, r["contiguous_bytes"]):
                found.append(
                    f"{label}: a {what} of {width} bytes, where a lane has {r['contiguous_bytes']} side by side"
                )
        if r["budget"] is not None and r["instructions_per_element"] > r["budget"]:
            found.append(f"{label}: {r['instructions_per_element']:.1f} instructions, budget {r['budget']}")
        if r["ps_one_warp"] > LONGEST_WAITS * r["ps_issue"]:
            found.append(
                f"{label}: one warp takes {r['ps_one_warp']:.2f} ps, its instructions {r['ps_issue']:.2f}: it waits"
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    names = (
        "kernel",
        "P",
        "dtype",
        "weights",
        "sm",
        "block",
        "registers",
        "instructions",
        "special",
        "fma",
        "loads",
        "stores",
        "bytes",
    )
    names += ("budget", "issue ps", "special ps", "memory ps", "floor ps", "one warp ps", "warps", "full ps")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for r in rows:
        lines.append(
            f"| {r['kernel']} | {r['P']} | {r['dtype']} | {r['weights']} | {r['sm']} | {r['block'][0]}x{r['block'][1]} "
            f"| {r['registers']} | {r['instructions_per_element']:.1f} | {r['special_per_element']:.2f} "
            f"| {r['fma_per_element']:.1f} | {r['loads_per_element']:.2f} | {r['stores_per_element']:.2f} "
            f"| {r['narrowest_load']}, {r['narrowest_store']} "
            f"| {r['budget'] or ''} | {r['ps_issue']:.2f} | {r['ps_special']:.2f} | {r['ps_memory']:.2f} "
            f"| {r['ps_floor']:.2f} | {r['ps_one_warp']:.2f} | {r['warps']} | {r['ps_full']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--perspectives", default="1,2,3,4", help="comma-separated (default: %(default)s)")
    parser.add_argument("--capabilities", default="80,90", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="comma-separated (default: %(default)s)")
    parser.add_argument("--weights", default="PC,BTP", help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit code 1 on a spill, a narrow load, too much, long waits",
    )
    options = parser.parse_args()
    kinds = options.weights.split(",")
    if not set(kinds) <= {"PC", "BTP"}:
        parser.error(f"--weights: expected some of PC, BTP; got {options.weights!r}")
    rows = []
    for P in map(int, options.perspectives.split(",")):
        for dtype in options.dtypes.split(","):
            for weights in kinds if P > 1 else ["PC"]:  # with one perspective there is nothing to weigh
                for name, launch in launches(P, DTYPES[dtype], weights).items():
                    for capability in map(int, options.capabilities.split(",")):
                        rows.append(row(name, launch, P, dtype, weights, capability))
                        print(f"{name} P = {P} {weights} {dtype} sm_{capability} compiled", file=sys.stderr)
    print(table(rows))
    if options.json:
        options.json.write_text(
            json.dumps({"environment": environment("cpu"), "rows": rows}, indent=1) + "\n"
        )
    found = problems(rows)
    print(
        "\n".join(found)
        if found
        else "no spill, no narrow load or store, nothing above its budget, no long waits"
    )
    sys.exit(bool(found) and options.check)


if __name__ == "__main__":
    main()
