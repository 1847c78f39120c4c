"""The public function, and the operator around the kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trwkv.ops._dispatch import resolve_backend
from trwkv.ops._library import is_gradient_needed
from trwkv.ops._validate import require_same_device, require_shape, require_tensor
from trwkv.ops.token_shift_mix import MAX_MIXES
from trwkv.ops.token_shift_mix.plain import token_shift_mix_plain

torch.library.define("trwkv::token_shift_mix", "(Tensor x, Tensor[] mixes, Tensor? previous) -> Tensor[]")


def token_shift_mix(
    x: Tensor, mixes: Sequence[Tensor], previous: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    r"""RWKV's token shift and all the time mixes of one block, in one pass over x: what its matrices are given.

    With x' the token before::

        output[m][t] = mixes[m] * x[t] + (1 - mixes[m]) * x'[t]        x'[t] = x[t-1], x'[0] = previous

    computed as `x' + mixes[m] * (x - x')`, the difference and the result rounded to x's dtype.

    RWKV: "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), equations 11 to 15.

    Args:
        x: [B, T, C], or [B, T, P, C] for P streams; float32, bfloat16, float16 or float64.
        mixes: one to three tensors [C], or [P, C] for one mix per perspective; rounded to x's dtype.
        previous: the token before the first, [B, C] or [B, P, C], of x's dtype; None is zeros.
        backend: "triton" is one launch and has no gradient. "torch" (and "reference") is plain PyTorch. "auto" is
            "triton" on a GPU for what is not float64, where no gradient is wanted and nothing is being compiled
            (`torch.compile` makes one kernel of the plain form and of what is around it), else "torch".

    Returns: one tensor per mix, of x's shape and dtype, with a P axis before C where a mix has one and x has none.

    Raises:
        TypeError: an argument that is not a tensor, or of a dtype not listed.
        ValueError: shapes that do not fit, tensors on different devices, a backend that cannot run here.
        RuntimeError: backend "triton" where a gradient would be wanted.
    """
    mixes = _check(x, mixes, previous)
    needs_gradient = is_gradient_needed(x, *mixes, previous)
    if backend == "auto" and (needs_gradient or torch.compiler.is_compiling()):
        backend = "torch"
    if resolve_backend(backend, x.device, x.dtype) != "triton":
        return token_shift_mix_plain(x, mixes, previous)
    if needs_gradient:
        raise RuntimeError(
            "token_shift_mix: expected no argument that requires a gradient, or torch.no_grad(), on 'triton'; "
            "use backend='torch'"
        )
    return tuple(token_shift_mix_op(x, mixes, previous))


token_shift_mix_op = torch.ops.trwkv.token_shift_mix


@torch.library.impl("trwkv::token_shift_mix", "CompositeExplicitAutograd")
def _token_shift_mix(x, mixes, previous):
    from trwkv.ops.token_shift_mix.kernel import token_shift_mix_forward

    return token_shift_mix_forward(x, mixes, previous)


@torch.library.register_fake("trwkv::token_shift_mix")
def _token_shift_mix_fake(x, mixes, previous):
    return [
        x.new_empty((*x.shape[:2], *mix.shape) if mix.ndim == 2 and x.ndim == 3 else x.shape) for mix in mixes
    ]


def _check(x: Tensor, mixes: Sequence[Tensor], previous: Tensor | None) -> list[Tensor]:
    require_tensor("x", x)
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected shape [B, T, C] or [B, T, P, C]; got {list(x.shape)}")
    if isinstance(mixes, Tensor) or not 1 <= len(mixes) <= MAX_MIXES:
        got = f"a tensor of shape {list(mixes.shape)}" if isinstance(mixes, Tensor) else f"{len(mixes)}"
        raise ValueError(f"mixes: expected a sequence of one to {MAX_MIXES} tensors; got {got}")
    named = {f"mixes[{i}]": mix for i, mix in enumerate(mixes)}
    for name, mix in named.items():
        require_tensor(name, mix)
        if x.ndim == 4 and mix.ndim == 2:
            require_shape(name, mix, "[P, C]", x.shape[2:])
        elif mix.ndim == 2:
            require_shape(name, mix, "[P, C]", (len(mix), x.shape[-1]))
        else:
            require_shape(name, mix, "[C] or [P, C]", x.shape[-1:])
    if previous is not None:
        require_tensor("previous", previous, [x.dtype])
        require_shape("previous", previous, "[B, C] or [B, P, C]", (x.shape[0], *x.shape[2:]))
    require_same_device(x=x, previous=previous, **named)
    return list(mixes)
