"""Packed sequences: several in one row, of which none may see another."""

from torch import Tensor

from trwkv.models.cache import TemporalRwkvCache
from trwkv.ops.token_shift_mix.plain import packed_places


def check_packed(
    batch_size: int,
    *,
    attention_mask: Tensor | None,
    cache: TemporalRwkvCache | None,
    use_cache: bool | None,
) -> None:
    """Raise ValueError for what `cu_seqlens` does not go with: several rows, a mask, a cache."""
    if batch_size != 1:
        raise ValueError(f"input_ids, inputs_embeds: expected one row with cu_seqlens; got {batch_size}")
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: expected None with cu_seqlens, which leave no place without a token"
        )
    if cache is not None or use_cache:
        raise ValueError(
            "cache, use_cache: expected neither with cu_seqlens; a row of a cache is one sequence"
        )


def without_first_tokens(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Labels [1, T] with -100 for the first token of each sequence, which the one before has nothing to say of."""
    _, is_first = packed_places(cu_seqlens, labels.shape[1], labels.device)
    return labels.masked_fill(is_first, -100)
