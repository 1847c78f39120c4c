"""Configuration and model: what they compute, count, save and refuse."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from trwkv.models import TemporalRwkvCache, TemporalRwkvConfig, TemporalRwkvForCausalLM, TemporalRwkvModel

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": None}
KINDS = {
    "rwkv4": {"n_perspectives": 1},
    "layer": {"n_perspectives": 3},
    "layer, own keys": {
        "n_perspectives": 2,
        "perspective_vectors": ["time_decay", "time_mix_k", "time_mix_r"],
    },
    "layer, fixed": {"n_perspectives": 2, "aggregation": "fixed", "fixed_weights": [0.3, 0.7]},
    "stream": {"n_perspectives": 3, "placement": "stream"},
    "stream, learned": {"n_perspectives": 2, "placement": "stream", "aggregation": "learned"},
}


def random_model(kind: str = "layer", seed: int = 0, **options) -> TemporalRwkvForCausalLM:
    """A model whose every parameter is random, perspectives included."""
    torch.manual_seed(seed)
    model = TemporalRwkvForCausalLM(TemporalRwkvConfig(**(SIZES | KINDS[kind] | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if "emb" in name else 0.3) * torch.randn_like(parameter))
    return model


def random_tokens(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_perspectives": 0}, "n_perspectives: expected a whole number of at least 1; got 0"),
        ({"n_perspectives": 2.0}, "n_perspectives: expected a whole number"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"placement": "block"}, "placement: expected one of layer, stream; got 'block'"),
        ({"aggregation": "max"}, "aggregation: expected one of"),
        ({"aggregation": "fixed", "n_perspectives": 2}, "fixed_weights: expected with aggregation 'fixed'"),
        ({"perspective_vectors": "time_decay"}, "perspective_vectors: .* expected a list"),
        ({"perspective_vectors": ["time_dacay"]}, "perspective_vectors"),
        ({"perspective_vectors": ["channel_mix_k"]}, "with placement 'layer' expected"),
        ({"perspective_vectors": [], "n_perspectives": 2}, "expected at least one"),
        ({"perspective_noise": -0.1}, "perspective_noise: expected a finite number of at least 0; got -0.1"),
        ({"selector_noise": float("nan")}, "selector_noise"),
        ({"wkv_backend": "cuda"}, "wkv_backend: expected one of auto, triton, torch, reference; got 'cuda'"),
    ],
)
def test_wrong_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TemporalRwkvConfig(**options)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "rwkv", "hidden_size": 8, "num_hidden_layers": 2}')
    for load in (TemporalRwkvConfig.from_pretrained, TemporalRwkvForCausalLM.from_pretrained):
        with pytest.raises(
            ValueError, match=r"model_type: expected 'temporal_rwkv'; got 'rwkv' .*from_rwkv4"
        ):
            load(tmp_path)


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="n_perspective: unknown option; did you mean n_perspectives"):
        TemporalRwkvConfig(n_perspective=3)


def test_configuration_defaults_and_round_trip(tmp_path):
    assert TemporalRwkvConfig().perspective_vectors == ["time_decay", "time_first"]
    assert len(TemporalRwkvConfig(placement="stream").perspective_vectors) == 7
    config = TemporalRwkvConfig(
        **SIZES, n_perspectives=2, aggregation="fixed", fixed_weights=(0.5, 0.5), pad_token_id=1
    )
    assert (config.attention_hidden_size, config.intermediate_size) == (32, 128)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, TemporalRwkvConfig) and again.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(("size", "layers", "percent"), [(768, 12, 0.039), (1024, 24, 0.040)])
def test_seven_vectors_and_the_gate_add_a_twenty_fifth_of_a_percent(size, layers, percent):
    config = TemporalRwkvConfig(
        hidden_size=size, num_hidden_layers=layers, n_perspectives=2, placement="stream"
    )
    with torch.device("meta"):
        count = TemporalRwkvForCausalLM(config).count_parameters()
    assert round(count.added_percent, 3) == percent
    assert count.added == 7 * size * layers + 2 * size + 2
    assert count.total == count.base + count.added == count.trainable


@pytest.mark.parametrize("kind", KINDS)
def test_count_is_against_the_same_model_with_one_perspective(kind):
    model = random_model(kind)
    one = TemporalRwkvForCausalLM(TemporalRwkvConfig(**SIZES))
    assert model.count_parameters().base == one.count_parameters().total
    assert one.count_parameters().added == 0


def test_one_perspective_is_rwkv4_whatever_the_other_options():
    plain = TemporalRwkvForCausalLM(TemporalRwkvConfig(**SIZES)).state_dict()
    other = TemporalRwkvForCausalLM(
        TemporalRwkvConfig(**SIZES, placement="stream", aggregation="learned")
    ).state_dict()
    assert {name: x.shape for name, x in plain.items()} == {name: x.shape for name, x in other.items()}
    assert not any("selector" in name for name in plain)


@torch.no_grad()
def test_streams_are_separate_rwkv4s_whose_logits_a_gate_mixes():
    """The paper's released code: P models that share all but their vectors, softmax(gate(mean of outputs))."""
    model, tokens = random_model("stream"), random_tokens(2, 11)
    normed, logits = [], []
    for p in range(3):
        single = TemporalRwkvForCausalLM(TemporalRwkvConfig(**SIZES)).eval()
        rows = dict(model.perspective_parameters())
        state = {
            name: x[p] if name in rows else x
            for name, x in model.state_dict().items()
            if "selector" not in name
        }
        single.load_state_dict(state)
        output = single(tokens, output_hidden_states=True)
        normed.append(output.hidden_states[-1])
        logits.append(output.logits)
    gate = torch.softmax(model.rwkv.selector.gate(torch.stack(normed).mean(0)), -1)
    expected = sum(gate[..., p, None] * logits[p] for p in range(3))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_state_continues_a_sequence_at_any_cut(kind):
    model, tokens = random_model(kind), random_tokens(2, 12)
    whole = model(tokens).logits
    for cuts in ([5, 7], [1, 11], [1] * 12):
        cache, parts = None, []
        for part in tokens.split(cuts, dim=1):
            output = model(part, cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-5)
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_the_state_keeps_its_size():
    model = random_model("stream")
    sizes = set()
    for length in (1, 5, 50):
        output = model(random_tokens(2, length))
        sizes.add(output.cache.nbytes())
        sizes.add(model(random_tokens(2, 1), cache=output.cache).cache.nbytes())
    B, P, C, layers = 2, 3, 32, 2
    assert sizes == {4 * B * P * C * (3 + 2) * layers}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_places_without_a_token_change_nothing(kind):
    """Wherever they are, a row gives the logits and the state of its tokens alone."""
    model, tokens = random_model(kind), random_tokens(3, 10)
    mask = torch.tensor([[0] * 6 + [1] * 4, [1] * 7 + [0] * 3, [0, 1, 1, 0, 1, 1, 1, 0, 0, 1]])
    output = model(tokens, attention_mask=mask)
    following = random_tokens(3, 2, seed=8)
    continued = model(following, cache=output.cache).logits
    for row, keep in enumerate(mask.bool()):
        alone = model(tokens[row : row + 1, keep])
        torch.testing.assert_close(output.logits[row, keep], alone.logits[0], rtol=0, atol=1e-5)
        after = model(following[row : row + 1], cache=alone.cache).logits
        torch.testing.assert_close(continued[row], after[0], rtol=0, atol=1e-5)
    assert torch.isfinite(output.logits).all()


