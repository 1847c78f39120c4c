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
    settings = {"vocab_size": 260, "hidden_size": 8, "num_hidden_layers": 2, "n_perspectives": 2} | options
    config = TemporalRwkvConfig(**settings)
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
        TemporalRwkvConfig(vocab_size=260, hidden_size=8, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(tmp_path)])
    with pytest.raises(SystemExit):
        inspect_perspectives.main()
    assert "expected two perspectives or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing"], "no file or folder 'missing'"),
        (["--model", "model"], "expected a folder with tokenizer.json"),
        (["--model", "model", "--tokenizer", "missing"], "tokenizer 'missing': expected"),
        (
            ["--model", "model", "--tokenizer", "bytes", "--text", ""],
            "--text: expected at least one token; got none",
        ),
        (
            ["--model", "small", "--tokenizer", "bytes"],
            "tokenizer: expected at most the model's 9 tokens; got",
        ),
        (
            ["--model", "model", "--output", "no/where.png"],
            "--output: expected a file in a folder that exists",
        ),
    ],
)
def test_what_is_wrong_is_the_parsers_error(arguments, message, tmp_path, monkeypatch, capsys):
    small_model().save_pretrained(tmp_path / "model")
    small_model(vocab_size=9).save_pretrained(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as stop:
        inspect_perspectives.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
