"""The cache by itself: rows, copies, going back, and what it refuses."""

import copy
import pickle

import pytest
import torch
from test_models import random_model, random_tokens
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from trwkv.models import TemporalRwkvCache

LEFT_PADDED = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] * 5 + [1]])


def logits_after(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, cache=cache).logits


def cache_of(model, tokens, **options):
    cache = TemporalRwkvCache(model.config.num_hidden_layers, **options)
    with torch.no_grad():
        for part in tokens.split(4, dim=1):
            model(part, cache=cache)
    return cache


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["layer", "stream"])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "select by mask", "repeat"],
)
def test_changing_rows_is_changing_those_of_the_prompt(change, rows, kind, static):
    model, tokens, following = random_model(kind), random_tokens(3, 6), random_tokens(3, 2, seed=8)[:1]
    cache = cache_of(model, tokens, static=static)
    change(cache)
    assert cache.get_seq_length() == 6
    following = following.expand(len(rows), -1)
    expected = logits_after(model, cache_of(model, tokens[rows]), following)
    torch.testing.assert_close(logits_after(model, cache, following), expected, rtol=0, atol=2e-5)


def test_changing_rows_changes_which_have_started():
    model, tokens = random_model(), random_tokens(3, 6)
    mask = LEFT_PADDED.clone()
    mask[1] = 0
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask).cache
    assert cache.started.tolist() == [True, False, True]
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    assert cache.started.tolist() == [False, False, True]


def test_a_reset_cache_is_a_fresh_one():
    model, tokens = random_model(), random_tokens(2, 6)
    for static in (False, True):
        cache = cache_of(model, random_tokens(2, 9, seed=3), static=static)
        cache.reset()
        assert (cache.get_seq_length(), cache.nbytes(), cache.started) == (0, 0, None)
        assert not cache.is_initialized
        assert torch.equal(logits_after(model, cache, tokens), logits_after(model, None, tokens))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("static", [False, True])
def test_copies_go_their_own_ways(duplicate, static):
    model, tokens = random_model("stream"), random_tokens(2, 6)
    one, two = random_tokens(2, 3, seed=8), random_tokens(2, 3, seed=9)
    cache = cache_of(model, tokens, static=static)
    branches = [duplicate(cache), cache]
    for branch, following in zip(branches, (one, two), strict=True):
        expected = logits_after(model, None, torch.cat([tokens, following], dim=1))[:, 6:]
        torch.testing.assert_close(logits_after(model, branch, following), expected, rtol=0, atol=1e-5)
        assert branch.get_seq_length() == 9


def test_a_static_cache_keeps_its_addresses_and_another_does_not_touch_old_states():
    model, tokens = random_model(), random_tokens(2, 6)
    for static in (True, False):
        cache = cache_of(model, tokens, static=static)
        before = [layer.states() for layer in cache.layers]
        values = copy.deepcopy(before)
        logits_after(model, cache, tokens[:, :1])
        for layer, states, old in zip(cache.layers, before, values, strict=True):
            for name, now in layer.states().items():
                assert (now is states[name]) == static
                assert torch.equal(states[name], now if static else old[name])
    assert not cache.is_compileable
    assert TemporalRwkvCache(2, static=True).is_compileable


def test_states_pin_no_sequence():
    model = random_model("stream")
    cache = cache_of(model, random_tokens(2, 50))
    for change in (lambda: None, lambda: cache.reorder_cache(torch.tensor([1, 0]))):
        change()
        for layer in cache.layers:
            for name, state in layer.states().items():
                assert state.untyped_storage().nbytes() == state.nbytes, name


def test_offloaded_states_come_back():
    model, tokens = random_model(), random_tokens(2, 6)
    cache = cache_of(model, tokens)
    expected = logits_after(model, copy.deepcopy(cache), tokens)
    for i, layer in enumerate(cache.layers):
        layer.prefetch()  # nothing to bring back
        cache.offload(i)
        layer.prefetch()
    assert torch.equal(logits_after(model, cache, tokens), expected)


def test_a_state_cannot_be_cropped():
    model, tokens = random_model(), random_tokens(2, 6)
    cache = cache_of(model, tokens)
    expected = logits_after(model, copy.deepcopy(cache), tokens)
    for nothing in (0, 6, 7):
        cache.crop(nothing)
    for length in (-1, -6, 5):
        with pytest.raises(ValueError, match="crop: expected to drop at most the 0 last places"):
            cache.crop(length)
    assert torch.equal(logits_after(model, cache, tokens), expected)


@pytest.mark.parametrize("kind", ["layer", "stream"])
@pytest.mark.parametrize("crops", [(-1,), (-5,), (-2, -3), (9,), (-5, 0)])
def test_a_recorded_state_can_be(kind, crops):
    model, tokens, mask = random_model(kind), random_tokens(3, 12), torch.ones(3, 12)
    mask[:, :6] = LEFT_PADDED
    cache = TemporalRwkvCache(2)
    with torch.no_grad():
        model(tokens[:, :7], attention_mask=mask[:, :7], cache=cache)
        cache.activate_past_recording()
        model(tokens[:, 7:9], cache=cache)
        model(tokens[:, 9:12], cache=cache)
        for crop in crops:
            cache.crop(crop)
        length = 12 + sum(crops) if crops[0] <= 0 else crops[0]
        assert cache.get_seq_length() == length
        with pytest.raises(ValueError, match=f"drop at most the {length - 7} last places, those recorded"):
            cache.crop(6 - length)
        expected = model(tokens[:, :length], attention_mask=mask[:, :length]).cache
    following = random_tokens(3, 2, seed=8)
    torch.testing.assert_close(
        logits_after(model, cache, following), logits_after(model, expected, following), rtol=0, atol=1e-5
    )
    assert cache.get_seq_length() == length + 2
    cache.crop(0)
    assert cache.recording.x is None  # what nothing can go back on is not kept


def test_it_is_one_of_hugging_faces_and_theirs_are_not_ours():
    cache = TemporalRwkvCache(2)
    assert isinstance(cache, Cache) and all(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1
    with pytest.raises(TypeError, match=r"cache: expected a TemporalRwkvCache\(2\) .* got DynamicCache"):
        random_model()(random_tokens(1, 3), cache=DynamicCache())
    with pytest.raises(ValueError, match="expected static=False"):
        TemporalRwkvCache(2, static=True).activate_past_recording()
