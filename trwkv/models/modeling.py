"""RWKV-4 with multiple temporal perspectives, in Hugging Face conventions."""

from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from trwkv import convert
from trwkv.models.block import TemporalRwkvBlock, new_selector
from trwkv.models.cache import TemporalRwkvCache, the_cache
from trwkv.models.configuration import TemporalRwkvConfig
from trwkv.models.generation import TemporalRwkvGenerationMixin
from trwkv.models.outputs import TemporalRwkvCausalLMOutput, TemporalRwkvOutput
from trwkv.models.packing import check_packed, without_first_tokens
from trwkv.models.padding import last_token_place, padding_first, reorder, token_mask
from trwkv.models.parameters import TemporalRwkvParametersMixin
from trwkv.models.weights import rwkv4_state, with_rwkv4_weights
from trwkv.modules import (
    ChannelMixing,
    PerspectiveSelector,
    RwkvLinear,
    SelectorLinear,
    TimeMixing,
    merge_perspectives,
)


class TemporalRwkvPreTrainedModel(PreTrainedModel):
    """Initialisation (RWKV-4's own) and what Hugging Face needs to know."""

    config_class = TemporalRwkvConfig
    base_model_prefix = "rwkv"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TemporalRwkvBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["time_decay", "time_first"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # leaf by leaf, and only through functions that spare what a checkpoint has brought
        if isinstance(module, TimeMixing | ChannelMixing):
            for parameter, value in module.initial_values():
                init.copy_(parameter, value)
        elif isinstance(module, RwkvLinear):
            if not getattr(module.weight, "_is_hf_initialized", False):
                module.reset_parameters()
        elif isinstance(module, SelectorLinear | PerspectiveSelector | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -self.config.initializer_range, self.config.initializer_range)


class TemporalRwkvModel(TemporalRwkvPreTrainedModel):
    """The model without its head. See `TemporalRwkvConfig` for what it can be."""

    def __init__(self, config: TemporalRwkvConfig) -> None:
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(TemporalRwkvBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.has_streams = config.placement == "stream" and config.n_perspectives > 1
        if self.has_streams:
            self.selector = new_selector(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.emb = embeddings  # type: ignore

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: TemporalRwkvCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: TemporalRwkvCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> TemporalRwkvOutput:
        """Run B sequences of T tokens.

        Args:
            input_ids: [B, T] int64, or instead of it `inputs_embeds` [B, T, C].
            attention_mask: [B, T], or longer with a cache (the last T columns count): 0 where there is no
                token. Such places are skipped wherever they are: a row gives the same outputs and state as
                its tokens alone. Outputs at such places are those of the last token before, so that `generate`
                takes rows padded on the right too; before the first token they mean nothing.
            cache: state to continue from; updated in place. After a row's first token a cache allows no more
                padding in it.
            past_key_values: `cache` under the name that it had before transformers 5.24.
            use_cache: return the state (default: `config.use_cache`, but not in training nor with `cu_seqlens`).
            cu_seqlens: packed sequences, [N + 1] int32 or int64, rising from 0 to T, on the model's device or the CPU:
                tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1 of the one row (B = 1) are computed as if they were alone.
                There is no mask and no cache then.

        Raises:
            TypeError: `cache` of another model's kind, a `cu_seqlens` that is no tensor of whole numbers.
            ValueError: neither or both inputs, one of another shape, a mask or a cache that does not fit, padding after
                a cached token, a cache under both names, `cu_seqlens` that does not fit.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self._embedded(input_ids, inputs_embeds)
        given = the_cache(cache, past_key_values)
        B, T = x.shape[:2]
        if cu_seqlens is not None:
            check_packed(B, attention_mask=attention_mask, cache=given, use_cache=use_cache)
            use_cache = False
        use_cache, cache = self._choose_cache(use_cache, given)
        if cache is not None:
            if cache.n_rows not in (None, B):
                raise ValueError(
                    f"cache: expected a state of {B} rows, as the input has; got one of {cache.n_rows} "
                    "(see its batch_repeat_interleave and batch_select_indices)"
                )
            self.replay(cache)
        mask, places = token_mask(attention_mask, B, T, given), None
        if mask is not None:
            order, places = padding_first(mask), last_token_place(mask)
            x, mask = reorder(x, order), mask.gather(1, order)
        if cache is not None and cache.recording is not None:
            cache.recording.append(x, mask)
        hidden_states = self._run_blocks(x, mask, cache, output_hidden_states, cu_seqlens)
        x = self.ln_out(hidden_states.pop())
        if self.has_streams:
            x = merge_perspectives(x, self.selector(x.mean(dim=2)))
        hidden_states.append(x)
        if places is not None:
            hidden_states = [reorder(h, places) for h in hidden_states]
        return TemporalRwkvOutput(
            hidden_states[-1],
            cache if use_cache else None,
            tuple(hidden_states) if output_hidden_states else None,
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The one input that was given, as [B, T, C]."""
        if input_ids is not None and inputs_embeds is None:
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids: expected shape [B, T]; got {list(input_ids.shape)}")
            return self.emb(input_ids)
        if inputs_embeds is None or input_ids is not None:
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them; got both or neither")
        C = self.config.hidden_size
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != C:
            raise ValueError(f"inputs_embeds: expected shape [B, T, {C}]; got {list(inputs_embeds.shape)}")
        return inputs_embeds

    def _run_blocks(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: TemporalRwkvCache | None,
        output_hidden_states: bool | None,
        cu_seqlens: Tensor | None = None,
    ) -> list[Tensor]:
        """The output of the last block, after the inputs of all where asked for."""
        if cache is not None:
            B, T = x.shape[:2]
            cache.advance(T, torch.full((B,), T, device=x.device) if mask is None else mask.sum(dim=1))
        if self.has_streams:
            x = x.unsqueeze(2).expand(-1, -1, self.config.n_perspectives, -1)
        hidden_states = []
        for block in self.blocks:
            hidden_states += [x] if output_hidden_states else []
            x = block(x, mask, cache=cache, cu_seqlens=cu_seqlens)
        return [*hidden_states, x]

    def replay(self, cache: TemporalRwkvCache) -> None:
        """Run again what `cache.crop` has left of the calls it went back on, if there is something."""
        past = cache.recording
        if past is not None and past.x is not None and past.replay:
            cache.recording = None
            self._run_blocks(past.x, past.mask, cache, output_hidden_states=False)
            cache.activate_past_recording()

    def _choose_cache(
        self, use_cache: bool | None, cache: TemporalRwkvCache | None
    ) -> tuple[bool, TemporalRwkvCache | None]:
        """Whether to return the state, and the one to update (None: none)."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("cache: expected None in training with gradient checkpointing")
            return False, None
        layers = len(self.blocks)
        if cache is not None and not isinstance(cache, TemporalRwkvCache):
            raise TypeError(
                f"cache: expected a TemporalRwkvCache({layers}) or None; got {type(cache).__name__}"
            )
        if cache is not None and len(cache) != layers:
            raise ValueError(f"cache: expected a state of {layers} layers; got {len(cache)}")
        return use_cache, TemporalRwkvCache(layers) if cache is None and use_cache else cache


class TemporalRwkvForCausalLM(
    TemporalRwkvPreTrainedModel, TemporalRwkvParametersMixin, TemporalRwkvGenerationMixin
):
    """The model with its head. `from_rwkv4` gives an RWKV-4 checkpoint perspectives; `to_rwkv4` writes one.

    Loaded in half precision (`from_pretrained(dtype=...)`, `from_rwkv4(dtype=...)`) it keeps decay and bonus in
    float32, and the WKV state always is; `.to(torch.bfloat16)` rounds whatever parameters there are.
    """

    _tied_weights_keys = {"head.weight": "rwkv.emb.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: TemporalRwkvConfig) -> None:
        super().__init__(config)
        self.rwkv = TemporalRwkvModel(config)
        self.head = RwkvLinear(config.hidden_size, config.vocab_size, scale=0.5)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.rwkv.emb

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.rwkv.emb = embeddings  # type: ignore

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.head = head  # type: ignore

    @classmethod
    def from_rwkv4(
        cls,
        source: str | PathLike,
        *,
        n_perspectives: int = 1,
        placement: str = "layer",
        perspective_vectors: Sequence[str] | None = None,
        aggregation: str = "selector",
        fixed_weights: Sequence[float] | None = None,
        perspective_noise: float = 0.0,
        selector_noise: float = 0.0,
        dtype: torch.dtype | str | None = None,
        wkv_backend: str = "auto",
    ) -> "TemporalRwkvForCausalLM":
        """An RWKV-4 checkpoint with `n_perspectives` perspectives, each a copy of the one it has.

        Without `perspective_noise` the model computes the base's function exactly; but equal perspectives
        learn apart only through the selector (which starts from small random weights): with any other
        aggregation, add noise.

        Args:
            source: see `trwkv.convert.read_rwkv4`, also for what it raises.
            n_perspectives, placement, perspective_vectors, aggregation, fixed_weights, perspective_noise,
                selector_noise, wkv_backend: see `TemporalRwkvConfig`.
            dtype: of the parameters (decay and bonus are float32 always); None is the checkpoint's own.
        """
        checkpoint = convert.read_rwkv4(source)
        config = TemporalRwkvConfig(
            **checkpoint.settings,
            n_perspectives=n_perspectives,
            placement=placement,
            perspective_vectors=perspective_vectors,
            aggregation=aggregation,
            fixed_weights=fixed_weights,
            perspective_noise=perspective_noise,
            selector_noise=selector_noise,
            wkv_backend=wkv_backend,
        )
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        dtype = dtype or convert.checkpoint_dtype(checkpoint.state)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating point torch.dtype or its name; got {dtype!r}")
        return with_rwkv4_weights(cls, config, checkpoint.state, dtype)

    def to_rwkv4(self, path: str | PathLike) -> None:
        """Write as RWKV-4: an official file if `path` ends in .pth, one of rwkv.cpp if in .bin, else a Hugging Face
        folder. P = 1 only.

        Tensors are written bit for bit in the model's dtype (decay and bonus in float32); rwkv.cpp's in float16 if the
        model's are, else in float32, with -exp(decay) for the decay.

        Raises:
            ValueError: P > 1, or a LayerNorm epsilon other than RWKV-4's 1e-5.
        """
        config = self.config
        if config.n_perspectives > 1:
            raise ValueError(
                f"to_rwkv4: RWKV-4 has one perspective and this model {config.n_perspectives}; "
                "use save_pretrained"
            )
        if config.layer_norm_epsilon != convert.LAYER_NORM_EPSILON:
            raise ValueError(
                f"to_rwkv4: expected layer_norm_epsilon {convert.LAYER_NORM_EPSILON}; "
                f"got {config.layer_norm_epsilon}"
            )
        convert.write_rwkv4(
            path, rwkv4_state(self), {name: getattr(config, name) for name in convert.SETTINGS}
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: TemporalRwkvCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: TemporalRwkvCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> TemporalRwkvCausalLMOutput:
        """Logits of the next token, and the loss where `labels` are given.

        The first arguments, `past_key_values` and `cu_seqlens` are those of `TemporalRwkvModel.forward`. With streams
        the gate mixes the normalised outputs rather than the logits: the same thing, the head being linear, at 1/P of
        its cost.

        Args:
            labels: [B, T], as `input_ids` (they are shifted here); -100 is not counted, nor is the first token of a
                packed sequence.
            logits_to_keep: compute the last so many only (0: all), or those at the given positions.
            num_items_in_batch: divide the loss by this instead of by the labels of this call (Trainer's
                gradient accumulation).
            output_attentions: PEFT passes it, None or False; there is no attention matrix to return.

        Raises:
            ValueError: output_attentions is true.
        """
        if output_attentions:
            raise ValueError("output_attentions: expected False (an RWKV has no attention matrix); got True")
        outputs = self.rwkv(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=the_cache(cache, past_key_values),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seqlens=cu_seqlens,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = without_first_tokens(labels, cu_seqlens)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return TemporalRwkvCausalLMOutput(loss, logits, outputs.cache, outputs.hidden_states)
