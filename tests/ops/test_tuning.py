"""Configurations that a search found: chosen by timing among right ones, saved, and taken by later calls."""

import json
from collections import Counter

import pytest
import torch

from trwkv.ops import _dispatch, _tuning, tune
from trwkv.ops._tuning import CONFIGS, config_for, entry_name, save_config, saved_configs
from trwkv.testing import HAS_GPU

DEVICE = "cuda" if HAS_GPU else "cpu"
FOUND = _tuning.Config(fwd_block_c=32, fwd_block_t=8, bwd_block_c=32, bwd_block_t=4, fwd_warps=10)


@pytest.fixture
def file(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("TRWKV_TUNING_FILE", str(file))
    _dispatch.tuning_file.cache_clear()
    saved_configs.cache_clear()
    yield file
    _dispatch.tuning_file.cache_clear()
    saved_configs.cache_clear()


@pytest.fixture
def k(monkeypatch):
    """A tensor whose device is taken for a GPU of some name."""
    monkeypatch.setattr(_tuning, "gpu_name", lambda device: "Some GPU")
    return torch.empty(1, 1, 1, dtype=torch.bfloat16)


def test_a_saved_configuration_is_taken(file, k) -> None:
    assert config_for(2, k) == CONFIGS[2]
    save_config(file, "Some GPU", entry_name(2, torch.bfloat16), FOUND, {"forward": 1.0})
    assert config_for(2, k) == FOUND
    assert config_for(2, k.float()) == CONFIGS[2]
    assert config_for(1, k) == CONFIGS[1]
    assert config_for(2) == CONFIGS[2]
    save_config(file, "Other GPU", entry_name(2, torch.bfloat16), CONFIGS[3], {})
    assert config_for(2, k) == FOUND
    assert json.loads(file.read_text())["Some GPU"]["P = 2, bfloat16"]["measured"] == {"forward": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"Some GPU": {"P = 2, bfloat16": {}}}',
        '{"Some GPU": {"P = 2, bfloat16": {"config": {"fwd_block_c": 32}}}}',
        json.dumps({"Some GPU": {"P = 2, bfloat16": {"config": vars(FOUND) | {"fwd_block_t": 3}}}}),
        json.dumps({"Some GPU": {"P = 2, bfloat16": {"config": vars(FOUND) | {"bwd_block_t": 1}}}}),
    ],
)
def test_a_broken_file_is_named(file, k, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tuning\.json"):
        config_for(2, k)


def test_the_fastest_is_found(monkeypatch) -> None:
    """By a clock that prefers one block size, a number of warps on the single row, and T in one piece."""
    monkeypatch.setattr(tune, "BLOCK_C", (32,))
    monkeypatch.setattr(tune, "FWD_BLOCK_T", (4, 8))
    monkeypatch.setattr(tune, "BWD_BLOCK_T", (2,))
    monkeypatch.setattr(tune, "WARPS", (12, 16))
    runs = Counter()

    def clock(step) -> float:
        step()
        config = config_for(1)
        runs[config] += 1
        wrong = (
            config.fwd_block_t != 8,
            config.bwd_block_t != 2,
            config.fwd_warps != 16,
            config.bwd_warps != 16,
            config.fwd_undivided_from > 1,
            config.bwd_undivided_from > 1,
        )
        return 1 + sum(wrong)

    lines = []
    config, measured = tune.search(1, torch.float32, (1, 9, 4), DEVICE, timer=clock, report=lines.append)
    assert (config.fwd_block_t, config.bwd_block_t) == (8, 2)
    assert (config.fwd_warps, config.bwd_warps) == (16, 16)
    column = 1 / _dispatch.multiprocessors(torch.device(DEVICE))  # which one row of four channels is
    assert (config.fwd_undivided_from, config.bwd_undivided_from) == (column, column)
    assert (config.fwd_block_c, config.bwd_block_c) == (32, 32)
    assert measured["forward"] < measured["forward, as shipped"]
    assert len(lines) == sum(runs.values()) == 3 + 2 + 2 + 2 + 2 + 2


@pytest.mark.parametrize(
    "T, columns, chunks",
    [(4096, 1, 64), (4096, 40, 32), (4096, 395, 4), (4096, 396, 1), (257, 1, 5), (256, 1, 1), (0, 0, 0)],
)
def test_t_is_divided_where_columns_are_few(T: int, columns: int, chunks: int) -> None:
    length = _tuning.chunk_length(_tuning.Config(64, 16, 64, 8), "forward", T, columns, 132)
    assert length % _tuning.SEGMENT == 0 and length > 0
    assert -(-T // length) == chunks
    assert columns * chunks <= 12 * 132


def test_a_wrong_kernel_is_not_timed(monkeypatch) -> None:
    from trwkv.ops.wkv import chunk

    right = chunk.chunk_forward

    def wrong(*args, save):
        output, *rest = right(*args, save=save)
        return (output * (1.0 + 0.1 * (config_for(1).fwd_block_t == 4)), *rest)

    monkeypatch.setattr(chunk, "chunk_forward", wrong)
    lines = []
    config, _ = tune.search(1, torch.float32, (1, 5, 4), DEVICE, timer=lambda step: 1.0, report=lines.append)
    assert config == CONFIGS[1]  # nothing is faster
    left_out = [line for line in lines if "left out" in line]
    assert len(left_out) == 2 and all("fwd_block_t=4" in x and "wrong by" in x for x in left_out)


def test_without_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "a GPU is needed" in capsys.readouterr().err
