"""Read a torch file that holds more than tensors, without importing or calling what it names.

Published checkpoints carry an argparse.Namespace, numpy scalars, optimiser state, or are a whole
pickled module. ``torch.load(weights_only=True)`` refuses those. Here a name outside a short list
becomes a placeholder that takes whatever the pickle does to it and does nothing; of a module, the
placeholder keeps the state, in which its tensors are. Like other pickles (:mod:`~mcn_ext.prepare.
unpickle`), it is read in a child process with limits first.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext.prepare.unpickle import Unpickler, UnsafePickle, attempt

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class Inert:
    """What stands for an object that is not read: keeps its state, ignores all else."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    extend = add = append


class _Mapping(dict):
    """An OrderedDict, less the attributes a pickle gives it (a state dict's ``_metadata``)."""

    def __setstate__(self, state):
        pass


class _Reader(Unpickler):
    """Unpickler of torch's files; ``storage(key, dtype, numel)`` finds a tensor's numbers."""

    def __init__(self, file, storage):
        super().__init__(file, {})
        self.storage, self.not_read = storage, set()
        keep = {key: self.known[key] for key in self.known if key[0] in ("builtins", "_codecs")}
        self.known = keep | {
            ("collections", "OrderedDict"): self._mapping,
            ("collections", "defaultdict"): self._mapping_of,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_or_inert,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
            ("torch", "Size"): tuple,
        }

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self.known:
            return self.known[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        self.not_read.add(f"{module}.{name}")
        return type("Inert", (Inert,), {})  # of its own: whatever is done to it reaches no other

    def persistent_load(self, saved):
        # ("storage", type, key, device, numel), legacy files: and a view, which none has any more.
        if (
            not isinstance(saved, tuple)
            or len(saved) < 5
            or saved[0] != "storage"
            or saved[5:] not in ((), (None,))
            or type(saved[4]) is not int
            or saved[4] < 0
        ):
            if isinstance(saved, tuple) and len(saved) > 1 and saved[0] == "module":
                return saved[1]  # a class, with its source code, which nobody needs
            raise ValueError(f"a storage described by {str(saved)[:80]}")
        if not isinstance(saved[1], torch.dtype):
            return Inert()
        return self.storage(str(saved[2]), saved[1], saved[4])

    def _mapping(self, *items):
        return _Mapping(*items)

    def _mapping_of(self, _factory=None):
        return _Mapping()

    def _parameter(self, data, *_):
        return data

    def _tensor_or_inert(self, storage, *geometry):
        return Inert() if isinstance(storage, Inert) else self.tensor(storage, *geometry)


def _typed(data: bytearray, dtype: torch.dtype):
    untyped = (
        torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        if data
        else torch.UntypedStorage(0)
    )
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _read_zip(path: Path) -> tuple[object, set[str]]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(name.rpartition("/")[2] == "constants.pkl" for name in entries):
            raise ValueError("a TorchScript archive; save its state_dict() with torch.save")
        if len(names) != 1 or any(e.compress_type != zipfile.ZIP_STORED for e in entries.values()):
            raise ValueError("a zip file that torch.save has not written")
        folder = names[0][: -len("data.pkl")]
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        kept = {}

        def storage(key, dtype, numel):
            if key not in kept:
                name = f"{folder}data/{key}"
                if entries[name].file_size != numel * dtype.itemsize:
                    raise ValueError(
                        f"{name} has {entries[name].file_size} bytes for {numel} numbers of {dtype}"
                    )
                kept[key] = _typed(bytearray(archive.read(name)), dtype)
            return kept[key]

        with archive.open(names[0]) as file:
            reader = _Reader(file, storage)
            return reader.load(), reader.not_read


def _read_legacy(path: Path) -> tuple[object, set[str]]:
    with open(path, "rb") as file:
        left, kept = os.path.getsize(path), {}

        def storage(key, dtype, numel):
            nonlocal left
            if key not in kept:
                left -= numel * dtype.itemsize
                if left < 0:
                    raise ValueError("more numbers than the file holds")
                data = bytearray(numel * dtype.itemsize)
                kept[key] = data, _typed(data, dtype), numel
            return kept[key][1]

        if _Reader(file, storage).load() != _LEGACY_MAGIC:
            raise ValueError("not a file of torch.save")
        if (
            _Reader(file, storage).load() != _LEGACY_VERSION
            or not isinstance(system := _Reader(file, storage).load(), dict)
            or not system.get("little_endian")
        ):
            raise ValueError("of an unknown version, or written on a big-endian machine")
        reader = _Reader(file, storage)
        content = reader.load()
        for key in _Reader(file, storage).load():  # then the numbers, which tensors share already
            data, _, numel = kept.pop(str(key))
            if struct.unpack("<q", file.read(8))[0] != numel or file.readinto(data) != len(data):
                raise ValueError(f"storage {key} is not whole")
        if kept:
            raise ValueError(f"{len(kept)} storages are not there")
        return content, reader.not_read


def read(path: str | os.PathLike) -> tuple[object, list[str]]:
    """(content, names of what became a placeholder) of a file of ``torch.save``, zip or legacy.

    Content is containers, numbers, tensors and :class:`Inert`. UnsafePickle for damage, and for
    what asks for more memory or time than its size explains.
    """
    path = Path(path)
    load = _read_zip if zipfile.is_zipfile(path) else _read_legacy
    attempt(path, lambda: load(path))
    try:
        content, not_read = load(path)
    except Exception as error:  # damage makes zipfile and the unpickler raise a dozen types
        raise UnsafePickle(
            f"{path}: not a readable torch file ({type(error).__name__}: {error})"
        ) from error
    return content, sorted(not_read)


def tensors(content: object) -> dict[str, Tensor]:
    """All tensors in what was read, by their path ("state_dict.module.conv1.weight"), once each.

    Of a module's placeholder, what ``state_dict()`` would name. Deeper than 50 levels, where paths
    would take more memory than what they lead to, nothing is looked for.
    """
    found, seen, stack = {}, set(), [((), content)]
    while stack:
        at, value = stack.pop()
        if isinstance(value, Tensor):
            found[".".join(at)] = value.detach()
            continue
        if isinstance(value, Inert):
            value = value.state
            if isinstance(value, tuple) and len(value) == 2:  # (__dict__, slots)
                value = value[0]
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen or len(at) > 50:
            continue
        seen.add(id(value))  # shared or circular containers are walked once
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        module = isinstance(value, dict) and "_parameters" in value and "_modules" in value
        for key, inner in reversed(items):
            own = module and key in ("_parameters", "_buffers", "_modules")
            stack.append((at if own else (*at, str(key)), inner))
    return found
