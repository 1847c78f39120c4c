"""Operators of `torch.library` with a gradient: for every op of the package, the ways PyTorch calls one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def differentiable(name: str, keep: Callable, formula: Callable) -> Callable:
    """Gives `trwkv::name` its gradient and a batching rule, and returns the function to call it with.

    `keep(ctx, inputs, output)` saves what `formula(ctx, *grads)` needs.

    `torch.library.register_autograd` serves the compiler and export, but costs 30 us a call (T = 1 takes 100) and
    cannot be transformed by `torch.func`. Therefore eager calls go through an `autograd.Function` of the old, fast
    kind, and those under `torch.func` through one of the new kind. All three share the formula.
    """
    op = getattr(torch.ops.trwkv, name)
    torch.library.register_autograd(f"trwkv::{name}", formula, setup_context=keep)
    torch.library.register_vmap(f"trwkv::{name}", _slice_by_slice(op))

    def below_autograd(
        *args: Any,
    ) -> Any:  # what is registered there would only find that there is nothing to do
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def no_forward_mode(ctx, *tangents):
        raise NotImplementedError(
            f"trwkv::{name}: forward-mode derivatives (torch.func.jvp) are available with backend='reference' only"
        )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            outputs = below_autograd(*args)
            keep(ctx, args, outputs)
            return outputs

        backward = staticmethod(formula)
        jvp = staticmethod(no_forward_mode)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return op(*args)

        setup_context = staticmethod(keep)
        backward = staticmethod(formula)
        jvp = staticmethod(no_forward_mode)

    Eager.__name__ = Transformed.__name__ = name

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return Transformed.apply(*args)
        is_forward_mode = forward_ad._current_level >= 0  # below autograd a tangent would be lost
        return Eager.apply(*args) if is_gradient_needed(*args) or is_forward_mode else below_autograd(*args)

    return call


def is_gradient_needed(*args: Any) -> bool:
    """Whether autograd will want the gradient of any of `args`, tensors or not."""
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return True
    return False


def is_plain_inference(*args: Any) -> bool:
    """Whether an op without a gradient and a batching rule will do for these arguments."""
    return not is_gradient_needed(*args) and not torch._C._are_functorch_transforms_active()


def _slice_by_slice(op: Callable) -> Callable:
    """Batching rule for `torch.func.vmap`: the op once per slice, whichever arguments are mapped."""

    def rule(info, in_dims, *args):
        rows = [
            op(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return outputs, (0,) * len(outputs)

    return rule
