"""generate(): the recurrent state against running everything again."""

import copy

import pytest
import torch
from test_models import KINDS, random_model, random_tokens
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from trwkv.models import TemporalRwkvCache, TemporalRwkvForCausalLM
from trwkv.models.cache import CACHE_NAME

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
def test_embeddings_are_a_prompt_too(kind):
    model, tokens = random_model(kind), random_tokens(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = model.generate(tokens, attention_mask=mask, **GREEDY)
    embedded = model.generate(inputs_embeds=model.rwkv.emb(tokens), attention_mask=mask, **GREEDY)
    assert torch.equal(embedded, expected[:, 6:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "use_cache"), [*((kind, True) for kind in KINDS), ("stream", False)])
def test_a_padded_row_generates_what_it_does_alone(kind, side, use_cache):
    model, tokens = random_model(kind), random_tokens(3, 9)
    lengths = [9, 4, 1]
    mask = torch.stack([torch.tensor([1] * n + [0] * (9 - n)) for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6}
    together = model.generate(tokens, attention_mask=mask, use_cache=use_cache, **options)
    for row, keep in enumerate(mask.bool()):
        prompt = tokens[row : row + 1, keep]
        alone = model.generate(prompt, attention_mask=all_ones(prompt), **options)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, prompt.shape[1] :])
        for a, b in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=2e-5)


def test_the_cache_has_two_names():
    model, tokens = random_model(), random_tokens(2, 6)
    following = random_tokens(2, 3)
    with torch.no_grad():
        logits = []
        for name in ("cache", "past_key_values"):
            output = model(tokens)
            assert getattr(output, name) is output[CACHE_NAME] is output[1]
            logits.append(model(following, **{name: output.cache}).logits)
        assert torch.equal(*logits)
        both = {"cache": model(tokens).cache, "past_key_values": output.cache}
    said = torch.cat([tokens, following], dim=1)
    generated = []
    for name, cache in both.items():
        cache.reset()
        generated.append(model.generate(said, attention_mask=all_ones(said), **{name: cache}, **GREEDY))
        assert cache.get_seq_length() == said.shape[1] + 11
    assert torch.equal(*generated)
    for call in (model, model.rwkv, model.generate):
        with pytest.raises(ValueError, match=r"cache, past_key_values: expected one of them .* got both"):
            call(tokens, **both)


def test_no_name_of_a_class_makes_hugging_face_choose_the_cache():
    class Renamed(TemporalRwkvForCausalLM):
        pass

    model, tokens = random_model(), random_tokens(2, 6)
    assert not Renamed._supports_default_dynamic_cache()
    model.__class__ = Renamed
    output = model.generate(tokens, return_dict_in_generate=True, **GREEDY)
    assert type(output[CACHE_NAME]) is TemporalRwkvCache
    assert torch.equal(output.sequences, rerun_greedily(model, tokens, 12))


def test_each_step_runs_one_token_and_the_state_keeps_its_size(monkeypatch):
    model, tokens = random_model(), random_tokens(2, 6)
    lengths, sizes = [], []
    forward = type(model.rwkv).forward

    def spy(self, input_ids, **kwargs):
        output = forward(self, input_ids, **kwargs)
        lengths.append(input_ids.shape[1])
        sizes.append(output.cache.nbytes())
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


def test_generation_in_training_with_gradient_checkpointing():
    """As a callback of Trainer's may do: without a cache, which checkpointing forbids."""
    model, tokens = random_model(), random_tokens(2, 6)
    expected = model.generate(tokens, attention_mask=all_ones(tokens), **GREEDY)
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(tokens, attention_mask=all_ones(tokens), **GREEDY), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_draft_for_a_transformer():
    settings = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    target, tokens = GPTNeoXForCausalLM(settings).eval(), random_tokens(1, 6)
    expected = target.generate(tokens, attention_mask=all_ones(tokens), **GREEDY)
    output = target.generate(
        tokens, attention_mask=all_ones(tokens), assistant_model=random_model(), **GREEDY
    )
    assert torch.equal(output, expected)


