"""RWKV-4 with multiple temporal perspectives for Hugging Face transformers.

Importing this package registers the model with AutoConfig, AutoModel and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from trwkv.models.cache import TemporalRwkvCache, TemporalRwkvCacheLayer
from trwkv.models.configuration import TemporalRwkvConfig
from trwkv.models.modeling import (
    TemporalRwkvForCausalLM,
    TemporalRwkvModel,
    TemporalRwkvPreTrainedModel,
)
from trwkv.models.outputs import ParameterCount, TemporalRwkvCausalLMOutput, TemporalRwkvOutput

AutoConfig.register(TemporalRwkvConfig.model_type, TemporalRwkvConfig, exist_ok=True)
AutoModel.register(TemporalRwkvConfig, TemporalRwkvModel, exist_ok=True)
AutoModelForCausalLM.register(TemporalRwkvConfig, TemporalRwkvForCausalLM, exist_ok=True)

__all__ = [
    "ParameterCount",
    "TemporalRwkvCache",
    "TemporalRwkvCacheLayer",
    "TemporalRwkvCausalLMOutput",
    "TemporalRwkvConfig",
    "TemporalRwkvForCausalLM",
    "TemporalRwkvModel",
    "TemporalRwkvOutput",
    "TemporalRwkvPreTrainedModel",
]
