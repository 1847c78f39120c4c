"""One optimizer step in two gloo processes, data parallel (DDP) and sharded (FSDP2), is that of one process."""

import datetime
import itertools
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM

N_RANKS = 2
TIME_LIMIT = 120
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SAME_STEP = list(itertools.product(("ddp", "fsdp"), ("layer", "stream"), (False, True)))


def make(placement="layer", frozen=False):
    torch.manual_seed(0)
    settings = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "n_perspectives": 3}
    model = TemporalRwkvForCausalLM(TemporalRwkvConfig(placement=placement, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return (model.freeze_base() if frozen else model).train()


def step(model, ids, autocast=False):
    """The loss of a step, which `model` takes: SGD, so that a gradient that is off by a factor shows."""
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.5)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def batch():
    return torch.randint(29, (4, 8), generator=torch.Generator().manual_seed(1))


def shard(model):
    for block in model.rwkv.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def shard_in_half(model):
    """As docs/finetuning.md does it."""
    for block in model.rwkv.blocks:
        fully_shard([m for m in block.att.modules() if isinstance(m, torch.nn.Linear)], mp_policy=HALF)
        fully_shard(block.att)
        fully_shard(block, mp_policy=HALF)
    fully_shard(model, mp_policy=HALF)
    return model


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def mean_loss(loss):
    dist.all_reduce(loss)
    return loss / N_RANKS


def observed_decays(model):
    """The decays that every layer's forward sees, as they come."""
    seen = []
    for block in model.rwkv.blocks:
        block.att.value.register_forward_hook(
            lambda *_, att=block.att: seen.append(att.time_decay.detach().clone())
        )
    return seen


def worker(rank, folder):
    torch.set_num_threads(1)
    seconds = datetime.timedelta(seconds=30)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_RANKS, timeout=seconds
    )
    ids, results = batch().chunk(N_RANKS)[rank], {}
    for kind, placement, frozen in SAME_STEP:
        model = make(placement, frozen)
        parallel = DistributedDataParallel(model) if kind == "ddp" else shard(model)
        loss = mean_loss(step(parallel, ids))
        results[kind, placement, frozen] = loss, [whole(x) for x in model.parameters()]
    for name, sharded in (("autocast", shard(make())), ("policy", shard_in_half(make()))):
        seen = observed_decays(sharded)
        loss = mean_loss(step(sharded, ids, autocast=name == "autocast"))
        results[name] = loss, [whole(x) for x in sharded.parameters()], seen
    try:
        step(shard(with_bfloat16()), ids)
    except AssertionError as error:
        results["bfloat16"] = str(error)
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    dist.destroy_process_group()


def with_bfloat16():
    """A bfloat16 model as `from_pretrained(..., dtype="bfloat16")` gives it."""
    model = make().bfloat16()
    for block in model.rwkv.blocks:
        block.att.time_decay.data = block.att.time_decay.data.float()
        block.att.time_first.data = block.att.time_first.data.float()
    return model


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    context = mp.start_processes(
        worker, args=(str(folder),), nprocs=N_RANKS, join=False, start_method="spawn"
    )
    end = time.monotonic() + TIME_LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize(("kind", "placement", "frozen"), SAME_STEP)
def test_a_step_is_that_of_one_process(results, kind, placement, frozen):
    model = make(placement, frozen)
    before = [x.detach().clone() for x in model.parameters()]
    loss = step(model, batch())
    got_loss, got = results[kind, placement, frozen]
    torch.testing.assert_close(got_loss, loss)
    for (name, x), start, mine in zip(model.named_parameters(), before, got, strict=True):
        torch.testing.assert_close(mine, x.detach(), msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(mine, start) != x.requires_grad, name


@pytest.mark.parametrize("name", ["autocast", "policy"])
def test_bfloat16_work_on_exact_decays(results, name):
    """The two ways that docs/finetuning.md names; a step moves where that in float32 does, within bfloat16."""
    model = make()
    before = [x.detach().clone() for x in model.parameters()]
    loss = step(model, batch())
    got_loss, got, seen = results[name]
    assert [x.dtype for x in seen] == [torch.float32] * len(model.rwkv.blocks)
    for decay, block in zip(seen, make().rwkv.blocks, strict=True):
        assert torch.equal(decay, block.att.time_decay.detach())
    torch.testing.assert_close(got_loss, loss, rtol=2e-2, atol=0)
    assert got_loss != loss
    moved = torch.cat([(x - y).flatten() for x, y in zip(got, before, strict=True)])
    expected = torch.cat(
        [(x.detach() - y).flatten() for x, y in zip(model.parameters(), before, strict=True)]
    )
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_a_bfloat16_model_cannot_share_groups(results):
    assert "uniform original parameter dtype" in results["bfloat16"]
