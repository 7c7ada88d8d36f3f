"""--streams of prepare: HTM-zoo's tars, torch files, nested folders; hostile ones are listed."""

import errno
import gzip
import io
import json
import os
import pickle
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from mcn_ext.data.store import Store, validate
from mcn_ext.evaluation.localization import load_steps
from tests.conftest import run, started, wait_for
from tests.test_prepare_sets import SET, Evil, clips, make_set, save


def member(tar, name, content):
    """Add a file of torch.save to a tar."""
    file = io.BytesIO()
    torch.save(content, file)
    entry = tarfile.TarInfo(name)
    entry.size = file.tell()
    file.seek(0)
    tar.addfile(entry, file)


def make_zoo(folder, n=8, seconds=40, width=16):
    """HTM-zoo's layout: tars of features in fp16, folders of what WhisperX says."""
    torch.manual_seed(0)
    rows = {f"{'-_'[i % 2]}id{i:07d}": torch.rand(seconds, width).half() for i in range(n)}
    for part in range(2):
        (folder / f"said/part{part}").mkdir(parents=True)
        (folder / "clip").mkdir(exist_ok=True)
        with tarfile.open(folder / f"clip/part{part}.tar", "w") as tar:
            for name in list(rows)[part::2]:
                member(tar, f"part{part}/{name}.pth.tar", rows[name])
                words = [{"word": "chop", "start": 1.0, "end": 1.5, "score": 0.9}, {"word": "2"}]
                segments = [
                    {"start": 1.0, "end": 4.0, "text": f" chop {name}", "words": words},
                    {"end": 9.0, "text": "it began nowhere", "words": []},
                    {"start": 5.0, "end": 9.0, "text": "now fry"},
                ]
                said = {"segments": segments, "word_segments": words, "language": "en"}
                said |= {"segments_native": [{"start": 0.0, "end": 9.0, "text": "no"}]}
                (folder / f"said/part{part}/{name}.json").write_text(json.dumps(said))
    return rows


def test_htm_zoo(convert, tmp_path):
    """Features in tars, sound in nested folders, no list; what it lacks is said."""
    rows = make_zoo(tmp_path)
    names = sorted(rows)
    (tmp_path / "beats/a/b").mkdir(parents=True)
    for name in names[1:]:
        np.savez(f"beats/a/b/{name}_beats.npz", features=np.full((80, 4), 0.5, np.float32))
    torch.save({"features": rows[names[0]], "at": 3}, "clip/z.pth.tar")  # no archive
    torch.save(torch.ones(40, 16), f"clip/{names[0]}.pt")  # takes the place of the tar's
    streams = ["--streams", "clip=clip:1", "beats=beats:2:audio"]
    said, skipped = convert("howto100m", "--captions", "said", *streams)
    assert (
        "8 of 9 videos, streams beats 4 (audio), clip 16 (video), 1 without beats; 1 skipped"
        in said
    )
    assert "z,no captions in said" in skipped
    assert "8 captions left out: 8 without 0 <= start < end" in said
    store = Store(tmp_path / "out.h5")
    validate(tmp_path / "out.h5")
    assert store.ids() == names and store.modalities == {"beats": "audio", "clip": "video"}
    assert store.rates == {"beats": 2.0, "clip": 1.0}
    assert (store.clips(0, "clip", [0], [99])[0] == 1).all()
    for i, name in list(enumerate(names))[1:]:
        np.testing.assert_array_equal(store.clips(i, "clip", [0], [99])[0], rows[name])
        assert store.caption_texts(i) == [f" chop {name}", "now fry"]
    with tarfile.open("one.tar", "w") as tar:
        for name in names[:3]:
            member(tar, f"{name}_clip.pt", rows[name].bfloat16())
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"x/{name}" for name in names) + "\n")
    words = ["--list", "list.csv", "--captions", "said", "--streams", "clip=one.tar:1"]
    said, skipped = convert("howto100m", *words, out="o.h5")
    assert "3 of 8 videos, streams clip 16 (video); 5 skipped" in said
    assert "no clip features of x/" in skipped


def expanded(n):
    return torch.ones(1, 16).expand(n, 16)


def edited(change):
    """A file of torch.save whose pickle is changed."""
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save(torch.ones(4, 16), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return file.getvalue()


def squeezed():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps([]) + b"\0" * 10**8)
    return file.getvalue()


