"""What the models return."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from trwkv.models.cache import CACHE_NAME, TemporalRwkvCache


def _output(cls: Any) -> Any:
    """A dataclass whose field `cache` has the name by which this transformers looks for it, and can be read as both."""
    if CACHE_NAME != "cache":
        fields = {CACHE_NAME if name == "cache" else name: kind for name, kind in cls.__annotations__.items()}
        cls.__annotations__ = fields
        setattr(cls, CACHE_NAME, None)
        cls.cache = property(lambda output: output.past_key_values)
    return dataclass(cls)


@_output
class TemporalRwkvOutput(ModelOutput):
    """Output of `TemporalRwkvModel`.

    `last_hidden_state` is [B, T, C]. `hidden_states` holds the input of each block ([B, T, C], or [B, T, P, C]
    for streams) and then `last_hidden_state`. `cache` can be read as `past_key_values`, too, its name before
    transformers 5.24.
    """

    last_hidden_state: Tensor | None = None
    cache: TemporalRwkvCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@_output
class TemporalRwkvCausalLMOutput(ModelOutput):
    """Output of `TemporalRwkvForCausalLM`: `logits` [B, T, vocab_size], the rest as in `TemporalRwkvOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: TemporalRwkvCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ParameterCount(NamedTuple):
    """Numbers of parameters: `added` are those beyond the same model with P = 1, `base` the others.

    `added_percent` is 100 added / base; `trainable` are those with requires_grad.
    """

    total: int
    base: int
    added: int
    added_percent: float
    trainable: int
