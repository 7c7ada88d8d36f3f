"""Damaged, foreign and hostile stores: what is wrong is named; files of older code still read."""

import os

import h5py
import numpy as np
import pytest

from mcn_ext.data.store import Store, StoreError, StoreWriter, validate
from mcn_ext.store import main
from tests.conftest import STREAMS, write_store


@pytest.fixture
def copy(tmp_path, store_path):
    """A store that a test may damage."""
    path = tmp_path / "s.h5"
    path.write_bytes(store_path.read_bytes())
    return path


def test_a_truncated_file_is_named(copy):
    data = copy.read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 1):
        copy.write_bytes(data[:size])
        with pytest.raises(StoreError, match="s.h5: not a readable HDF5 file, or damaged.*prepare"):
            Store(copy)


@pytest.mark.parametrize(
    "name", ["2d/data", "caption/start", "caption/end", "caption/text", "video/id"]
)
def test_the_validator_finds_a_changed_value_of_any_dataset(copy, name, capsys):
    with h5py.File(copy, "r+") as file:
        file[name][0] = "other" if file[name].dtype == object else file[name][0] + 0.5
    Store(copy)  # what training reads is not read twice
    assert main([str(copy)]) == 1
    said = capsys.readouterr().err
    assert f"{copy}: {name}: its checksum is" in said and "prepare the store again" in said


def older(path, new, userblock):
    """The same store as files of former versions: without checksums, or after a block of bytes."""
    with h5py.File(new) as file, h5py.File(path, "w", userblock_size=userblock) as old:
        old.attrs.update(file.attrs)
        for group in file:
            old.create_group(group).attrs.update(file[group].attrs)
            for name, data in file[group].items():
                copied = old[group].create_dataset(name, data=data[:], dtype=data.dtype)
                copied.attrs.update(data.attrs if userblock else {})
    if userblock:
        with open(path, "r+b") as raw:
            raw.write(b"mcn-store seal 1\n")
    return path


def test_older_stores_still_read(tmp_path, store_path, capsys):
    plain = older(tmp_path / "plain.h5", store_path, 0)
    sealed = older(tmp_path / "sealed.h5", store_path, 4096)
    for path, said in ((plain, "no checksums"), (sealed, "checksums agree")):
        assert list(Store(path).texts()) == list(Store(store_path).texts())
        assert main([str(path)]) == 0 and said in capsys.readouterr().out


def test_a_damaged_part_is_not_joined(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", {"2d": STREAMS["2d"]}, "test", shard_mib=1e-4)
    for name in "ab":
        writer.add(name, {"2d": np.ones((9, 12))}, [0], [1], ["x"])
    with h5py.File(writer.parts[0], "r+") as file:
        file["2d/data"][3, 3] = 4
    with pytest.raises(StoreError, match="00000.h5: 2d/data: its checksum is not"):
        writer.close()
    assert not (tmp_path / "s.h5").exists()


def change(name, **how):
    """A dataset of the same name, otherwise as ``how`` says."""

    def damage(file):
        old = file[name]
        how.setdefault("dtype", old.dtype)
        how.setdefault("shape", old.shape)
        del file[name]
        file.create_dataset(name, **how)

    return damage


STRUCTURES = {
    "broken link": lambda f: (f.pop("2d/data"), f.update({"2d/data": h5py.SoftLink("/none")})),
    "float64": change("2d/data", dtype="f8"),
    "compound": change("2d/data", dtype="f2,i4"),
    "one dimension": change("2d/data", shape=(7,)),
    "texts as numbers": change("caption/text", dtype="i4"),
    "fewer texts": change("caption/text", shape=(3,)),
    "39 mel bands": lambda f: change("mel/data", shape=(len(f["mel/data"]), 39))(f),
    "a group as dataset": lambda f: (f.pop("2d/data"), f.create_group("2d/data")),
    "missing": lambda f: f.pop("mel/offset"),
    "negative offset": lambda f: f["2d/offset"].__setitem__(1, -4),
    "offsets that fall": lambda f: f["mel/offset"].__setitem__(slice(1, 3), [900, 5]),
    "offsets past the rows": lambda f: f["caption/offset"].__setitem__(-1, 10**9),
    "no rate": lambda f: f["2d"].attrs.pop("rate_hz"),
    "rate": lambda f: f["2d"].attrs.__setitem__("rate_hz", -1.0),
    "version": lambda f: f.attrs.__setitem__("version", 2),
    "format": lambda f: f.attrs.__setitem__("format", "other"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_wrong_in_structure_is_refused_on_opening(copy, name):
    with h5py.File(copy, "r+") as file:
        STRUCTURES[name](file)
    with pytest.raises(StoreError, match=r"s\.h5: (2d|3d|mel|caption|attr)\S* .*prepare the store"):
        Store(copy)


@pytest.mark.parametrize("start,end", [(np.nan, 1), (-1, 1), (3, 2), (0, np.inf)])
def test_captions_without_a_time_are_refused(tmp_path, copy, start, end):
    writer = StoreWriter(tmp_path / "w.h5", {"2d": STREAMS["2d"]}, "test")
    with pytest.raises(StoreError, match="a: captions need"):
        writer.add("a", {}, [start], [end], ["x"])
    with h5py.File(copy, "r+") as file:
        file["caption/start"][7], file["caption/end"][7] = start, end
    with pytest.raises(StoreError, match="caption/start"):
        Store(copy).caption_times(1)
    with pytest.raises(StoreError, match="caption/(start|end)"):
        validate(copy)


# ------------------------------------------------------------------------------- open files


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("mcn_ext.data.store.MAX_OPEN", 3)
    store = Store(write_store(tmp_path / "shards", n_videos=12, shard_mib=0.01))
    before = len(os.listdir("/proc/self/fd"))
    first = [store.clips(i, "2d", [0], [3])[0] for i in range(12)]
    again = [store.clips(i, "2d", [0], [3])[0] for i in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(store.files) > 6 and len(os.listdir("/proc/self/fd")) <= before + 3


def test_read_only_files_and_folders(tmp_path):
    path = write_store(tmp_path / "folder" / "s", n_videos=3, shard_mib=0.01)
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    try:
        assert validate(path)["videos"] == 3
    finally:
        path.chmod(0o755)
