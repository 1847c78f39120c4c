"""The operators. Importing this package loads no kernel and no model library."""

from trwkv.ops.wkv.api import (
    WkvOutput,
    WkvStates,
    chunk_wkv,
    merge_wkv_states,
    multi_perspective_wkv,
    recurrent_wkv,
    recurrent_wkv_,
    reference_wkv,
    wkv_states,
)

__all__ = [
    "WkvOutput",
    "WkvStates",
    "chunk_wkv",
    "merge_wkv_states",
    "multi_perspective_wkv",
    "recurrent_wkv",
    "recurrent_wkv_",
    "reference_wkv",
    "wkv_states",
]
