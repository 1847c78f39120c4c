"""Files of `torch.save` from strangers: a dict of tensors, and nothing else.

`torch.load(weights_only=True)` runs no foreign code, but what it does build can fill the memory from a file of a few
bytes: compressed records, tensors with steps of zero, `bytearray(10**11)`. So the archive and the names in its pickle
are checked before it, and the tensors after it.
"""

import pickletools
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

_ALLOWED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
_SHARED = 2  # an embedding that is the head, too, is stored once


def load_pth(path: Path) -> dict[str, Tensor]:
    """The dict of tensors that `torch.save` wrote, on the CPU.

    Raises:
        ValueError: another kind of file, a damaged one, or one that holds anything but tensors by name. Nothing in it
            is run, and no more memory is taken than twice the file's size.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(path, size, archive)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a readable checkpoint of torch.save (incomplete, damaged, or older than torch 1.6; nothing "
            f"was run): {error}"
        ) from error
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path}: not a readable checkpoint (incomplete or damaged; nothing was run): {error}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(
            f"{path}: expected a dict of tensors by name; got {type(tensors).__name__} of other things"
        )
    if not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path}: expected a dict of tensors by name; some of its keys are no text")
    n_bytes = sum(x.numel() * x.element_size() for x in tensors.values())
    if n_bytes > _SHARED * size:
        raise ValueError(f"{path}: damaged: its tensors would take {n_bytes} bytes, the file has {size}")
    return {name: x.detach() for name, x in tensors.items()}


def _check_archive(path: Path, size: int, archive: zipfile.ZipFile) -> None:
    records = archive.infolist()
    names = [record.filename for record in records]
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(set(names)) < len(names) or len(pickles) != 1:
        raise ValueError(
            f"{path}: not an archive of torch.save: expected different records, one of them data.pkl"
        )
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path}: expected an archive as torch.save writes it, without compression")
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"{path}: damaged: its records are larger than the file")
    unknown = set()
    try:
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
                unknown.add(str(argument).replace(" ", "."))
            elif opcode.name in ("STACK_GLOBAL", "INST"):
                unknown.add(opcode.name)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable checkpoint (damaged; nothing was run): {error}") from error
    if unknown:
        shown = ", ".join(sorted(unknown))[:200]
        raise ValueError(f"{path}: not a file of plain tensors: it asks for {shown!a} (nothing was run)")
