"""The operators. Importing this package loads no kernel and no model library."""

from trwkv.ops.wkv.api import (
    WkvOutput,
    chunk_wkv,
    multi_perspective_wkv,
    recurrent_wkv,
    reference_wkv,
)

__all__ = ["WkvOutput", "chunk_wkv", "multi_perspective_wkv", "recurrent_wkv", "reference_wkv"]
