"""Checkpoints that are broken, lie or attack: each is refused with what is wrong, runs nothing, fills no memory.

Files of rwkv.cpp that lie are in test_ggmf.py.
"""

import copy
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from tests.hostile import MEMORY, Call, Code, assert_refused, bounded_memory, pickled, rewritten, saved
from tests.test_convert import LAYERS, C, random_hf_model, random_official
from trwkv.convert import hf_name, read_rwkv4
from trwkv.models import TemporalRwkvConfig, TemporalRwkvForCausalLM

STATE = random_official()
SAVED = saved(STATE)
HUGE = 1 << 40


def changed(**tensors):
    """The state with tensors replaced, added, or (None) left out; "__" stands for "."."""
    state = STATE | {name.replace("__", "."): x for name, x in tensors.items()}
    return {name: x for name, x in state.items() if x is not None}


def without_block_1():
    return {name.replace("blocks.1.", "blocks.1000000000."): x for name, x in STATE.items()}


def wide(n):
    """A model of n tokens that takes no room: one row n times."""
    return changed(emb__weight=torch.ones(1, C).expand(n, C), head__weight=torch.ones(1, C).expand(n, C))


def overlapping_records():
    """An archive that lists its largest record twenty times more: memory for twenty, in a file for one."""
    file = io.BytesIO(SAVED)
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.filelist, key=lambda record: record.file_size)
        for i in range(20):
            again = copy.copy(largest)
            again.filename = f"archive/data/{1000 + i}"
            archive.filelist.append(again)
        archive.writestr("archive/data/more", b"")  # so that the list is written anew
    return file.getvalue()


def pth_files(trace):
    """Name of a case, content of an official file, message."""
    code = Code(trace)
    junk = rewritten(SAVED, data_pkl=b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01b.")
    jit = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), jit)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    plain = "not a readable checkpoint of torch.save"
    yield (
        "code among the tensors",
        saved(STATE | {"x": code}),
        r"it asks for 'posix\.mkdir' \(nothing was run\)",
    )
    yield "code as the whole", saved(code), r"asks for 'posix\.mkdir'"
    yield "code as a key", saved({("x", code): 1}), r"asks for 'posix\.mkdir'"
    yield "code in a plain pickle", pickled(STATE | {"x": code}), f"{plain}.*nothing was run"
    yield "code in the old format", saved({"x": code}, _use_new_zipfile_serialization=False), plain
    yield "code by eval", saved({"x": Call(eval, f"__import__('os').mkdir({str(trace)!r})")}), "eval"
    yield "code in another protocol", saved({"x": code}, pickle_protocol=4), "STACK_GLOBAL"
    yield "a name of terminal codes", rewritten(SAVED, data_pkl=b"cos\n\x1b[2J\n."), r"'os\.\\x1b\[2J'"
    yield "a module", saved(torch.nn.Linear(2, 2)), r"asks for .*Linear"
    yield "TorchScript", jit.getvalue(), "without compression"
    yield "a tar archive", tar.getvalue(), plain
    yield "empty", b"", plain
    yield "one byte", SAVED[:1], plain
    yield "ends early", SAVED[:1000], plain
    yield "ends late", SAVED[:-100], plain
    yield "text", b"<!DOCTYPE html><title>404</title>", plain
    yield "GGUF", b"GGUF" + bytes(100), "format GGUF; of ggml's formats only ggmf"
    yield "ggml", struct.pack("<6i", 0x67676D6C, 71, 32, 2, 2, 0), "format ggml without a version"
    yield "another archive", rewritten(SAVED, data_pkl=None), "one of them data.pkl"
    yield "an unfinished pickle", rewritten(SAVED, data_pkl=b"\x80\x02}q\x00("), "damaged; nothing was run"
    yield "a pickle of junk", junk, "not a readable checkpoint"
    yield "a lost storage", rewritten(SAVED, data_0=None), "not a readable checkpoint"
    yield "a short storage", rewritten(SAVED, data_0=b"\0" * 8), "not a readable checkpoint"
    yield (
        "a bomb: compressed",
        rewritten(saved({"x": torch.zeros(10**7)}), zipfile.ZIP_DEFLATED),
        "without compression",
    )
    yield "a bomb: records that overlap", overlapping_records(), "records are larger than the file"
    yield "a bomb: steps of zero", saved(wide(HUGE)), r"its tensors would take \d+ bytes"
    yield "a bomb: a bytearray", saved({"x": Call(bytearray, HUGE)}), "bytearray"
    yield (
        "a bomb: a sparse tensor",
        saved({"x": torch.sparse_coo_tensor(size=(HUGE,), check_invariants=True)}),
        "sparse",
    )
    yield "no dict", saved(list(STATE.values())), "expected a dict of tensors by name; got list"
    yield "other things", saved({"model": STATE, "step": 3}), "expected a dict of tensors"
    yield "keys that are no names", saved({3: torch.ones(2)}), "some of its keys are no text"
    yield "nothing", saved({}), "not an RWKV-4 checkpoint"
    drop = changed(blocks__1__att__key__weight=None, ln_out__bias=None)
    yield "tensors less", saved(drop), r"missing: blocks.1.att.key.weight, ln_out.bias$"
    yield (
        "a tensor more",
        saved(changed(blocks__0__att__extra=torch.zeros(3))),
        r"unexpected: blocks.0.att.extra",
    )
    yield (
        "a wrong shape", saved(changed(blocks__0__ffn__time_mix_k=torch.zeros(C))),
        r"wrong shape: blocks.0.ffn.time_mix_k \(expected \[1, 1, 32\], got \[32\]\)",
    )  # fmt: skip
    yield "a scalar", saved(changed(emb__weight=torch.tensor(1.0))), "not an RWKV-4 checkpoint"
    yield (
        "integers",
        saved(changed(ln_out__bias=torch.zeros(C, dtype=torch.int64))),
        r"ln_out.bias \(torch.int64\)",
    )
    yield "bytes", saved(changed(ln_out__bias=torch.zeros(C).to(torch.float8_e4m3fn))), "float8_e4m3fn"
    yield "a later RWKV", saved(changed(blocks__0__att__ln_x__weight=torch.ones(C))), "later RWKV"
    yield (
        "a block of a high number", saved(without_block_1()),
        r"missing: blocks.1.ln1.weight.* and 10 more; unexpected: blocks.1000000000",
    )  # fmt: skip
    yield (
        "a block of 5000 digits",
        saved(changed(**{f"blocks.{'9' * 5000}.x": torch.ones(1)})),
        "missing: blocks.2.ln1",
    )
    yield (
        "a name of control characters",
        saved(changed(**{"\x1b[2J": torch.ones(1)})),
        r"unexpected: '\\x1b\[2J'",
    )
    yield "no embedding", saved(changed(emb__weight=None)), "not an RWKV-4 checkpoint"


