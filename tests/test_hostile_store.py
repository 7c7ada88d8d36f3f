"""Broken and hostile stores: a flipped byte, a lying header, links to elsewhere, open files."""

import contextlib
import os

import h5py
import numpy as np
import pytest
import torch

from mcn_ext.data.clips import ClipReader, Loader, TrainingClips
from mcn_ext.data.store import Store, StoreError, StoreWriter, main, validate
from mcn_ext.data.store_file import SEAL_BYTES, check_seal, seal
from tests.conftest import STREAMS, write_store


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A store of one video and few bytes, for tests that damage each of them."""
    streams = {"2d": {"dim": 3, "rate_hz": 1.0}}
    writer = StoreWriter(tmp_path_factory.mktemp("small") / "s.h5", streams, "test")
    writer.add("a", {"2d": np.arange(12.0).reshape(4, 3)}, [0, 2], [1, 3], ["chop", "fry it"])
    return writer.close()


def flip(path, data, at, by):
    damaged = bytearray(data)
    damaged[at] ^= by
    path.write_bytes(bytes(damaged))


@pytest.mark.slow
@pytest.mark.parametrize("step", [101, 19])
def test_the_validator_finds_a_flip_of_any_byte(tmp_path, small, step):
    """Of the seal, metadata, values, texts and the gaps between: no byte of the file is dead."""
    data, path = small.read_bytes(), tmp_path / "s.h5"
    for at in range(0, len(data), step):
        flip(path, data, at, (1, 0x80, 0xFF)[at % 3])
        with pytest.raises(StoreError, match="s.h5"):
            validate(path)
            pytest.fail(f"byte {at} of {len(data)}")


def test_unused_bytes_are_sealed_too(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", {"2d": STREAMS["2d"]}, "test")
    writer.add("a", {"2d": np.ones((3, 12))}, [0, 1], [1, 2], ["x" * 3000, "y" * 3000])
    path = writer.close()
    assert check_seal(path, whole=True)
    with h5py.File(path) as file:
        unused = file.id.get_filesize() - 8  # the end of the heap that holds the texts
    flip(path, path.read_bytes(), unused, 1)
    assert Store(path).caption_texts(0) == ["x" * 3000, "y" * 3000]
    with pytest.raises(StoreError, match="caption/text differs from what was written"):
        validate(path)


@pytest.mark.slow
def test_a_flip_in_metadata_is_found_on_opening(tmp_path, small):
    data, path = small.read_bytes(), tmp_path / "s.h5"
    for at in (0, 20, SEAL_BYTES - 1, SEAL_BYTES, SEAL_BYTES + 700, data.index(b"GCOL") + 25):
        flip(path, data, at, 1)
        with pytest.raises(StoreError, match="s.h5"):
            Store(path)
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=r"bytes, \d+ were written; copy it again"):
        Store(path)


def test_each_dataset_has_its_own_checksum(tmp_path, small, capsys):
    """Seals made anew, so that only the datasets' checksums can tell."""
    with h5py.File(small) as file:
        names = [f"{g}/{d}" for g in file for d in file[g]]
        assert all(file[name].attrs["crc32"].dtype == np.uint32 for name in names)
    for name in ("2d/data", "caption/start", "caption/end", "caption/text", "video/id"):
        path = tmp_path / "s.h5"
        path.write_bytes(small.read_bytes())
        with h5py.File(path, "r+") as file:
            file[name][0] = "other" if file[name].dtype == object else file[name][0] + 0.5
        seal(path)
        Store(path)
        assert main([str(path)]) == 1
        said = capsys.readouterr().err
        assert str(path) in said and name in said and "checksum" in said


def test_stores_without_checksums_still_read_and_are_said_to_be(tmp_path, small, capsys):
    with h5py.File(small) as new, h5py.File(tmp_path / "older.h5", "w") as old:
        old.attrs.update(new.attrs)
        for group in new:
            old.create_group(group).attrs.update(new[group].attrs)
            for name, data in new[group].items():
                old[group].create_dataset(name, data=data[:], dtype=data.dtype)
    assert Store(tmp_path / "older.h5").caption_texts(0) == ["chop", "fry it"]
    assert validate(tmp_path / "older.h5")["checksums"] is False
    assert main([str(tmp_path / "older.h5")]) == 0 and "no checksums" in capsys.readouterr().out
    assert main([str(small)]) == 0 and "checksums agree" in capsys.readouterr().out


