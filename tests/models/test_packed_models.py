"""Packed sequences in a model: each is computed as if it were alone."""

import pytest
import torch
from test_models import KINDS, random_model, random_tokens

from trwkv.models import TemporalRwkvCache

LENGTHS = [5, 0, 1, 7, 1, 4, 0]
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)


def pieces(x: torch.Tensor) -> list[torch.Tensor]:
    """The sequences of a packed row [1, T, ...] that have a token."""
    return [piece for piece in x.split(LENGTHS, dim=1) if piece.shape[1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_is_separate(kind, dtype):
    model, tokens = random_model(kind).double(), random_tokens(1, 18)
    packed = model(tokens, cu_seqlens=BOUNDS.to(dtype), output_hidden_states=True)
    alone = [model(piece, output_hidden_states=True) for piece in pieces(tokens)]
    torch.testing.assert_close(packed.logits, torch.cat([x.logits for x in alone], 1))
    for layer, states in enumerate(packed.hidden_states):
        expected = torch.cat([x.hidden_states[layer] for x in alone], 1)
        torch.testing.assert_close(states, expected)
    assert packed.cache is None
    assert (packed.logits[:, 5:] - model(tokens).logits[:, 5:]).abs().max() > 0.1  # neighbours would show


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("kind", ["rwkv4", "layer", "stream"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_sequences(kind, checkpointing):
    """Each token is predicted from those before it in its own sequence, the first of each from nothing: not at all."""
    model, tokens = random_model(kind).double().train(), random_tokens(1, 18)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    n_predicted = sum(piece.shape[1] - 1 for piece in pieces(tokens))
    losses, gradients = [], []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            loss = model(tokens, labels=tokens, cu_seqlens=BOUNDS).loss
        else:
            loss = sum(
                model(piece, labels=piece, num_items_in_batch=n_predicted).loss
                for piece in pieces(tokens)
                if piece.shape[1] > 1
            )
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_no_token_at_all():
    packed = random_model()(random_tokens(1, 0), cu_seqlens=torch.tensor([0, 0, 0]))
    assert packed.logits.shape == (1, 0, 64)


def test_what_does_not_go_with_packed_sequences_is_refused():
    model, tokens = random_model(), random_tokens(1, 18)
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected one row with cu_seqlens; got 2"):
        model(tokens.view(2, 9), cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="attention_mask: expected None with cu_seqlens"):
        model(tokens, attention_mask=torch.ones_like(tokens), cu_seqlens=BOUNDS)
    for options in ({"cache": TemporalRwkvCache(2)}, {"use_cache": True}):
        with pytest.raises(ValueError, match="cache, use_cache: expected neither with cu_seqlens"):
            model(tokens, cu_seqlens=BOUNDS, **options)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="cu_seqlens: expected None in generation"):
            model.generate(tokens, cu_seqlens=BOUNDS, use_cache=use_cache, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 18], TypeError, "cu_seqlens: expected a tensor; got list"),
        (torch.tensor([0.0, 18.0]), TypeError, "cu_seqlens: expected one of int32, int64"),
        (torch.tensor([0]), ValueError, r"cu_seqlens: expected shape \[N \+ 1\]"),
        (torch.tensor([[0, 18]]), ValueError, r"cu_seqlens: expected shape \[N \+ 1\]"),
        (torch.tensor([0, 17]), ValueError, r"from 0 to T = 18, .*; got \[0, 17\]"),
        (torch.tensor([0, 20]), ValueError, r"from 0 to T = 18, .*; got \[0, 20\]"),
        (torch.tensor([1, 18]), ValueError, r"from 0 to T = 18, .*; got \[1, 18\]"),
        (torch.tensor([0, 9, 8, 18]), ValueError, r"from 0 to T = 18, .*; got \[0, 9, 8, 18\]"),
    ],
)
def test_wrong_bounds_are_refused(cu_seqlens, error, message):
    model, tokens = random_model(), random_tokens(1, 18)
    with pytest.raises(error, match=message):
        model(tokens, labels=tokens, cu_seqlens=cu_seqlens)
