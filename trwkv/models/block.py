"""One block of the model: time mixing and channel mixing, each after its LayerNorm."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trwkv.models.cache import TemporalRwkvCache, TemporalRwkvCacheLayer
from trwkv.models.configuration import TemporalRwkvConfig
from trwkv.modules import ChannelMixing, PerspectiveSelector, TimeMixing
from trwkv.modules.channel_mixing import CHANNEL_VECTORS
from trwkv.modules.time_mixing import TIME_VECTORS

HALVED_EVERY = 6
"""In float16 the residual stream is halved after so many blocks, as RWKV-4's own inference does (rescale_every)."""


class TemporalRwkvBlock(GradientCheckpointingLayer):
    """`x += TimeMixing(LayerNorm(x)); x += ChannelMixing(LayerNorm(x))`; block 0 also owns the LayerNorm
    before.

    The stream grows from block to block, beyond what float16 holds: there x is that of the other types divided by
    2^(blocks before // HALVED_EVERY), which no LayerNorm notices.
    """

    def __init__(self, config: TemporalRwkvConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        size, eps, P = config.hidden_size, config.layer_norm_epsilon, config.n_perspectives
        common = {
            "n_perspectives": P,
            "perspective_noise": config.perspective_noise,
            "layer_index": layer_index,
            "n_layers": config.num_hidden_layers,
            "backend": config.wkv_backend,
        }
        if layer_index == 0:
            self.ln0 = nn.LayerNorm(size, eps=eps)
        self.ln1 = nn.LayerNorm(size, eps=eps)
        self.ln2 = nn.LayerNorm(size, eps=eps)
        self.att = TimeMixing(
            size,
            config.attention_hidden_size,
            perspective_vectors=[name for name in config.perspective_vectors if name in TIME_VECTORS],
            selector=new_selector(config) if config.placement == "layer" and P > 1 else None,
            **common,
        )
        self.ffn = ChannelMixing(
            size,
            config.intermediate_size,
            perspective_vectors=[name for name in config.perspective_vectors if name in CHANNEL_VECTORS],
            **common,
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: TemporalRwkvCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        if self.layer_index == 0:
            x = self.ln0(x)
        cached = cache is not None
        state = TemporalRwkvCacheLayer() if cache is None else cache.layers[self.layer_index]
        is_half = x.dtype == torch.float16
        scale = 2.0 ** -(self.layer_index // HALVED_EVERY) if is_half else 1.0
        attention, attention_shift, wkv = self.att(
            self.ln1(x),
            mask=mask,
            shift_state=state.attention_shift,
            wkv_state=state.wkv,
            output_state=cached,
            cu_seqlens=cu_seqlens,
            scale=scale,
        )
        x = x + attention
        feed_forward, feed_forward_shift = self.ffn(
            self.ln2(x),
            mask=mask,
            shift_state=state.feed_forward_shift,
            output_state=cached,
            cu_seqlens=cu_seqlens,
            scale=scale,
        )
        if cached:
            state.update(attention_shift=attention_shift, wkv=wkv, feed_forward_shift=feed_forward_shift)
        x = x + feed_forward
        return 0.5 * x if is_half and (self.layer_index + 1) % HALVED_EVERY == 0 else x


def new_selector(config: TemporalRwkvConfig) -> PerspectiveSelector:
    return PerspectiveSelector(
        config.hidden_size,
        config.n_perspectives,
        aggregation=config.aggregation,
        fixed_weights=config.fixed_weights,
        noise=config.selector_noise,
    )
