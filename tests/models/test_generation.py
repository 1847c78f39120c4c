"""generate(): the recurrent state against running everything again."""

import pytest
import torch
from test_models import KINDS, random_model, random_tokens

from trwkv.models import TemporalRwkvCache

GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


def rerun_greedily(model, tokens, n_new):
    with torch.no_grad():
        for _ in range(n_new):
            best = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
            tokens = torch.cat([tokens, best.unsqueeze(1)], dim=1)
    return tokens


def all_ones(tokens):
    return torch.ones_like(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_a_full_rerun(kind):
    model, tokens = random_model(kind), random_tokens(2, 6)
    expected = rerun_greedily(model, tokens, 12)
    assert torch.equal(model.generate(tokens, attention_mask=all_ones(tokens), **GREEDY), expected)
    without = model.generate(tokens, attention_mask=all_ones(tokens), use_cache=False, **GREEDY)
    assert torch.equal(without, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_row_generates_what_it_does_alone(kind):
    model, tokens = random_model(kind), random_tokens(3, 9)
    lengths = [9, 4, 1]
    mask = torch.stack([torch.tensor([0] * (9 - n) + [1] * n) for n in lengths])
    together = model.generate(
        tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    for row, n in enumerate(lengths):
        prompt = tokens[row : row + 1, 9 - n :]
        alone = model.generate(
            prompt,
            attention_mask=all_ones(prompt),
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert torch.equal(together.sequences[row, 9 - n :], alone.sequences[0])
        for a, b in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=2e-5)


def test_each_step_runs_one_token_and_the_state_keeps_its_size(monkeypatch):
    model, tokens = random_model(), random_tokens(2, 6)
    lengths, sizes = [], []
    forward = type(model.rwkv).forward

    def spy(self, input_ids, **kwargs):
        output = forward(self, input_ids, **kwargs)
        lengths.append(input_ids.shape[1])
        sizes.append(output.past_key_values.nbytes())
        return output

    monkeypatch.setattr(type(model.rwkv), "forward", spy)
    model.generate(tokens, attention_mask=all_ones(tokens), **GREEDY)
    assert lengths == [6] + [1] * 11
    assert len(set(sizes)) == 1


def test_sampling_follows_the_seed_and_needs_no_cache():
    model, tokens = random_model("stream"), random_tokens(2, 6)
    options = {"do_sample": True, "top_k": 20, "max_new_tokens": 10, "pad_token_id": 0}
    drawn = []
    for seed, use_cache in [(0, True), (0, False), (1, True)]:
        torch.manual_seed(seed)
        drawn.append(model.generate(tokens, attention_mask=all_ones(tokens), use_cache=use_cache, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", ["layer", "stream"])
def test_beam_search_reorders_the_state(kind):
    model, tokens = random_model(kind), random_tokens(2, 6)
    options = GREEDY | {"num_beams": 4, "num_return_sequences": 2}
    with_state = model.generate(tokens, attention_mask=all_ones(tokens), **options)
    without = model.generate(tokens, attention_mask=all_ones(tokens), use_cache=False, **options)
    assert torch.equal(with_state, without)


def test_several_samples_of_one_prompt():
    model, tokens = random_model(), random_tokens(1, 6)
    torch.manual_seed(0)
    options = GREEDY | {"do_sample": True, "num_return_sequences": 3}
    assert model.generate(tokens, attention_mask=all_ones(tokens), **options).shape == (3, 18)


@pytest.mark.parametrize("padding", [0, 3])
def test_prefill_in_chunks(padding):
    model, tokens = random_model(), random_tokens(2, 8)
    mask = all_ones(tokens)
    mask[1, :padding] = 0
    plain = model.generate(tokens, attention_mask=mask, **GREEDY)
    cache = TemporalRwkvCache(model.config.num_hidden_layers)
    chunked = model.generate(
        tokens, attention_mask=mask, past_key_values=cache, prefill_chunk_size=2, **GREEDY
    )
    assert torch.equal(plain, chunked)


def test_a_conversation_continues_from_the_returned_state():
    model, tokens = random_model(), random_tokens(2, 6)
    first = model.generate(tokens, attention_mask=all_ones(tokens), return_dict_in_generate=True, **GREEDY)
    more = torch.cat([first.sequences, random_tokens(2, 3, seed=9)], dim=1)
    continued = model.generate(
        more, attention_mask=all_ones(more), past_key_values=first.past_key_values, **GREEDY
    )
    assert torch.equal(continued, rerun_greedily(model, more, 12))


def test_cache_reset_and_repeat():
    model, tokens = random_model(), random_tokens(2, 6)
    with torch.no_grad():
        cache = model(tokens).past_key_values
        cache.batch_repeat_interleave(2)
        expected = model(tokens.repeat_interleave(2, 0)).past_key_values
        for a, b in zip(cache.layers, expected.layers, strict=True):
            torch.testing.assert_close(a.wkv, b.wkv)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes() == 0
        again = model(tokens, past_key_values=cache).logits
        assert torch.equal(again, model(tokens).logits)
