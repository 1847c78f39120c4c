"""Measures of how far perspectives are apart, on models whose perspectives are known."""

import math

import pytest
import torch

from trwkv.diversity import (
    half_lives,
    output_distance,
    selector_entropy,
    selector_weights,
    vector_distances,
)
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM

IDS = torch.arange(1, 13)[None]


def known_model(**options):
    torch.manual_seed(0)
    config = TemporalRwkvConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, n_perspectives=2, **options
    )
    model = TemporalRwkvForCausalLM(config).eval()
    with torch.no_grad():
        for i, block in enumerate(model.rwkv.blocks):
            for matrix in (block.att.key, block.att.receptance, block.att.output):  # zero at the start
                torch.nn.init.orthogonal_(matrix.weight)
            for p, steps in enumerate((4.0, 64.0)):
                if "time_decay" in block.att.perspective_vectors:
                    block.att.time_decay[p] = math.log(math.log(2) / (steps * (i + 1)))
    return model


@torch.no_grad()
def collapse(model, layer, rows=2):
    """Make the first two perspectives of a layer the same."""
    for name, x in model.named_parameters():
        if (
            name.startswith(f"rwkv.blocks.{layer}.")
            and x.ndim == 2
            and len(x) == rows
            and "selector" not in name
        ):
            x[1] = x[0]


def test_one_perspective_is_refused():
    one = TemporalRwkvForCausalLM(TemporalRwkvConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2))
    for measure in (
        vector_distances,
        *(lambda x, f=f: f(x, IDS) for f in (output_distance, selector_entropy)),
    ):
        with pytest.raises(ValueError, match="two perspectives or more; got one"):
            measure(one)


def test_half_lives():
    lives = half_lives(known_model())
    for i, life in enumerate(lives):
        torch.testing.assert_close(life, torch.tensor([[4.0], [64.0]]).expand(2, 8) * (i + 1))


def test_a_collapsed_perspective_is_seen_in_the_vectors():
    model = known_model(perspective_noise=0.3)
    assert min(vector_distances(model)) > 0.1
    collapse(model, 1)
    first, second = vector_distances(model)
    assert first > 0.1
    assert second == 0


def test_two_of_three_are_enough():
    """It is the closest two that count."""
    torch.manual_seed(0)
    config = TemporalRwkvConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, n_perspectives=3, perspective_noise=0.3
    )
    model = TemporalRwkvForCausalLM(config)
    collapse(model, 0, rows=3)
    assert vector_distances(model) == [0]


@pytest.mark.parametrize("options", [{}, {"placement": "stream"}, {"perspective_vectors": ["time_mix_r"]}])
def test_output_distance(options):
    """Zero when all have collapsed, half of it when half of the layers have; and the model is as it was."""
    model = known_model(perspective_noise=0.5, **options)
    before = model(IDS).logits
    apart = output_distance(model, IDS)
    assert apart > 0.01
    assert torch.equal(model(IDS).logits, before)
    if "placement" not in options:  # streams that differ stay different
        collapse(model, 0)
        alone = known_model(perspective_noise=0.5, **options)
        collapse(alone, 1)
        assert 0 < output_distance(model, IDS) < apart
        assert 0 < output_distance(alone, IDS) < apart
    collapse(model, 0)
    collapse(model, 1)
    assert output_distance(model, IDS) == 0


def test_output_distance_is_that_of_the_op():
    """One layer: the root of the mean square of the difference, by hand."""
    model = known_model()
    seen = []
    model.rwkv.blocks[0].att.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS)
    att = model.rwkv.blocks[0].att
    outputs = []
    for p in range(2):
        with torch.no_grad():
            att.selector.gate.weight.zero_()
            att.selector.gate.bias.copy_(torch.tensor([100.0, -100.0]) * (1 - 2 * p))
        outputs.append(att(seen[0]).output)
    a, b = outputs
    expected = (a - b).square().mean().sqrt() / torch.stack(outputs).square().mean().sqrt()
    model.rwkv.blocks = model.rwkv.blocks[:1]
    assert output_distance(model, IDS) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("placement", ["layer", "stream"])
def test_selector_weights(placement):
    weights = selector_weights(known_model(placement=placement), IDS)
    assert len(weights) == (2 if placement == "layer" else 1)
    assert all(x.shape == (12, 2) and torch.allclose(x.sum(1), torch.ones(12)) for x in weights)


def test_selector_entropy():
    assert selector_entropy(known_model(aggregation="mean"), IDS) == pytest.approx(1)
    fixed = known_model(aggregation="fixed", fixed_weights=[0.75, 0.25])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert selector_entropy(fixed, IDS) == pytest.approx(expected)
    one = known_model(aggregation="fixed", fixed_weights=[1, 0])
    assert selector_entropy(one, IDS) == 0
