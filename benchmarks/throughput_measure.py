"""How it is measured: time, memory and the speed of a copy, on the CPU or a GPU."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIN_SAMPLES = 5
MAX_SAMPLES = 200
PATIENCE = 10.0
"""A row gets at most this many times the seconds asked for, should `MIN_SAMPLES` take longer than they."""

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here; its log lines say nothing


class Clock:
    """Times calls with cold caches: before each, something larger than the last-level cache is overwritten."""

    def __init__(self, device: str) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**26
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def samples(self, fn: Callable[[], Any], *, seconds: float, flush: bool = True) -> list[float]:
        """Milliseconds of repeated calls, for about `seconds` in all. `fn` must have run before."""
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < MAX_SAMPLES:
            if flush:
                self._flush.zero_()
            times.append(self._milliseconds(fn))
            spent = time.perf_counter() - begin
            if spent > seconds * (1.0 if len(times) >= MIN_SAMPLES else PATIENCE):
                break
        return times

    def _milliseconds(self, fn: Callable[[], Any]) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            fn()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % of the samples."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def copy_speed(clock: Clock, *, seconds: float) -> float:
    """Bytes read and written per second by a large `copy_`: what memory allows."""
    size = 2**30 if clock.device == "cuda" else 2**28
    source, target = (torch.zeros(size, dtype=torch.int8, device=clock.device) for _ in range(2))
    target.copy_(source)
    return 2 * size / (quantiles(clock.samples(lambda: target.copy_(source), seconds=seconds))[1] / 1e3)


def peak_memory(fn: Callable[[], Any], device: str) -> int:
    """Most bytes that one call of `fn` holds at once beyond what it is given: PyTorch's allocations, on any device."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
