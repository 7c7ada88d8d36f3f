"""Broken and hostile inputs of the converters: pickles, lists, captions, word vectors."""

import pickle
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcn_ext.data.store import Store, validate
from mcn_ext.data.unpickle import UnsafePickle, load_pickle
from mcn_ext.data.words import WordVectors, vectors_for
from mcn_ext.prepare import Skipped, captions, howto100m, in_order, youcook2
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


BROKEN = {
    "persistent id": b"\x80\x02NQ.",
    "text persistent id": b"P1\n.",
    "extension": b"\x80\x02\x82\x01.",
    "declared length": b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.",
    "declared bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "object dtype": dtype_state(b"O8"),
    "void dtype": dtype_state(b"V8"),
    "object scalar": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRNtR.",
    "array beyond its bytes": b"cnumpy.core.numeric\n_frombuffer\n(C\x08aaaaaaaacnumpy\ndtype\n"
    b"(S'f8'\ntR(I9\ntS'C'\ntR.",
    "codec": b"c_codecs\nencode\n(Vx\nVbz2\ntR.",
    "tensor past its storage": torch_pickle(4, (2, 2), (2, 1)),
    "tensor before its storage": torch_pickle(-1, (2,), (1,)),
    "negative stride": torch_pickle(5, (2,), (-1,)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_hostile_pickles_are_an_error(tmp_path, name):
    (tmp_path / "x.pkl").write_bytes(BROKEN[name])
    with pytest.raises(UnsafePickle, match="x.pkl"):
        load_pickle(tmp_path / "x.pkl")


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


# --------------------------------------------------------------------------------- converters


def laughs(depth=40):
    """10**depth numbers in a few hundred bytes."""
    value = [0.5]
    for _ in range(depth):
        value = [value] * 10
    return value


# laughs is called in the tests: hypothesis now and then prints a strategy, and would not end.
VALUES = st.one_of(
    st.none(),
    st.floats(),
    st.integers(-(10**400), 10**400),
    st.text(max_size=5),
    st.booleans(),
    st.lists(st.floats(width=32), max_size=4),
    st.binary(max_size=3),
    st.sampled_from(
        [
            laughs,
            {},
            "\ud83d",
            "a\0b",
            np.ones((2, 2)),
            np.zeros(0),
            np.array(1.0),
            torch.ones(12),
            torch.ones(40, 5),
            np.full((40, 3), 1e30),
        ]
    ),
)


def test_headers_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """In two threads at once CPython 3.11 now and then calls a good header damaged."""
    inside, most, parse = [], [], np.lib.format.read_array_header_1_0

    def slow(file):
        inside.append(file)
        most.append(len(inside))
        time.sleep(0.005)
        inside.remove(file)
        return parse(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slow)
    np.savez(tmp_path / "a.npz", features=np.ones((2, 3), np.float16))
    results = [rows for _, rows in in_order(howto100m.load_array, [tmp_path / "a.npz"] * 16, 4)]
    assert max(most) == 1 and all((rows == 1).all() for rows in results)


def test_lists_that_unfold_are_not_text_or_numbers(tmp_path):
    for value in (laughs(3), (laughs(3),)):
        with pytest.raises(ValueError, match="where a text is expected"):
            captions.as_text(value)
    item = {"id": "a", "caption": "fry", "2d": np.ones(1, np.float32)}
    (tmp_path / "y.pkl").write_bytes(
        pickle.dumps([item, item | {"caption": laughs(3)}, item | {"2d": [laughs(3)]}])
    )
    assert "2 skipped" in youcook2.prepare(tmp_path / "y.pkl", tmp_path / "y.h5")
    (tmp_path / "c.pickle").write_bytes(
        pickle.dumps({"a": {"start": [0], "end": [1], "text": [laughs(3)]}})
    )
    with pytest.raises(Skipped, match="where a text is expected"):
        captions.Captions(tmp_path / "c.pickle").of("a")


@pytest.mark.slow
@given(st.sampled_from(["2d", "3d", "audio", "caption", "id"]), VALUES)
@QUICK
def test_youcook2_keeps_or_lists_any_clip(tmp_path, key, value):
    items = [
        {
            "id": f"c{i}",
            "caption": "fry",
            "2d": np.ones(12, np.float32),
            "3d": np.ones(6),
            "audio": np.ones((40, 9), np.float32),
        }
        for i in range(3)
    ]
    items[1][key] = value() if value is laughs else value
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(items))
    said = youcook2.prepare(tmp_path / "y.pkl", tmp_path / "y.h5", overwrite=True)
    assert "3 of 3 clips" in said or "2 of 3 clips" in said and "1 skipped" in said
    validate(tmp_path / "y.h5")


@pytest.mark.slow
@given(st.sampled_from(["start", "end", "text"]), VALUES, st.booleans())
@QUICK
def test_howto100m_keeps_or_lists_any_captions(tmp_path, key, value, whole):
    for i in range(2):
        np.savez(tmp_path / f"v{i}_2d.npz", features=np.ones((30, 4), np.float16))
    (tmp_path / "list.csv").write_text("path\nv0\nv1\n")
    captions = {
        f"v{i}": {"start": [0.0, 4.0], "end": [2.0, 6.0], "text": ["chop", "fry"]} for i in range(2)
    }
    value = value() if value is laughs else value
    if whole:
        captions["v1"][key] = value
    else:
        captions["v1"][key][0] = value
    (tmp_path / "c.pickle").write_bytes(pickle.dumps(captions))
    said = howto100m.prepare(
        tmp_path / "list.csv",
        tmp_path,
        None,
        tmp_path / "c.pickle",
        tmp_path / "o.h5",
        rates={"2d": 1.0, "3d": 1.5, "mel": 100.0},
        overwrite=True,
        workers=1,
    )
    assert "2 of 2 videos" in said or "1 of 2 videos" in said and "1 skipped" in said
    validate(tmp_path / "o.h5")


def test_lists_and_captions_that_are_none(tmp_path):
    for content, message in (
        (b'path\n"' + b"x" * 200_000, "not a CSV"),
        (b"\xff\xfe", "no column"),
    ):
        (tmp_path / "list.csv").write_bytes(content)
        with pytest.raises(SystemExit, match=f"list.csv: {message}"):
            howto100m.read_list(tmp_path / "list.csv")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(SystemExit, match="deep.json: not JSON"):
        captions.Captions(tmp_path / "deep.json")


def test_a_damaged_cache_of_word_vectors_is_made_again(tmp_path, store_path, caplog):
    models = pytest.importorskip("gensim.models")
    keyed = models.KeyedVectors(5)
    keyed.add_vectors(WORDS, np.ones((len(WORDS), 5), np.float32))
    keyed.save_word2vec_format(tmp_path / "v.bin", binary=True)
    (tmp_path / "cache.npz").write_bytes(b"PK\3\4 damaged")
    words = vectors_for(Store(store_path), tmp_path / "v.bin", tmp_path / "cache.npz")
    assert "cache.npz: damaged" in caplog.text and words.words == sorted(WORDS)
    assert WordVectors.load(tmp_path / "cache.npz").words == words.words
    (tmp_path / "v.bin").write_bytes(b"99999999999 300\nchop ")
    with pytest.raises(SystemExit, match="v.bin: not a word2vec file"):
        vectors_for(Store(store_path), tmp_path / "v.bin", None)
