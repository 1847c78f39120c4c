"""The recurrent state of the model as a Hugging Face cache: the same size after any number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

# What transformers calls a cache in calls and outputs: since 5.24 "cache", before that "past_key_values".
CACHE_NAME = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"

_STATES = ("attention_shift", "wkv", "feed_forward_shift")


def the_cache(
    cache: "TemporalRwkvCache | None", past_key_values: "TemporalRwkvCache | None"
) -> "TemporalRwkvCache | None":
    """Which of the two was given.

    Raises:
        ValueError: both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache, past_key_values: expected one of them (two names of the same); got both")
    return past_key_values if cache is None else cache


def _at_static_address(state: Tensor) -> Tensor:
    state = state.clone()
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(state)  # or CUDA graphs would not have it change in place
    return state


class TemporalRwkvCacheLayer(CacheLayerMixin):
    """State of one block after a token; None, each part of it, before the first one.

    Streams (placement "stream", P > 1) have a P axis where it is in parentheses.

    Attributes:
        attention_shift: [B, (P,) C], the time mixing's last input.
        wkv: [B, 3, P, A] float32, (num, den, exp).
        feed_forward_shift: [B, (P,) C], the channel mixing's last input.
        counts: [B, 2] int64, places seen (padding included, the same in every row) and tokens among them.
    """

    supports_early_init = False  # there are no keys and values to make room for

    def __init__(self, static: bool = False) -> None:
        super().__init__()
        self.static = static
        self.attention_shift: Tensor | None = None
        self.wkv: Tensor | None = None
        self.feed_forward_shift: Tensor | None = None
        self.counts: Tensor | None = None
        self.device: torch.device | None = None

    def lazy_initialization(self, *keys_and_values: Tensor) -> None:
        raise NotImplementedError("TemporalRwkvCacheLayer: a recurrent state has no keys and values")

    def update(self, **states: Tensor) -> None:  # type: ignore[override]
        """Replace the states named; a static layer keeps their addresses."""
        for name, state in states.items():
            old = getattr(self, name)
            if not self.static:
                setattr(self, name, state)
            elif old is not None and (old.shape, old.device) == (state.shape, state.device):
                old.copy_(state)
            else:
                setattr(self, name, _at_static_address(state))
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Places seen, padding included."""
        return 0 if self.counts is None or not len(self.counts) else int(self.counts[0, 0])

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    get_max_cache_shape = get_max_length  # the older name

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("TemporalRwkvCacheLayer: a recurrent state has no keys to mask")

    def reset(self) -> None:
        """Back to the start of a sequence."""
        self.attention_shift = self.wkv = self.feed_forward_shift = self.counts = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the former row `beam_idx[b]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, numbers or a bool mask."""
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times over."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move the state to the CPU."""
        if self.wkv is not None:
            self.device = self.wkv.device
        self._map(lambda x: x.cpu())

    def prefetch(self) -> None:
        """Move the state back to where `offload` found it."""
        self._map(lambda x: x.to(self.device))

    def states(self) -> dict[str, Tensor]:
        """What there is, by name."""
        states = {name: getattr(self, name) for name in (*_STATES, "counts")}
        return {name: state for name, state in states.items() if state is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.update(**{name: change(state) for name, state in self.states().items()})


@dataclass
class Recording:
    """What `TemporalRwkvCache.crop` goes back with.

    Attributes:
        states: of every layer, before the inputs below.
        x, mask: inputs of the blocks since, [B, T, C], and where they are tokens, [B, T] bool; None: none yet.
        replay: whether the layers are as in `states`, and must see x again.
    """

    states: list[dict[str, Tensor]]
    x: Tensor | None = None
    mask: Tensor | None = None
    replay: bool = False

    def n_places(self) -> int:
        return 0 if self.x is None else self.x.shape[1]

    def append(self, x: Tensor, mask: Tensor | None) -> None:
        """Inputs that the blocks are about to see."""
        mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        self.x = x if self.x is None else torch.cat([self.x, x], dim=1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)


class TemporalRwkvCache(Cache):
    """What `generate()` carries from token to token: one `TemporalRwkvCacheLayer` per block.

    The model updates it, as Hugging Face's own caches are; to go on from one prompt in several ways, give each
    its own `copy.deepcopy`.

    Args:
        num_hidden_layers: blocks of the model.
        static: keep every state at one address, changed in place, so that `generate` compiles the decoding
            step on a GPU (what its `cache_implementation="static"` asks for). Without gradients only.
    """

    layers: list[TemporalRwkvCacheLayer]  # type: ignore[assignment]

    def __init__(self, num_hidden_layers: int, *, static: bool = False) -> None:
        super().__init__(layers=[TemporalRwkvCacheLayer(static) for _ in range(num_hidden_layers)])
        self.static = static
        self.recording: Recording | None = None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.static

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can go back now."""
        return self.recording is not None

    @property
    def n_rows(self) -> int | None:
        """Rows; None before the first call."""
        counts = self.layers[0].counts
        return None if counts is None else counts.shape[0]

    @property
    def started(self) -> Tensor | None:
        """[B] bool, the rows that have seen a token: padding must come before. None: no row has."""
        return None if self.tokens_seen is None else self.tokens_seen > 0

    @property
    def tokens_seen(self) -> Tensor | None:
        """How many tokens, padding apart, each row has had [B]; None before the first call."""
        counts = self.layers[0].counts
        return None if counts is None else counts[:, 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places seen, padding included."""
        waiting = self.recording.n_places() if self.recording is not None and self.recording.replay else 0
        return self.layers[layer_idx].get_seq_length() + waiting

    def reset(self) -> None:
        """Back to the start of a sequence."""
        super().reset()
        self.recording = None

    def activate_past_recording(self) -> None:
        """Let `crop` go back to any place from here on, until it is called again or `recording` is set to None."""
        if self.static:
            raise ValueError("cache: expected static=False to go back in; got static=True")
        if self.recording is None:
            self.recording = Recording([layer.states() for layer in self.layers])

    def crop(self, length: int) -> None:
        """Forget the last places. A recurrent state cannot, unless recorded since a place before those to forget:
        then the model runs what was to be kept since again, in its next call (assisted generation works so).

        Args:
            length: as Hugging Face's caches take it, how many places to keep, or if negative to drop; 0 drops none.

        Raises:
            ValueError: more to drop than was recorded.
        """
        drop = -length if length <= 0 else max(self.get_seq_length() - length, 0)
        past = self.recording
        n_recorded = 0 if past is None else past.n_places()
        if drop > n_recorded:
            raise ValueError(
                f"crop: expected to drop at most the {n_recorded} last places, those recorded (a recurrent state "
                f"cannot go back; copy.deepcopy it, or call activate_past_recording, before going on); got {drop}"
            )
        if past is None or past.x is None or past.mask is None:
            return
        if drop > 0:
            super().reset()
            for layer, states in zip(self.layers, past.states, strict=True):
                layer.update(**states)
            kept = n_recorded - drop
            self.recording = Recording(past.states, past.x[:, :kept], past.mask[:, :kept], replay=kept > 0)
        elif not past.replay:
            self.recording = Recording([layer.states() for layer in self.layers])

    def advance(self, n_places: int, n_tokens: Tensor) -> None:
        """Count `n_places` more, of which `n_tokens` [B] int64 have a token."""
        counts = torch.stack([torch.full_like(n_tokens, n_places), n_tokens], dim=1)
        if self.layers[0].counts is not None:
            counts = self.layers[0].counts + counts
        for layer in self.layers:
            layer.update(counts=counts)

    def nbytes(self) -> int:
        """Bytes of memory the states keep alive (without `counts`, 16 bytes a row, and what `crop` needs)."""
        states = [getattr(layer, name) for layer in self.layers for name in _STATES]
        return sum(x.untyped_storage().nbytes() for x in states if x is not None)
