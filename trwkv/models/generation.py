"""What `generate()` must know of a model whose cache is a recurrent state, in transformers 5.0 and later."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from trwkv.models.cache import CACHE_NAME, TemporalRwkvCache, the_cache

# "dynamic_full" is what assisted generation of transformers before 5.23 asks an assistant for
CACHE_IMPLEMENTATIONS = (None, "dynamic", "dynamic_full", "static")


class TemporalRwkvGenerationMixin(GenerationMixin):
    """Hugging Face's `generate`, on a `TemporalRwkvCache`.

    All its ways of decoding work. `cache_implementation` may be None or "dynamic", or "static" to let `generate`
    compile the decoding step on a GPU (not with an assistant). To go on from a cache, pass it as `cache` and
    all tokens so far as `input_ids` (those it has seen are skipped), or the new ones alone with an `attention_mask` as
    long as all; for n beams or n returned sequences after `cache.batch_repeat_interleave(n)`. With an assistant the
    cache must be a fresh one.
    """

    def generate(self, *args: Any, cache: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Hugging Face's own, which takes the cache by one of its names, the newer or the older."""
        cache = the_cache(cache, past_key_values)
        return super().generate(*args, **({} if cache is None else {CACHE_NAME: cache}), **kwargs)  # type: ignore

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: there are no keys and values. (transformers 5.0 goes by `_is_stateful`, later ones by "rwkv" in
        the name of the class, which a subclass need not have.)"""
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation: expected None, 'dynamic' or 'static' (a recurrent state is all there is "
                f"to keep, of one size); got {kind!r}"
            )
        if self.training and self.base_model.gradient_checkpointing and not generation_config.is_assistant:  # type: ignore
            generation_config.use_cache = model_kwargs["use_cache"] = False
        if generation_config.use_cache is False or model_kwargs.get(CACHE_NAME) is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore
        else:
            layers = self.config.num_hidden_layers  # type: ignore
            model_kwargs[CACHE_NAME] = TemporalRwkvCache(layers, static=kind == "static")
        if generation_config.is_assistant:  # its drafts are taken back where they fail
            model_kwargs[CACHE_NAME].activate_past_recording()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Hugging Face's own, which forgets to ask whether there is a new token at all.

        Raises:
            ValueError: no token beyond those the cache has seen; packed sequences.
        """
        if kwargs.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens: expected None in generation, which goes on with one sequence a row")
        n_new, position = kwargs.get("next_sequence_length"), kwargs.get("cache_position")
        if (n_new is not None and n_new < 1) or (position is not None and len(position) == 0):
            raise ValueError(
                f"input_ids: expected more tokens than the {kwargs[CACHE_NAME].get_seq_length()} that "
                "the cache has seen, or the new ones alone with an attention_mask as long as all; got "
                f"{input_ids.shape[1]}"
            )
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore
        inputs.pop("cache_position", None)  # transformers 5.0 counts for everyone
        inputs.pop("position_ids", None)  # from a target that this model drafts for
        return inputs

    def _get_initial_cache_position(
        self, seq_length: int, device: torch.device, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """transformers 5.0 only, which knows no input of new tokens alone, as later ones do: by a longer mask."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] > seq_length:
            model_kwargs["cache_position"] = torch.arange(mask.shape[1], device=device)[-seq_length:]
        return super()._get_initial_cache_position(seq_length, device, model_kwargs)  # type: ignore

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Hugging Face's own, less the mask once there is a state: all that follows the prompt is tokens."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get(CACHE_NAME) is not None:
            model_kwargs.pop("attention_mask", None)
        return model_kwargs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """[B, T] as it is: there is no attention to mask in four dimensions."""
        return attention_mask

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE_NAME)
        if cache is None:
            raise ValueError("use_cache: expected True with assisted generation; got False")
        if cache.get_seq_length() > 0:  # transformers would run all of input_ids through it again
            raise ValueError(
                "cache: expected a fresh one with assisted generation; got one that has seen "
                f"{cache.get_seq_length()} tokens"
            )
        cache.activate_past_recording()
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore
        finally:
            self.base_model.replay(cache)  # type: ignore
            cache.recording = None