CASES = [name for name, *_ in pth_files("")]


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "it ran"
    return trace, {name: rest for name, *rest in pth_files(trace)}


@pytest.mark.parametrize("case", CASES)
def test_pth(case, contents, tmp_path) -> None:
    trace, files = contents
    content, message = files[case]
    (tmp_path / "rwkv4.pth").write_bytes(content)
    assert_refused(tmp_path / "rwkv4.pth", message, trace)


def safetensors_files():
    """Name of a case, content of a model.safetensors, message."""
    good = {hf_name(name): x for name, x in STATE.items()}
    data = save(good)
    length = struct.unpack("<Q", data[:8])[0]
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    norm = "rwkv.ln_out.weight"

    def lying(**fields):
        text = json.dumps(header | {norm: header[norm] | fields}).encode()
        return struct.pack("<Q", len(text)) + text + values

    def with_header(text: bytes):
        return struct.pack("<Q", len(text)) + text + values

    damaged = "model.safetensors: not a readable checkpoint"
    for name, keep in {"empty": 0, "one byte": 1, "ends early": 1000, "ends late": -100}.items():
        yield name, data[:keep], damaged
    yield "a pickle", pickled(STATE), damaged
    yield "an official file", SAVED, damaged
    yield "a header of 2^60 bytes", struct.pack("<Q", 1 << 60) + data[8:], damaged
    yield "a header of more than the file", struct.pack("<Q", len(data)) + data[8:], damaged
    yield "a header of noise", with_header(b"\xff\xfe" * 20), damaged
    yield "a header that is a list", with_header(b"[]"), damaged
    yield "brackets without end", with_header(b'{"a":' * 100_000), damaged
    yield "no such dtype", lying(dtype="F33"), damaged
    yield "a wider dtype", lying(dtype="F64"), damaged
    yield "a narrower dtype", lying(dtype="F16"), damaged
    yield "integers of that width", lying(dtype="I32"), r"ln_out.weight \(torch.int32\)"
    yield "a larger shape", lying(shape=[HUGE]), damaged
    yield "a shape that overflows", lying(shape=[1 << 62, 1 << 62]), damaged
    yield "a negative shape", lying(shape=[-C]), damaged
    yield (
        "a shape of NaN",
        with_header(data[8 : 8 + length].replace(b'"shape":[32]', b'"shape":[NaN]', 1)),
        damaged,
    )
    yield "a place behind the end", lying(data_offsets=[len(values), len(values) + 4 * C]), damaged
    yield "a place of another tensor", lying(data_offsets=header["rwkv.ln_out.bias"]["data_offsets"]), damaged
    yield "a place that ends before it begins", lying(data_offsets=[4 * C, 0]), damaged
    yield "bytes behind the end", data + b"\0\0", damaged
    misnamed = {
        name.replace("blocks.0.attention.key", "blocks.0.attention.kee"): x for name, x in good.items()
    }
    yield (
        "a wrong name", save(misnamed),
        r"missing: rwkv.blocks.0.attention.key.weight; unexpected: rwkv.blocks.0.attention.kee.weight",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"), [pytest.param(*rest, id=name) for name, *rest in safetensors_files()]
)
def test_safetensors(content, message, hf_folder, tmp_path) -> None:
    (hf_folder / "model.safetensors").write_bytes(content)
    assert_refused(hf_folder, message, tmp_path / "it ran")


