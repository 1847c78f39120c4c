"""Clocks and counters of the benchmark; the GPU's with a stand-in for the device."""

import time
import types

import pytest
import torch

import throughput_measure
from throughput_measure import Clock, copy_speed, graphed, peak_memory, quantiles


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.ones(2**18)  # 1 MiB
    assert peak_memory(lambda: (x + 1) * 2 + 3, "cpu") / 2**20 == pytest.approx(2, abs=0.01)


def test_quantiles():
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)


class Gpu:
    """Notes in which order a GPU is asked for what. Every call of `work` takes the device 2 ms."""

    def __init__(self, monkeypatch):
        self.asked, self.now = [], 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, other):
                assert gpu.asked[-1] == "synchronize"
                return other.at - self.at

        for name, stand_in in {
            "Event": Event,
            "synchronize": lambda: self.asked.append("synchronize"),
            "_sleep": lambda cycles: self.asked.append(("sleep", cycles)),
        }.items():
            monkeypatch.setattr(throughput_measure.torch.cuda, name, stand_in)
        self.clock = Clock("cpu")
        self.clock.device = "cuda"
        self.clock._flush = types.SimpleNamespace(zero_=self.flush)

    def flush(self):
        self.asked.append("flush")
        self.now += 100.0

    def work(self):
        self.asked.append("work")
        time.sleep(0.004)
        self.now += 2.0


def test_a_gpu_is_timed_by_its_own_clock_with_the_calls_queued(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert set(gpu.clock.samples(gpu.work, seconds=0.02)) == {2.0}  # without flush and host
    begin = next(i for i, x in enumerate(gpu.asked) if isinstance(x, tuple))
    assert gpu.asked[:begin] == ["work", "synchronize"] * (begin // 2) and begin >= 2  # warm-up
    batch = gpu.asked[begin : gpu.asked.index("synchronize", begin)]
    assert batch[1:] == ["flush", "work"] * (len(batch) // 2) and len(batch) > 5
    cycles = batch[0][1]
    assert (
        0.004 * throughput_measure.SPIN_RATE
        < cycles
        <= throughput_measure.QUEUE * throughput_measure.SPIN_RATE
    )


def test_decoding_counts_what_the_host_needs(monkeypatch):
    gpu = Gpu(monkeypatch)
    times = gpu.clock.samples(gpu.work, seconds=0.02, flush=False, hide_launch=False)
    assert set(times) == {2.0} and len(times) >= throughput_measure.MIN_SAMPLES
    assert set(gpu.asked) == {"work", "synchronize"}


def test_a_graph_is_captured_after_a_warm_up_and_replayed(monkeypatch):
    asked = []

    class Context:
        def __init__(self, *what):
            pass

        def __enter__(self):
            asked.append("in")

        def __exit__(self, *error):
            asked.append("out")

    for name, stand_in in {
        "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "stream": Context,
        "graph": Context,
        "synchronize": lambda: None,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: asked.append("replay")),
    }.items():
        monkeypatch.setattr(throughput_measure.torch.cuda, name, stand_in)
    fn = graphed(lambda: asked.append("call") or "results")
    assert asked == ["in", "call", "call", "call", "out", "in", "call", "out"]
    assert fn() == "results" and asked[8:] == ["replay"]


def test_copy_speed_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(Clock, "samples", lambda self, fn, seconds: [1e3])
    assert copy_speed(Clock("cpu"), seconds=0.1) == 2 * 2**28
