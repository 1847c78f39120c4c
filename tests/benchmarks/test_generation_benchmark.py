"""Generation keeps nothing per token but the tokens: the rows say so, and would say if it were otherwise."""

import pytest
import torch

import generation
from trwkv.models import TemporalRwkvModel


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(generation, "MODEL", generation.MODEL | {"hidden_size": 8, "num_hidden_layers": 1})


def test_state_and_tensors_stay_as_many() -> None:
    rows = generation.measure(2000, 500)
    assert [row["tokens"] for row in rows] == [500, 1000, 1500, 2000]
    assert {row["state_bytes"] for row in rows} == {2 * 8 * 4 + 3 * 3 * 8 * 4}
    assert len({row["tensors_alive"] for row in rows}) == 1
    assert all(
        row["ms_per_token"] * row["tokens_per_second"] == pytest.approx(1000, rel=0.01) for row in rows
    )


@pytest.mark.parametrize("static", [False, True])
def test_other_models(static: bool) -> None:
    options = {"hidden_size": 16, "num_hidden_layers": 2, "wkv_backend": "torch"}
    (row,) = generation.measure(20, 20, dtype=torch.bfloat16, static=static, **options)
    assert row["tokens"] == 20
    assert row["state_bytes"] == 2 * (2 * 16 * 2 + 3 * 3 * 16 * 4)


def test_what_is_kept_is_seen(monkeypatch) -> None:
    kept = []
    forward = TemporalRwkvModel.forward

    def keeping(self, *args, **options):
        output = forward(self, *args, **options)
        kept.append(output.last_hidden_state)
        return output

    monkeypatch.setattr(TemporalRwkvModel, "forward", keeping)
    first, second = generation.measure(200, 100)
    assert second["tensors_alive"] >= first["tensors_alive"] + 100


def test_a_state_that_pins_more_is_seen() -> None:
    """`nbytes` counts what the state keeps alive, not what it shows."""
    cache = generation.TemporalRwkvCache(1)
    cache.layers[0].wkv = torch.zeros(100, 3, 3, 8)[:1]
    assert cache.nbytes() == 100 * 3 * 3 * 8 * 4
