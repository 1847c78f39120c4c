"""Sequence parallelism: several gloo processes compute what one does, and an absent one is an error."""

import datetime
import itertools
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trwkv import distributed
from trwkv.distributed import previous_token, sequence_parallel_wkv
from trwkv.modules import token_shift
from trwkv.testing import IMPLEMENTATIONS, truth_of, wkv_case
from trwkv.testing.contracts import assert_same
from trwkv.testing.wkv import comparable

JOBS = [
    {"cuts": (5, 9), "options": {"T": 13, "P": 2, "weights": "BTP", "state": "random"}},
    {"cuts": (0, 9), "options": {"T": 9, "P": 2, "weights": "PC", "reverse": True, "state": "random"}},
    {"cuts": (40, 41), "options": {"T": 50, "P": 1, "weights": "none", "k_range": 300.0, "log_decays": (-13.8, 4.4)}},
    {"cuts": (3, 7), "options": {"T": 10, "P": 3, "weights": "none", "shared": False, "growing": 0.5}},
    {"cuts": (3, 6, 9), "options": {"T": 14, "P": 2, "weights": "P", "log_decays": (-13.8, -9.0)}},
    {"cuts": (8,), "options": {"T": 16, "P": 2, "weights": "BTP", "dtype": torch.float64}},
    {"cuts": (6,), "options": {"T": 12, "P": 2, "weights": "BTP", "dtype": torch.bfloat16, "state": "random"}},
]  # fmt: skip
OP = IMPLEMENTATIONS["wkv/torch-chunk"].op
PER_TOKEN = ("k", "v")


def case_for(job):
    return wkv_case(B=2, C=5, **job["options"])


def stretches(job):
    return list(itertools.pairwise((0, *job["cuts"], job["options"]["T"])))


def is_per_token(name, x):
    return name in PER_TOKEN or (name == "weights" and x.ndim == 3)


def run_stretch(job, rank, n_ranks):
    """One process's part of a case: outputs, state and gradients."""
    case = case_for(job)
    begin, end = stretches(job)[rank]
    first, last = (n_ranks - 1, 0) if case.reverse else (0, n_ranks - 1)
    inputs = {}
    for name, x in case.inputs.items():
        if name == "initial_state" and rank != first:
            continue
        part = x[:, begin:end] if is_per_token(name, x) else x
        inputs[name] = part.clone().requires_grad_()
    output, state = sequence_parallel_wkv(**inputs, output_final_state=True, reverse=case.reverse)
    loss = (output * case.grad_output[:, begin:end]).double().sum()
    if rank == last:
        sums = comparable((output, state), truth_of(OP, case).units)["state"]
        loss = loss + (sums * case.grad_state.double()).sum()
    loss.backward()
    grads = {name: x.grad for name, x in inputs.items()}
    return {"output": output.detach(), "state": state.detach(), "grads": grads}


def worker(rank, n_ranks, folder, jobs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    results = [run_stretch(job, rank, n_ranks) for job in jobs]
    results.append(shift_stretch(rank, n_ranks))
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


SHIFT_CUTS = {2: (0, 4, 9), 3: (0, 4, 4, 9), 4: (0, 0, 5, 6, 9)}


def shift_inputs():
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 9, 3, generator=g),
        torch.randn(2, 3, generator=g),
        torch.randn(2, 9, 3, generator=g),
    )


def shift_stretch(rank, n_ranks):
    x, initial, grad = shift_inputs()
    begin, end = SHIFT_CUTS[n_ranks][rank : rank + 2]
    part = x[:, begin:end].clone().requires_grad_()
    before = previous_token(part, initial)
    after = previous_token(part, reverse=True)
    shifted = token_shift(part, before) if end > begin else part
    ((shifted * grad[:, begin:end]).sum() + 0 * before.sum()).backward()
    return {"shifted": shifted.detach(), "after": after.detach(), "grad": part.grad}


