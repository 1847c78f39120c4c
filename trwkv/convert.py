"""RWKV-4 checkpoints in and out: official `.pth` files, Hugging Face folders, and files of rwkv.cpp (`trwkv.ggmf`).

All are read into, and written from, one form: a dict with the official names and shapes (`emb.weight`,
`blocks.0.att.time_mix_k` [1, 1, C], ...). Nothing but tensors is ever loaded, and every name and shape is
checked.
"""

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trwkv.ggmf import is_ggmf, read_ggmf, write_ggmf
from trwkv.pth import load_pth

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "attention_hidden_size", "intermediate_size")
SETTINGS = (*SIZES, "context_length", "tie_word_embeddings", "bos_token_id", "eos_token_id")
LAYER_NORM_EPSILON = 1e-5

_HF_NAMES = (  # official, Hugging Face
    (r"^emb\.", "rwkv.embeddings."),
    (r"^blocks\.", "rwkv.blocks."),
    (r"^ln_out\.", "rwkv.ln_out."),
    (r"\.ln0\.", ".pre_ln."),
    (r"\.att\.", ".attention."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\.time_mix_k$", ".time_mix_key"),
    (r"\.time_mix_v$", ".time_mix_value"),
    (r"\.time_mix_r$", ".time_mix_receptance"),
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+\.pth)?")
_SUFFIXES = (".safetensors", ".bin")
_OTHER_FORMATS = {b"GGUF": "GGUF", b"lmgg": "ggml without a version", b"tjgg": "ggjt"}  # by their first bytes
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN, _SHOWN_LENGTH = 8, 80  # names listed in an error, and characters of each


class Rwkv4Checkpoint(NamedTuple):
    """`state`: official names and shapes. `settings`: what it says about its `TemporalRwkvConfig`."""

    state: dict[str, Tensor]
    settings: dict[str, Any]


def rwkv4_shapes(
    *,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    attention_hidden_size: int,
    intermediate_size: int,
) -> dict[str, tuple[int, ...]]:
    """Official name and shape of every tensor of an RWKV-4 model."""
    C, A, F = hidden_size, attention_hidden_size, intermediate_size
    block: dict[str, tuple[int, ...]] = {
        "ln1.weight": (C,),
        "ln1.bias": (C,),
        "ln2.weight": (C,),
        "ln2.bias": (C,),
    }
    block |= {"att.time_decay": (A,), "att.time_first": (A,)}
    block |= {f"att.time_mix_{x}": (1, 1, C) for x in "kvr"}
    block |= {f"att.{x}.weight": (A, C) for x in ("key", "value", "receptance")}
    block |= {"att.output.weight": (C, A), "ffn.time_mix_k": (1, 1, C), "ffn.time_mix_r": (1, 1, C)}
    block |= {"ffn.key.weight": (F, C), "ffn.receptance.weight": (C, C), "ffn.value.weight": (C, F)}
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (vocab_size, C)}
    shapes |= {"blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(num_hidden_layers) for name, shape in block.items()}
    return shapes | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (vocab_size, C)}


def hf_name(official: str) -> str:
    """Hugging Face's name of a tensor, from its official one."""
    for pattern, replacement in _HF_NAMES:
        official = re.sub(pattern, replacement, official)
    return official


def read_rwkv4(source: str | PathLike) -> Rwkv4Checkpoint:
    """Read an RWKV-4 checkpoint, whichever form it has.

    Args:
        source: an official `.pth` file; a file of rwkv.cpp; a Hugging Face RWKV-4 folder (safetensors or .bin, sharded
            or not); a hub id "owner/name", or "owner/name/file.pth" for an official file on the hub.

    Raises:
        FileNotFoundError: no such file or folder, and not a hub id.
        OSError: a hub id that can not be downloaded.
        ValueError: a file that can not be read, that holds anything but tensors (nothing in it is run), or
            whose tensors are not those of an RWKV-4; says which are missing, unexpected, or of a wrong shape.
    """
    path = Path(source)
    if not path.exists():
        if not _HUB_ID.fullmatch(str(source)):
            raise FileNotFoundError(
                f"source: no file or folder {str(source)!r}, and not a hub id (owner/name)"
            )
        path = _download(str(source))
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path}: expected a file or a folder; it is neither")
    settings = _read_hf_config(path) if path.is_dir() else {}
    tensors = _load_folder(path) if path.is_dir() else _load_file(path)
    is_hf = "rwkv.embeddings.weight" in tensors
    if not settings:
        settings = _infer_sizes(tensors, is_hf, path)
    tied = settings.get("tie_word_embeddings", False)
    if not 0 < settings["num_hidden_layers"] <= len(tensors):  # or the names alone could fill the memory
        raise ValueError(
            f"{path}: it should have {settings['num_hidden_layers']} layers; it holds {len(tensors)} tensors"
        )
    shapes = rwkv4_shapes(**{name: settings[name] for name in SIZES})
    names = {(hf_name(name) if is_hf or path.is_dir() else name): name for name in shapes}
    if tied and "head.weight" not in tensors:
        del names["head.weight"]
    _check_tensors(path, tensors, {name: shapes[official] for name, official in names.items()})
    state = {official: tensors[name] for name, official in names.items()}
    if tied:
        state.setdefault("head.weight", state["emb.weight"])
    return Rwkv4Checkpoint(state, settings)


