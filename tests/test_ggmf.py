"""Files of rwkv.cpp: read as the format is described, written so that they are read again, refused when they lie."""

import math
import struct

import pytest
import torch

from tests.hostile import assert_refused
from tests.test_convert import LAYERS, VOCAB, C, random_official
from trwkv.convert import read_rwkv4
from trwkv.ggmf import read_ggmf, write_ggmf
from trwkv.models import TemporalRwkvForCausalLM

TOKENS = torch.tensor([[1, 2, 3, 70]])


def tensor_record(name, x, **lies):
    """A tensor as the format has it, written here by the letter; `lies` replace fields."""
    flat = x.squeeze() if ".time_" in name else x
    if name.endswith("time_decay"):
        flat = torch.tensor([-math.exp(d) for d in flat.tolist()])
    kind = 1 if flat.dtype == torch.float16 else 0
    dims = list(flat.shape)[::-1]
    fields = {
        "n_dims": len(dims),
        "length": len(name),
        "kind": kind,
        "dims": dims,
        "key": name.encode(),
    } | lies
    values = b"".join(struct.pack("<e" if kind else "<f", value) for value in flat.flatten().tolist())
    record = struct.pack("<iii", fields["n_dims"], fields["length"], fields["kind"])
    return record + struct.pack(f"<{len(fields['dims'])}i", *fields["dims"]) + fields["key"] + values


def header(**lies):
    fields = {
        "magic": 0x67676D66,
        "version": 101,
        "vocab": VOCAB,
        "embed": C,
        "layers": LAYERS,
        "kind": 0,
    } | lies
    return struct.pack("<6i", *fields.values())


def official(half=False):
    state = random_official()
    return {name: x.half() if half and x.squeeze().ndim == 2 else x for name, x in state.items()}


def file_of(state, **lies):
    return header(**lies) + b"".join(tensor_record(name, x) for name, x in state.items())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("version", [100, 101])
def test_reads_what_the_format_says(version, half, tmp_path) -> None:
    state = official(half)
    (tmp_path / "rwkv.cpp.bin").write_bytes(file_of(state, version=version, kind=int(half)))
    read = read_rwkv4(tmp_path / "rwkv.cpp.bin").state
    assert read.keys() == state.keys()
    for name, x in state.items():
        assert read[name].dtype == x.dtype
        exact = 0 if not name.endswith("time_decay") else 3e-7
        torch.testing.assert_close(read[name], x, rtol=exact, atol=exact)


def test_computes_what_the_official_file_does(tmp_path) -> None:
    state = official()
    torch.save(state, tmp_path / "official.pth")
    (tmp_path / "rwkv.cpp.bin").write_bytes(file_of(state))
    results = []
    for name in ("official.pth", "rwkv.cpp.bin"):
        with torch.no_grad():
            results.append(TemporalRwkvForCausalLM.from_rwkv4(tmp_path / name)(TOKENS).logits)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(dtype, tmp_path) -> None:
    """Bit for bit what the model computes with: of the decay that is its exponential."""
    torch.save(random_official(dtype=dtype), tmp_path / "official.pth")
    model = TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "official.pth")
    model.to_rwkv4(tmp_path / "rwkv.cpp.bin")
    again = TemporalRwkvForCausalLM.from_rwkv4(tmp_path / "rwkv.cpp.bin")
    assert again.dtype == torch.float32  # that of the vectors, always
    for (name, x), y in zip(model.named_parameters(), again.parameters(), strict=True):
        if name.endswith("time_decay"):
            torch.testing.assert_close(x, y, rtol=3e-7, atol=3e-7)
            x, y = torch.exp(x), torch.exp(y)
        assert torch.equal(x.float(), y.float()), name


def test_decays_round_trip_bit_for_bit(tmp_path) -> None:
    """A million of them: an exponential is rounded wrongly about once in a hundred times."""
    decay = torch.empty(10**6).uniform_(-9, 6, generator=torch.Generator().manual_seed(0))
    write_ggmf(tmp_path / "x.bin", {"emb.weight": torch.ones(1, 1), "blocks.0.att.time_decay": decay})
    again = read_ggmf(tmp_path / "x.bin")["blocks.0.att.time_decay"]
    assert torch.equal(torch.exp(again), torch.exp(decay))
    assert (again - decay).abs().max() < 6.2e-8


