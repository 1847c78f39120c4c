"""The layers of a multi-perspective RWKV-4, in plain PyTorch: no model library needed."""

from trwkv.modules.channel_mixing import CHANNEL_VECTORS, ChannelMixing
from trwkv.modules.linear import RwkvLinear, SelectorLinear
from trwkv.modules.perspective_selector import AGGREGATIONS, PerspectiveSelector, merge_perspectives
from trwkv.modules.time_mixing import TIME_VECTORS, TimeMixing, perspective_rows
from trwkv.modules.token_shift import time_mix, token_shift

__all__ = [
    "AGGREGATIONS",
    "CHANNEL_VECTORS",
    "TIME_VECTORS",
    "ChannelMixing",
    "PerspectiveSelector",
    "RwkvLinear",
    "SelectorLinear",
    "TimeMixing",
    "merge_perspectives",
    "perspective_rows",
    "time_mix",
    "token_shift",
]