def test_a_damaged_part_is_not_joined(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", {"2d": STREAMS["2d"]}, "test", shard_mib=1e-4)
    for name in "ab":
        writer.add(name, {"2d": np.ones((9, 12))}, [0], [1], ["x"])
    with h5py.File(writer.parts[0], "r") as file:
        at = file["2d/data"].id.get_offset()
    flip(writer.parts[0], writer.parts[0].read_bytes(), at + 30, 4)
    with pytest.raises(StoreError, match="00000.h5: 2d/data: its checksum is not"):
        writer.close()
    assert not (tmp_path / "s.h5").exists()


def replace(file, name, **how):
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    data = file.create_dataset(name, how.pop("shape", shape), how.pop("dtype", dtype), **how)
    if data.chunks is None and data.external is None and data.size < 10**6 and name != "3d/data":
        data[...] = np.zeros(data.shape, data.dtype)


def link(file, name, target):
    del file[name]
    file[name] = target


STRUCTURES = {
    "external link": lambda f: link(f, "2d/data", h5py.ExternalLink("other.h5", "2d/data")),
    "soft link": lambda f: link(f, "2d/data", h5py.SoftLink("/mel/data")),
    "linked group": lambda f: link(f, "2d", h5py.SoftLink("/mel")),
    "bytes of another file": lambda f: replace(f, "2d/data", external=[("/etc/passwd", 0, 10**6)]),
    "chunked": lambda f: replace(f, "2d/data", chunks=True),
    "compressed": lambda f: replace(f, "2d/data", shape=(2**24, 12), compression="gzip"),
    "never written": lambda f: replace(f, "2d/data", shape=(2**40, 12)),
    "never written, of the right size": lambda f: replace(f, "3d/data"),
    "float64": lambda f: replace(f, "2d/data", dtype="f8"),
    "compound": lambda f: replace(f, "2d/data", dtype="f2,i4"),
    "texts as numbers": lambda f: replace(f, "caption/text", dtype="i4"),
    "a group as dataset": lambda f: (f.__delitem__("2d/data"), f.create_group("2d/data")),
    "negative offset": lambda f: f["2d/offset"].__setitem__(1, -4),
    "offsets that fall": lambda f: f["mel/offset"].__setitem__(slice(1, 3), [900, 5]),
    "offsets past the rows": lambda f: f["caption/offset"].__setitem__(-1, 10**9),
    "rate": lambda f: f["2d"].attrs.__setitem__("rate_hz", np.nan),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_wrong_in_structure_is_refused_on_opening(tmp_path, store_path, name):
    path = tmp_path / "s.h5"
    path.write_bytes(store_path.read_bytes())
    with h5py.File(path, "r+") as file:
        STRUCTURES[name](file)
    seal(path)
    with pytest.raises(StoreError, match=r"s\.h5: (2d|3d|mel|caption)\S* .*prepare the store"):
        Store(path)


def test_virtual_datasets_are_refused(tmp_path, store_path):
    path = tmp_path / "s.h5"
    path.write_bytes(store_path.read_bytes())
    with h5py.File(path, "r+") as file:
        layout = h5py.VirtualLayout(file["2d/data"].shape, "f2")
        layout[:] = h5py.VirtualSource(str(store_path), "2d/data", file["2d/data"].shape)
        del file["2d/data"]
        file.create_virtual_dataset("2d/data", layout)
    seal(path)
    with pytest.raises(StoreError, match="2d/data: chunked, compressed, virtual"):
        Store(path)


@pytest.mark.parametrize("start,end", [(np.nan, 1), (-1, 1), (3, 2), (0, np.inf)])
def test_captions_without_a_time_are_refused(tmp_path, store_path, start, end):
    with pytest.raises(StoreError, match="a: captions need"):
        StoreWriter(tmp_path / "w.h5", {"2d": STREAMS["2d"]}, "test").add(
            "a", {}, [start], [end], ["x"]
        )
    path = tmp_path / "s.h5"
    path.write_bytes(store_path.read_bytes())
    with h5py.File(path, "r+") as file:
        file["caption/start"][7], file["caption/end"][7] = start, end
    seal(path)
    with pytest.raises(StoreError, match="caption/start"):
        Store(path).caption_times(1)
    with pytest.raises(StoreError, match="caption/(start|end)"):
        validate(path)


def test_texts_that_share_one_heap_do_not_unfold(tmp_path):
    """A thousand captions that refer to the same megabyte are a gigabyte: refused by size."""
    writer = StoreWriter(tmp_path / "s.h5", {"2d": STREAMS["2d"]}, "test")
    n = 1000
    writer.add("a", {"2d": np.ones((3, 12))}, np.zeros(n), np.ones(n), ["x" * 10**6] + [""] * 999)
    path = writer.close()
    with h5py.File(path) as file:
        at = file["caption/text"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[at : at + 16 * n] = data[at : at + 16] * n
    path.write_bytes(bytes(data))
    seal(path)
    with pytest.raises(StoreError, match="caption/text: texts from 0 on are not in the file"):
        validate(path)


def test_ten_hours_of_sound_are_not_copied_for_every_clip(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", {"mel": STREAMS["mel"]}, "test")
    mel = np.arange(36_000)[:, None] % 77 - np.arange(40.0)
    writer.add("a", {"mel": mel}, [0], [36_000], ["x"])
    clip = ClipReader(Store(writer.close()), audio=True, audio_frames=100).read(0, [(0, 0)])
    assert clip["audio"].shape == (1, 40, 100) and clip["valid.audio"].all()
    np.testing.assert_array_equal(clip["audio"][0].T, mel[:100].astype(np.float16))


# ------------------------------------------------------------------------------- open files


def links():
    """What this process's open files are; other threads open and close some meanwhile."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"/proc/self/fd/{fd}")


class CountingClips(TrainingClips):
    def __getitem__(self, key):
        own = f"{self.reader.store.path}/shard-"  # other tests' stores may still be open
        open_files = sum(link.startswith(own) for link in links())
        return super().__getitem__(key) | {"open": np.array([open_files])}


@pytest.mark.parametrize("workers", [0, 2])
def test_no_file_stays_open_over_epochs_shards_and_workers(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("mcn_ext.data.store.MAX_OPEN", 3)
    store = Store(write_store(tmp_path / "shards", n_videos=12, shard_mib=0.01))
    assert len(store.files) > 6
    store.ids()  # opened here, then forked
    loader = Loader(
        CountingClips(ClipReader(store, video_streams=("2d",)), n_pair=2, min_time=1.0, seed=0),
        4,
        workers,
        torch.device("cpu"),
    )
    counts, here = [], []
    for epoch in range(4):
        counts.append(max(int(batch["open"].max()) for batch in loader.epoch(epoch)))
        here.append(len(os.listdir("/proc/self/fd")))
    assert max(counts) <= 3 * (2 if workers else 1)  # a worker inherits those open at the fork
    assert counts[-1] <= counts[1] and here[-1] == here[0]


def test_read_only_files_and_folders(tmp_path):
    path = write_store(tmp_path / "folder" / "s", n_videos=3, shard_mib=0.01)
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    try:
        assert validate(path)["videos"] == 3
    finally:
        path.chmod(0o755)


def test_disks_without_locks_are_read(tmp_path, monkeypatch):
    real, path = h5py.File, write_store(tmp_path / "s.h5")

    def opened(*args, locking=None, **kwargs):
        if locking is None:
            raise OSError(38, "unable to lock file, errno = 38")
        return real(*args, locking=locking, **kwargs)

    monkeypatch.setattr(h5py, "File", opened)
    assert validate(path)["videos"] == 10


def test_others_may_have_the_file_open(store_path):
    with h5py.File(store_path) as file:
        store = Store(store_path)
        assert len(store.ids()) == len(file["video/id"])
        with h5py.File(store_path):
            pass