def test_several_samples_of_one_prompt():
    model, tokens = random_model(), random_tokens(2, 6)
    options = GREEDY | {"do_sample": True, "num_return_sequences": 3}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(tokens, attention_mask=all_ones(tokens), use_cache=use_cache, **options))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (6, 18) and len(set(map(tuple, drawn[0].tolist()))) > 2


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("padding", [0, 3])
def test_prefill_in_chunks(padding, given):
    model, tokens = random_model(), random_tokens(2, 8)
    mask = all_ones(tokens)
    mask[1, :padding] = 0
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(tokens, attention_mask=mask, **options)
    cache = TemporalRwkvCache(model.config.num_hidden_layers) if given else None
    chunked = model.generate(tokens, attention_mask=mask, cache=cache, prefill_chunk_size=2, **options)
    assert torch.equal(plain.sequences, chunked.sequences)
    for a, b in zip(plain.logits, chunked.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("new_alone", [False, True])
@pytest.mark.parametrize("kind", ["layer", "stream"])
def test_a_conversation_continues_from_the_returned_state(kind, new_alone):
    """Turn after turn, and once more from a copy; input_ids are all tokens, or those the state has not seen."""
    model, said = random_model(kind), random_tokens(2, 6)
    cache = TemporalRwkvCache(model.config.num_hidden_layers)
    for turn, n_new in enumerate((6, 3, 15)):
        if turn > 0:
            said = torch.cat([said, random_tokens(2, n_new, seed=turn)], dim=1)
        expected = rerun_greedily(model, said, 12)
        unseen = said.shape[1] - cache.get_seq_length()
        tokens = said[:, -unseen:] if new_alone else said
        for state in (copy.deepcopy(cache), cache):
            output = model.generate(tokens, attention_mask=all_ones(said), cache=state, **GREEDY)
            assert torch.equal(output[:, -12:], expected[:, -12:])
            assert state.get_seq_length() == expected.shape[1] - 1  # the last token has not been run yet
        said = expected


def test_a_padded_conversation_continues():
    model, tokens, following = random_model(), random_tokens(2, 6), random_tokens(2, 4, seed=9)
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask).cache
    said, mask = torch.cat([tokens, following], dim=1), torch.cat([mask, all_ones(following)], dim=1)
    expected = model.generate(said, attention_mask=mask, **GREEDY)
    output = model.generate(following, attention_mask=mask, cache=cache, **GREEDY)
    assert torch.equal(output[:, 4:], expected[:, 10:])


def test_nothing_new_to_continue_with_is_refused():
    model, tokens = random_model(), random_tokens(2, 6)
    with torch.no_grad():
        cache = model(tokens).cache
    for n in (6, 2):
        with pytest.raises(ValueError, match=f"input_ids: expected more tokens than the 6 .* got {n}"):
            model.generate(tokens[:, :n], attention_mask=all_ones(tokens[:, :n]), cache=cache, **GREEDY)


ASSISTANTS = {
    "itself": {"assistant_model": random_model()},
    "another": {"assistant_model": random_model("rwkv4", seed=1)},
    "the prompt": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("assistant", ASSISTANTS)
def test_assisted_generation_is_greedy_generation(assistant, padding, monkeypatch):
    model, tokens = random_model(), random_tokens(1, 8)
    mask = all_ones(tokens)
    mask[:, :padding] = 0
    options = GREEDY | {"max_new_tokens": 24, "eos_token_id": 63}
    expected = model.generate(tokens, attention_mask=mask, **options)
    runs, run = [], type(model.rwkv)._run_blocks

    def spy(self, x, *args, **kwargs):
        runs.extend([x.shape[1]] if self is model.rwkv else [])
        return run(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model.rwkv), "_run_blocks", spy)
    output = model.generate(
        tokens, attention_mask=mask, return_dict_in_generate=True, **options, **ASSISTANTS[assistant]
    )
    assert torch.equal(output.sequences, expected)
    if assistant == "itself":
        assert len(runs) < 16 and sum(runs) == expected.shape[1] - 1  # nothing to take back
    cache = output[CACHE_NAME]
    assert cache.recording is None
    with torch.no_grad():
        seen = expected[:, : cache.get_seq_length()]
        mask = torch.cat([mask, all_ones(seen[:, 8:])], dim=1)
        after = [model(tokens, cache=state).logits for state in (cache, model(seen, mask).cache)]
    torch.testing.assert_close(*after, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_assisted_generation_cannot_do_is_refused():
    model, tokens = random_model(), random_tokens(1, 6)
    options = GREEDY | {"attention_mask": all_ones(tokens), "prompt_lookup_num_tokens": 3}
    with torch.no_grad():
        cache = model(tokens[:, :3]).cache
    with pytest.raises(ValueError, match=r"cache: expected a fresh one .* seen 3 tokens"):
        model.generate(tokens, cache=cache, **options)
    with pytest.raises(ValueError, match="expected static=False"):
        model.generate(tokens, cache=TemporalRwkvCache(2, static=True), **options)
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(tokens, use_cache=False, **options)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_other_kinds_of_cache_are_refused(kind):
    model, tokens = random_model(), random_tokens(1, 6)
    with pytest.raises(ValueError, match=f"cache_implementation: expected .* got '{kind}'"):
        model.generate(tokens, attention_mask=all_ones(tokens), cache_implementation=kind, **GREEDY)
    for cache, message in ((DynamicCache(), "cache: expected a TemporalRwkvCache"), ((), CACHE_NAME)):
        with pytest.raises((TypeError, ValueError), match=message):
            model.generate(tokens, attention_mask=all_ones(tokens), cache=cache, **GREEDY)
