"""The store: its layout, shards, what it refuses to overwrite."""

import h5py
import numpy as np
import pytest

from mcn_ext.data.store import Store, StoreError, StoreWriter, validate
from mcn_ext.store import main
from tests.conftest import STREAMS, write_store

RATES = {"2d": 1.0, "3d": 1.5, "mel": 100.0}

# --------------------------------------------------------------------------------------- store


def test_layout_is_the_documented_one(store_path):
    with h5py.File(store_path) as file:
        root = {name: file.attrs[name] for name in ("format", "version", "source")}
        assert root == {"format": "mcn-store", "version": 1, "source": "test data"}
        assert set(file["2d"].attrs) == {*"rate_hz model weights_sha256 tool modality".split()}
        n, rows = len(file["video/id"]), file["2d/data"]
        assert rows.dtype == np.float16 and rows.chunks is None and rows.compression is None
        for name in ("2d", "3d", "mel", "caption"):
            offset = file[f"{name}/offset"]
            assert offset.shape == (n + 1,) and offset.dtype == np.int64
        assert file["caption/start"].dtype == file["caption/end"].dtype == np.float32


def content(store):
    """All that a store holds, as plain values."""
    for i in range(len(store)):
        yield *(part.tolist() for part in store.caption_times(i)[1:]), store.caption_texts(i)
        for stream in store.dims:
            yield [rows.tolist() for rows in store.clips(i, stream, [1, 9.5], [3, 500])]


def test_shards_and_one_file_read_the_same(tmp_path, store_path):
    shards = write_store(tmp_path / "shards", shard_mib=0.1)
    joined = write_store(tmp_path / "joined.h5", shard_mib=0.1)
    assert len(list(shards.glob("shard-*.h5"))) > 2
    assert not (tmp_path / "joined.h5.parts").exists()
    one, *others = [Store(path) for path in (store_path, shards, joined)]
    for other in others:
        assert other.ids() == one.ids() and list(content(other)) == list(content(one))
        assert list(other.texts(block=7)) == list(one.texts())
    assert validate(shards)["videos"] == 10


def test_clips_far_apart_are_read_one_by_one_and_clamped(tmp_path):
    writer = StoreWriter(tmp_path / "long.h5", {"2d": STREAMS["2d"]}, "test")
    rows = np.arange(36_000)[:, None].repeat(12, 1) % 1000
    writer.add("ten hours", {"2d": rows}, [0], [1], ["x"])
    store = Store(writer.close())
    first, last, past = store.clips(0, "2d", [3, 35_998, 40_000], [5, 40_000, 40_010])
    assert (
        first[:, 0].tolist() == [3, 4, 5] and last[:, 0].tolist() == [998, 999] and len(past) == 0
    )


def test_errors_name_file_and_fix(tmp_path, store_path):
    (tmp_path / "none.h5").write_bytes(b"not hdf5")
    for name, message in (("none.h5", "not a readable HDF5 file"), ("gone.h5", "no such store")):
        with pytest.raises(StoreError, match=f"{name}: {message}.*mcn_ext.prepare"):
            Store(tmp_path / name)
    broken = write_store(tmp_path / "broken.h5", n_videos=2)
    with h5py.File(broken, "r+") as file:
        file["mel/data"][5, 5] = np.nan
    with pytest.raises(StoreError, match="mel/data: has values that are not finite"):
        validate(broken)
    assert main([str(broken)]) == 1 and main([str(broken), "--quick"]) == 0
    assert main([str(store_path)]) == 0


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


def test_captions_hdf5_cannot_hold_are_mended(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", {"2d": STREAMS["2d"]}, "test")
    writer.add("a", {"2d": np.ones((3, 12))}, [0, 1], [1, 2], ["chop\0it", "cut \ud83d off"])
    assert Store(writer.close()).caption_texts(0) == ["chop it", "cut ? off"]
