"""The store, and pickles: broken files, hostile pickles."""

import io
import os
import pickle

import h5py
import numpy as np
import pytest
import torch

from mcn_ext.data.store import Store, StoreError, StoreWriter, main, validate
from mcn_ext.data.store_file import seal
from mcn_ext.prepare.unpickle import UnsafePickle, load_pickle
from tests.conftest import STREAMS, write_store

# --------------------------------------------------------------------------------------- store


def test_layout_is_the_documented_one(store_path):
    with h5py.File(store_path) as f:
        assert (
            f.attrs["format"] == "mcn-store"
            and f.attrs["version"] == 1
            and f.attrs["source"] == "test data"
        )
        assert (
            f["2d/data"].dtype == np.float16
            and f["2d/data"].chunks is None
            and f["2d/data"].compression is None
        )
        assert f["mel/data"].shape[1] == 40 and f["3d"].attrs["rate_hz"] == 1.5
        assert set(f["2d"].attrs) == {"rate_hz", "model", "weights_sha256", "tool"}
        n = len(f["video/id"])
        for name in ("2d", "3d", "mel", "caption"):
            assert f[f"{name}/offset"].shape == (n + 1,) and f[f"{name}/offset"].dtype == np.int64
        assert f["caption/start"].dtype == f["caption/end"].dtype == np.float32


def test_shards_and_one_file_read_the_same(tmp_path, store_path):
    shards = write_store(tmp_path / "shards", shard_mib=0.1)
    joined = write_store(tmp_path / "joined.h5", shard_mib=0.1)
    assert (
        shards.is_dir()
        and len(list(shards.glob("shard-*.h5"))) > 2
        and not (tmp_path / "joined.h5.parts").exists()
    )
    stores = [Store(p) for p in (store_path, shards, joined)]
    assert (
        len({len(s) for s in stores}) == 1 and stores[0].ids() == stores[1].ids() == stores[2].ids()
    )
    for i in range(len(stores[0])):
        wanted = (*stores[0].caption_times(i), stores[0].caption_texts(i))
        for other in stores[1:]:
            got = (*other.caption_times(i), other.caption_texts(i))
            assert got[0] == wanted[0] and got[3] == wanted[3] and np.array_equal(got[1], wanted[1])
            for stream in ("2d", "mel"):
                for a, b in zip(
                    stores[0].clips(i, stream, [1, 9.5], [3, 500]),
                    other.clips(i, stream, [1, 9.5], [3, 500]),
                    strict=True,
                ):
                    np.testing.assert_array_equal(a, b)
    assert validate(shards)["videos"] == 10
    assert list(stores[1].texts(block=7)) == list(stores[0].texts())


def test_clips_far_apart_are_read_one_by_one_and_clamped(tmp_path):
    writer = StoreWriter(tmp_path / "long.h5", {"2d": STREAMS["2d"]}, "test")
    rows = np.arange(36_000)[:, None].repeat(12, 1) % 1000
    writer.add("ten hours", {"2d": rows}, [0], [1], ["x"])
    store = Store(writer.close())
    first, last, past = store.clips(0, "2d", [3, 35_998, 40_000], [5, 40_000, 40_010])
    assert (
        first[:, 0].tolist() == [3, 4, 5] and last[:, 0].tolist() == [998, 999] and len(past) == 0
    )


def test_errors_name_file_dataset_and_fix(tmp_path, store_path):
    for content, message in ((b"not hdf5", "not a readable HDF5 file"), (None, "no such store")):
        path = tmp_path / f"{message[:4]}.h5"
        if content:
            path.write_bytes(content)
        with pytest.raises(StoreError, match=f"{path.name}.*{message}"):
            Store(path)
    broken = tmp_path / "broken.h5"

    def damage(change):
        broken.write_bytes(store_path.read_bytes())
        with h5py.File(broken, "a") as f:
            change(f)

    for change, message in (
        (lambda f: f["mel"].attrs.__delitem__("rate_hz"), "missing or of another kind"),
        (lambda f: f.__delitem__("caption/text"), "caption/text: missing, or a link"),
        (lambda f: f.attrs.update(version=2), "version 2, this code reads version 1"),
        (lambda f: f.attrs.update(format="other"), "not 'mcn-store'"),
        (lambda f: f.__delitem__("caption/offset"), "caption/offset: missing, or a link"),
        (lambda f: f["2d/offset"].__setitem__(1, 9999), "2d/offset does not run"),
        (
            lambda f: f["mel/data"].__setitem__((5, 5), np.nan),
            "mel/data has values that are not finite",
        ),
    ):
        damage(change)
        seal(broken)
        with pytest.raises(StoreError, match=message):
            validate(broken)
    assert main([str(broken)]) == 1 and main([str(store_path)]) == 0


def test_existing_store_is_not_overwritten(tmp_path):
    path = write_store(tmp_path / "s.h5", n_videos=2)
    with pytest.raises(StoreError, match="exists; pass --overwrite"):
        write_store(path)
    write_store(path, n_videos=3, overwrite=True)
    assert len(Store(path)) == 3


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tmp").touch()
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="holds thesis.tmp, which is not part of a store"):
            write_store(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tmp").exists()


@pytest.mark.slow
def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("mcn_ext.data.store.MAX_OPEN", 3)
    store = Store(write_store(tmp_path / "shards", n_videos=12, shard_mib=0.01))
    assert len(store.files) > 3
    first = [store.clips(i, "2d", [0], [3])[0] for i in range(12)]
    again = [store.clips(i, "2d", [0], [3])[0] for i in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(store._handles) == 3 and len(store.ids()) == 12


def test_captions_hdf5_cannot_hold_are_mended(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", {"2d": STREAMS["2d"]}, "test")
    writer.add("a", {"2d": np.ones((3, 12))}, [0, 1], [1, 2], ["chop\0it", "cut \ud83d off"])
    assert Store(writer.close()).caption_texts(0) == ["chop it", "cut ? off"]


# ------------------------------------------------------------------------------------ pickles


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


@pytest.mark.parametrize(
    "name,data", list(hostile()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, name, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(data)
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
