"""What goes into prepare comes out, or is named: items, streams, durations, space, a second run."""

import contextlib
import csv
import errno
import io
import os
import pickle
import re
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcn_ext import prepare
from mcn_ext.data import files, store_writer
from mcn_ext.data.store import Store, StoreError, StoreWriter, compare_durations, validate
from mcn_ext.data.unpickle import load_pickle
from mcn_ext.prepare import Skipped, videos
from mcn_ext.prepare.__main__ import main
from mcn_ext.store import main as describe
from tests.conftest import ROOT, STREAMS
from tests.test_prepare_sets import HOWTO, SET, clips, make_howto, make_set, save

QUICK = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
IDS = st.lists(
    st.sampled_from(
        ["x", "x#2", "x#3", 1, "1", 1.0, "1#2", "", None, True, "True", " x", "a\0b", "a b"]
        + ["\ud83d", "?", "\x1b[31m", "é", float("nan"), [1], "2"]
    ),
    min_size=1,
    max_size=12,
)
NAMES = st.lists(
    st.sampled_from(
        ["v0", "v1", "None/v0", "a/v0/", "", "/", "None/", " ", "gone", "v0#2", "\x1b"]
    ),
    min_size=1,
    max_size=8,
)


def listed(out="out.h5"):
    try:
        with open(f"{out}.skipped.csv", newline="") as file:
            return list(csv.reader(file))[1:]
    except FileNotFoundError:
        return []


# -------------------------------------------------------------------------------------- items


@pytest.mark.parametrize("kind", ["youcook2", "msrvtt"])
@given(IDS)
@QUICK
def test_every_clip_of_a_pickle_is_in_the_store_whatever_its_id(convert, kind, ids):
    items = clips(len(ids))
    for item, name in zip(items, ids, strict=True):
        item["id"] = name
    said, _ = convert(kind, save(items), "--overwrite")
    store = Store("out.h5")
    assert f"{len(ids)} of {len(ids)} clips" in said and "none skipped" in said
    assert [*store.texts()] == [f"step {i}" for i in range(len(ids))]
    assert len(set(store.ids())) == len(ids)


@pytest.mark.parametrize("kind", ["howto100m", "crosstask", "miningyoutube"])
@given(names=NAMES)
@QUICK
def test_every_row_of_a_list_is_in_the_store_or_listed(convert, tmp_path, kind, names):
    if not (tmp_path / "features").exists():
        make_set(tmp_path, by_task=kind == "crosstask")
        (tmp_path / "all.json").write_text(
            '{"v0": {"start": [1], "end": [2], "text": ["x"]}, "v1": []}'
        )
    task = {"howto100m": "", "miningyoutube": ""}.get(kind, ",23521")
    header = "path" if kind == "howto100m" else "video_id" + (task and ",task")
    rows = [f'"{name}"{task}' for name in names]
    (tmp_path / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "out.h5.skipped.csv").unlink(missing_ok=True)
    words = [*HOWTO, "all.json"] if kind == "howto100m" else [*SET, "steps.json"]
    words = words if kind == "howto100m" else [kind, *words]
    try:
        code = main([*words, "--out", "out.h5", "--overwrite"])
    except SystemExit as error:  # none can be used: the error says so
        assert (
            "lists no video" in str(error)
            or "of none of" in str(error)
            or "--features" in str(error)
        )
        return
    if code == 0:
        assert len(Store("out.h5")) + len(listed()) == len(names)
        assert len(set(Store("out.h5").ids())) == len(Store("out.h5"))


@pytest.fixture
def sound_alone(monkeypatch):
    """Files are not decoded; each is a second of sound, unless its name begins with bad."""

    def decoded(path, *_):
        if path.name.startswith("bad"):
            raise Skipped(f"{path}: no media")
        yield "mel", np.arange(4000, dtype=np.float16).reshape(100, 40) / -100

    monkeypatch.setattr(videos, "decode_apart", decoded)
    monkeypatch.setattr(videos, "_resnet", lambda *_: None)


FILES = [b"caf\xe9.mp4", b"caf\xe8.mp4", b"esc\x1b[31m.mp4", b"-dash.wav", b"--dash.wav"]
FILES += ["é.MKV".encode(), "é.mkv".encode(), b"a.mp4", b"a.mkv", b"sub/a.mp4", b"bad\x9b.wav"]
FILES += [b"new\nline.mp4", b"cr\rx.mp4", b"http:x.mp4", b"gone.mp4", b"\\xe9.mp4", b"notes.txt"]