GOOD = official()
DECAY = "blocks.0.att.time_decay"
SHORT = "incomplete: it ends in the middle of something"
HEADER = "its header says .* it holds"
FILES = {
    "magic alone": (header()[:4], SHORT),
    "half a header": (header()[:13], SHORT),
    "no tensors": (header(), HEADER),
    "version 99": (file_of(GOOD, version=99), "expected ggmf version 100 or 101; got 99"),
    "version 102": (file_of(GOOD, version=102), "expected ggmf version 100 or 101; got 102"),
    "quantised": (file_of(GOOD, kind=2), "expected float32 or float16 .* got type 2: quantised"),
    "another vocabulary": (file_of(GOOD, vocab=VOCAB + 1), HEADER),
    "another width": (file_of(GOOD, embed=C - 1), HEADER),
    "more layers": (file_of(GOOD, layers=LAYERS + 1), HEADER),
    "two billion layers": (file_of(GOOD, layers=2**31 - 1), HEADER),
    "negative layers": (file_of(GOOD, layers=-1), HEADER),
    "ends in values": (file_of(GOOD)[:-7], "head.weight of shape .* does not fit into the file"),
    "ends in a name": (header() + tensor_record("emb.weight", GOOD["emb.weight"])[:24], SHORT),
    "bytes behind the end": (file_of(GOOD) + b"\0\0\0", SHORT),
    "records behind the end": (file_of(GOOD) + tensor_record("extra", torch.ones(2)), "unexpected: extra"),
    "a tensor twice": (file_of(GOOD) + tensor_record("emb.weight", GOOD["emb.weight"]), "emb.weight comes twice"),
    "a tensor less": (file_of({name: x for name, x in GOOD.items() if name != "head.weight"}), "missing: head.weight"),
    "a block less": (file_of({name: x for name, x in GOOD.items() if not name.startswith("blocks.1.")}), HEADER),
    "a transposed matrix": (
        file_of(GOOD | {"blocks.0.ffn.key.weight": GOOD["blocks.0.ffn.key.weight"].T}),
        "wrong shape: blocks.0.ffn.key.weight",
    ),
} | {
    f"a decay of {value}": (
        file_of(GOOD).replace(
            tensor_record(DECAY, GOOD[DECAY]),
            tensor_record("any", torch.full((C,), value), length=len(DECAY), key=DECAY.encode()),
        ),
        "blocks.0.att.time_decay: expected finite negative log decays",
    )
    for value in (1.0, 0.0, math.nan, -math.inf)
}  # fmt: skip
DIMENSIONS, SIZE = "damaged: a tensor of .* dimensions and a name of", "does not fit into the file"
LIES = {
    "no dimensions": ({"n_dims": 0, "dims": []}, DIMENSIONS),
    "three dimensions": ({"n_dims": 3, "dims": [1, C, VOCAB]}, DIMENSIONS),
    "a billion dimensions": ({"n_dims": 2**30}, DIMENSIONS),
    "an empty name": ({"length": 0}, DIMENSIONS),
    "a negative name": ({"length": -5}, DIMENSIONS),
    "an endless name": ({"length": 2**30}, DIMENSIONS),
    "quantised values": ({"kind": 2}, "emb.weight: expected float32 or float16 .* got type 2: quantised"),
    "no such type": ({"kind": -1}, "got type -1"),
    "negative size": ({"dims": [C, -VOCAB]}, SIZE),
    "size zero": ({"dims": [C, 0]}, SIZE),
    "too large": ({"dims": [2**30, 2**30]}, SIZE),
    "overflowing": ({"dims": [2**31 - 1, 2**31 - 1]}, SIZE),
    "larger than the file": ({"dims": [C, 100 * VOCAB]}, SIZE),
    "a name of noise": ({"key": b"\xff\xfe\x00\x01emb.we"}, "damaged: a tensor's name"),
    "pickle as a name": ({"key": b"cos\nsystem"}, r"damaged: a tensor's name .*cos\\nsystem"),
}
FILES |= {
    f"a tensor with {lie}": (
        header() + tensor_record("emb.weight", GOOD["emb.weight"], **fields)
        + b"".join(tensor_record(name, x) for name, x in GOOD.items() if name != "emb.weight"),
        message,
    )
    for lie, (fields, message) in LIES.items()
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_lies_is_refused(case, tmp_path) -> None:
    content, message = FILES[case]
    (tmp_path / "model.bin").write_bytes(content)
    assert_refused(tmp_path / "model.bin", message, tmp_path / "it ran")


@pytest.mark.parametrize("seed", range(30))
def test_damage_is_an_error_or_harmless(seed, tmp_path) -> None:
    """A byte of the first kilobytes, where headers lie, replaced: a ValueError, or tensors of the right shapes."""
    g = torch.Generator().manual_seed(seed)
    data = bytearray(file_of(GOOD))
    at = (
        int(torch.randint(4, 60, (1,), generator=g))
        if seed % 2
        else int(torch.randint(len(data), (1,), generator=g))
    )
    data[at] = int(torch.randint(256, (1,), generator=g))
    (tmp_path / "model.bin").write_bytes(data)
    try:
        read = read_ggmf(tmp_path / "model.bin")
    except ValueError as error:
        assert "model.bin" in str(error)
    else:
        assert read["emb.weight"].shape == (VOCAB, C)