@pytest.fixture
def hf_folder(tmp_path):
    random_hf_model().save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


CONFIGS = {
    "half of it": (b'{"model_type": "rw', "not readable as JSON"),
    "noise": (b"\xff\xfe\x00", "not readable as JSON"),
    "a list": (b"[]", "expected a JSON object; got list"),
    "brackets without end": (b'{"a":' * 100_000, "not readable as JSON"),
    "another model": (b'{"model_type": "llama"}', "expected model_type 'rwkv'.*'llama'"),
    "no model": (b"{}", "expected model_type 'rwkv'.*None"),
}
LIES = {
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, "expected layer_norm_epsilon 1e-05; got 1e-06"),
    "an epsilon of NaN": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
    "another vocabulary": ({"vocab_size": 72}, r"embeddings.weight \(expected \[72, 32\], got \[71, 32\]\)"),
    "another width": ({"hidden_size": 16}, "wrong shape"),
    "a negative width": ({"hidden_size": -32}, "wrong shape"),
    "a width that is text": ({"hidden_size": "wide"}, "hidden_size"),
    "a width of NaN": ({"hidden_size": float("nan")}, "hidden_size"),
    "a layer less": ({"num_hidden_layers": LAYERS - 1}, "unexpected: rwkv.blocks.1"),
    "a layer more": ({"num_hidden_layers": LAYERS + 1}, f"missing: rwkv.blocks.{LAYERS}"),
    "no layers": ({"num_hidden_layers": 0}, "should have 0 layers"),
    "a trillion layers": (
        {"num_hidden_layers": 10**12},
        "should have 1000000000000 layers; it holds 42 tensors",
    ),
}


@pytest.mark.parametrize("case", [*CONFIGS, *LIES])
def test_config(case, hf_folder, tmp_path) -> None:
    content, message = (CONFIGS | LIES)[case]
    if isinstance(content, dict):
        content = json.dumps({**json.loads((hf_folder / "config.json").read_text()), **content}).encode()
    (hf_folder / "config.json").write_bytes(content)
    assert_refused(hf_folder, message, tmp_path / "it ran")


def test_what_a_config_names_is_not_run(hf_folder, tmp_path) -> None:
    """transformers can be told to run a file of the folder; this reader can not."""
    (hf_folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'it ran')!r})\n")
    config = json.loads((hf_folder / "config.json").read_text())
    remote = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
        "__class__": "x",
        "to_dict": 1,
    }
    (hf_folder / "config.json").write_text(json.dumps(config | remote))
    assert read_rwkv4(hf_folder).settings["hidden_size"] == C
    assert not (tmp_path / "it ran").exists()