@given(st.sets(st.sampled_from(FILES), min_size=1))
@QUICK
def test_every_media_file_is_in_the_store_or_listed(tmp_path_factory, sound_alone, capsys, names):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("media")
    (folder / "v/sub").mkdir(parents=True)
    (folder / "v/loop").symlink_to(folder / "v")
    for name in names:
        path = os.fsencode(folder) + b"/v/" + name
        os.symlink("nowhere", path) if name == b"gone.mp4" else open(path, "w").close()
    media = [name for name in names if not name.endswith(b".txt")]
    command = ["videos", str(folder / "v"), "--random_weights", "--out", str(folder / "o.h5")]
    if not media:
        with pytest.raises(SystemExit, match="a folder without a video"):
            main(command)
        return
    code = main(command)
    said, err = capsys.readouterr()
    ids = Store(folder / "o.h5").ids() if code == 0 else []
    assert len(ids) + len(listed(folder / "o.h5")) == len(media) and len(set(ids)) == len(ids)
    assert (".txt 1" in err) == (b"notes.txt" in names)
    text = said + (folder / "o.h5.skipped.csv").read_text() if listed(folder / "o.h5") else said
    assert "\x1b" not in text and "\x9b" not in text
    assert {name for name in ("-dash", "--dash") if name.encode() + b".wav" in names} <= {*ids}
    assert (b"caf\xe9.mp4" in names) == ("caf\\xe9" in ids)


def test_linked_folders_are_read_once(tmp_path):
    for name in ("v", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.MP4").touch()
    for link in ("one", "two"):
        (tmp_path / "v" / link).symlink_to(tmp_path / "other")
    found = videos.find_videos([tmp_path / "v"])
    assert sorted(path.name for path in found) == ["other.MP4", "v.MP4"]


def test_a_run_whose_input_has_changed_is_not_resumed(tmp_path):
    def writer():
        return StoreWriter(tmp_path / "s", {"2d": STREAMS["2d"]}, "test", shard_mib=1e-9)

    writer().add("gone", {"2d": np.ones((3, 12))}, [0], [1], ["x"])
    with pytest.raises(StoreError, match="begun with 1 videos that are not in the input now.*gone"):
        prepare.convert(writer(), prepare.SkipList(tmp_path / "s"), {"new": None}, None)


# ------------------------------------------------------------------------- streams, durations


def change(folder, suffix, how):
    """Every file of a stream, as ``how`` changes its array; None removes it."""
    for path in folder.glob(f"features/**/*_{suffix}.npz"):
        with np.load(path) as file:
            (key,) = file
            array = file[key]
        changed = how(array)
        np.savez(path, **(changed if isinstance(changed, dict) else {key: changed}))


@pytest.mark.parametrize(
    "suffix,how",
    [
        ("2d", lambda a: a[:, :, None, None]),
        ("2d", lambda a: a[None]),
        ("2d", lambda a: a[0]),
        ("2d", lambda a: (100 * a).astype(np.int32)),
        ("2d", lambda a: a.astype(str)),
        ("3d", lambda a: a.astype(np.float32) * 1e6),
        ("3d", lambda a: a * np.nan),
        ("3d", lambda a: a[:0]),
        ("spec", lambda a: {"mel": a}),
        ("spec", lambda a: a[:, :0]),
        ("spec", lambda a: a.T),
        ("spec", lambda a: a[:39]),
    ],
)
def test_a_stream_of_which_no_file_can_be_read_is_an_error(convert, tmp_path, suffix, how):
    make_howto(tmp_path, n=3)
    change(tmp_path, suffix, how)
    with pytest.raises(SystemExit, match="none can be read, the first because of|bands"):
        convert(*HOWTO, "caption.pickle")
    for path in tmp_path.glob(f"features/**/*_{suffix}.npz"):
        path.unlink()  # as the error says
    assert "3 of 3 videos" in convert(*HOWTO, "caption.pickle")[0]


def test_a_stream_that_appears_late_is_not_dropped(convert, tmp_path, monkeypatch):
    make_howto(tmp_path, n=3)
    paths = sorted(tmp_path.glob("features/**/*_3d.npz"))
    for path in paths[:2]:
        path.unlink()
    rows = (tmp_path / "list.csv").read_text().splitlines()
    absent = [f"topic/none{i}" for i in range(1000)]
    (tmp_path / "list.csv").write_text("\n".join([*rows[:3], *absent, rows[3]]) + "\n")
    said, skipped = convert(*HOWTO, "caption.pickle")
    assert "2 of 1003 videos" in said and "have no 3d file; list this one before" in skipped


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (1,), (0,)])
@pytest.mark.parametrize("kind", ["youcook2", "msrvtt"])
def test_pooled_features_of_another_shape_are_an_error(convert, kind, shape):
    items = clips(3, **{"3d": np.ones(shape)})
    if shape == (1,):  # one number is a width, too
        assert "3d 1" in convert(kind, save(items))[0]
        return
    with pytest.raises(SystemExit, match=r"clips.pkl: .*3d have the shape .*in most clips"):
        convert(kind, save(items))


