"""The pictures of what perspectives learned."""

import sys

import inspect_perspectives
import pytest
import torch

from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM
from trwkv.synthetic import byte_tokenizer

pytest.importorskip("matplotlib", reason="draws a plot")


def small_model(**options):
    torch.manual_seed(0)
    config = TemporalRwkvConfig(
        vocab_size=260, hidden_size=8, num_hidden_layers=2, n_perspectives=2, **options
    )
    return TemporalRwkvForCausalLM(config).eval()


@pytest.mark.parametrize("placement", ["layer", "stream"])
def test_the_script(placement, tmp_path, monkeypatch, capsys):
    small_model(placement=placement).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(
        sys, "argv", ["x", "--model", str(tmp_path), "--text", "the sea", "--output", str(picture)]
    )
    inspect_perspectives.main()
    printed = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    assert ("weights of the last selector" in printed) == (placement == "stream")


def test_tokens_are_no_formulas(tmp_path):
    lives, weights = [torch.ones(2, 4)], [torch.full((2, 2), 0.5)]
    inspect_perspectives.draw(tmp_path / "x.png", lives, weights, [0.1], ["$$", r"$\frac$"])
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_one_perspective_is_refused(tmp_path, monkeypatch, capsys):
    TemporalRwkvForCausalLM(
        TemporalRwkvConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(tmp_path)])
    with pytest.raises(SystemExit):
        inspect_perspectives.main()
    assert "expected two perspectives or more" in capsys.readouterr().err