def old_format():
    file = io.BytesIO()
    torch.save(torch.ones(4, 16), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


HOSTILE = {
    "code": (Evil(), "asks for posix.system"),
    "expanded": (expanded(10**12), "repeats its numbers"),
    "out of bounds": (
        edited(lambda p: p.replace(b"K\4K\x10\x86", b"K\5K\x10\x86")),
        "out of bounds",
    ),
    "gigabytes": (b"\x80\2cbuiltins\nbytearray\n\x8a\5\0\0\0\0\x10\x85R.", "builtins.bytearray"),
    "compressed": (squeezed(), "compressed"),
    "before 1.6": (old_format(), "since torch 1.6"),
    "damaged": (edited(lambda p: p).replace(b"\0\0\x80\x3f", b"\0\0\x80\x3e", 1), "CRC-32"),
    "sparse": (torch.eye(16).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
    "meta": (torch.empty(9, 16, device="meta"), "asks for torch._utils"),
    "quantized": (
        edited(lambda p: p.replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor")),
        "asks for torch._utils._rebuild_qtensor",
    ),
    "complex": (torch.ones(9, 16, dtype=torch.complex64), "asks for torch.ComplexFloatStorage"),
    "integer": (torch.ones(9, 16, dtype=torch.long), "int64 array"),
    "one axis": (torch.ones(16), "shape (16,)"),
    "three axes": (torch.ones(2, 9, 16), "shape (2, 9, 16)"),
    "empty": (torch.ones(0, 16), "ValueError"),
    "nan": (torch.full((9, 16), torch.nan), "NaN"),
    "beyond": (torch.full((9, 16), 1e9), "beyond fp16"),
    "a list": ([torch.ones(9, 16)], "holds a list"),
    "two tensors": ({"a": torch.ones(9, 16), "b": torch.ones(1)}, "expected features or arr_0"),
    "another width": (torch.ones(9, 15), "width 15"),
}


def test_hostile_tensors_and_members_are_listed(convert, tmp_path):
    rows = make_zoo(tmp_path)
    with tarfile.open("clip/part9.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo(f"link{int(kind)}.pt")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        sparse = tarfile.TarInfo("holes.pt")
        sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**15)}
        tar.addfile(sparse)
    for name, (content, _) in HOSTILE.items():
        if name == "gigabytes":
            content = edited(lambda p, content=content: content)
        if isinstance(content, bytes):
            (tmp_path / f"clip/{name}.pth").write_bytes(content)
        else:
            torch.save(content, f"clip/{name}.pth")
    said, skipped = convert("howto100m", "--captions", "said", "--streams", "clip=clip:1")
    assert f"8 of {11 + len(HOSTILE)} videos" in said
    assert Store(tmp_path / "out.h5").ids() == sorted(rows)
    listed = dict(line.split(",", 1) for line in skipped.splitlines())
    for name, (_, reason) in HOSTILE.items():
        assert reason in listed[name], (name, listed[name])
    for name in ("link1", "link2", "holes"):
        assert "a link or a sparse member" in listed[name]
    assert not (tmp_path / "executed").exists()


def test_streams_that_cannot_be_used(convert, tmp_path):
    make_zoo(tmp_path, n=4)
    whole = (tmp_path / "clip/part0.tar").read_bytes()
    for name in ("empty", "gz", "cut", "bad", "gzip", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "gz/part0.tar.gz").write_bytes(b"")
    (tmp_path / "gzip/part0.tar").write_bytes(gzip.compress(whole))
    (tmp_path / "cut/part0.tar").write_bytes(whole[:-12_000])
    (tmp_path / "two/part0.tar").write_bytes(2 * whole)
    start = whole.index(b"part0/", 600)
    (tmp_path / "bad/part0.tar").write_bytes(whole[:start] + b"?" + whole[start + 1 :])
    for spec, message in (
        ("clip=none:1", "none: no such file or folder"),
        ("clip=empty:1", "no readable features of any video; looked for ID_clip.npz, .*, ID.npz"),
        ("clip=gz:1", "part0.tar.gz: compressed.*gunzip"),
        ("clip=gzip:1", "part0.tar: not a whole, uncompressed tar"),
        ("clip=cut:1", "part0.tar: not a whole, uncompressed tar"),
        ("clip=bad:1", "part0.tar: not a whole.*no header and no end"),
        ("clip=two:1", "part0.tar: not a whole.*more behind its end, as of tars that were joined"),
        ("clip=clip:1:text", "expected NAME=DIR:RATE"),
        ("clip=clip:0:audio", "expected NAME=DIR:RATE"),
        ("clip=clip", "expected NAME=DIR:RATE"),
        ("a/b=clip:1", "expected NAME=DIR:RATE"),
        ("caption=clip:1", "caption is not a name for features"),
        ("davenet=clip:1:audio", "davenet is not a name for features"),
    ):
        with pytest.raises(SystemExit, match=f"(?s){message}"):
            convert("howto100m", "--captions", "said", "--streams", spec)
    with pytest.raises(SystemExit, match="clip is given twice"):
        convert("howto100m", "--captions", "said", "--streams", "clip=clip:1", "clip=clip:2")
    with pytest.raises(SystemExit, match="--list: give"):
        convert("howto100m", "--captions", "said", "--features", "clip")
    with pytest.raises(SystemExit, match="--features: give"):
        (tmp_path / "list.csv").write_text("path\nx\n")
        convert("howto100m", "--captions", "said", "--list", "list.csv")


@pytest.mark.slow
def test_a_killed_conversion_of_tars_is_resumed(convert, tmp_path):
    make_zoo(tmp_path, n=400, seconds=200, width=256)
    command = "-m mcn_ext.prepare howto100m --captions said --streams clip=clip:1 --shard-mib 2"
    with started(command, "--out killed.h5", cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(list(tmp_path.glob("killed.h5.parts/shard-*.h5"))) >= 3)
        process.kill()
        process.wait()
    assert not (tmp_path / "killed.h5").exists()
    done = run(command, "--out killed.h5", cwd=tmp_path)
    assert "400 of 400 videos" in done.stdout and "from an earlier, interrupted run" in done.stdout
    convert("howto100m", "--captions", "said", "--streams", "clip=clip:1")
    assert Store(tmp_path / "killed.h5").fingerprint() == Store(tmp_path / "out.h5").fingerprint()


def test_the_list_tells_which_of_two_files(convert, tmp_path, monkeypatch):
    """A copy in another folder, files of macOS; a folder that cannot be read."""
    for folder, value in (("a/x", 1.0), ("b/x/AAA", 2.0)):
        (tmp_path / "f" / folder).mkdir(parents=True)
        np.save(f"f/{folder}/AAA.npy", np.full((1, 3), value, np.float32))
    (tmp_path / "f/a/._BBB.npy").write_bytes(b"macOS")
    (tmp_path / "list.csv").write_text("path\nb/x/AAA\n")
    captions = tmp_path / "c.json"
    captions.write_text('{"AAA": {"start": [0], "end": [1], "text": ["chop"]}}')
    command = ["howto100m", "--captions", captions, "--streams", "my-clip=f:1"]
    said, skipped = convert(*command, "--list", "list.csv")
    assert "1 of 1 videos, streams my-clip 3 (video)" in said
    assert Store("out.h5").clips(0, "my-clip", [0], [1])[0].tolist() == [[2.0] * 3]
    convert(*command, out="all.h5")
    assert Store("all.h5").ids() == ["AAA"]
    assert Store("all.h5").clips(0, "my-clip", [0], [1])[0].tolist() == [[1.0] * 3]
    real = os.scandir

    def scandir(path):
        if str(path).endswith("b/x"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SystemExit, match="f/b/x: cannot be listed .Input/output error"):
        convert(*command, out="lost.h5")


def test_clips_with_streams(convert, tmp_path):
    items = clips(4)
    del items[1]["audio"], items[1]["2d"], items[1]["3d"]
    (tmp_path / "clip/deep").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    for i in (0, 1, 3):
        shape = (5,) if i == 3 else (7, 5)  # one vector of the whole clip is as good
        torch.save(torch.full(shape, float(i)), f"clip/deep/c{i}.pth.tar")
        np.save(f"more/c{i}_2d.npy", np.full((14, 6), i, np.float32))
    np.save("more/c2_2d.npy", np.ones((14, 6), np.float32))
    np.save("more/c0_beats.npy", np.ones((14, 3), np.float32))
    for item in items:
        item.pop("3d", None)
    streams = ["--streams", "clip=clip:1", "2d=more:2", "beats=more:2:audio"]
    said, listed = convert("youcook2", save(items), *streams)
    found = "3 of 4 clips, streams mel 40, 2d 6, beats 3 (audio), clip 5 (video), 1 without audio"
    assert found + ", 2 without beats" in said
    assert "c2,no clip features of c2 in clip" in listed
    store = Store(tmp_path / "out.h5")
    assert store.modalities == {"2d": "video", "beats": "audio", "clip": "video", "mel": "audio"}
    assert store.caption_times(1)[2].tolist() == [7.0]  # as long as its longest stream
    np.testing.assert_array_equal(store.clips(1, "clip", [0], [7])[0], np.full((7, 5), 1))
    np.testing.assert_array_equal(store.clips(2, "clip", [0], [7])[0], np.full((1, 5), 3))
    np.testing.assert_array_equal(store.clips(2, "2d", [0], [7])[0], np.full((14, 6), 3))


@pytest.mark.parametrize("kind", ["crosstask", "miningyoutube"])
def test_a_set_of_steps_with_streams_alone(convert, tmp_path, kind):
    make_set(tmp_path, by_task=kind == "crosstask")
    (tmp_path / "clip").mkdir()
    for i in range(3):
        torch.save({"x": torch.full((12 + i, 5), float(i))}, f"clip/v{i}.pt")
    words = [kind, *SET[:2], *SET[6:], "steps.json", "--streams", "clip=clip:1"]
    said, listed = convert(*words)
    assert (
        "3 of 4 videos, streams clip 5 (video); 1 skipped" in said and "no clip features" in listed
    )
    store = Store(tmp_path / "out.h5")
    np.testing.assert_array_equal(store.clips(2, "clip", [4], [9])[0], np.full((6, 5), 2))
    assert len(load_steps(tmp_path / "out.h5")["videos"]) == 4