def start(target, n_ranks, *args, timeout=120):
    context = mp.start_processes(
        target, args=(n_ranks, *args), nprocs=n_ranks, join=False, start_method="spawn"
    )
    end = time.monotonic() + timeout
    while not context.join(timeout=1):
        assert time.monotonic() < end, "the processes hang"


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_as_one_process(n_ranks, tmp_path):
    jobs = [job for job in JOBS if len(job["cuts"]) == n_ranks - 1]
    start(worker, n_ranks, str(tmp_path), jobs)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(n_ranks)]
    for i, job in enumerate(jobs):
        parts = [result[i] for result in results]
        case = case_for(job)
        truth = truth_of(OP, case)
        final = parts[0 if case.reverse else -1]["state"]
        whole = comparable((torch.cat([p["output"] for p in parts], 1), final), truth.units)
        whole["state"] = whole["state"].to(final.dtype)
        for name, x in case.inputs.items():
            grads = [p["grads"][name] for p in parts if name in p["grads"]]
            whole[name] = (
                torch.cat(grads, 1) if is_per_token(name, x) else sum(g.double() for g in grads).to(x.dtype)
            )
        IMPLEMENTATIONS["wkv/torch-chunk"].assert_accurate(whole, truth)

    x, initial, grad = shift_inputs()
    x.requires_grad_()
    shifted = token_shift(x, initial)
    (shifted * grad).sum().backward()
    parts = [result[-1] for result in results]
    assert_same("shifted", torch.cat([p["shifted"] for p in parts], 1), shifted.detach())
    torch.testing.assert_close(torch.cat([p["grad"] for p in parts], 1), x.grad)
    for (_, end), part in zip(itertools.pairwise(SHIFT_CUTS[n_ranks]), parts, strict=True):
        assert_same("after", part["after"], x[:, end].detach() if end < 9 else torch.zeros(2, 3))


def deserter(rank, n_ranks, folder):
    seconds = datetime.timedelta(seconds=4)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks, timeout=seconds
    )
    k = torch.ones(1, 3, 2)
    vector = torch.ones(2)
    sequence_parallel_wkv(-vector, vector, k, k)
    if rank == 1:
        time.sleep(9 if n_ranks == 2 else 0)
        return
    try:
        sequence_parallel_wkv(-vector, vector, k, k)
    except RuntimeError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    os._exit(0)  # gloo's threads, which still wait, would abort


@pytest.mark.parametrize("n_ranks", [2, 3], ids=["one that hangs", "one that has gone"])
def test_an_absent_process_is_an_error(n_ranks, tmp_path):
    start(deserter, n_ranks, str(tmp_path), timeout=60)
    for rank in range(n_ranks):
        assert (tmp_path / f"{rank}.txt").exists() == (rank != 1)


def test_in_one_process(tmp_path):
    """A group of one, and what is said of wrong calls."""
    vector, k = torch.rand(2), torch.rand(1, 3, 2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        sequence_parallel_wkv(-vector, vector, k, k)
    with pytest.raises(RuntimeError, match="init_process_group"):
        previous_token(k)


def test_without_gradients_there_is_no_graph(monkeypatch):
    seen = []

    def run(self, *args):
        seen.append(torch.is_grad_enabled())
        return kept(self, *args)

    kept = distributed._Stretch.run
    monkeypatch.setattr(distributed._Stretch, "run", run)
    vector, k = torch.rand(2, requires_grad=True), torch.rand(1, 3, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.no_grad():
            expected = sequence_parallel_wkv(-vector, vector, k, k).output
        assert not any(seen)
        assert torch.equal(sequence_parallel_wkv(-vector, vector, k, k).output, expected)
        assert any(seen)
    finally:
        dist.destroy_process_group()


def misplaced(rank, n_ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    vector, k = torch.rand(2), torch.rand(1, 3, 2)
    for reverse in (False, True):
        wrong = (1, 0)[reverse]
        if rank == wrong:
            with pytest.raises(ValueError, match=r"initial_state: expected None .* got one in rank"):
                sequence_parallel_wkv(
                    -vector, vector, k, k, initial_state=torch.ones(1, 3, 2), reverse=reverse
                )


def test_an_initial_state_belongs_to_the_first(tmp_path):
    start(misplaced, 2, str(tmp_path))
