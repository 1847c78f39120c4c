"""Configuration of a multi-perspective RWKV-4."""

import difflib
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from trwkv.convert import SIZES
from trwkv.modules import AGGREGATIONS, CHANNEL_VECTORS, TIME_VECTORS
from trwkv.modules.arguments import check_differ, check_whole_number, chosen_vectors
from trwkv.modules.perspective_selector import check_aggregation
from trwkv.ops._dispatch import BACKENDS

PLACEMENTS = ("layer", "stream")
_VALID_VECTORS = {"layer": TIME_VECTORS, "stream": TIME_VECTORS + CHANNEL_VECTORS}
_DEFAULT_VECTORS = {"layer": ("time_decay", "time_first"), "stream": TIME_VECTORS + CHANNEL_VECTORS}


class TemporalRwkvConfig(PreTrainedConfig):
    """RWKV-4 with `n_perspectives` temporal perspectives (arXiv 2402.02625). With one it is RWKV-4.

    Args:
        vocab_size: rows of the embedding and of the head.
        hidden_size: C, width of the residual stream.
        num_hidden_layers: number of blocks.
        attention_hidden_size: channels of the time mixing; None is `hidden_size`.
        intermediate_size: channels of the channel mixing; None is 4 `hidden_size`.
        layer_norm_epsilon: of every LayerNorm (RWKV-4: 1e-5).
        context_length: tokens the model was trained on at once. A note: nothing limits the length.
        n_perspectives: P.
        placement: where the perspectives live. "layer": inside each time mixing, merged right after the WKV;
            k and v are shared, and every matrix works once. "stream": P whole residual
            streams that share every matrix, merged after the last LayerNorm; P times the compute (the paper's
            released code).
        perspective_vectors: which of RWKV-4's seven vectors per block are one per perspective: "time_decay",
            "time_first", "time_mix_k", "time_mix_v", "time_mix_r" (att.* in an official checkpoint) and, with
            placement "stream" only, "channel_mix_k", "channel_mix_r" (its ffn.time_mix_*). None is
            "time_decay" and "time_first" with "layer" (k and v stay shared), all seven with "stream".
        aggregation: how they are merged: "selector" (per token), "learned", "mean" or "fixed"; see
            `trwkv.modules.PerspectiveSelector`.
        fixed_weights: P numbers that sum to one, with aggregation "fixed".
        perspective_noise: noise that sets the perspectives apart at initialisation and at conversion: a
            fraction of each vector's root mean square, added to every perspective but the first.
        selector_noise: standard deviation of noise on the selector's logits, in training only.
        tie_word_embeddings: head and embedding are one matrix.
        wkv_backend: backend of the op: "auto", "triton", "torch" or "reference".
        initializer_range: the embedding starts uniform within plus and minus this (RWKV-4: 1e-4).
        bos_token_id, eos_token_id, pad_token_id, use_cache: as anywhere in Hugging Face transformers.

    Raises:
        TypeError: an unknown option that resembles a known one.
        ValueError: a value out of range, or options that do not fit each other.
    """

    model_type = "temporal_rwkv"
    attribute_map = {"max_position_embeddings": "context_length"}  # noqa: RUF012 (Hugging Face's convention)
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int = 50277,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        attention_hidden_size: int | None = None,
        intermediate_size: int | None = None,
        layer_norm_epsilon: float = 1e-5,
        context_length: int = 1024,
        n_perspectives: int = 1,
        placement: str = "layer",
        perspective_vectors: Sequence[str] | None = None,
        aggregation: str = "selector",
        fixed_weights: Sequence[float] | None = None,
        perspective_noise: float = 0.0,
        selector_noise: float = 0.0,
        tie_word_embeddings: bool = False,
        wkv_backend: str = "auto",
        initializer_range: float = 1e-4,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 0,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.perspective_vectors: Sequence[str]
        self.fixed_weights: Sequence[float] | None
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        _reject_misspelt(kwargs, own)
        for name, value in own.items():
            setattr(self, name, value)
        if attention_hidden_size is None:
            self.attention_hidden_size = hidden_size
        if intermediate_size is None:
            self.intermediate_size = 4 * hidden_size
        self._check_numbers()
        self._check_perspectives()
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:  # transformers would only warn, and begin with random weights
            raise ValueError(
                f"model_type: expected {cls.model_type!r}; got {kind!r} (a checkpoint of RWKV-4 is read by "
                "TemporalRwkvForCausalLM.from_rwkv4)"
            )
        return super().from_dict(config_dict, **kwargs)

    def _check_numbers(self) -> None:
        for name in (*SIZES, "context_length", "n_perspectives"):
            check_whole_number(name, getattr(self, name))
        for name in ("perspective_noise", "selector_noise", "layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0; got {value!r}")

    def _check_perspectives(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement: expected one of {', '.join(PLACEMENTS)}; got {self.placement!r}")
        if self.wkv_backend not in BACKENDS:
            raise ValueError(f"wkv_backend: expected one of {', '.join(BACKENDS)}; got {self.wkv_backend!r}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation: expected one of {', '.join(AGGREGATIONS)}; got {self.aggregation!r}"
            )
        valid = _VALID_VECTORS[self.placement]
        if self.perspective_vectors is None:
            self.perspective_vectors = _DEFAULT_VECTORS[self.placement]
        where = f"with placement {self.placement!r} "
        self.perspective_vectors = chosen_vectors(self.perspective_vectors, valid, where)
        check_differ(self.perspective_vectors, self.n_perspectives)
        if self.fixed_weights is not None:
            self.fixed_weights = [float(weight) for weight in self.fixed_weights]
        check_aggregation(self.aggregation, self.fixed_weights, self.n_perspectives)


def _reject_misspelt(unknown: dict[str, Any], known: dict[str, Any]) -> None:
    """Hugging Face keeps any option it does not know as an attribute; a near miss of ours is a mistake,
    though."""
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            raise TypeError(f"{name}: unknown option; did you mean {close[0]}?")
