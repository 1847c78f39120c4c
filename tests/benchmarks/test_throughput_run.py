"""The benchmark's runs: what crashes, hangs or is killed costs no more than its own row."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import throughput
import throughput_first_call
import throughput_run
from throughput_cases import Case
from throughput_contenders import contenders
from throughput_official import OFFICIAL
from throughput_run import Benchmark

SMALL = ["--device", "cpu", "--shapes", "2,20,8", "--seconds", "0.01", "--modes", "forward"]


@pytest.fixture
def choose(monkeypatch):
    """Makes the benchmark measure these contenders only."""

    def chosen(*those):
        by_name = {contender.name: contender for contender in those}
        for module in (throughput, throughput_run):
            monkeypatch.setattr(module, "contenders", lambda device: by_name)

    monkeypatch.setattr(throughput_run, "copy_speed", lambda clock, seconds: 1e10)
    return chosen


def fake(name, before, **changes):
    """The torch backend, after whatever `before` does."""
    right = contenders("cpu")["torch"]

    def run(*arguments):
        before()
        return right.run(*arguments)

    return replace(right, name=name, run=run, **changes)


def crash():
    raise RuntimeError("no such instruction\nand a long explanation")


def key(row):
    return tuple(str(row[n]) for n in ("shape", "mode", "perspectives", "layout", "dtype", "implementation"))


def test_a_crash_is_reported_and_skipped(choose, tmp_path, capsys):
    choose(fake("crashing", crash), fake("sound", lambda: None))
    path = tmp_path / "results.json"
    assert throughput.main([*SMALL, "--perspectives", "1,2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert [row["implementation"] for row in written["rows"]] == ["sound", "sound"]
    label = "crashing (forward, 2x20x8, P = 2, aggregated, float32)"
    assert f"{label}: RuntimeError: no such instruction" in written["failed"]
    assert len(written["failed"]) == 2
    assert "FAILED, not timed: crashing (forward" in capsys.readouterr().err


def test_a_slow_contender_gets_few_samples_and_is_not_called_many_times(choose, tmp_path, capsys):
    choose(fake("slow", lambda: time.sleep(0.06), many_calls=True))
    path = tmp_path / "results.json"
    limit = ["--max-call-seconds", "0.1", "--perspectives", "1,3"]
    assert throughput.main([*SMALL, *limit, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["perspectives"] == 1 and len(row["samples_ms"]) < 3  # of 60 ms; it gets 100 ms
    assert "slow (forward, 2x20x8, P = 3, aggregated, float32): 3 calls would take" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(choose, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    arguments = [*SMALL, "--perspectives", "1,2", "--layout", "own,separate", "--json", str(path)]
    alive, calls = [True], []

    def work():
        calls.append(None)
        if not alive[0]:
            raise KeyboardInterrupt

    choose(fake("torch", work), fake("flaky", lambda: alive[0] or crash()))
    monkeypatch.setattr(throughput_run.Clock, "samples", lambda self, fn, **how: [fn() and 1.0])
    real = throughput_run.Benchmark.write

    def write(self):
        real(self)
        alive[0] = len(self.rows) < 3

    monkeypatch.setattr(throughput_run.Benchmark, "write", write)
    with pytest.raises(KeyboardInterrupt):
        throughput.main(arguments)
    before = json.loads(path.read_text())
    assert len(before["rows"]) == 3 and not list(tmp_path.glob("*.part"))

    monkeypatch.setattr(throughput_run.Benchmark, "write", real)
    alive[0] = True
    made = []
    monkeypatch.setattr(throughput_run, "make_inputs", lambda case: made.append(case) or make_inputs(case))
    calls.clear()
    assert throughput.main([*arguments, "--resume", "--retry"]) == 0
    after = json.loads(path.read_text())
    assert after["rows"][:3] == before["rows"]
    keys = [key(row) for row in after["rows"]]
    assert len(keys) == len(set(keys)) == (1 + 2) * 2  # P = 1 in one layout, P = 2 in two; two contenders
    assert len(after["resumed"]) == 1 and not after["failed"]
    assert len(calls) == 3  # result, sample, memory, of the one row that "torch" lacked
    assert len(made) == 2  # no inputs for what is complete

    calls.clear()
    assert throughput.main([*arguments, "--resume"]) == 0
    assert json.loads(path.read_text())["rows"] == after["rows"] and not calls
    monkeypatch.setattr(throughput_run, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="has another commit"):
        throughput.main([*arguments, "--resume"])


make_inputs = throughput_run.make_inputs


def test_what_the_process_died_in_is_not_run_again(choose, tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = [*SMALL, "--perspectives", "1,2", "--json", str(path)]
    ran = []
    choose(fake("deadly", lambda: ran.append(path.read_text())), fake("crashing", crash))
    assert throughput.main(arguments) == 0
    label = "deadly (forward, 2x20x8, P = 1, aggregated, float32)"
    left = json.loads(ran[0])  # what a process that dies leaves behind
    assert left["running"] == label and not left["rows"]
    finished = json.loads(path.read_text())
    assert finished["running"] is None and len(finished["rows"]) == 2 and len(finished["failed"]) == 2
    path.write_text(ran[0])
    ran.clear()
    assert throughput.main([*arguments, "--resume"]) == 0
    resumed = json.loads(path.read_text())
    assert [row["perspectives"] for row in resumed["rows"]] == [2]
    assert f"{label}: the process ended in it" in resumed["failed"]
    assert f"FAILED, not timed: {label}" in capsys.readouterr().err
    assert throughput.main([*arguments, "--resume", "--retry"]) == 0
    retried = json.loads(path.read_text())
    assert len(retried["rows"]) == 2 and len(retried["failed"]) == 2  # those that do crash


COMPILE = """
import sys
sys.path[:0] = ["benchmarks", "."]
import throughput, throughput_run
from throughput_contenders import _backend, contenders, in_place
from trwkv.ops import _dispatch