def map_of(*shards):
    """An index that lists these; FIRST is the first that there is."""

    def damage(folder, first, trace):
        weight_map = {
            f"x{i}": x.replace("FIRST", first) if isinstance(x, str) else x for i, x in enumerate(shards)
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def written(name, content):
    """A file of this content, or what `content(trace)` gives; None: no file."""

    def damage(folder, first, trace):
        file = folder / name.replace("FIRST", first)
        made = content(trace) if callable(content) else content
        if made is None:
            file.unlink()
        else:
            file.write_bytes(made)
        if name.endswith(".bin"):
            (folder / "model.safetensors.index.json").unlink()

    return damage


def twice(folder, first, trace):
    last = sorted(folder.glob("*.safetensors"))[-1]
    save_file({**load_file(last), "rwkv.embeddings.weight": torch.ones(1)}, last)


OUTSIDE, INDEX = "which is not a file of that folder", "model.safetensors.index.json"
BIN = "pytorch_model.bin"
FOLDERS = {
    "a shard of another folder": (map_of("../folder/FIRST"), OUTSIDE),
    "a shard of an absolute path": (map_of("/dev/zero"), OUTSIDE),
    "a shard that is a folder": (map_of("."), OUTSIDE),
    "a shard that is missing": (written("FIRST", None), OUTSIDE),
    "a shard twice": (twice, "holds what another file holds, too: rwkv.embeddings.weight"),
    "a shard of other tensors": (map_of("FIRST"), "does not list what its files hold"),
    "a shard that is empty": (written("FIRST", b""), "00001-of-.*: not a readable checkpoint"),
    "a map to numbers": (map_of(3), "expected a weight_map"),
    "a map that is a list": (written(INDEX, b'{"weight_map": ["x"]}'), "expected a weight_map"),
    "no map": (written(INDEX, b"{}"), "expected a weight_map"),
    "an index of noise": (written(INDEX, b"\xff"), "index.json: not readable as JSON"),
    "no index": (written(INDEX, None), "expected model.safetensors or pytorch_model.bin"),
    "no config": (written("config.json", None), "it has no config.json"),
    "a bin with code": (
        written(BIN, lambda trace: saved({"x": Code(trace)})),
        rf"{BIN}: .*asks for 'posix\.mkdir'",
    ),
    "a bin that is a pickle": (
        written(BIN, lambda trace: pickled(Code(trace))),
        f"{BIN}: not a readable checkpoint",
    ),
    "a bin of official names": (
        written(BIN, SAVED),
        "missing: rwkv.embeddings.weight.*unexpected: emb.weight",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder(case, tmp_path) -> None:
    folder, trace = tmp_path / "folder", tmp_path / "it ran"
    random_hf_model().save_pretrained(folder, max_shard_size="20KB")
    damage, message = FOLDERS[case]
    damage(folder, min(file.name for file in folder.glob("*.safetensors")), trace)
    assert_refused(folder, message, trace)


def test_neither_file_nor_folder(tmp_path) -> None:
    os.mkfifo(tmp_path / "rwkv4.pth")
    assert_refused(tmp_path / "rwkv4.pth", "expected a file or a folder; it is neither", tmp_path / "it ran")
    (tmp_path / "folder.pth").mkdir()
    assert_refused(tmp_path / "folder.pth", "it has no config.json", tmp_path / "it ran")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_rwkv4(tmp_path / "nothing.pth")


def test_our_own_folder_is_for_from_pretrained(tmp_path) -> None:
    config = TemporalRwkvConfig(vocab_size=71, hidden_size=C, num_hidden_layers=1)
    TemporalRwkvForCausalLM(config).save_pretrained(tmp_path / "folder")
    assert_refused(tmp_path / "folder", "load it with from_pretrained", tmp_path / "it ran")


def test_the_bounds_of_these_tests_hold(tmp_path) -> None:
    """Memory beyond the bound is an error, and code that is run does leave its trace."""
    with bounded_memory(), pytest.raises((RuntimeError, MemoryError)):
        torch.empty(4 * MEMORY, dtype=torch.uint8)
    pickle.loads(pickled({"x": Code(tmp_path / "it ran")}))
    assert (tmp_path / "it ran").exists()