RATES = [
    ("2d", lambda a: np.repeat(a, 2, 0), "stream 2d lasts 2 times"),
    ("2d", lambda a: a[::2], "stream 2d lasts 0.5 times .* has it 0.5 rows a second, not 1"),
    ("3d", lambda a: np.repeat(a, 2, 0)[: int(len(a) * 1.2)], "stream 3d lasts 1.2 times"),
    ("spec", lambda a: np.repeat(a, 2, 1)[:, : int(a.shape[1] * 1.378)], "stream mel lasts 1.38"),
    ("spec", lambda a: a[:, :1024], "stream mel lasts 0.341 .* or is it cut off"),
    ("2d", lambda a: a[:-1], None),
    ("3d", lambda a: np.concatenate([a, a[:1]]), None),
    ("spec", lambda a: np.concatenate([a, a[:, :150]], 1), None),
]


@pytest.mark.parametrize("suffix,how,message", RATES)
def test_durations_that_disagree_are_named(convert, tmp_path, capsys, suffix, how, message):
    make_howto(tmp_path, n=5)
    change(tmp_path, suffix, how)
    said, _ = convert(*HOWTO, "caption.pickle")
    table = tmp_path / "out.h5.durations.csv"
    if message is None:
        assert "WARNING" not in said and not table.exists()
        return
    assert re.search(message, said) and "videos durations disagree, listed in" in said
    assert len(table.read_text().splitlines()) >= 5
    assert describe(["out.h5"]) == 0 and re.search(message, capsys.readouterr().out)


def test_one_video_that_disagrees_and_captions_in_other_units(convert, tmp_path):
    paths, captions = make_howto(tmp_path, n=5)
    file = tmp_path / "features" / paths[3] / "vid00000003_2d.npz"
    np.savez(file, features=np.ones((60, 12), np.float32))
    said, _ = convert(*HOWTO, "caption.pickle")
    assert "WARNING: in 1 videos durations disagree" in said and "lasts" not in said
    table = (tmp_path / "out.h5.durations.csv").read_text()
    assert 'vid00000003,"2d 60 s, 3d 30 s, mel 30 s, captions 22.5 s"' in table
    for factor in (1000, 1 / 60):
        other = {
            name: c | {key: [factor * s for s in c[key]] for key in ("start", "end")}
            for name, c in captions.items()
        }
        (tmp_path / "caption.pickle").write_bytes(pickle.dumps(other))
        said, _ = convert(*HOWTO, "caption.pickle", "--overwrite")
        assert ("captions end after" in said) == (factor == 1000 or factor < 0.03), said
    (tmp_path / "caption.pickle").write_bytes(pickle.dumps(captions))
    np.savez(file, features=np.ones((30, 12), np.float32))
    convert(*HOWTO, "caption.pickle", "--overwrite")
    assert not (tmp_path / "out.h5.durations.csv").exists()


def test_durations_of_videos_without_streams_or_captions(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", STREAMS, "test", shard_mib=1e-4)
    writer.add("none", {}, [], [], [])
    writer.add("one", {"2d": np.ones((30, 12))}, [], [], [])
    writer.add("two", {"2d": np.ones((30, 12)), "mel": np.ones((9000, 40))}, [0], [29], ["x"])
    notices, misfits = compare_durations(Store(writer.close()))
    assert [name for name, _ in misfits] == ["two"] and "stream mel lasts 3 times" in notices[0]


# --------------------------------------------------------------------- space, locks, the machine


class SmallDisk(io.FileIO):
    """Full after ``room`` bytes."""

    room = 0

    def write(self, data):
        data = memoryview(data).cast("B")
        if self.tell() >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[: self.room - self.tell()])


@pytest.mark.parametrize("shard_mib", [512, 0.2])
def test_a_full_disk_is_an_error_and_the_run_resumes(tmp_path, monkeypatch, shard_mib):
    """With HDF5 itself writing, the process crashes here."""

    def write(out):
        writer = StoreWriter(out, STREAMS, "test", shard_mib=shard_mib)
        for i in range(6):
            if f"v{i}" not in writer.done:
                mel = np.full((2000, 40), -float(i))
                text = [f"{'word ' * 30}{k}" for k in range(100)]
                writer.add(f"v{i}", {"mel": mel}, np.arange(100), np.arange(100) + 1, text)
        return writer.close()

    whole = write(tmp_path / "whole.h5")

    class File(store_writer._File, SmallDisk):
        pass

    monkeypatch.setattr(store_writer, "_File", File)
    for part in (0, 0.01, 0.1, 0.4, 0.8, 0.9, 0.97, 0.999):
        SmallDisk.room = int(part * whole.stat().st_size)
        with pytest.raises(SystemExit, match="could not be written .No space left on device"):
            write(tmp_path / "s.h5")
        assert not (tmp_path / "s.h5").exists()
    SmallDisk.room = 10**9
    assert write(tmp_path / "s.h5").exists() and validate(tmp_path / "s.h5")["videos"] == 6
    with h5py.File(whole) as a, h5py.File(tmp_path / "s.h5") as b:
        assert (a["caption/text"][:] == b["caption/text"][:]).all()