_dispatch._require_triton = lambda device, dtype: None
throughput_run.compile_all = lambda launches, jobs: compiled.extend(launches) or 1
throughput_run.copy_speed = lambda clock, seconds: 1e10
compiled = []
arguments = ["--device", "cpu", "--shapes", "2,20,8", "--modes", "backward,decode", "--perspectives", "1,2"]
benchmark = throughput_run.Benchmark(throughput.parse(arguments))
benchmark._compile([_backend("triton"), in_place("triton"), contenders("cpu")["torch"]])
print(*sorted({launch.name for launch in compiled}), len({launch.specialization() for launch in compiled}))
"""


def test_kernels_are_compiled_before_anything_is_timed():
    """In a process of its own, where kernels are not interpreted: three for each P, decoding in place is no other."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.stdout == "wkv_chunk_bwd_kernel wkv_chunk_fwd_kernel wkv_recurrent_fwd_kernel 6\n", (
        done.stderr
    )


def test_tuning_belongs_to_the_results(choose, monkeypatch, tmp_path):
    choose(fake("torch", lambda: None))
    arguments = [*SMALL, "--perspectives", "1", "--json", str(tmp_path / "results.json")]
    assert throughput.main(arguments) == 0
    monkeypatch.setattr(Benchmark, "_tuning", lambda self: {"P = 1, bfloat16": {"fwd_block_c": 32}})
    with pytest.raises(SystemExit, match="has another tuning"):
        throughput.main([*arguments, "--resume"])


def test_what_the_time_does_not_suffice_for_is_listed(choose, tmp_path, capsys):
    choose(fake("torch", lambda: None))
    arguments = [*SMALL, "--perspectives", "1,2", "--first-call", "--json", str(tmp_path / "results.json")]
    assert throughput.main([*arguments, "--minutes", "0"]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert not written["rows"] and len(written["not_run"]) == 3
    assert "3 not run" in capsys.readouterr().out
    arguments.remove("--first-call")
    assert throughput.main([*arguments, "--resume"]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["rows"]) == 2 and not written["not_run"]


def test_after_the_gpu_is_lost_nothing_more_is_run(choose, monkeypatch):
    choose(fake("torch", lambda: None))
    benchmark = Benchmark(throughput.parse(SMALL))
    contender = contenders("cpu")["torch"]
    benchmark._check_gpu(contender)
    assert not benchmark.lost  # there is none to lose
    monkeypatch.setattr(torch.cuda, "synchronize", crash)
    benchmark.options.device = "cuda"
    benchmark._check_gpu(contender)
    case = Case("forward", 2, 20, 8, 1, "aggregated", torch.float32, "cpu")
    benchmark._turn(case, contender, throughput_run.Shared([case]))
    assert not benchmark.rows and "the GPU was lost by torch" in benchmark.results["not_run"][0]


def test_the_official_kernel_is_built_once_and_may_fail(choose, monkeypatch, tmp_path):
    choose(fake("torch", lambda: None))
    options = throughput.parse([*SMALL, "--perspectives", "1"])
    options.backends, options.official_cuda = ["torch", OFFICIAL], tmp_path
    asked = []

    def find_sources(folder, dtype):
        asked.append((folder, dtype))
        raise OSError("nvcc: not found")

    monkeypatch.setattr(throughput_run, "find_sources", find_sources)
    benchmark = Benchmark(options)
    benchmark.run()
    assert asked == [(tmp_path, torch.float32)]
    assert benchmark.results["failed"] == [f"{OFFICIAL}: OSError: nvcc: not found"]
    assert len(benchmark.rows) == 1


def test_profile(choose, tmp_path, capsys):
    choose(fake("torch", lambda: None), fake("crashing", crash))
    assert throughput.main([*SMALL, "--profile", str(tmp_path / "traces")]) == 0
    printed = capsys.readouterr()
    assert "Self CPU" in printed.out and "trwkv::" in printed.out
    assert "traceEvents" in json.loads((tmp_path / "traces" / "torch.json").read_text())
    assert "crashing (forward, 2x20x8, P = 1, aggregated, float32): RuntimeError" in printed.err


def test_first_call_is_timed_in_a_fresh_process(tmp_path, capsys):
    path = tmp_path / "results.json"
    few = ["--perspectives", "1", "--backends", "torch"]
    assert throughput.main([*SMALL, *few, "--first-call", "--json", str(path)]) == 0
    (call,) = json.loads(path.read_text())["first_calls"]
    assert call["implementation"] == "torch" and 0 < call["seconds"] < 60
    assert "first call (s)" in capsys.readouterr().out


def test_first_call_says_what_went_wrong(monkeypatch):
    found = {}

    def run(command, env, **how):
        found.update(env)
        return throughput_first_call.subprocess.CompletedProcess(command, 1, "", "Traceback\nKeyError: 'x'\n")

    monkeypatch.setattr(throughput_first_call.subprocess, "run", run)
    assert throughput_first_call.first_call("x", {}, None, None) == {"error": "KeyError: 'x'"}
    caches = {found[name] for name in throughput_first_call.CACHES}
    assert len(caches) == 2 and not caches & set(throughput_first_call.os.environ.values())
