"""Reads pickles of arrays and containers without letting them run anything.

A pickle is a program: loading one may call any importable function. Here every name a pickle asks
for is on a list of constructors, of arrays of numbers, torch tensors and containers; anything else
is an error that names it.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import re
import zipfile
from typing import BinaryIO

import numpy as np
import torch


class UnsafePickle(ValueError):
    """A damaged pickle, or one that asks for something off the list; names the file and request."""


class Dtype:
    """A dtype of numbers, texts or objects. Its state may change the byte order, nothing else:
    numpy would believe a state that says object pointers are plain bytes."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[biuf][1248]|f16|c8|c16|[US]\d+|O8?", code):
            raise UnsafePickle(
                f"asks for an array of {code[:40]!r}, which are not numbers, texts or objects"
            )
        self.numpy = np.dtype(code)

    def __setstate__(self, state):
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array with a :class:`Dtype`; of texts, which become Python's, or of objects: these come as
    a list of what the pickle has read, never as bytes."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        kind, size = dtype.numpy.kind, dtype.numpy.itemsize
        if kind in "US":
            raw = [scalar(dtype, raw[at : at + size]) for at in range(0, len(raw), size)]
        if kind in "USO":  # numpy would read past the end of a list that is too short
            whole = all(type(n) is int and n >= 0 for n in shape)
            if type(raw) is not list or not whole or math.prod(shape) != len(raw):
                raise UnsafePickle(f"has an array of shape {shape} without as many items")
            super().__setstate__((1, shape, np.dtype(object), fortran, raw))
        else:  # numpy checks that the bytes fit the shape
            super().__setstate__((1, shape, dtype.numpy, fortran, bytes(raw)))


def scalar(dtype: Dtype, raw: bytes):
    """A number, a str or bytes."""
    if dtype.numpy.kind == "U":  # not by numpy: it crashes on what is no character
        order = "be" if dtype.numpy.byteorder == ">" else "le"
        return bytes(raw).decode(f"utf-32-{order}", "surrogatepass").rstrip("\0")
    if dtype.numpy.kind == "S":
        return bytes(raw).rstrip(b"\0")
    return np.frombuffer(raw, dtype.numpy)[0]  # which refuses objects


NUMPY = ("numpy.core", "numpy._core")  # numpy < 2, and since
# What files of torch.save keep beside tensors; for torch.serialization.safe_globals.
PLAIN = [argparse.Namespace, (Dtype, "numpy.dtype")]
PLAIN += [(scalar, f"{core}.multiarray.scalar") for core in NUMPY]


class Unpickler(pickle.Unpickler):
    """Allows what it names and ``more``: {(module, name): constructor}.

    Constructors are methods or cannot be changed: of functions, a pickle may set attributes.
    """

    def __init__(self, file, more: dict):
        super().__init__(file)
        kinds = (set, frozenset, complex, list, dict, tuple, int, float, bytes)
        self.known = {("builtins", kind.__name__): kind for kind in kinds} | {
            ("_codecs", "encode"): self._encode,
            ("collections", "OrderedDict"): dict,
            ("collections", "defaultdict"): self._defaultdict,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): Dtype,
            ("torch", "Size"): tuple,
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
        }
        for core in NUMPY:
            self.known[f"{core}.multiarray", "_reconstruct"] = self._array
            self.known[f"{core}.multiarray", "scalar"] = self._scalar
            self.known[f"{core}.numeric", "_frombuffer"] = self._frombuffer
        self.known |= more

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) not in self.known:
            raise UnsafePickle(
                f"asks for {module}.{name}, which is not an array, a tensor or a container"
            )
        return self.known[module, name]

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])

    def _defaultdict(self, _factory=None):
        return {}

    def _array(self, *_):
        return _Array(0, np.int8)

    def _scalar(self, dtype, raw):
        return scalar(dtype, raw)

    def _frombuffer(self, raw, dtype, shape, order):
        array = self._array()
        array.__setstate__((1, shape, dtype, order == "F", raw))
        return array

    def _storage(self, data: bytes):
        # torch pickles a storage as a torch file, and reads it with everything allowed. Not here.
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def _tensor(self, storage, offset, size, stride, *_):
        # as_strided checks that the tensor lies in its storage; torch's own constructor does not.
        flat = torch.empty(0, dtype=storage.dtype).set_(storage)
        return flat.as_strided(size, stride, offset)