@torch.no_grad()
def test_masked_tokens_may_be_anything():
    model, tokens = random_model(), random_tokens(1, 10)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    other = torch.where(mask.bool(), tokens, 5)
    assert torch.equal(
        model(tokens, attention_mask=mask).logits[:, 3:], model(other, attention_mask=mask).logits[:, 3:]
    )


def test_wrong_inputs_are_refused():
    model, tokens = random_model(), random_tokens(2, 5)
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected exactly one"):
        model()
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected exactly one"):
        model(tokens, inputs_embeds=torch.zeros(2, 5, 32))
    for shape in [(2, 4), (2, 6), (1, 5), (2, 5, 1)]:
        with pytest.raises(ValueError, match=r"attention_mask: expected shape \[B, T\] = \[2, 5\]"):
            model(tokens, attention_mask=torch.ones(shape))
    cache = model(tokens).cache
    with pytest.raises(ValueError, match="padding after a token"):
        model(tokens, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), cache=cache)
    unlike = torch.cat([torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), torch.ones(2, 5)], dim=1)
    with pytest.raises(ValueError, match=r"before the last 5 places .* has seen, \[5, 5\]; got \[3, 5\]"):
        model(tokens, attention_mask=unlike, cache=cache)
    with pytest.raises(ValueError, match="cache: expected a state of 2 layers"):
        model(tokens, cache=TemporalRwkvCache(3))
    before = [x.clone() for x in cache.layers[0].states().values()]
    with pytest.raises(ValueError, match=r"expected a state of 3 rows.*got one of 2 .*repeat_interleave"):
        model(random_tokens(3, 5), cache=cache)
    assert all(torch.equal(x, y) for x, y in zip(before, cache.layers[0].states().values(), strict=True))


