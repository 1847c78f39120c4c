"""A case: the inputs of one call of any op and the gradients to send back, and what can be done to every case."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "sliced", "strided", "unaligned", "expanded", "mixed")


class Axes(NamedTuple):
    """Where a tensor has the axes that the contracts speak of; None where it has none.

    `batch` counts rows, or in a tensor without tokens (a state) the sequences: rows, or those that are packed.
    Along `lane` nothing ever mixes: the channels of a channel-wise op, the heads of another.
    """

    batch: int | None = None
    tokens: int | None = None
    lane: int | None = None

    @property
    def sequence_axis(self) -> int | None:
        """The axis along which packed sequences follow each other."""
        return self.batch if self.tokens is None else self.tokens


@dataclass
class Case:
    """Inputs of one call by name, and the gradients to send back by result: "output" and "state".

    `axes` knows every input there can be, "output" and "state". Inputs read as attributes too (`case.k`; None where
    absent), and so do the gradients (`case.grad_output`).
    """

    inputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    axes: dict[str, Axes]
    cu_seqlens: Tensor | None = None
    reverse: bool = False

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__
        if name.startswith("grad_"):
            return fields["grads"].get(name.removeprefix("grad_"))
        if name in fields.get("axes", {}):
            return fields["inputs"].get(name)
        raise AttributeError(f"case: expected one of {', '.join(fields.get('axes', {}))}; got {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("grad_"):
            self.grads[name.removeprefix("grad_")] = value
        elif name in self.__dict__.get("axes", {}):
            self.inputs[name] = value
        else:
            super().__setattr__(name, value)

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        """Runs one of an op's public functions."""
        if self.cu_seqlens is not None:
            options["cu_seqlens"] = self.cu_seqlens
        if self.reverse:
            options["reverse"] = True
        return function(**self.inputs, output_final_state=True, **options)

    @property
    def accumulator(self) -> torch.dtype:
        """The type of sums and states: float32, or float64 for float64 inputs."""
        is_double = any(x.dtype == torch.float64 for x in self.inputs.values())
        return torch.float64 if is_double else torch.float32

    @property
    def tokens(self) -> int:
        return next(x.shape[a.tokens] for _, x, a in self._tensors() if a.tokens is not None)

    @property
    def rows(self) -> int:
        batches = ((x, a.batch) for _, x, a in self._tensors() if a.tokens is not None)
        return next(x.shape[batch] for x, batch in batches if batch is not None)

    @property
    def bounds(self) -> list[int]:
        """Where the sequences of a row begin, and where the last one ends."""
        return [0, self.tokens] if self.cu_seqlens is None else self.cu_seqlens.tolist()

    @property
    def sequences(self) -> int:
        return self.rows if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def is_shared(self, name: str) -> bool:
        """Whether all sequences read one such input, and add to its gradient."""
        return self.axes[name].sequence_axis is None

    def _tensors(self) -> Iterator[tuple[str, Tensor, Axes]]:
        for name, x in self.inputs.items():
            yield name, x, self.axes[name]
        for name, x in self.grads.items():
            yield name, x, self.axes[name]

    def mapped(self, change: Callable[[Tensor, Axes], Tensor], **options: Any) -> "Case":
        """The case with `change` applied to every tensor, and its options replaced."""
        inputs = {name: change(x, self.axes[name]) for name, x in self.inputs.items()}
        grads = {name: change(x, self.axes[name]) for name, x in self.grads.items()}
        return replace(self, inputs=inputs, grads=grads, **options)

    def to(self, target: Any) -> "Case":
        """On another device, layouts kept, or in another dtype."""
        if isinstance(target, torch.dtype):
            return self.mapped(lambda x, _: x.to(target))
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(target)
        return self.mapped(lambda x, _: on_device(x, target), cu_seqlens=cu_seqlens)

    def contiguous(self) -> "Case":
        return self.mapped(lambda x, _: x.contiguous())

    def positions(self) -> Tensor:
        """Of every token, how many of its sequence run before it: [T]."""
        spans = [torch.arange(b - a) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        return torch.cat([span.flip(0) if self.reverse else span for span in spans])

    def part(self, begin: int, end: int, state: Tensor | None) -> "Case":
        """The tokens that run from `begin` to `end` - 1, continuing from a state; of a case that is not packed."""
        first = self.tokens - end if self.reverse else begin

        def cut(x: Tensor, axes: Axes) -> Tensor:
            return x if axes.tokens is None else x.narrow(axes.tokens, first, end - begin)

        inputs = {name: cut(x, self.axes[name]) for name, x in self.inputs.items()}
        if state is not None:
            inputs["initial_state"] = state
        return replace(self, inputs=inputs, grads={n: cut(x, self.axes[n]) for n, x in self.grads.items()})

    def flip_index(self) -> Tensor:
        """For every token, the one that takes its place when each sequence is turned round: [T]."""
        spans = [torch.arange(a, b).flip(0) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        return torch.cat(spans)

    def flipped(self) -> "Case":
        """Every sequence turned round, and run the other way: the same results, turned round."""
        index = self.flip_index()
        return self.mapped(lambda x, a: take(x, a.tokens, index), reverse=not self.reverse)

    def unpacked(self) -> list["Case"]:
        """Every packed sequence as a case of its own."""

        def alone(i: int, begin: int, end: int) -> "Case":
            def cut(x: Tensor, axes: Axes) -> Tensor:
                if axes.tokens is not None:
                    return x.narrow(axes.tokens, begin, end - begin)
                return x if axes.batch is None else x.narrow(axes.batch, i, 1)

            return self.mapped(cut, cu_seqlens=None)

        return [alone(i, *span) for i, span in enumerate(zip(self.bounds, self.bounds[1:], strict=False))]

    def permutation(self, order: Tensor) -> Callable[[Tensor, Axes], Tensor]:
        """What brings a tensor of this case, or a result of it, into another order of the sequences."""
        if self.cu_seqlens is None:
            return lambda x, a: take(x, a.batch, order)
        spans = [torch.arange(a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        index = torch.cat([spans[i] for i in order.tolist()])
        return lambda x, a: take(x, a.tokens, index) if a.tokens is not None else take(x, a.batch, order)

    def permuted(self, order: Tensor) -> "Case":
        """The sequences, with their states, in another order."""
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff()[order.to(cu_seqlens.device)]
            cu_seqlens = torch.cat([cu_seqlens[:1], lengths.cumsum(0).to(cu_seqlens.dtype)])
        return self.mapped(self.permutation(order), cu_seqlens=cu_seqlens)

    def sequence_mask(self, x: Tensor, axes: Axes, sequence: int) -> Tensor:
        """Which elements of a tensor belong to one sequence; broadcastable to it."""
        if self.cu_seqlens is not None and axes.tokens is not None:
            t = torch.arange(self.tokens)
            return along(x, axes.tokens, (t >= self.bounds[sequence]) & (t < self.bounds[sequence + 1]))
        if axes.batch is None:
            return torch.zeros([1] * x.ndim, dtype=torch.bool, device=x.device)
        return along(x, axes.batch, torch.arange(self.sequences) == sequence)


def take(x: Tensor, axis: int | None, index: Tensor) -> Tensor:
    return x if axis is None else x.index_select(axis, index.to(x.device))


def join(parts: Sequence[Tensor], axis: int | None) -> Tensor:
    """Parts that follow each other along an axis, or add up where there is none."""
    return sum(parts[1:], parts[0]) if axis is None else torch.cat(tuple(parts), dim=axis)


def along(x: Tensor, axis: int | None, values: Tensor) -> Tensor:
    """[n] as a tensor that broadcasts to x along one axis."""
    if axis is None:
        raise ValueError(f"axis: expected one of a tensor of shape {list(x.shape)}; got None")
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.to(x.device).reshape(shape)


def on_device(x: Tensor, device: Any) -> Tensor:
    """x elsewhere with its strides and offset, and all that lies between its elements."""
    if torch.device(device) == x.device or torch.device(device).type == "meta":
        return x.to(device)
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def laid_out(x: Tensor, layout: str, choice: int = 0) -> Tensor:
    """x in another layout, NaN between its elements; `choice` decides what the layout leaves open.

    "sliced" is a slice of longer rows, "strided" every other element of a wider transposed tensor, "unaligned" begins
    one element into its memory. "expanded" repeats the first along the first or the last axis, with a stride of 0.
    """
    if layout == "mixed":
        layout = LAYOUTS[choice % (len(LAYOUTS) - 1)]
    if layout == "contiguous" or x.ndim == 0:
        return x.contiguous()
    if layout == "expanded":
        axis = 0 if choice % 2 else x.ndim - 1
        return x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)
    *outer, inner = x.shape
    if layout == "unaligned":
        view = nans(x, [x.numel() + 1])[1:].view(x.shape)
    elif layout == "sliced":
        view = nans(x, [*outer, 2 * inner + 1])[..., 1 : inner + 1]
    elif x.ndim == 1:
        view = nans(x, [2 * inner])[::2]
    else:
        view = nans(x, [*outer[:-1], 2 * inner, outer[-1]])[..., ::2, :].transpose(-1, -2)
    return view.copy_(x)


def nans(x: Tensor, shape: list[int]) -> Tensor:
    return torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
