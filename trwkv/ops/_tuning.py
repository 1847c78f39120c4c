"""Kernel configurations: what ships, what `trwkv.ops.tune` found on a machine, and a way to pin another one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trwkv.ops._dispatch import gpu_name, tuning_file

SEGMENT = 64
"""Tokens between two states that the forward keeps for the backward: 3 P / 64 floats per token and channel."""

UNDIVIDED_SEGMENTS = 4
"""Up to so many segments T is walked in one piece, in one launch."""

MAX_PERSPECTIVES = 8
"""The kernels unroll the perspectives: from 7 on the backward spills some registers (docs/performance.md)."""


@dataclass(frozen=True)
class Config:
    """One configuration of the chunk kernels. Every program is one warp over `block_c` channels.

    `fwd_warps` and `bwd_warps` are how many a multiprocessor is to hold at once, and so what registers each may take:
    with fewer (blocks of channels over all batch rows), T is divided among that many. From `..._undivided_from` for
    each multiprocessor on it is not: where T is divided, k and v are read twice. `chunk_len` is the number of tokens a
    program walks: None lets `chunk_length` decide.
    """

    fwd_block_c: int
    fwd_block_t: int
    bwd_block_c: int
    bwd_block_t: int
    fwd_warps: int = 12
    bwd_warps: int = 12
    fwd_undivided_from: float = 3.0
    bwd_undivided_from: float = 3.5
    chunk_len: int | None = None

    def block_c(self, kernel: str) -> int:
        return self.fwd_block_c if kernel == "forward" else self.bwd_block_c


CONFIGS = {
    1: Config(fwd_block_c=64, fwd_block_t=16, bwd_block_c=64, bwd_block_t=8, bwd_undivided_from=4.0),
    2: Config(
        fwd_block_c=64,
        fwd_block_t=16,
        bwd_block_c=64,
        bwd_block_t=8,
        fwd_warps=8,
        bwd_warps=8,
        bwd_undivided_from=4.0,
    ),
    3: Config(fwd_block_c=64, fwd_block_t=16, bwd_block_c=64, bwd_block_t=8, fwd_warps=8, bwd_warps=8),
    4: Config(fwd_block_c=64, fwd_block_t=16, bwd_block_c=32, bwd_block_t=8, fwd_warps=8, bwd_warps=8),
    6: Config(fwd_block_c=32, fwd_block_t=16, bwd_block_c=32, bwd_block_t=8, fwd_warps=8, bwd_warps=8),
    8: Config(fwd_block_c=32, fwd_block_t=16, bwd_block_c=32, bwd_block_t=4, fwd_warps=8, bwd_warps=8),
}
"""What ships. Measured on no GPU yet: chosen by the registers and instructions that the compiler reports (sm_90)."""

INSTRUCTION_BUDGET = {
    ("sums", "PC"): {1: 17.0, 2: 19.0, 3: 22.5, 4: 23.5},
    ("adjoints", "PC"): {1: 35.5, 2: 49.5, 3: 70.0, 4: 91.0},
    ("forward", "PC"): {1: 25.5, 2: 36.0, 3: 46.0, 4: 56.0},
    ("backward", "PC"): {1: 68.0, 2: 95.0, 3: 127.0, 4: 173.0},
    ("adjoints", "BTP"): {2: 53.0, 3: 74.5, 4: 98.0},
    ("forward", "BTP"): {2: 37.5, 3: 48.0, 4: 58.5},
    ("backward", "BTP"): {2: 110.0, 3: 150.0, 4: 222.0},
}
"""Instructions per token and channel that a tile's fast path may take, by kernel, shape of the weights and P (any type,
sm_80 and sm_90); see `benchmarks/static_report.py --check`. "sums" and "adjoints" are the first walks where T is
divided."""

_pinned: list[Config] = []


def config_for(P: int, k: torch.Tensor | None = None) -> Config:
    """The configuration for P perspectives: for `k`'s GPU and dtype if one was saved, else that of the next larger P
    that ships.
    """
    if P > MAX_PERSPECTIVES:
        raise ValueError(
            f"w: the 'triton' backend takes at most {MAX_PERSPECTIVES} perspectives; got P = {P}; use backend='torch'"
        )
    if _pinned:
        return _pinned[-1]
    if k is not None and (gpu := gpu_name(k.device)):
        tuned = saved_configs(tuning_file()).get(gpu, {})
        if tuned and (config := tuned.get(entry_name(P, k.dtype))):
            return config
    return CONFIGS[min(p for p in CONFIGS if p >= P)]


def entry_name(P: int, dtype: torch.dtype) -> str:
    return f"P = {P}, {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=4)
def saved_configs(file: Path) -> dict[str, dict[str, Config]]:
    """By GPU and entry, from the file that `save_config` writes; nothing if there is none."""
    return {
        gpu: {name: _config(entry, file, name) for name, entry in entries.items()}
        for gpu, entries in _read(file).items()
    }


def save_config(file: Path, gpu: str, name: str, config: Config, measured: dict[str, Any]) -> None:
    """Adds an entry to the file, or replaces it, together with what was measured."""
    table = _read(file)
    table.setdefault(gpu, {})[name] = {"config": asdict(config), "measured": measured}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    partial.replace(file)
    saved_configs.cache_clear()


def _read(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file}: expected what `python -m trwkv.ops.tune` writes; got {error}") from error
    if not isinstance(table, dict) or not all(isinstance(entries, dict) for entries in table.values()):
        raise ValueError(f"{file}: expected entries by GPU, as `python -m trwkv.ops.tune` writes them")
    return table


def _config(entry: Any, file: Path, name: str) -> Config:
    try:
        config = Config(**entry["config"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file}: {name}: expected a configuration; got {entry!r}") from error
    sizes = (config.fwd_block_c, config.fwd_block_t, config.bwd_block_c, config.bwd_block_t)
    numbers = (*sizes, config.fwd_warps, config.bwd_warps)
    if not all(isinstance(n, int) and n > 0 for n in numbers) or any(n & (n - 1) for n in sizes):
        raise ValueError(f"{file}: {name}: expected numbers above 0, of blocks powers of two; got {config}")
    for columns in (config.fwd_undivided_from, config.bwd_undivided_from):
        if not isinstance(columns, int | float) or not columns > 0:
            raise ValueError(f"{file}: {name}: expected undivided_from above 0; got {columns!r}")
    if config.bwd_block_t * 32 < SEGMENT:
        raise ValueError(
            f"{file}: {name}: expected bwd_block_t of at least {SEGMENT // 32}; got {config.bwd_block_t}"
        )
    return config


@contextmanager
def pin_config(**changes: int) -> Iterator[None]:
    """Within the block every call uses the configuration for P = 1 with these fields changed."""
    _pinned.append(replace(_pinned[-1] if _pinned else CONFIGS[1], **changes))
    try:
        yield
    finally:
        _pinned.pop()


def chunk_length(config: Config, kernel: str, T: int, columns: int, multiprocessors: int) -> int:
    """Tokens that a program of "forward" or "backward" walks, a multiple of SEGMENT. `columns`: blocks of channels over
    all batch rows.

    All of T where the columns keep the machine busy, or T is too short for the two launches more that chunks cost;
    else so many chunks that all of them run at once. With more, some would begin when the others have ended.
    """
    if config.chunk_len is not None:
        return max(SEGMENT, -(-config.chunk_len // SEGMENT) * SEGMENT)
    warps, undivided_from = config.fwd_warps, config.fwd_undivided_from
    if kernel == "backward":
        warps, undivided_from = config.bwd_warps, config.bwd_undivided_from
    segments = max(1, -(-T // SEGMENT))
    if columns >= undivided_from * multiprocessors or segments <= UNDIVIDED_SEGMENTS:
        return segments * SEGMENT
    chunks = max(1, warps * multiprocessors // max(1, columns))
    return -(-segments // chunks) * SEGMENT