def load_pickle(path: str | os.PathLike, more: dict | None = None):
    """The object in a pickle made of numpy arrays, torch tensors, containers, numbers and strings.

    ``more``: {(module, name): constructor} to allow, too. UnsafePickle for any other, or damage.
    """
    with open(path, "rb") as file:
        try:
            return Unpickler(file, more or {}).load()
        except UnsafePickle as error:
            raise UnsafePickle(f"{path}: refused, nothing was run: the pickle {error}") from None
        except Exception as error:  # damage makes the unpickler raise a dozen types
            raise UnsafePickle(
                f"{path}: not a readable pickle ({type(error).__name__}: {error}); get the file "
                "again from where it was published"
            ) from error


class _TorchFile(Unpickler):
    """Of a file of torch.save since torch 1.6: a zip of a pickle, and of the bytes of storages."""

    def __init__(self, archive: zipfile.ZipFile, pickled: str):
        kinds = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
        dtypes = {("torch", f"{kind}Storage"): getattr(torch, kind.lower()) for kind in kinds}
        super().__init__(archive.open(pickled), dtypes)
        del self.known["torch.storage", "_load_from_bytes"]
        self.archive, self.folder = archive, pickled.removesuffix("data.pkl")
        self.storages: dict[str, torch.Tensor] = {}  # a pickle may name one any number of times

    def persistent_load(self, found):
        _, dtype, key, *_ = found
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.folder}data/{key}"))  # checks its checksum
            self.storages[key] = torch.frombuffer(raw, dtype=dtype)
        return self.storages[key]

    def _tensor(self, storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)  # which must lie in its storage


def load_torch(file: BinaryIO):
    """The object in a file of torch.save, made of dense tensors and what :func:`load_pickle` reads.

    Not by torch.load: that compares no checksums, and lets a file ask for any amount of memory, as
    ``bytearray(10**12)`` or in compressed parts. UnsafePickle, or what zip raises, for damage.
    """
    if not zipfile.is_zipfile(file):
        raise UnsafePickle("not a file of torch.save since torch 1.6; load it and save it again")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
            raise UnsafePickle("its parts are compressed, or overlap")
        names = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
        if len(names) != 1:
            raise UnsafePickle("a zip that is not of torch.save")
        return _TorchFile(archive, names[0]).load()


def load_key_vectors(path: str | os.PathLike) -> tuple[list[str], np.ndarray]:
    """Words and vectors (V, dim) of a gensim .kv: a pickle, with a large array beside it."""

    class Plain:
        pass

    names = ("KeyedVectors", "Word2VecKeyedVectors", "FastTextKeyedVectors", "CompatVocab", "Vocab")
    more = {("gensim.models.keyedvectors", name): Plain for name in names}
    more["copyreg", "_reconstructor"] = lambda cls, base, state: Plain()
    more["builtins", "object"] = object
    loaded = load_pickle(path, more)
    words = getattr(loaded, "index_to_key", None) or getattr(loaded, "index2word", None)
    vectors = getattr(loaded, "vectors", None)
    beside = f"{path}.vectors.npy"
    if vectors is None and os.path.exists(beside):
        vectors = np.load(beside, mmap_mode="r", allow_pickle=False)
    is_matrix = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and vectors.dtype.kind == "f"
    if not is_matrix or type(words) is not list or len(words) != len(vectors):
        raise UnsafePickle(f"{path}: no words with vectors; a large .kv needs {beside} beside it")
    return [str(word) for word in words], vectors
