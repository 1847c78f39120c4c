"""A run of the benchmark: case by case, contender by contender, every result kept as soon as it is there."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from throughput_cases import (
    DECODE_TOKENS,
    DTYPES,
    LAYOUTS,
    Case,
    Inputs,
    error_limit,
    errors,
    exact_results,
    expected,
    make_inputs,
)
from throughput_contenders import IN_PLACE, Contender, contenders, work
from throughput_first_call import first_call
from throughput_measure import Clock, copy_speed, peak_memory, profile, quantiles
from throughput_official import MAX_TOKENS, OFFICIAL, find_sources, official
from trwkv.ops._compile import record_launches
from trwkv.ops._dispatch import gpu_name, tuning_file
from trwkv.ops._tuning import saved_configs
from trwkv.ops.precompile import compile_all
from trwkv.report import environment

OWN_KERNELS = ("triton", IN_PLACE)
NOT_TIMED = ("wrong", "failed", "skipped", "not_run")
"""Lists of "<contender> (<case>): <why>" in the results. Not run: the time was over."""


class Benchmark:
    """A run and its results: the rows measured so far, and what was not timed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.lost = ""  # by whom the GPU was, if it was
        clock = Clock(options.device)
        self.clock, self.copy = clock, copy_speed(clock, seconds=options.seconds)
        _say(f"copy: {self.copy / 1e9:.3g} GB/s")
        self.results = self._start()
        self.rows = self.results["rows"]
        self.done = {_key(row) for row in self.rows}
        self.given_up = () if options.retry else tuple(self.results["failed"] + self.results["wrong"])

    def _start(self) -> dict[str, Any]:
        kept = ("device", "seconds", "max_call_seconds")
        here = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "commit": commit(),
            "environment": environment(self.options.device),
            "options": {name: getattr(self.options, name) for name in kept},
            "load_average_before": _load_average(),
            "copy_gb_per_second": self.copy / 1e9,
            "tuning": self._tuning(),
        }
        if self.options.device == "cuda":
            here["launch_us"] = self.clock.launch_microseconds()
        if self.options.resume and self.options.json.exists():
            earlier = json.loads(self.options.json.read_text())
            for name in ("commit", "environment", "options", "tuning"):
                before, now = (self._that_matters(name, results.get(name)) for results in (earlier, here))
                if before != now:
                    raise SystemExit(f"--resume: {self.options.json} has another {name}: {before}; now {now}")
            if died_in := earlier.get("running"):
                earlier["failed"].append(f"{died_in}: the process ended in it")
            continued = {name: here[name] for name in ("date", "load_average_before", "copy_gb_per_second")}
            resumed = [*earlier["resumed"], continued]
            return {**earlier, "resumed": resumed, "not_run": [], "running": None}
        lists = {name: [] for name in ("rows", *NOT_TIMED, "first_calls", "resumed")}
        return {**here, **lists, "running": None}

    def _tuning(self) -> dict[str, Any]:
        """The configurations that were saved for this GPU; without any, what ships is measured."""
        device = torch.device(self.options.device)
        found = saved_configs(tuning_file()).get(gpu_name(device) or "", {})
        return {entry: asdict(config) for entry, config in found.items()}

    def _that_matters(self, name: str, value: Any) -> Any:
        """Of results that are to be continued: on a GPU another host, or other versions of the rest, is no matter."""
        if name == "tuning":
            return value or {}
        if name != "environment" or self.options.device != "cuda":
            return value
        versions = {package: value["versions"].get(package) for package in ("torch", "triton")}
        return {"device": value["device"], **versions}

    def run(self) -> None:
        chosen = self._contenders()
        if self.options.device == "cuda" and any(contender.name in OWN_KERNELS for contender in chosen):
            self._compile(chosen)
        for group in groups(self.options):
            shared = Shared(group)
            for case in group:
                for contender in chosen:
                    self._turn(case, contender, shared)
        if self.options.first_call:
            self._first_calls(chosen)
        self.write()

    def _compile(self, chosen: list[Contender]) -> None:
        """Our kernels for all cases, on all cores, instead of one after the other while the GPU waits."""
        begin = time.monotonic()
        with record_launches() as launches:
            for group in groups(self.options):
                inputs = make_inputs(group[0], random=False)
                for case in group:
                    case = replace(case, mode=case.mode.removesuffix("-graph"))
                    for contender in chosen:
                        if contender.name in OWN_KERNELS and contender.refuses(case) is None:
                            work(case, contender, inputs)()
        try:
            count = compile_all(launches, os.cpu_count() or 1)
            _say(f"{count} kernels compiled in {time.monotonic() - begin:.0f} s")
        except Exception as error:  # it will be raised again, and noted, by the case that needs the kernel
            _say(f"compiling: {_reason(error)}")
        torch.cuda.empty_cache()  # what the cases' inputs took: an extension that allocates its own needs it, too

    def _contenders(self) -> list[Contender]:
        present = contenders(self.options.device)
        names = [name for name in self.options.backends if name in present]
        chosen = [present[name] for name in names]
        if OFFICIAL in self.options.backends:
            try:
                chosen.append(self._official())
            except Exception as error:  # whatever building may raise
                self._note("failed", OFFICIAL, _reason(error))
        return chosen

    def _official(self) -> Contender:
        """One build for the whole run: two of them would register the same names with PyTorch."""
        dtypes = set(self.options.dtypes)
        dtype = DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
        _say(f"{OFFICIAL}: building")
        return official(
            find_sources(self.options.official_cuda, dtype),
            min(MAX_TOKENS, max(T for _, T, _ in self.options.shapes)),
        )

    def _turn(self, case: Case, contender: Contender, shared: "Shared") -> None:
        label = f"{contender.name} ({case})"
        if _key(_identity(case, contender)) in self.done or any(
            x.startswith(f"{label}: ") for x in self.given_up
        ):
            return
        if self.lost or time.monotonic() > self.deadline:
            why = f"the GPU was lost by {self.lost}" if self.lost else "the time was over"
            self._note("not_run", label, why)
        elif reason := contender.refuses(case):
            self._note("skipped", label, reason)
        elif contender.many_calls and (predicted := self._predicted(case, contender)) > (
            self.options.max_call_seconds
        ):
            self._note("skipped", label, f"{case.P} calls would take about {predicted:.2g} s")
        else:
            self.results["running"] = label
            self.write()
            try:
                self._try(case, contender, shared, label)
            finally:  # nothing is left of it but if the process dies
                self.results["running"] = None
                self.write()

    def _try(self, case: Case, contender: Contender, shared: "Shared", label: str) -> None:
        """A row, or why there is none: nothing that a contender raises ends the run."""
        try:
            fn = work(case, contender, shared.inputs)
            results = fn()
            found = errors(
                shared.inputs, results, expected(case.mode, shared.exact), log_decay=contender.log_decay
            )
            worst = max(found, key=lambda name: found[name])
            if not found[worst] <= error_limit(case.dtype):
                self._note(
                    "wrong",
                    label,
                    f"{worst} is off by {found[worst]:.2g} of its largest value; "
                    f"at most {error_limit(case.dtype):.2g} is allowed",
                )
                return
            returned = sum(x.numel() * x.element_size() for x in results.values())
            del results
            row = self._measured(case, contender, fn)
            if not case.decoding:
                k = shared.inputs.k
                extra = max(0.0, row["peak_memory_mib"] * 2**20 - returned)
                row["extra_memory_percent_of_k"] = 100 * extra / (k.numel() * k.element_size())
            row |= {"error": found[worst], "errors": found}
        except Exception as error:
            self._note("failed", label, _reason(error))
            self._check_gpu(contender)
            return
        self._forget(label)
        self.rows.append(row)
        self.done.add(_key(row))
        _say(f"{case}: {contender.name} {row['ms_median']:.4g} ms, error {row['error']:.1e}")

    def _measured(self, case: Case, contender: Contender, fn: Any) -> dict[str, Any]:
        steps = case.T if case.decoding else 1
        samples = [
            ms / steps
            for ms in self.clock.samples(
                fn, seconds=self.options.seconds, flush=not case.decoding, hide_launch=case.mode != "decode"
            )
        ]
        p20, median, p80 = quantiles(samples)
        speed = case.necessary_bytes / (median / 1e3)
        return {
            **_identity(case, contender),
            "calls": case.P if contender.many_calls else 1,
            "ms_median": median,
            "ms_p20": p20,
            "ms_p80": p80,
            "tokens_per_second": case.tokens / (median / 1e3),
            "gb_per_second": speed / 1e9,
            "percent_of_copy": 100 * speed / self.copy,
            "peak_memory_mib": peak_memory(fn, case.device) / 2**20,
            "samples_ms": [float(f"{ms:.5g}") for ms in samples],
        }

    def _predicted(self, case: Case, contender: Contender) -> float:
        """Seconds of a call, from those for fewer perspectives."""
        like = {**_identity(case, contender), "perspectives": 0, "layout": ""}
        calls = [
            row["ms_median"] * (case.T if case.decoding else 1) / row["perspectives"]
            for row in self.rows
            if {**row, "perspectives": 0, "layout": ""}.items() >= like.items()
        ]
        return max(calls, default=0.0) * case.P / 1e3

    def _check_gpu(self, contender: Contender) -> None:
        """After some errors a GPU answers nothing more to this process."""
        if self.options.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                self.lost = contender.name

    def _first_calls(self, chosen: list[Contender]) -> None:
        """Of every contender and mode, in a process of its own, on the first case."""
        B, T, C = self.options.shapes[0]
        P, dtype = self.options.perspectives[0], self.options.dtypes[0]
        layout = self.options.layouts[0] if P > 1 else LAYOUTS[0]
        found = self.results["first_calls"]
        for mode in self.options.modes:
            length = DECODE_TOKENS if mode.startswith("decode") else T
            task = {"mode": mode, "B": B, "T": length, "C": C, "P": P, "layout": layout}
            task |= {"dtype": dtype, "device": self.options.device}
            for contender in chosen:
                who = {"implementation": contender.name, **task}
                label = f"{contender.name} (first call, {mode})"
                if any(call.items() >= who.items() for call in found) or contender.refuses(
                    Case(**{**task, "dtype": DTYPES[dtype]})
                ):
                    continue
                if time.monotonic() > self.deadline:
                    self._note("not_run", label, "the time was over")
                    continue
                took = first_call(contender.name, task, self.options.official_cuda, self.options.threads)
                if "error" in took:
                    self._note("failed", label, took["error"])
                else:
                    found.append({**who, **took})
                    _say(f"{label}: {took['seconds']:.3g} s")
                self.write()

    def profile(self, folder: Path) -> list[str]:
        """The profile of the first case, of every contender: tables; the timelines go into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        case = next(groups(self.options))[0]
        inputs, tables = make_inputs(case), []
        for contender in self._contenders():
            if reason := contender.refuses(case):
                self._note("skipped", f"{contender.name} ({case})", reason)
                continue
            trace = folder / f"{contender.name}.json"
            try:
                found = profile(work(case, contender, inputs), case.device, trace)
                tables.append(f"{contender.name} ({case}), three calls; timeline: {trace}\n\n{found}")
            except Exception as error:
                self._note("failed", f"{contender.name} ({case})", _reason(error))
        return tables

    def _forget(self, label: str) -> None:
        for kind in NOT_TIMED:
            self.results[kind] = [x for x in self.results[kind] if not x.startswith(f"{label}: ")]

    def _note(self, kind: str, label: str, why: str) -> None:
        self._forget(label)
        self.results[kind].append(f"{label}: {why}")
        _say(f"{kind.replace('_', ' ')}: {label}: {why}")

    def write(self) -> None:
        """All there is, in one step: whoever reads, or is killed, never meets half a file."""
        if self.options.json:
            part = self.options.json.with_name(self.options.json.name + ".part")
            part.write_text(json.dumps(self.results, indent=1) + "\n")
            part.replace(self.options.json)


class Shared:
    """What the cases of a group share, made when first asked for. They differ in their mode alone."""

    def __init__(self, group: list[Case]) -> None:
        self.group = group

    @cached_property
    def inputs(self) -> Inputs:
        return make_inputs(self.group[0])

    @cached_property
    def exact(self) -> dict[str, torch.Tensor]:
        return exact_results(self.inputs, gradients=any("backward" in case.mode for case in self.group))


def groups(options: argparse.Namespace) -> Iterator[list[Case]]:
    """The cases asked for, those with the same inputs together. With P = 1 the layouts do not differ."""
    decode = [mode for mode in options.modes if mode.startswith("decode")]
    other = [mode for mode in options.modes if not mode.startswith("decode")]
    work = [((B, DECODE_TOKENS, C), decode) for B, C in options.decode]
    work += [(shape, other) for shape in options.shapes]
    for (B, T, C), modes in work:
        for dtype in options.dtypes:
            for P in options.perspectives:
                for layout in options.layouts if P > 1 else LAYOUTS[:1]:
                    first = Case("", B, T, C, P, layout, DTYPES[dtype], options.device)
                    if modes:
                        yield [replace(first, mode=mode) for mode in modes]


def _identity(case: Case, contender: Contender) -> dict[str, Any]:
    return {
        "shape": case.shape,
        "mode": case.mode,
        "perspectives": case.P,
        "layout": case.layout,
        "dtype": case.dtype_name,
        "implementation": contender.name,
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["shape"]), *(
        row[n] for n in ("mode", "perspectives", "layout", "dtype", "implementation")
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _load_average() -> float | None:
    """Programs that were running in the last minute: above zero they shared the machine with this one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit() -> str:
    """The commit that ran, marked "-dirty" if what was measured differs from it; "unknown" outside a checkout,
    unless TRWKV_COMMIT says."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).parent.parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    commit = os.environ.get("TRWKV_COMMIT") or git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "trwkv", "benchmarks/*.py")
    return (commit or "unknown") + ("-dirty" if changed else "")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
