"""Broken and hostile inputs of the converters: pickles, lists, captions, word vectors."""

import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcn_ext.data.store import Store
from mcn_ext.data.unpickle import UnsafePickle, load_pickle
from mcn_ext.data.words import WordVectors, vectors_for
from tests.conftest import WORDS

QUICK = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# ---------------------------------------------------------------------------------- pickles


def torch_pickle(offset, size, stride):
    """A tensor of a storage of 6 numbers, with a geometry of choice."""

    class Storage:
        def __reduce__(self):
            return torch.arange(6.0).storage().__reduce__()

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    return pickle.dumps(Tensor())


def dtype_state(code):
    return b"cnumpy\ndtype\n(S'" + code + b"'\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb."


def array_of(code, contents, n):
    """An array of n of a dtype, whose state is given ``contents``."""
    build = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\nt" % n
    )
    return build + b"cnumpy\ndtype\n(S'" + code + b"'\ntRI00\n" + contents + b"tb."


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


class EvilTorch:
    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(Evil()),)


def hostile():
    torch_file = io.BytesIO()
    torch.save({"x": Evil()}, torch_file)

    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (torch_file.getvalue(),)

    yield "reduce", pickle.dumps([Evil()])
    yield "protocol 0", b"cos\nsystem\n(S'touch executed'\ntR."
    yield "eval", b'cbuiltins\neval\n(S\'__import__("os").system("touch executed")\'\ntR.'
    yield "getattr", b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."
    yield "stack global", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ftouch executed\x85R."
    yield "torch.load inside", pickle.dumps(EvilTorch())
    yield "torch file inside", pickle.dumps([Nested()])
    yield "numpy object array", pickle.dumps(np.array([Evil()], dtype=object))
    yield "truncated", pickle.dumps([1.0] * 99)[:50]


BROKEN = {
    "persistent id": b"\x80\x02NQ.",
    "text persistent id": b"P1\n.",
    "extension": b"\x80\x02\x82\x01.",
    "declared length": b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.",
    "declared bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "objects as bytes": array_of(b"O8", b"C\x08aaaaaaaa", 1),
    "objects as a tuple": array_of(b"O8", b"(I1\nt", 1),
    "too few objects": array_of(b"O8", b"(lI1\na", 2),
    "negative shapes": array_of(b"O8", b"(lI1\na", -1),
    "objects by _frombuffer": b"cnumpy.core.numeric\n_frombuffer\n(C\x08aaaaaaaacnumpy\ndtype\n"
    b"(S'O8'\ntR(I1\ntS'C'\ntR.",
    "objects as a scalar's bytes": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntR"
    b"C\x08aaaaaaaatR.",
    "no characters": array_of(b"U1", b"C\x04\xff\xff\xff\xff", 1),
    "texts of no size": array_of(b"U0", b"C\x04aaaa", 1),
    "texts beyond their bytes": array_of(b"U1", b"C\x04a\0\0\0", 2),
    "void dtype": dtype_state(b"V8"),
    "object scalar": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRNtR.",
    "array beyond its bytes": b"cnumpy.core.numeric\n_frombuffer\n(C\x08aaaaaaaacnumpy\ndtype\n"
    b"(S'f8'\ntR(I9\ntS'C'\ntR.",
    "codec": b"c_codecs\nencode\n(Vx\nVbz2\ntR.",
    "tensor past its storage": torch_pickle(4, (2, 2), (2, 1)),
    "tensor before its storage": torch_pickle(-1, (2,), (1,)),
    "negative stride": torch_pickle(5, (2,), (-1,)),
}


BROKEN |= dict(hostile())


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_hostile_pickles_are_an_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(BROKEN[name])
    with pytest.raises(UnsafePickle, match="x.pkl"):
        load_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_honest_pickles_load(tmp_path, protocol):
    value = {
        "f": np.arange(6.0, dtype=np.float16).reshape(2, 3),
        "t": torch.arange(4).half(),
        "s": ["é", None, True, 2.5],
        "scalar": np.float32(3),
        "fortran": np.asfortranarray(np.ones((2, 2))),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    got = load_pickle(tmp_path / "x.pkl")
    np.testing.assert_array_equal(got["f"], value["f"])
    assert torch.equal(got["t"], value["t"]) and got["s"] == value["s"] and got["scalar"] == 3


def test_views_of_a_tensor_load(tmp_path):
    (tmp_path / "x.pkl").write_bytes(torch_pickle(1, (2, 2), (1, 2)))
    assert load_pickle(tmp_path / "x.pkl").tolist() == [[1, 3], [2, 4]]


def test_attributes_cannot_shadow_a_containers_methods(tmp_path):
    # OrderedDict(), then its state: {"get": "gotcha"}
    (tmp_path / "x.pkl").write_bytes(b"ccollections\nOrderedDict\n)R}S'get'\nS'gotcha'\nsb.")
    with pytest.raises(UnsafePickle):
        load_pickle(tmp_path / "x.pkl")


@given(st.binary(max_size=60))
@QUICK
@pytest.mark.slow
def test_any_bytes_are_a_value_or_an_error(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + data)
    try:
        load_pickle(tmp_path / "x.pkl")
    except UnsafePickle as error:
        assert "x.pkl" in str(error)


def test_a_damaged_cache_of_word_vectors_is_made_again(tmp_path, store_path, caplog):
    entries = b"".join(word.encode() + b" " + np.ones(5, "<f4").tobytes() for word in WORDS)
    (tmp_path / "v.bin").write_bytes(b"%d 5\n" % len(WORDS) + entries)
    (tmp_path / "cache.npz").write_bytes(b"PK\3\4 damaged")
    words = vectors_for(Store(store_path), tmp_path / "v.bin", tmp_path / "cache.npz")
    assert "cache.npz: damaged" in caplog.text and words.words == sorted(WORDS)
    assert WordVectors.load(tmp_path / "cache.npz").words == words.words
    (tmp_path / "v.bin").write_bytes(b"99999999999 300\nchop ")
    with pytest.raises(SystemExit, match="v.bin: not word vectors .it ends after 0 of"):
        vectors_for(Store(store_path), tmp_path / "v.bin", None)
