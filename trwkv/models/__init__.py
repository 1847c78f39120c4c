"""RWKV-4 with multiple temporal perspectives for Hugging Face transformers.

Importing this package registers the model with AutoConfig, AutoModel and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
# Here Trainer looks whether labels are to be shifted for its label smoothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TemporalRwkvConfig.model_type] = TemporalRwkvForCausalLM.__name__

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
