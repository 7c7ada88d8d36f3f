"""Read pickles of arrays and containers without letting them run anything.

A pickle is a program: loading one may call any importable function. Here every name a pickle asks
for must be on a short list of constructors of numpy arrays, torch tensors and containers; anything
else is an error that names it.
"""

from __future__ import annotations

import io
import os
import pickle

import numpy as np

# Constructors that numpy's and Python's own pickles ask for. Old numpy (< 2) wrote numpy.core.
_ALLOWED = {("collections", "OrderedDict"), ("collections", "defaultdict"),
            ("collections", "deque"), ("builtins", "set"), ("builtins", "frozenset"),
            ("builtins", "bytearray"), ("builtins", "complex"), ("builtins", "slice"),
            ("builtins", "list"), ("builtins", "dict"), ("builtins", "tuple"), ("builtins", "int"),
            ("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype"),
            ("numpy.dtypes", "Float32DType"),
            *((f"numpy.{core}.{module}", name) for core in ("core", "_core")
              for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"),
                                   ("numeric", "_frombuffer")))}


class UnsafePickle(ValueError):
    """A damaged pickle, or one that asks for something off the list; names the file and request."""


def _torch_constructors() -> dict:
    import torch

    def storage_from_bytes(data: bytes):
        # torch pickles a storage as a torch file, and reads it with everything allowed. Not here.
        return torch.load(io.BytesIO(data), weights_only=True)

    return {("torch.storage", "_load_from_bytes"): storage_from_bytes,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch", "Size"): torch.Size, ("torch", "device"): torch.device}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, stand_ins):
        super().__init__(file)
        self.stand_ins = stand_ins

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self.stand_ins:
            return self.stand_ins[module, name]
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module.split(".")[0] == "torch" and (module, name) in (torch := _torch_constructors()):
            return torch[module, name]
        raise UnsafePickle(
            f"asks for {module}.{name}, which is not an array, a tensor or a container")


def load_pickle(path: str | os.PathLike, stand_ins: dict | None = None):
    """The object in a pickle made of numpy arrays, torch tensors, containers, numbers and strings.

    stand_ins: {(module, name): class} for further names. UnsafePickle for any other, or damage.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file, stand_ins or {}).load()
        except UnsafePickle as error:
            raise UnsafePickle(
                f"{path}: refused, nothing was executed: the pickle {error}") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError,
                TypeError, ValueError, RuntimeError, UnicodeDecodeError) as error:
            raise UnsafePickle(
                f"{path}: not a readable pickle ({type(error).__name__}: {error})") from error


def load_key_vectors(path: str | os.PathLike) -> tuple[list[str], np.ndarray]:
    """Words and vectors (V, dim) of a gensim .kv: a pickle, with the large array beside it."""
    class Plain:
        pass

    names = ("KeyedVectors", "Word2VecKeyedVectors", "FastTextKeyedVectors", "CompatVocab", "Vocab")
    loaded = load_pickle(path, {("gensim.models.keyedvectors", name): Plain for name in names}
                         | {("copyreg", "_reconstructor"): lambda cls, base, state: Plain(),
                            ("builtins", "object"): object})
    words = getattr(loaded, "index_to_key", None) or getattr(loaded, "index2word", None)
    vectors = getattr(loaded, "vectors", None)
    if vectors is None:
        try:
            vectors = np.load(f"{path}.vectors.npy", mmap_mode="r", allow_pickle=False)
        except OSError:
            vectors = None
    if words is None or vectors is None or len(words) != len(vectors):
        raise UnsafePickle(
            f"{path}: no words with vectors in it; a large .kv also needs {path}.vectors.npy "
            "beside it")
    return list(words), vectors
