"""The recurrent state of the model: the same size after any number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class LayerState:
    """State of one block after a token; None before the first one.

    Streams (placement "stream", P > 1) have a P axis where it is in parentheses.
    """

    attention_shift: Tensor | None = None  # [B, (P,) C], the time mixing's last input
    wkv: Tensor | None = None  # [B, 3, P, A] float32: (num, den, exp)
    feed_forward_shift: Tensor | None = None  # [B, (P,) C], the channel mixing's last input


class TemporalRwkvCache:
    """What `generate()` carries from token to token: one `LayerState` per block.

    The model updates it in place, as Hugging Face's own caches are. `started` [B] tells which rows have seen
    a token: padding must come before (see `TemporalRwkvModel.forward`).
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_hidden_layers: int) -> None:
        self.layers = [LayerState() for _ in range(num_hidden_layers)]
        self.started: Tensor | None = None
        self.seen_tokens = 0

    def __len__(self) -> int:
        return len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included (the same for every layer)."""
        return self.seen_tokens

    def advance(self, n_tokens: int, started: Tensor) -> None:
        """Count `n_tokens` more; `started` [B] bool: the rows that had a token among them."""
        self.seen_tokens += n_tokens
        self.started = started if self.started is None else self.started | started

    def reset(self) -> None:
        """Back to the start of a sequence."""
        self.layers = [LayerState() for _ in self.layers]
        self.started, self.seen_tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> "TemporalRwkvCache":
        """Row b becomes the former row `beam_idx[b]`, in place (beam search)."""
        return self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> "TemporalRwkvCache":
        """Every row `repeats` times over, in place."""
        return self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def nbytes(self) -> int:
        """Bytes of memory the state keeps alive."""
        tensors = [x for layer in self.layers for x in vars(layer).values() if x is not None]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TemporalRwkvCache":
        for layer in self.layers:
            for field in fields(layer):
                x = getattr(layer, field.name)
                setattr(layer, field.name, None if x is None else change(x))
        self.started = None if self.started is None else change(self.started)
        return self


def rows_started(mask: Tensor | None, batch_size: int, n_tokens: int, device: torch.device) -> Tensor:
    """[B] bool: which rows hold a token, by a bool mask [B, T] (None: all)."""
    if mask is None:
        return torch.full((batch_size,), n_tokens > 0, device=device)
    return mask.any(dim=1)