def test_too_many_open_files_end_the_run(convert, tmp_path, monkeypatch):
    make_howto(tmp_path, n=3)
    real, calls = np.load, []

    def load(path, **options):
        calls.append(path)
        if len(calls) > 9:  # beyond what the widths are taken from
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, **options)

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(SystemExit, match="Too many open files.*run the same command again"):
        convert(*HOWTO, "caption.pickle")
    monkeypatch.setattr(np, "load", real)
    assert "3 of 3 videos" in convert(*HOWTO, "caption.pickle")[0]


@contextlib.contextmanager
def other_process(path):
    """A process that has a lock until its input ends."""
    code = "import sys; from pathlib import Path; from mcn_ext.data import files; "
    code += f"files.lock(Path({str(path)!r})); print('held', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process


def test_two_runs_into_one_store_the_second_is_refused(convert, tmp_path):
    make_howto(tmp_path, n=3)
    with other_process(tmp_path / "out.h5") as other:
        about = (
            rf"out.h5: another run is writing here \(host .*, process {other.pid}, since \d{{4}}-"
        )
        with pytest.raises(SystemExit, match=about):
            convert(*HOWTO, "caption.pickle")
        assert not (tmp_path / "out.h5.parts").exists()
        other.kill()
    assert "3 of 3 videos" in convert(*HOWTO, "caption.pickle")[0]  # its process is gone


def test_a_run_that_waits_goes_on_when_the_other_is_done(tmp_path):
    with other_process(tmp_path / "x") as other:
        end = threading.Timer(0.2, other.stdin.close)
        end.start()
        files.lock(tmp_path / "x", wait=True)
        assert end.finished.is_set()


# ----------------------------------------------------------------------------- odds and ends


def test_no_id_steers_the_terminal(convert, tmp_path, capsys):
    bad = "\x1b]0;owned\x07\x9b31m\r"
    items = clips(3)
    for item in items[1:]:
        item["id"] = bad
    items[2]["caption"] = [bad]
    said, skipped = convert("youcook2", save(items))
    assert "2 of 3" in said and "\\x1b]0;owned\\x07\\x9b31m\\r" in said + skipped
    assert not set("\x1b\x07\x9b\r") & set(said + skipped)
    (tmp_path / bad).write_text("x")
    assert describe([str(tmp_path / bad)]) == 1
    assert not set("\x1b\x07\x9b\r") & set(capsys.readouterr().err)
    assert Store("out.h5").ids()[1] == bad  # kept as they are


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_console_can_show_any_name(tmp_path, encoding):
    writer = StoreWriter(tmp_path / "é.h5", {"2d": STREAMS["2d"]}, "名前")
    writer.add("x", {"2d": np.ones((3, 12))}, [0], [1], ["x"])
    store = writer.close()
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mcn_ext.store", str(store)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0 and b"valid mcn-store" in done.stdout


def test_tensors_that_were_saved_on_a_gpu(tmp_path):
    class Storage:
        def __reduce__(self):
            function, (data,) = torch.arange(3.0).storage().__reduce__()
            cpu, gpu = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"
            assert cpu in data
            return function, (data.replace(cpu, gpu),)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, (3,), (1,), False, {})

    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"2d": Tensor()}))
    assert load_pickle(tmp_path / "x.pkl")["2d"].tolist() == [0, 1, 2]


def test_a_folder_of_shards_that_is_being_written_is_no_store(tmp_path):
    writer = StoreWriter(tmp_path / "shards", STREAMS, "test", shard_mib=0)
    for name in "ab":
        writer.add(name, {"2d": np.ones((2, 12)), "3d": None, "mel": None}, [0], [1], ["x"])
    with pytest.raises(StoreError, match="has not finished; run the same"):
        Store(tmp_path / "shards")
    assert len(Store(writer.close())) == 2


def test_overwrite_replaces_a_store_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "shards").symlink_to(tmp_path / "disk")
    for text in ("old", "new"):
        writer = StoreWriter(tmp_path / "shards", STREAMS, "test", overwrite=True)
        writer.add("a", {"2d": np.ones((2, 12)), "3d": None, "mel": None}, [0], [1], [text])
        assert Store(writer.close()).caption_texts(0) == [text]
    (tmp_path / "disk/mine.txt").touch()
    with pytest.raises(StoreError, match="mine.txt, which is not part of a store"):
        StoreWriter(tmp_path / "shards", STREAMS, "test", overwrite=True)
    assert len(Store(tmp_path / "shards")) == 1
