"""How long a scheduler takes for a loop's instructions, by the waits that the compiler wrote into them.

Every instruction of NVIDIA's GPUs since Volta says how many cycles the warp's next one is to wait, which of six
barriers it raises until its result is there, and which it waits for. So the time of one warp follows from the machine
code and a few latencies; that of several, which take turns, from a simulation. A model, and no measurement: the
latencies are assumed, round figures of the size that is usual for Hopper, and one load takes as long as any other.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

SMS, CLOCK, COPY = 132, 1.98e9, 4.3e12
"""An H200's multiprocessors, Hz, and bytes per second of a copy."""
CACHE = 50e6
"""Bytes of its L2 cache, which is taken to keep what was used last."""
LAUNCH = 2.5e-6
"""Seconds, assumed: until a kernel has begun, and its programs have loaded their first tile."""
LATENCY = {"MUFU": 20, "LDS": 30, "REDUX": 30, "R2UR": 12, "S2R": 30, "LDC": 30, "SHFL": 25, "LDL": 60}
OTHER = 20
ALU = (
    "LOP3", "SHF", "FMNMX", "SEL", "FSEL", "IADD3", "LEA", "PRMT", "ISETP", "FSETP", "PLOP3", "VOTE", "F2FP", "HMNMX2",
    "VIMNMX", "IABS", "I2FP",
)  # fmt: skip
BUSY = {"MUFU": 8, "LDG": 4, "STG": 4, "LDS": 4, "STS": 4}
"""Cycles for which an instruction of a warp keeps its unit from the next one; one that the ALU does, 2."""


def controls(encoding: int) -> tuple[int, int, int, int]:
    """Of the upper half of an instruction: cycles until the next, barriers of the result and of the operands (7: none),
    and the mask of those waited for.
    """
    bits = encoding >> 41
    return bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63


def cycles(trace: Sequence[tuple[str, int]], warps: int, load: int, turns: int = 6) -> float:
    """What a turn of the loop takes one scheduler, for all its warps together, if a load takes `load` cycles."""
    decoded = []
    for opcode, encoding in trace:
        name = opcode.split(".")[0]
        unit, busy = ("ALU", 2) if name in ALU else (name, BUSY.get(name, 1))
        latency = load if name == "LDG" else LATENCY.get(name, OTHER)
        decoded.append((unit, busy, latency, *controls(encoding)))
    total = turns * len(trace)
    at, ready = [0] * warps, [0.0] * warps
    raised = [[0.0] * 6 for _ in range(warps)]  # until when
    free: dict[str, float] = {}
    now, last = 0.0, 0
    ends: list[float] = []  # of the first warp's turns
    while any(n < total for n in at):
        best = None
        for warp in [(last + i) % warps for i in range(1, warps + 1)]:
            if at[warp] == total:
                continue
            unit, *_, mask = decoded[at[warp] % len(trace)]
            start = max(
                [ready[warp], free.get(unit, 0.0)] + [raised[warp][i] for i in range(6) if mask >> i & 1]
            )
            if best is None or start < best[0]:
                best = start, warp
            if start <= now:
                break
        now, warp = max(now, best[0]), best[1]
        unit, busy, latency, stall, result, operands, _ = decoded[at[warp] % len(trace)]
        free[unit] = now + busy
        for barrier, wait in ((result, latency), (operands, OTHER)):
            if barrier != 7:
                raised[warp][barrier] = max(raised[warp][barrier], now + wait)
        at[warp] += 1
        ready[warp] = now + max(1, stall)
        last = warp
        now += 1
        if warp == 0 and at[0] % len(trace) == 0:
            ends.append(now)
    return (ends[-1] - ends[1]) / (len(ends) - 2) / warps


class Walk(NamedTuple):
    """A kernel's walk over a tile: cycles that a scheduler takes for 1, 2, ... warps, up to what registers allow."""

    channels: int
    tokens: int
    cycles: tuple[float, ...]

    def seconds(self, programs: int, tokens: int, bytes_per_element: float) -> float:
        """What so many programs of so many tokens each take."""
        total, left = 0.0, programs
        while left > 0:
            now = min(left, len(self.cycles) * (4 * SMS))
            compute = tokens / self.tokens * self.cycles[math.ceil(now / (4 * SMS)) - 1] / CLOCK
            total += max(compute, now * tokens * self.channels * bytes_per_element / COPY)
            left -= now
        return total


class Kernels(NamedTuple):
    """Those of the forward, or of the backward."""

    summary: Walk
    scan: float  # cycles for each chunk
    results: Walk
    bytes_per_element: tuple[float, float]  # of summary and results

    def seconds(self, B: int, T: int, C: int, chunk_len: int) -> float:
        chunks = math.ceil(T / chunk_len)
        programs = B * math.ceil(C / self.results.channels) * chunks
        first, second = self.bytes_per_element
        total = 0.0
        if chunks > 1:
            total += LAUNCH + self.summary.seconds(programs, chunk_len, first)
            total += LAUNCH + chunks * self.scan / CLOCK
            # what the first walk read last, the second reads first
            second -= first * min(1.0, CACHE / (B * T * C * second))
        return total + LAUNCH + self.results.seconds(programs, chunk_len, second)
