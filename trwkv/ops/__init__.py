"""The operators. Importing this package loads no kernel and no model library."""

from trwkv.ops.token_shift_mix.api import token_shift_mix
from trwkv.ops.wkv.api import (
    WkvOutput,
    WkvStates,
    chunk_wkv,
    merge_wkv_states,
    multi_perspective_wkv,
    recurrent_wkv,
    reference_wkv,
    wkv_states,
)
from trwkv.ops.wkv.api_decode import gated_recurrent_wkv, recurrent_wkv_

__all__ = [
    "WkvOutput",
    "WkvStates",
    "chunk_wkv",
    "gated_recurrent_wkv",
    "merge_wkv_states",
    "multi_perspective_wkv",
    "recurrent_wkv",
    "recurrent_wkv_",
    "reference_wkv",
    "token_shift_mix",
    "wkv_states",
]
