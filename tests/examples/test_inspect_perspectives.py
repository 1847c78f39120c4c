"""The pictures of what perspectives learned: their numbers, on a model whose perspectives are known."""

import math
import sys

import inspect_perspectives
import pytest
import torch

from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.synthetic import byte_tokenizer

pytest.importorskip("matplotlib", reason="draws a plot")


def known_model(**options):
    torch.manual_seed(0)
    config = TemporalRwkvConfig(
        vocab_size=260, hidden_size=8, num_hidden_layers=2, n_perspectives=2, **options
    )
    model = TemporalRwkvForCausalLM(config).eval()
    with torch.no_grad():
        for i, block in enumerate(model.rwkv.blocks):
            for p, steps in enumerate((4.0, 64.0)):
                block.att.time_decay[p] = math.log(math.log(2) / (steps * (i + 1)))
    return model


def test_half_lives():
    lives = inspect_perspectives.half_lives(known_model())
    for i, life in enumerate(lives):
        torch.testing.assert_close(life, torch.tensor([[4.0], [64.0]]).expand(2, 8) * (i + 1))


def test_a_collapsed_perspective_is_seen():
    model = known_model(perspective_noise=0.3)
    assert min(inspect_perspectives.distances(model)) > 0.1
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.startswith("rwkv.blocks.1.") and x.ndim == 2 and len(x) == 2 and "selector" not in name:
                x[1] = x[0]
    first, second = inspect_perspectives.distances(model)
    assert first > 0.1
    assert second == 0


@pytest.mark.parametrize("placement", ["layer", "stream"])
def test_the_script(placement, tmp_path, monkeypatch, capsys):
    known_model(placement=placement).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(
        sys, "argv", ["x", "--model", str(tmp_path), "--text", "the sea", "--output", str(picture)]
    )
    inspect_perspectives.main()
    printed = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    weights = inspect_perspectives.selector_weights(
        known_model(placement=placement), torch.tensor([[1, 2, 3]])
    )
    assert len(weights) == (2 if placement == "layer" else 1)
    assert all(x.shape == (3, 2) and torch.allclose(x.sum(1), torch.ones(3)) for x in weights)
    assert ("weights of the last selector" in printed) == (placement == "stream")


def test_one_perspective_is_refused(tmp_path, monkeypatch, capsys):
    TemporalRwkvForCausalLM(
        TemporalRwkvConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(tmp_path)])
    with pytest.raises(SystemExit):
        inspect_perspectives.main()
    assert "expected two perspectives or more" in capsys.readouterr().err