def write_rwkv4(path: str | PathLike, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write an RWKV-4: an official file if `path` ends in .pth, one of rwkv.cpp if in .bin, else a Hugging Face folder.

    Args:
        path: where to.
        state: every tensor, with its official name and shape.
        settings: options of Hugging Face's `RwkvConfig`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save(state, path)
        return
    if path.suffix == ".bin":
        write_ggmf(path, state)
        return
    from huggingface_hub import save_torch_state_dict
    from transformers import RwkvConfig

    path.mkdir(parents=True, exist_ok=True)
    dtype = str(state["emb.weight"].dtype).removeprefix("torch.")
    # rescale_every halves activations for float16's sake; 0 computes the plain function
    RwkvConfig(**settings, rescale_every=0, architectures=["RwkvForCausalLM"], dtype=dtype).save_pretrained(
        path
    )
    if settings.get("tie_word_embeddings"):
        state = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    save_torch_state_dict(
        {hf_name(name): tensor for name, tensor in state.items()}, path, metadata={"format": "pt"}
    )


def checkpoint_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """The dtype that holds all tensors exactly; decay and bonus, which the model keeps in float32, do not
    count."""
    dtypes = {x.dtype for name, x in state.items() if not name.endswith(("time_decay", "time_first"))}
    result = dtypes.pop()
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


def _load_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as file:
        other = _OTHER_FORMATS.get(file.read(4))
    if other:
        raise ValueError(f"{path}: a file in the format {other}; of ggml's formats only ggmf can be read")
    if path.suffix != ".safetensors":
        return read_ggmf(path) if is_ggmf(path) else load_pth(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path}: not a readable checkpoint (incomplete or damaged): {error}") from error


def _load_folder(path: Path) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _load_file(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            return _load_shards(path, index)
    raise ValueError(
        f"{path}: expected model.safetensors or pytorch_model.bin (or the index of a sharded one); "
        f"found {sorted(x.name for x in path.iterdir())[:_SHOWN]}"
    )


def _load_shards(path: Path, index: Path) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index}: expected a weight_map of tensors and files")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (path / shard).is_file():
            raise ValueError(f"{index}: lists {shard!r}, which is not a file of that folder")
        more = _load_file(path / shard)
        if twice := [name for name in more if name in tensors]:
            raise ValueError(f"{path / shard}: holds what another file holds, too: {_shorten(twice)}")
        tensors |= more
    if different := sorted(weight_map.keys() ^ tensors.keys()):
        raise ValueError(f"{index}: does not list what its files hold: {_shorten(different)}")
    return tensors


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON (incomplete or damaged): {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object; got {type(content).__name__}")
    return content


def _read_hf_config(path: Path) -> dict[str, Any]:
    from transformers import RwkvConfig

    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: expected a Hugging Face RWKV-4 folder; it has no config.json")
    raw = _read_json(file)
    if raw.get("model_type") == "temporal_rwkv":
        raise ValueError(f"{path}: already a temporal_rwkv model; load it with from_pretrained")
    if raw.get("model_type") != "rwkv":
        raise ValueError(f"{file}: expected model_type 'rwkv' (RWKV-4); got {raw.get('model_type')!r}")
    try:  # what else it says is of no interest: it could be anything
        config = RwkvConfig(**{name: raw[name] for name in (*SETTINGS, "layer_norm_epsilon") if name in raw})
    except Exception as error:  # several of its own
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not the configuration of an RWKV-4: {reason}") from error
    if config.layer_norm_epsilon != LAYER_NORM_EPSILON:
        raise ValueError(
            f"{file}: expected layer_norm_epsilon {LAYER_NORM_EPSILON}; got {config.layer_norm_epsilon}"
        )
    for name in SIZES:  # transformers 5.0 takes anything
        if not isinstance(value := getattr(config, name), int):
            raise ValueError(f"{file}: expected {name} to be an integer; got {value!r}")
    return {name: getattr(config, name) for name in SETTINGS}


def _infer_sizes(tensors: dict[str, Tensor], is_hf: bool, path: Path) -> dict[str, Any]:
    """Sizes from the shapes of a checkpoint without a configuration; errors in them are left to
    `_check_tensors`."""
    newer = [
        name for name in tensors if re.search(r"\.(att|attention)\.(ln_x|gate|time_maa|x_r|w0|r_k)", name)
    ]
    if newer:
        raise ValueError(
            f"{path}: not an RWKV-4 but a later RWKV (it has {newer[0]}); only RWKV-4 can be read"
        )

    def rows(official: str, default: int) -> int:
        tensor = tensors.get(hf_name(official) if is_hf else official)
        return tensor.shape[0] if tensor is not None and tensor.ndim == 2 else default

    embedding = tensors.get("rwkv.embeddings.weight" if is_hf else "emb.weight")
    blocks = {match[1] for name in tensors if (match := re.match(r"(?:rwkv\.)?blocks\.(\d+)\.", name))}
    if embedding is None or embedding.ndim != 2 or not blocks:
        raise ValueError(
            f"{path}: not an RWKV-4 checkpoint: expected emb.weight [vocab_size, C] and blocks.0...; "
            f"got {_shorten(sorted(tensors))}"
        )
    C = embedding.shape[1]
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": C,
        "num_hidden_layers": len(blocks),
        "attention_hidden_size": rows("blocks.0.att.key.weight", C),
        "intermediate_size": rows("blocks.0.ffn.key.weight", 4 * C),
    }


def _check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise unless the tensors are exactly these, and of floating point."""
    problems = []
    if missing := [name for name in shapes if name not in tensors]:
        problems.append(f"missing: {_shorten(missing)}")
    if unexpected := [name for name in tensors if name not in shapes]:
        problems.append(f"unexpected: {_shorten(unexpected)}")
    present = {name: tensors[name] for name in shapes if name in tensors}
    if wrong := [
        f"{name} (expected {list(shapes[name])}, got {list(x.shape)})"
        for name, x in present.items()
        if tuple(x.shape) != shapes[name]
    ]:
        problems.append(f"wrong shape: {_shorten(wrong)}")
    if other := [f"{name} ({x.dtype})" for name, x in present.items() if x.dtype not in _FLOATS]:
        problems.append(f"not of 64, 32 or 16 bit floating point: {_shorten(other)}")
    if problems:
        raise ValueError(f"{path}: not a complete RWKV-4 checkpoint. " + "; ".join(problems))


def _shorten(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    shown = [name if name.isprintable() else ascii(name) for name in names[:_SHOWN]]
    return ", ".join(name[:_SHOWN_LENGTH] for name in shown) + (f" and {rest} more" if rest > 0 else "")


def _download(source: str) -> Path:
    """Folder (or official file) of a hub id, from the local cache where it is there and the network is
    not."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository = "/".join(source.split("/")[:2])
    file = source.removeprefix(repository).removeprefix("/")
    wanted = (
        [[file]] if file else [["config.json", f"*{suffix}", f"*{suffix}.index.json"] for suffix in _SUFFIXES]
    )
    try:
        for patterns in wanted:
            folder = Path(
                snapshot_download(
                    repository, allow_patterns=patterns, local_files_only=constants.HF_HUB_OFFLINE
                )
            )
            if any(file.suffix in (*_SUFFIXES, ".pth") for file in folder.iterdir()):
                break
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _hub_error(source, error) from error
    if file and not (folder / file).is_file():
        raise _hub_error(source, f"{repository} has no file {file}")
    return folder / file if file else folder


def _hub_error(source: str, reason: object) -> OSError:
    return OSError(
        f"source: {source!r} is no local file or folder, and could not be had from the Hugging Face hub: "
        "give the path of a downloaded RWKV-4 checkpoint (.pth or folder), or connect to the network. "
        f"({reason})"
    )
