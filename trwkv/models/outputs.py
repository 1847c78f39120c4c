"""What the models return."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from trwkv.models.cache import TemporalRwkvCache


@dataclass
class TemporalRwkvOutput(ModelOutput):
    """Output of `TemporalRwkvModel`.

    `last_hidden_state` is [B, T, C]. `hidden_states` holds the input of each block ([B, T, C], or [B, T, P, C]
    for streams) and then `last_hidden_state`.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: TemporalRwkvCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class TemporalRwkvCausalLMOutput(ModelOutput):
    """Output of `TemporalRwkvForCausalLM`: `logits` [B, T, vocab_size], the rest as in `TemporalRwkvOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: TemporalRwkvCache | None = None
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
