"""Global memory of one launch: the tensors that a kernel was given, and nothing else.

Every tensor has addresses of its own, far from any other's, in front of it and behind. An access beyond it, across its
end or at an address that is no multiple of its width is an error, and so is one that races with another lane's.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

WARP = 32
_SPACING = 1 << 44
_UNIT = 2  # bytes: the smallest that is loaded or stored
_NOBODY, _SEVERAL = -1, -2


class MemoryFault(Exception):
    """What compute-sanitizer would report."""


@dataclass
class _Buffer:
    name: str
    begin: int  # as the kernel sees it
    data: NDArray  # uint8
    writer: NDArray  # the last lane to write each unit, and the barriers that its program had passed then
    written: NDArray
    reader: NDArray
    read: NDArray
    load: NDArray  # the last one of each unit

    def words(self, width: int) -> NDArray:
        return self.data[: len(self.data) // width * width].view(f"u{width}")


class Memory:
    """`lanes` have numbers, those of one program side by side; only those of one can be ordered, by a barrier."""

    def __init__(self, tensors: dict[str, Tensor], programs: NDArray) -> None:
        self._programs = programs
        self.barriers = np.zeros(programs.max() + 1, np.int64)  # that each program has passed
        self._load = 0
        self._buffers: list[_Buffer] = []
        self._addresses: dict[str, int] = {}
        spans: list[tuple[int, int, list[str]]] = []
        for name, x in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            if x.device.type != "cpu":
                raise ValueError(
                    f"{name}: expected a tensor on the CPU, to run its kernel there; got {x.device}"
                )
            begin, size = x.data_ptr(), x.numel() * x.element_size()
            if not x.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor; got strides {x.stride()}")
            if spans and begin < spans[-1][1]:  # memory of the one before
                spans[-1] = (spans[-1][0], max(spans[-1][1], begin + size), [*spans[-1][2], name])
            else:
                spans.append((begin, begin + size, [name]))
        for i, (begin, end, names) in enumerate(spans, 1):
            units = (end - begin) // _UNIT
            data = np.ctypeslib.as_array((ctypes.c_ubyte * (end - begin)).from_address(begin))
            nobody = [np.full(units, _NOBODY, np.int64) for _ in range(5)]
            seen = i * _SPACING + _SPACING // 2 + begin % 4096
            self._buffers.append(_Buffer(" = ".join(names), seen, data, *nobody))
            for name in names:
                self._addresses[name] = self._buffers[-1].begin + tensors[name].data_ptr() - begin

    def address(self, name: str) -> int:
        return self._addresses[name]

    def load(self, lanes: NDArray, addresses: NDArray, width: int) -> NDArray:
        """Words of so many bytes."""
        out = np.zeros(len(lanes), f"u{width}")
        for buffer, chosen, offsets in self._located(addresses, width):
            out[chosen] = buffer.words(width)[offsets // width]
            for units in _units(offsets, width):
                self._reads(buffer, lanes[chosen], units)
        return out

    def end_of_load(self) -> int:
        """The number of the load that `load` was called for, once or for several words of each lane."""
        self._load += 1
        return self._load - 1

    def store(
        self, lanes: NDArray, addresses: NDArray, words: NDArray, waits_for: Callable[[], Sequence[int]]
    ) -> None:
        """`waits_for` names loads that are over in all lanes of a warp before one of its lanes stores."""
        width = words.dtype.itemsize
        for buffer, chosen, offsets in self._located(addresses, width):
            for units in _units(offsets, width):
                self._writes(buffer, lanes[chosen], units, waits_for)
            buffer.words(width)[offsets // width] = words[chosen]

    def touch(self, addresses: NDArray) -> None:
        """Fails where a load would, for a byte."""
        self._located(addresses, 1)

    def _located(self, addresses: NDArray, width: int) -> list[tuple[_Buffer, NDArray | slice, NDArray]]:
        which = addresses.astype(np.int64) // _SPACING - 1
        out = []
        for i in np.unique(which):
            if not 0 <= i < len(self._buffers):
                raise MemoryFault(f"address {int(addresses[which == i][0]):#x} is that of no tensor")
            chosen = which == i
            buffer = self._buffers[i]
            offsets = addresses[chosen].astype(np.int64) - buffer.begin
            if offsets.min() < 0 or offsets.max() > len(buffer.data) - width:
                at = offsets[(offsets < 0) | (offsets > len(buffer.data) - width)][0]
                raise MemoryFault(f"{buffer.name}: {width} bytes at {at} of {len(buffer.data)}")
            if (addresses[chosen] % np.uint64(width)).any():
                raise MemoryFault(f"{buffer.name}: an address is no multiple of {width}")
            out.append((buffer, chosen, offsets))
        return out

    def _reads(self, buffer: _Buffer, lanes: NDArray, units: NDArray) -> None:
        now = self.barriers[self._programs[lanes]]
        self._check(buffer, "read", lanes, now, buffer.writer[units], buffer.written[units])
        shared = (
            (buffer.reader[units] != lanes) & (buffer.read[units] == now) & (buffer.reader[units] != _NOBODY)
        )
        buffer.reader[units] = np.where(shared, _SEVERAL, lanes)
        buffer.read[units] = now
        buffer.load[units] = self._load

    def _writes(
        self, buffer: _Buffer, lanes: NDArray, units: NDArray, waits_for: Callable[[], Sequence[int]]
    ) -> None:
        if len(np.unique(units)) < len(units):
            raise MemoryFault(f"{buffer.name}: two lanes write the same element at once")
        now = self.barriers[self._programs[lanes]]
        self._check(buffer, "written", lanes, now, buffer.writer[units], buffer.written[units])
        readers = buffer.reader[units]
        is_in_warp = (readers >= 0) & (readers != lanes) & (readers // WARP == lanes // WARP)
        if is_in_warp.any():
            readers = np.where(is_in_warp & np.isin(buffer.load[units], waits_for()), _NOBODY, readers)
        self._check(buffer, "written", lanes, now, readers, buffer.read[units])
        buffer.writer[units] = lanes
        buffer.written[units] = now
        buffer.reader[units] = _NOBODY

    def _check(
        self, buffer: _Buffer, what: str, lanes: NDArray, now: NDArray, others: NDArray, then: NDArray
    ) -> None:
        """Whether other lanes touched the same, unless they are of the same program and a barrier came between."""
        is_other = (others != _NOBODY) & (others != lanes)
        is_stranger = (others >= 0) & (self._programs[others] != self._programs[lanes])
        races = is_other & (is_stranger | (then == now))
        if races.any():
            i = int(np.flatnonzero(races)[0])
            raise MemoryFault(
                f"{buffer.name}: {what} by lane {lanes[i]}, with no barrier after lane {others[i]} used it"
            )


def _units(offsets: NDArray, width: int) -> list[NDArray]:
    return [(offsets + i) // _UNIT for i in range(0, width, _UNIT)]