@pytest.mark.parametrize("kind", ["rwkv4", "layer", "stream"])
def test_inputs_of_another_shape_are_refused(kind):
    """Also [1, 1, P], in which the last axis could pass for perspectives."""
    model = random_model(kind)
    for shape in [(), (5,), (2, 5, 1), (1, 1, 3)]:
        with pytest.raises(
            ValueError, match=re.escape(f"input_ids: expected shape [B, T]; got {list(shape)}")
        ):
            model(random_tokens(*shape))
    for shape in [(5, 32), (2, 5, 16), (2, 5, 3, 32)]:
        with pytest.raises(
            ValueError, match=re.escape(f"inputs_embeds: expected shape [B, T, 32]; got {list(shape)}")
        ):
            model(inputs_embeds=torch.zeros(shape))


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_embeddings_and_some_logits():
    model, tokens = random_model(), random_tokens(2, 5)
    full = model(tokens, output_hidden_states=True)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, full.logits)
    assert torch.equal(model(tokens, logits_to_keep=2).logits, full.logits[:, -2:])
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([0, 3])).logits, full.logits[:, [0, 3]])
    assert len(full.hidden_states) == 3
    assert torch.equal(model.head(full.hidden_states[-1]), full.logits)
    assert torch.equal(model(tokens, return_dict=False)[0], full.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path, kind):
    model, tokens = random_model(kind), random_tokens(2, 9)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens).logits
        for cls in (TemporalRwkvForCausalLM, AutoModelForCausalLM):
            again = cls.from_pretrained(tmp_path)
            assert isinstance(again, TemporalRwkvForCausalLM)
            assert torch.equal(again(tokens).logits, expected)
        base = AutoModel.from_pretrained(tmp_path)
        assert isinstance(base, TemporalRwkvModel)
        assert torch.equal(model.head(base(tokens).last_hidden_state), expected)


def test_what_a_file_lacks_starts_afresh_and_nothing_else(tmp_path):
    model = random_model("layer")
    fresh = TemporalRwkvForCausalLM(model.config).state_dict()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = [
        "rwkv.blocks.1.att.time_first",
        "rwkv.blocks.0.att.selector.gate.bias",
        "rwkv.blocks.1.ffn.value.weight",
    ]
    for name in lost:
        del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = TemporalRwkvForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, expected in model.state_dict().items():
        assert torch.equal(again[name], fresh[name] if name in lost else expected), name


def test_a_fresh_head_and_embedding_are_rwkv4s():
    model = TemporalRwkvForCausalLM(TemporalRwkvConfig(**SIZES))
    gram = model.head.weight.T @ model.head.weight
    torch.testing.assert_close(gram, 0.25 * 2 * torch.eye(32), rtol=1e-4, atol=1e-4)
    assert 0.9e-4 < model.rwkv.emb.weight.abs().max() <= 1e-4


def test_tied_embeddings(tmp_path):
    model = random_model(tie_word_embeddings=True)
    assert model.head.weight is model.rwkv.emb.weight
    model.save_pretrained(tmp_path)
    again = TemporalRwkvForCausalLM.from_pretrained(tmp_path)
    assert again.head.weight is again.rwkv.emb.weight
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_may_be_of_half_precision(kind, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TemporalRwkvConfig(**SIZES, **KINDS[kind]), dtype=dtype)
    for name, parameter in model.named_parameters():
        wide = name.endswith(("time_decay", "time_first"))
        assert parameter.dtype == (torch.float32 if wide else dtype), name
    torch.manual_seed(0)
    expected = TemporalRwkvForCausalLM(TemporalRwkvConfig(**SIZES, **KINDS[kind]))
    torch.testing.assert_close(model.head.weight, expected.head.weight.to(dtype), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_changes_nothing(kind):
    model, tokens = random_model(kind), random_tokens(2, 5)
    assert model(tokens[:, :0]).logits.shape == (2, 0, SIZES["vocab_size"])
    first = model(tokens[:, :3]).cache
    nothing = model(tokens[:, :0], cache=first)
    rest = model(tokens[:, 3:], cache=nothing.cache).logits
    torch.testing.assert_close(rest, model(tokens).logits[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_decay_and_bonus_in_float32(tmp_path, kind):
    model, tokens = random_model(kind), random_tokens(2, 40)
    model.save_pretrained(tmp_path)
    low = TemporalRwkvForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in low.named_parameters():
        wide = name.endswith(("time_decay", "time_first"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    with torch.no_grad():
        expected, output = model(tokens).logits, low(tokens)
    assert output.logits.dtype == torch.bfloat16
    assert output.cache.layers[0].wkv.dtype == torch.float32
    assert (output.logits - expected).square().mean() < (0.03**2) * expected.square().mean()
