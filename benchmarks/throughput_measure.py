"""How it is measured: time, memory and the speed of a copy, on the CPU or a GPU; where the time goes."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIN_SAMPLES = 5
MAX_SAMPLES = 200
PATIENCE = 10.0
"""A row gets at most this many times the seconds asked for, should `MIN_SAMPLES` take longer than they."""
WARM_UP = 0.1
"""Seconds of calls before a GPU's first sample, for its clocks to rise."""
QUEUE = 0.05
"""At most this many seconds of calls are queued while a GPU waits: it takes about a thousand launches."""
SPIN_RATE = 2e9
"""Cycles per second of `torch.cuda._sleep`: about a GPU's clock. Too short a wait only shows the host's time."""
LAUNCHES = 32

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here; its log lines say nothing


class Clock:
    """Times calls with cold caches: before each, something larger than the last-level cache is overwritten."""

    def __init__(self, device: str) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**26
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def samples(
        self, fn: Callable[[], Any], *, seconds: float, flush: bool = True, hide_launch: bool = True
    ) -> list[float]:
        """Milliseconds of repeated calls, for about `seconds` in all. `fn` must have run before.

        On a GPU it is the device's time, between events. With `hide_launch` the calls are queued while the device
        waits, so that the host's work between two kernels is not counted.
        """
        host = self._warm_up(fn) if self.device == "cuda" else 0.0
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < MAX_SAMPLES:
            if self.device == "cuda":
                times += self._device_times(fn, host if hide_launch else None, flush)
            else:
                if flush:
                    self._flush.zero_()
                start = time.perf_counter()
                fn()
                times.append(1e3 * (time.perf_counter() - start))
            spent = time.perf_counter() - begin
            if spent > seconds * (1.0 if len(times) >= MIN_SAMPLES else PATIENCE):
                break
        return times

    def _warm_up(self, fn: Callable[[], Any]) -> float:
        """Returns the seconds that the host needs for a call."""
        host, begin = float("inf"), time.perf_counter()
        while time.perf_counter() - begin < WARM_UP:
            start = time.perf_counter()
            fn()
            host = min(host, time.perf_counter() - start)
            torch.cuda.synchronize()
        return host

    def _device_times(self, fn: Callable[[], Any], host: float | None, flush: bool) -> list[float]:
        calls = 1 if host is None else max(1, min(20, int(QUEUE / host)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        if host is not None:
            torch.cuda._sleep(int(SPIN_RATE * min(QUEUE, 1.2 * host * calls)))
        for start, end in events:
            if flush:
                self._flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def launch_microseconds(self) -> dict[str, float]:
        """What a kernel with next to nothing to do costs on a GPU: called, and inside a CUDA graph."""
        number = torch.zeros(1, device=self.device)

        def launches() -> None:
            for _ in range(LAUNCHES):
                number.add_(0)

        called = {"call": launches, "graph": graphed(launches)}
        return {
            name: 1e3 * quantiles(self.samples(fn, seconds=0.1, flush=False, hide_launch=False))[1] / LAUNCHES
            for name, fn in called.items()
        }


def graphed(fn: Callable[[], Any]) -> Callable[[], Any]:
    """`fn` as a CUDA graph: a call replays its kernels and returns the tensors that it returned when captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fn()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


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


def profile(fn: Callable[[], Any], device: str, trace: Path) -> str:
    """Where the time of three calls goes: a table; and a timeline in `trace`, for chrome://tracing or Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    fn()
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(3):
            fn()
        if device == "cuda":
            torch.cuda.synchronize()
    found.export_chrome_trace(str(trace))
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)
