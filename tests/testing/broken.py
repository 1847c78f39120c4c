"""The reference, broken in one way per contract: what each contract is there to catch.

Every function takes and returns what `multi_perspective_wkv` does.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trwkv.ops import WkvOutput, _tuning, reference_wkv
from trwkv.testing import IMPLEMENTATIONS, Implementation, register


def forgets_the_bonus(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return reference_wkv(w, u * 0, k, v, **options)


def overflows(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    """As a kernel does whose exponents may be positive."""
    out = reference_wkv(w, u, k, v, **options)
    return out._replace(output=out.output + 0 * k.amax().exp())


def wants_all_gradients(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return reference_wkv(w, u if k.requires_grad else u.detach(), k, v, **options)


def sees_the_future(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 1e-6 * v.mean().to(y.dtype))


def sees_neighbours(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 1e-6 * v[:1, :1, :1].mean().to(y.dtype))


def mixes_channels(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 1e-6 * v.mean().to(y.dtype))


def keeps_its_state_in_bfloat16(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    output, state = reference_wkv(w, u, k, v, **options)
    return WkvOutput(output, state.bfloat16().float())


def leaks_between_sequences(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, **options: Any
) -> WkvOutput:
    right = reference_wkv(w, u, k, v, cu_seqlens=cu_seqlens, **options)
    if cu_seqlens is None:
        return right
    return right._replace(output=reference_wkv(w, u, k, v, **(options | {"initial_state": None})).output)


def ignores_the_direction(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, reverse: bool = False, **options: Any
) -> WkvOutput:
    return reference_wkv(w, u, k, v, **options)


def is_random(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 1e-6 * torch.rand_like(y))


def depends_on_the_process(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 1e-6 * os.getpid())


def is_wrong_in_one_configuration(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str, **options: Any
) -> WkvOutput:
    config = _tuning.config_for(1)
    wrong = (config.fwd_block_c, config.bwd_block_t) == (32, 4)
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 0.1 * wrong)


def reads_unwritten_memory(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 0 * torch.empty_like(y))


def writes_beyond_its_output(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    scratch = torch.empty(k.shape)
    memory = torch.empty(0).set_(scratch.untyped_storage())
    memory[scratch.storage_offset() + scratch.numel()] = 1.0
    return reference_wkv(w, u, k, v, **options)


def writes_to_its_input(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    out = reference_wkv(w, u, k, v.clone(), **options)
    v.detach().add_(1.0)
    return out


def takes_k_for_contiguous(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    memory = torch.empty(0, dtype=k.dtype).set_(k.untyped_storage())
    return reference_wkv(w, u, memory[k.storage_offset() :][: k.numel()].view(k.shape), v, **options)


def errs_within_the_tolerance(w: Tensor, u: Tensor, k: Tensor, v: Tensor, **options: Any) -> WkvOutput:
    return changed(reference_wkv(w, u, k, v, **options), lambda y: 1.5e-6 * v.abs().max())


def changed(out: WkvOutput, error: Callable[[Tensor], Any]) -> WkvOutput:
    return out._replace(output=out.output + error(out.output.detach()))


ROWS: dict[str, Any] = {"B": 2, "T": 12, "P": 2, "C": 3, "state": "random"}
PACKED = ROWS | {"B": 1, "cu_seqlens": (0, 5, 5, 12)}
BROKEN: list[tuple[str, Callable[..., WkvOutput], dict[str, Any]]] = [
    ("agreement", forgets_the_bonus, ROWS),
    ("agreement", leaks_between_sequences, PACKED),
    ("agreement", ignores_the_direction, ROWS | {"reverse": True}),
    ("agreement", keeps_its_state_in_bfloat16, ROWS),
    ("any finite input", overflows, ROWS | {"k_range": 300.0}),
    ("partial gradients", wants_all_gradients, ROWS),
    ("causality", sees_the_future, ROWS),
    ("causality", sees_the_future, ROWS | {"reverse": True}),
    ("neighbours", sees_neighbours, ROWS),
    ("neighbours", leaks_between_sequences, PACKED),
    ("lanes", mixes_channels, ROWS),
    ("split", keeps_its_state_in_bfloat16, ROWS),
    ("decoding", keeps_its_state_in_bfloat16, ROWS),
    ("packed is separate", leaks_between_sequences, PACKED),
    ("reverse is flipped", ignores_the_direction, ROWS | {"reverse": True}),
    ("repetition", is_random, ROWS),
    ("other process", depends_on_the_process, ROWS),
    ("every configuration", is_wrong_in_one_configuration, ROWS),
    ("memory", reads_unwritten_memory, ROWS),
    ("memory", writes_beyond_its_output, ROWS),
    ("memory", writes_to_its_input, ROWS),
    ("layouts", takes_k_for_contiguous, ROWS | {"layout": "strided"}),
    ("error bound", errs_within_the_tolerance, ROWS | {"state": "none", "T": 3}),
]


def as_implementation(function: Callable[..., WkvOutput]) -> Implementation:
    backend = "triton" if function is is_wrong_in_one_configuration else None
    return Implementation(IMPLEMENTATIONS["wkv/reference"].op, function.__name__, function, backend)


if (
    "REGISTER_BROKEN" in os.environ
):  # for a process of its own alone: others would hold all of these to the contracts
    register(*(as_implementation(function) for _, function, _ in BROKEN))
