"""Read pickles of arrays and containers without letting them run anything.

A pickle is a program: loading one may call any importable function. Here every name a pickle asks
for is answered by a constructor of this module, which checks what it is given, and makes an array
of numbers, a torch tensor or a container; anything else is an error that names it. What a pickle
can do with these and the unpickler alone (unfold to terabytes, exhaust the C stack) it does first
in a child process with limits.
"""

from __future__ import annotations

import faulthandler
import io
import math
import os
import pickle
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch  # not when a pickle asks: that would count against the memory limit

# Of plain objects per byte of pickle the worst honest case is an empty dict, some 40 bytes.
_MEMORY_PER_BYTE, _MEMORY = 64, 2**30
_NUMPY = [f"numpy.{core}." for core in ("core", "_core")]  # numpy < 2 wrote numpy.core


class UnsafePickle(ValueError):
    """A damaged pickle, or one that asks for something off the list; names the file and request."""


class _Dtype:
    """A dtype in the making: its state may change the byte order, nothing else.

    numpy believes a dtype's state, even one that says object pointers are plain bytes.
    """

    def __init__(self, code: str):
        self.numpy = np.dtype(code)

    def __setstate__(self, state):
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array in the making: its state, set once, must fit its shape."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        if self.size:
            raise ValueError("an array's state set twice")
        super().__setstate__((1, *_fitting(shape, dtype, raw), bool(fortran), bytes(raw)))


def _fitting(shape, dtype, raw) -> tuple[tuple[int, ...], np.dtype]:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise ValueError("an array that is not made of a dtype and bytes")
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(
        shape
    ) * dtype.numpy.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} in {len(raw)} bytes")
    return tuple(shape), dtype.numpy


class Unpickler(pickle.Unpickler):
    """Constructors are bound methods, as a pickle may set attributes of functions and classes."""

    def __init__(self, file, stand_ins):
        super().__init__(file)
        self.known = {
            # Plain containers: attributes that a pickle sets on others would shadow their methods.
            ("collections", "OrderedDict"): self._dict,
            ("collections", "defaultdict"): self._defaultdict,
            **{
                ("builtins", kind.__name__): kind
                for kind in (set, frozenset, complex, list, dict, tuple, int, float)
            },
            ("_codecs", "encode"): self._encode,
            ("builtins", "bytes"): self._bytes,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): self._dtype,
            **{
                (core + name, function): method
                for core in _NUMPY
                for name, function, method in (
                    ("multiarray", "_reconstruct", self._reconstruct),
                    ("multiarray", "scalar", self._scalar),
                    ("numeric", "_frombuffer", self._frombuffer),
                )
            },
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch", "Size"): tuple,
            **stand_ins,
        }

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self.known:
            return self.known[module, name]
        raise UnsafePickle(
            f"asks for {module}.{name}, which is not an array, a tensor or a container"
        )

    def _dict(self, *items):
        return dict(*items)

    def _defaultdict(self, _factory=None):
        return {}

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])

    def _bytes(self):
        return b""  # as protocols below 3 write it

    def _dtype(self, code: str, *_):
        if not isinstance(code, str) or not re.fullmatch("[biuf][1248]|f16|c8|c16", code):
            raise UnsafePickle(f"asks for an array of {str(code)[:40]!r}, which are not numbers")
        return _Dtype(code)

    def _reconstruct(self, *_):
        return _Array(0, np.int8)

    def _scalar(self, dtype, raw):
        _, kind = _fitting((), dtype, raw)
        return np.frombuffer(raw, kind)[0]

    def _frombuffer(self, raw, dtype, shape, order):
        shape, kind = _fitting(shape, dtype, raw)
        return np.frombuffer(bytes(raw), kind).reshape(shape, order="F" if order == "F" else "C")

    def _storage(self, data: bytes):
        # torch pickles a storage as a torch file, and reads it with everything allowed. Not here.
        storage = torch.load(io.BytesIO(data), weights_only=True)
        if not isinstance(storage, torch.storage.TypedStorage):
            raise ValueError(f"a {type(storage).__name__} where torch keeps a storage")
        return storage

    def tensor(self, storage, offset, size, stride, *_):
        """torch does not check that strides stay within the storage: it reads what lies beyond."""
        numbers = (offset, *size, *stride)
        if (
            not isinstance(storage, torch.storage.TypedStorage)
            or len(size) != len(stride)
            or any(type(n) is not int or n < 0 for n in numbers)
        ):
            raise ValueError(f"a tensor of size {size}, stride {stride}, offset {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        held = storage._size()
        if count and (last >= held or count > held):
            raise ValueError(
                f"a tensor of size {size}, stride {stride} from {offset} in a storage of {held}"
            )
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, {})


def _limits(size: int) -> None:
    """Memory, seconds and no core file, for this process."""
    statm, hard = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)[1]
    if statm.exists():  # macOS knows no limit of memory
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = used + _MEMORY + _MEMORY_PER_BYTE * size
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # the parent says it in one line
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60 + size // 2**20)


def attempt(path, load: Callable[[], object]) -> None:
    """Load once in a child; UnsafePickle if that ends it, or takes too much memory or time."""
    child = os.fork()
    if not child:
        code = 1
        try:
            _limits(os.path.getsize(path))
            try:
                load()
            except MemoryError:
                raise
            except Exception as error:  # the parent will see, and report, the same
                str(error)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise UnsafePickle(
            f"{path}: refused: reading it "
            + (
                "takes far more memory than its size"
                if code > 0
                else "does not end"
                if code == -signal.SIGALRM
                else f"ends the process with signal {-code}"
            )
            + "; get the file again from where it was published"
        )


def load_pickle(path: str | os.PathLike, stand_ins: dict | None = None):
    """The object in a pickle made of numpy arrays, torch tensors, containers, numbers and strings.

    stand_ins: {(module, name): class} for further names. UnsafePickle for any other, or damage.
    """

    def load():
        with open(path, "rb") as file:
            return Unpickler(file, stand_ins or {}).load()

    attempt(path, load)
    try:
        return load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{path}: refused, nothing was executed: the pickle {error}") from None
    except Exception as error:  # damage makes the unpickler raise a dozen types
        raise UnsafePickle(
            f"{path}: not a readable pickle ({type(error).__name__}: {error})"
        ) from error


def load_key_vectors(path: str | os.PathLike) -> tuple[list[str], np.ndarray]:
    """Words and vectors (V, dim) of a gensim .kv: a pickle, with the large array beside it."""

    class Plain:
        pass

    names = ("KeyedVectors", "Word2VecKeyedVectors", "FastTextKeyedVectors", "CompatVocab", "Vocab")
    loaded = load_pickle(
        path,
        {("gensim.models.keyedvectors", name): Plain for name in names}
        | {
            ("copyreg", "_reconstructor"): lambda cls, base, state: Plain(),
            ("builtins", "object"): object,
        },
    )
    words = getattr(loaded, "index_to_key", None) or getattr(loaded, "index2word", None)
    vectors = getattr(loaded, "vectors", None)
    if vectors is None:
        try:
            vectors = np.load(f"{path}.vectors.npy", mmap_mode="r", allow_pickle=False)
        except Exception:  # missing, or damaged in one of many ways
            vectors = None
    if (
        type(words) is not list
        or not isinstance(vectors, np.ndarray)
        or vectors.ndim != 2
        or vectors.dtype.kind != "f"
        or len(words) != len(vectors)
        or not all(type(word) is str for word in words)
    ):
        raise UnsafePickle(
            f"{path}: no words with vectors in it; a large .kv also needs {path}.vectors.npy "
            "beside it"
        )
    return words, vectors
