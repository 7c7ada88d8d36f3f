"""The store and the converters: real formats, broken files, hostile pickles, kills."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

from mcn_ext.data.store import Store, StoreError, StoreWriter, main, validate
from mcn_ext.prepare import howto100m, youcook2
from mcn_ext.prepare.unpickle import UnsafePickle, load_pickle
from tests.conftest import ROOT, STREAMS, run, write_store

RATES = {"2d": 1.0, "3d": 1.5, "mel": 100.0}

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


@pytest.mark.slow
def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("mcn_ext.data.store.MAX_OPEN", 3)
    store = Store(write_store(tmp_path / "shards", n_videos=12, shard_mib=0.01))
    assert len(store.files) > 3
    first = [store.clips(i, "2d", [0], [3])[0] for i in range(12)]
    again = [store.clips(i, "2d", [0], [3])[0] for i in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(store._open) == 3 and len(store.ids()) == 12


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


# ---------------------------------------------------------------------------------- HowTo100M


def make_howto(folder, n=6, seed=0):
    """A small feature folder in the published layout."""
    rng = np.random.default_rng(seed)
    captions, paths = {}, []
    for i in range(n):
        name, path = f"vid{i:08d}", f"Food/Cakes/vid{i:08d}"
        paths.append(path if i else f"None/{path}")
        place = folder / "features" / path
        place.mkdir(parents=True)
        np.savez(place / f"{name}_2d.npz", features=rng.random((30, 12)).astype(np.float16))
        np.savez_compressed(
            place / f"{name}_3d.npz", features=rng.random((45, 6)).astype(np.float32)
        )
        if i != 1:
            np.savez(
                place / f"{name}_spec.npz", arr_0=rng.uniform(-80, 0, (40, 3000)).astype(np.float16)
            )
        captions[name] = {
            "start": [1.0, 5.0, 20.0],
            "end": [3.0, 9.0, 22.5],
            "text": ["chop the onion", "now fry", "egg"],
        }
    (folder / "list.csv").write_text("path\n" + "\n".join(paths) + "\n")
    (folder / "caption.pickle").write_bytes(pickle.dumps(captions))
    return paths, captions


def convert(folder, out, **kwargs):
    return howto100m.prepare(
        folder / "list.csv",
        folder / "features",
        None,
        kwargs.pop("captions", folder / "caption.pickle"),
        out,
        rates=RATES,
        **kwargs,
    )


def test_howto100m_round_trip(tmp_path):
    make_howto(tmp_path)
    summary = convert(tmp_path, tmp_path / "out.h5")
    assert "6 of 6 videos" in summary and "1 without audio" in summary and "none skipped" in summary
    store = Store(tmp_path / "out.h5")
    assert store.dims == {"2d": 12, "3d": 6, "mel": 40} and store.rates == RATES
    with np.load(tmp_path / "features/Food/Cakes/vid00000003/vid00000003_spec.npz") as f:
        np.testing.assert_array_equal(store.clips(3, "mel", [5.0], [9.0])[0], f["arr_0"].T[500:901])
    assert store.caption_texts(3) == ["chop the onion", "now fry", "egg"]
    assert len(store.clips(1, "mel", [0.0], [9.0])[0]) == 0
    validate(tmp_path / "out.h5")


def test_corrupt_videos_are_skipped_counted_and_listed(tmp_path):
    paths, captions = make_howto(tmp_path, n=12)

    def file(i, kind):
        return tmp_path / "features" / paths[i] / f"vid{i:08d}_{kind}.npz"

    file(2, "2d").write_bytes(file(2, "2d").read_bytes()[:300])  # truncated
    file(3, "3d").write_bytes(b"")
    np.savez(file(4, "2d"), features=np.full((9, 12), np.nan, np.float32))
    np.savez(file(5, "2d"), features=np.ones((9, 13), np.float32))
    np.savez(file(6, "2d"), wrong_key=np.ones((9, 12)))
    np.savez(file(7, "2d"), features=np.array([{"an": "object"}], dtype=object))
    file(8, "2d").unlink()
    flipped = bytearray(file(9, "3d").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    file(9, "3d").write_bytes(bytes(flipped))
    del captions["vid00000010"]
    captions["vid00000011"] = {"start": [5.0, -3.0], "end": [2.0, -1.0], "text": ["a", "b"]}
    (tmp_path / "caption.pickle").write_bytes(pickle.dumps(captions))
    with open(tmp_path / "list.csv", "a") as f:
        f.write("Food/Cakes/vid00000001\n")
    summary = convert(tmp_path, tmp_path / "out.h5")
    assert "2 of 13 videos" in summary and "11 skipped" in summary
    listed = (tmp_path / "out.h5.skipped.csv").read_text()
    for i in range(2, 12):
        assert f"vid{i:08d}" in listed
    for reason in (
        "BadZipFile",
        "NaN",
        "width 13",
        "wrong_key",
        "no 2d features",
        "no captions",
        "twice in",
        "0 <= start < end",
    ):
        assert reason in listed, reason
    assert Store(tmp_path / "out.h5").ids() == ["vid00000000", "vid00000001"]


@pytest.mark.parametrize("layout", ["json", "csv", "flat", "arr_0"])
def test_the_other_layouts(tmp_path, layout):
    paths, captions = make_howto(tmp_path, n=3)
    source = tmp_path / "caption.pickle"
    if layout == "json":
        source = tmp_path / "caption.json"
        source.write_text(json.dumps(captions))
    elif layout == "csv":
        source = tmp_path / "captions"
        source.mkdir()
        for name, c in captions.items():
            lines = [
                f"{s},{e},{t}" for s, e, t in zip(c["start"], c["end"], c["text"], strict=True)
            ]
            (source / f"{name}.csv").write_text("start,end,text\n" + "\n".join(lines))
    else:
        for path in [p.removeprefix("None/") for p in paths]:
            place = tmp_path / "features" / path
            for kind in ("2d", "3d", "spec"):
                old = place / f"{place.name}_{kind}.npz"
                if not old.exists():
                    continue
                if layout == "flat":
                    old.rename(place.parent / f"{place.name}_{kind}.npz")
                else:
                    with np.load(old) as f:
                        array = f[f.files[0]]
                    np.savez(old, arr_0=array)
    summary = convert(tmp_path, tmp_path / "out.h5", captions=source)
    assert "3 of 3 videos" in summary
    assert Store(tmp_path / "out.h5").caption_texts(2)[1] == "now fry"


@pytest.mark.slow
def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    make_howto(tmp_path, n=400)
    command = [
        sys.executable,
        "-m",
        "mcn_ext.prepare",
        "howto100m",
        "--list",
        "list.csv",
        "--features",
        "features",
        "--captions",
        "caption.pickle",
        "--out",
        "out.h5",
        "--shard-mib",
        "2",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    parts = tmp_path / "out.h5.parts"
    for _ in range(2000):
        if len(list(parts.glob("shard-*.h5"))) >= 3 or process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.h5").exists(), (
        "it finished before it could be killed: make the folder larger"
    )
    done = run(*command[1:], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert "400 of 400 videos" in done.stdout and "from an earlier, interrupted run" in done.stdout
    convert(tmp_path, tmp_path / "at_once.h5")
    resumed, at_once = Store(tmp_path / "out.h5"), Store(tmp_path / "at_once.h5")
    assert resumed.ids() == at_once.ids()
    for stream in STREAMS:
        with h5py.File(tmp_path / "out.h5") as a, h5py.File(tmp_path / "at_once.h5") as b:
            np.testing.assert_array_equal(a[f"{stream}/data"][:], b[f"{stream}/data"][:])
    # Other inputs under the same name are not mixed in.
    (tmp_path / "out.h5").rename(tmp_path / "kept.h5")
    StoreWriter(tmp_path / "out.h5", STREAMS, "something else")
    failed = run(*command[1:], cwd=tmp_path, check=False, env={"PYTHONPATH": str(ROOT)})
    assert failed.returncode == 1 and "begun from other inputs" in failed.stderr


# ----------------------------------------------------------------------------------- YouCook2


def test_youcook2_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    items = [
        {
            "id": "GLd3aX16zBg",
            "caption": f"step {i}",
            "2d": rng.random(12).astype(np.float32),
            "3d": rng.random(6),
            "audio": torch.rand(40, 100 + i),
        }
        for i in range(5)
    ]
    items[1]["audio"] = None
    items[2]["2d"] = np.full(12, np.nan)
    items[3].pop("3d")
    items[4]["2d_full"] = rng.random((30, 12))
    items += [{"id": "no words", "2d": items[0]["2d"], "3d": items[0]["3d"]}, "no dictionary"]
    (tmp_path / "val.pkl").write_bytes(pickle.dumps(items))
    summary = youcook2.prepare(tmp_path / "val.pkl", tmp_path / "val.h5")
    assert "3 of 7 clips" in summary and "4 skipped" in summary and "1 without audio" in summary
    assert "no words,no caption in it" in (tmp_path / "val.h5.skipped.csv").read_text()
    store = Store(tmp_path / "val.h5")
    assert store.ids() == ["GLd3aX16zBg", "GLd3aX16zBg#2", "GLd3aX16zBg#5"]
    assert [store.caption_texts(i) for i in range(3)] == [["step 0"], ["step 1"], ["step 4"]]
    np.testing.assert_allclose(
        store.clips(0, "2d", [0.0], [store.caption_times(0)[2][0]])[0][0], items[0]["2d"], rtol=1e-3
    )
    assert len(store.clips(2, "mel", [0.0], [store.caption_times(2)[2][0]])[0]) == 104
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"not": "a list"}))
    with pytest.raises(SystemExit, match="expected a list of dictionaries"):
        youcook2.prepare(tmp_path / "other.pkl", tmp_path / "other.h5")


@pytest.mark.slow
def test_real_recordings_convert(tmp_path, digits):
    summary = howto100m.prepare(
        digits / "videopaths.txt",
        digits / "features",
        None,
        digits / "caption.pickle",
        tmp_path / "train.h5",
        rates=RATES,
    )
    assert "120 of 120 videos" in summary and "none skipped" in summary
    assert validate(tmp_path / "train.h5")["captions"] == 1396
    summary = youcook2.prepare(digits / "val_audio.pkl", tmp_path / "val.h5")
    assert "385 of 385 clips" in summary
