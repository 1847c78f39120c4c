"""Padding: places without a token, which no state may see."""

import torch
from torch import Tensor

from trwkv.models.cache import TemporalRwkvCache


def token_mask(
    attention_mask: Tensor | None, batch_size: int, n_tokens: int, cache: TemporalRwkvCache | None
) -> Tensor | None:
    """The mask of these tokens as bool [B, T], or None when it leaves nothing out.

    Under torch.compile, which cannot look at numbers, any mask is taken to leave something out, rightly placed.

    Args:
        attention_mask: [B, T], or longer with a cache: its last T columns count; those before, if they are as many as
            the cache has seen, must be as it saw them. 0 where there is no token.
        batch_size, n_tokens: B and T.
        cache: a row whose first token it has seen may hold no more padding.

    Raises:
        ValueError: another shape, padding after a token the cache has seen, or other tokens than it has seen.
    """
    if attention_mask is None:
        return None
    shape, longer = attention_mask.shape, cache is not None
    if len(shape) != 2 or shape[0] != batch_size or (shape[1] < n_tokens if longer else shape[1] != n_tokens):
        raise ValueError(
            f"attention_mask: expected shape [B, T] = {[batch_size, n_tokens]}; got {list(shape)}"
        )
    past, mask = attention_mask.bool().split([shape[1] - n_tokens, n_tokens], dim=1)
    if torch.compiler.is_compiling():
        return mask
    if cache is not None and cache.tokens_seen is not None and past.shape[1] == cache.get_seq_length():
        got, seen = past.sum(dim=1).tolist(), cache.tokens_seen.tolist()
        if got != seen:
            raise ValueError(
                f"attention_mask: expected as many tokens in each row before the last {n_tokens} places as the cache "
                f"has seen, {seen}; got {got}"
            )
    if bool(mask.all()):
        return None
    started = None if cache is None else cache.started
    if started is not None and bool((started.unsqueeze(1) & ~mask).any()):
        raise ValueError("attention_mask: padding after a token that the cache has seen; pad on the left")
    return mask


def padding_first(mask: Tensor) -> Tensor:
    """Order [B, T] of places that puts padding first and then the tokens as they come."""
    return torch.argsort(mask.to(torch.uint8), dim=1, stable=True)


def last_token_place(mask: Tensor) -> Tensor:
    """Where, in the order of `padding_first`, each place's last token is [B, T]: the one there, or else before it.

    So the last place of a row padded on the right has the output `generate` looks for there. Places before the
    first token get one of padding.
    """
    return mask.cumsum(dim=1) - 1 + (~mask).sum(dim=1, keepdim=True)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """Row b, place t of the result is x[b, order[b, t]]; x [B, T, ...], order [B, T]."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), order]
