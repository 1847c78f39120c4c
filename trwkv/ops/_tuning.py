"""Kernel configurations: what ships, and a way to pin another one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

SEGMENT = 64
"""Tokens between two states that the forward keeps for the backward: 3 P / 64 floats per token and channel."""

MAX_PERSPECTIVES = 8
"""The kernels unroll the perspectives; beyond this registers spill."""


@dataclass(frozen=True)
class Config:
    """One configuration of the chunk kernels. Every program is one warp over `block_c` channels.

    The block sizes are chosen from the compiler's register report (no spill on sm_80 and sm_90), not yet from timings
    on a GPU. `chunk_len` is the number of tokens a program walks: None lets `chunk_length` decide.
    """

    fwd_block_c: int
    fwd_block_t: int
    bwd_block_c: int
    bwd_block_t: int
    chunk_len: int | None = None


CONFIGS = {
    1: Config(fwd_block_c=64, fwd_block_t=16, bwd_block_c=64, bwd_block_t=8),
    2: Config(fwd_block_c=64, fwd_block_t=16, bwd_block_c=32, bwd_block_t=8),
    3: Config(fwd_block_c=64, fwd_block_t=8, bwd_block_c=32, bwd_block_t=8),
    4: Config(fwd_block_c=32, fwd_block_t=16, bwd_block_c=32, bwd_block_t=8),
    8: Config(fwd_block_c=32, fwd_block_t=4, bwd_block_c=32, bwd_block_t=2),
}

INSTRUCTION_BUDGET = {
    ("forward", 1): 33.0,
    ("forward", 2): 51.0,
    ("forward", 3): 63.0,
    ("backward", 1): 88.0,
    ("backward", 3): 200.0,
}
"""Instructions per token and channel that a tile's fast path may take, by kernel and P (bfloat16, sm_90); see
`benchmarks/static_report.py --check`."""

TARGET_PROGRAMS = 2048
"""Programs (warps) wanted in flight on a large GPU: about 16 on each of 132 multiprocessors."""

_pinned: list[Config] = []


def config_for(P: int) -> Config:
    """The configuration for P perspectives: that of the next larger P listed."""
    if P > MAX_PERSPECTIVES:
        raise ValueError(
            f"w: the 'triton' backend takes at most {MAX_PERSPECTIVES} perspectives; got P = {P}; use backend='torch'"
        )
    return _pinned[-1] if _pinned else CONFIGS[min(p for p in CONFIGS if p >= P)]


@contextmanager
def pin_config(**changes: int) -> Iterator[None]:
    """Within the block every call uses the configuration for P = 1 with these fields changed."""
    _pinned.append(replace(_pinned[-1] if _pinned else CONFIGS[1], **changes))
    try:
        yield
    finally:
        _pinned.pop()


def chunk_length(config: Config, B: int, T: int, C: int, block_c: int) -> int:
    """Tokens per program: all of T when batch and channels fill the machine, else enough chunks to do so.

    A multiple of SEGMENT, and at least four of them: the chunks' summaries cost a second reading of k and v.
    """
    if config.chunk_len is not None:
        return max(SEGMENT, -(-config.chunk_len // SEGMENT) * SEGMENT)
    columns = max(1, B) * -(-C // block_c)
    chunks = max(1, min(TARGET_PROGRAMS // columns, T // (4 * SEGMENT)))
    segments = -(-T // SEGMENT)
    return max(1, -(-segments // chunks)) * SEGMENT
