"""evaluate.py, search and report: what they open, which run they take, what they print."""

import json
import os
import shlex

import numpy as np
import pytest
import torch

from mcn_ext.console import printable
from mcn_ext.data.store import StoreWriter
from mcn_ext.data.words import WordVectors
from mcn_ext.model import MCN
from mcn_ext.prepare.decode import open_media
from mcn_ext.train import checkpoint
from tests.conftest import STREAMS, WORDS, call, run, write_store

SIZES = {"modalities": "AVT", "video_dims": {"2d": 12, "3d": 6}, "word_dim": 10, "embd_dim": 8}
SIZES |= {"recon_dim": 8, "audio_width": 0.0625}
FLAGS = {"data": "data/demo/train.h5", "demo": False, "word2vec": None, "similarity": "cosine"}
FLAGS |= {"temperature": 0.1, "min_time": 1.0, "audio_frames": 200}


def make_run(folder, **flags):
    """A run folder with weights drawn at random, as training would leave it."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    content = {"mcn_checkpoint": 1, "args": FLAGS | flags, "sizes": SIZES, "step": 1}
    content |= {"complete": True, "run_id": "x", "model": MCN(**SIZES).state_dict()}
    checkpoint.write(folder / "checkpoint.pt", content)
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 10))
    WordVectors(WORDS, vectors, "test").save(folder / "words.npz")
    (folder / "args.json").write_text(json.dumps(content["args"]))
    return folder


# ------------------------------------------------------------------------------ which run, where


def test_where_it_looked_is_said_and_the_report_is_named(tmp_path, eval_path):
    def evaluate(*words, check=False):
        return call("evaluate.py", *words, "--device", "cpu", cwd=tmp_path, check=check)

    assert f"no run in {tmp_path / 'runs'};" in evaluate("--youcook2", eval_path).stderr
    make_run(tmp_path / "runs/stage1-AVT")
    for flag in ("--youcook2", "--msrvtt", "--crosstask", "--miningyoutube", "--moments"):
        assert str(tmp_path / "data/typo.h5") in evaluate(flag, "data/typo.h5").stderr
    assert str(tmp_path / "data/youcook2.h5") in evaluate("--youcook2").stderr
    done = evaluate("--youcook2", eval_path, check=True)
    assert f"the newest run, {tmp_path / 'runs/stage1-AVT'}" in done.stdout
    assert "python -m mcn_ext.report runs/stage1-AVT" in done.stdout


def test_a_demo_run_is_no_default_beside_real_data(tmp_path, eval_path):
    def evaluate(*words):
        return call("evaluate.py", "--youcook2", *words, cwd=tmp_path, check=False)

    make_run(tmp_path / "runs/stage2-AV_T-demo", demo=True)
    # The demo data are gone: how to make them, not YouCook2.
    assert "mcn_ext.prepare demo --out data/demo" in evaluate().stderr
    assert "of the demo data, which says nothing about this store" in evaluate(eval_path).stderr
    assert "text->video" in evaluate(eval_path, "--run", "runs/stage2-AV_T-demo").stdout  # named
    (tmp_path / "data").mkdir()
    for name in ("howto100m.h5", "youcook2.h5", "videos.h5"):
        (tmp_path / "data" / name).touch()
        assert f"but stage2-AV_T-demo, of the demo data, and there is data/{name}" in (
            evaluate().stderr
        )
        (tmp_path / "data" / name).unlink()
    make_run(tmp_path / "runs/stage1-AVT")
    os.utime(tmp_path / "runs/stage1-AVT/checkpoint.pt", (0, 0))  # an older one, but of real data
    assert "the newest run" in (done := evaluate(eval_path).stdout) and "stage1-AVT: " in done


# ------------------------------------------------------------------------------- how much is there


@pytest.mark.parametrize("lacking, stops", [(0.0, False), (0.6, False), (0.95, True)])
@pytest.mark.parametrize("what", ["audio", "video", "text"])
def test_what_is_there_is_said_before_numbers_are(tmp_path, monkeypatch, what, lacking, stops):
    rng = np.random.default_rng(0)
    writer = StoreWriter(tmp_path / "e.h5", STREAMS, "test")
    for i in range(40):
        rows = {name: rng.normal(size=(300, spec["dim"])) for name, spec in STREAMS.items()}
        gone = i < 40 * lacking
        if gone and what != "text":
            rows["mel" if what == "audio" else "3d"] = np.zeros((300, 40 if what == "audio" else 6))
        writer.add(str(i), rows, [0], [2], ["quux" if gone and what == "text" else "chop"])
    writer.close()
    make_run(tmp_path / "run")
    command = ("evaluate.py", "--youcook2", tmp_path / "e.h5", "--run", "run", "--device", "cpu")
    done = call(*command, cwd=tmp_path, check=False)
    n = round(40 * (1 - lacking))
    assert f"{what} in {n} of 40 ({n / 40:.0%})" in done.stdout
    only = f"only {1 - lacking:.0%} with {what}"
    assert (f"WARNING: {only}" in done.stdout) == (lacking == 0.6)
    assert (f"{only}: too few" in done.stderr) == stops == ("R@1" not in done.stdout)
    monkeypatch.setenv("MCN_ANYWAY", "1")
    assert not stops or "R@1" in call(*command, cwd=tmp_path).stdout


def test_captions_of_no_length_are_counted(tmp_path):
    writer = StoreWriter(tmp_path / "s.h5", STREAMS, "test")
    shapes = {name: (round(4 * spec["rate_hz"]), spec["dim"]) for name, spec in STREAMS.items()}
    rows = {name: np.random.default_rng(0).random(shape) for name, shape in shapes.items()}
    writer.add("a", rows, [0, 1, 2], [2, 1, 2], ["chop", "fry", "boil"])
    writer.close()
    make_run(tmp_path / "run")
    command = ("evaluate.py", "--moments", tmp_path / "s.h5", "--run", "run", "--device", "cpu")
    done = call(*command, cwd=tmp_path)
    assert "2 captions of no length: left out" in done.stdout and "n = 1" in done.stdout


# ------------------------------------------------------------------------------------ the terminal

UGLY = "chop \x1b[31mred\x1b]0;t\x07 \x9b2J \r\u202egnp.\u2066 日本 é 🥚"


def test_printable():
    got = printable(UGLY + "\0\ud800\tb\nc")
    assert not set(got) & set("\x1b\x07\x9b\r\0\u202e\u2066\ud800") and "日本 é 🥚" in got
    assert got.endswith("\\ud800\tb\nc") and "\\x1b[31m" in got


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_text_of_the_data_ends_a_command_or_steers_the_terminal(tmp_path, encoding):
    store = write_store(tmp_path / "v\x1b[0m.h5", 3, caption="{} " + UGLY)
    make_run(tmp_path / "run")
    env = {"PYTHONIOENCODING": encoding}
    common = ("--run", "run", "--device", "cpu")
    commands = [
        ("evaluate.py", "--moments", store, *common),
        ("-m", "mcn_ext.search", "--store", store, "--json", "f.json", *common, shlex.quote(UGLY)),
        (
            "-m mcn_ext.search --by embeddings",
            "'\x1b[2J é nothing' --store",
            store,
            *common,
        ),  # fails
        ("evaluate.py", "--youcook2", f"{store}\x1b[2J", *common),  # fails
        ("-m", "mcn_ext.report", "run\x1b[2J"),  # fails
    ]
    for command in commands:
        done = run(*command, cwd=tmp_path, env=env, check=False)
        fails = command in commands[2:]
        assert bool(done.returncode) == fails and "Traceback" not in done.stderr, done.stderr
        assert not set(done.stdout + done.stderr.replace("\r", "")) & set("\x1b\x07\x9b\r\u202e")
        assert "\\x1b" in done.stdout + done.stderr
    found = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert "日本" in next(iter(found.values()))[0]["words"]


# ------------------------------------------------------------------------------------------- media


def write_video(path):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_media_are_files_below_the_folder_and_nothing_else(tmp_path):
    from mcn_ext.prepare.decode import frame_at
    from mcn_ext.prepare.videos import find_media

    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for name in ("media/a.mkv", "media/sub/b.MP4", "outside.mkv", "media/http:127.0.0.1:9.mp4"):
        write_video(tmp_path / name)
    write_video(folder / "-y*[0].mp4")
    (folder / "link.mkv").symlink_to(tmp_path / "outside.mkv")
    (folder / "inner.mkv").symlink_to(folder / "a.mkv")
    (folder / "loop.mkv").symlink_to(folder / "loop.mkv")
    (folder / "away").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "list.m3u8").write_text("#EXTM3U\n")
    (folder / "dir.mp4").mkdir()
    media = find_media(folder)
    assert media.keys() == {"a", "b", "http:127.0.0.1:9", "-y*[0]", "inner"}
    assert all(frame_at(files, 1) is not None for files in media.values())
    for name in ("../outside", str(tmp_path / "outside"), "sub/b", "*", "?", "", ".", "list"):
        assert frame_at(media.get(name, []), 1) is None


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{good}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {good}\n",
        "ffconcat version 1.0\nfile http://127.0.0.1:9/x\n",
        "# VobSub index file, v7\n",
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="x"></MPD>',
        "not a video",
        "",
    ],
)
def test_playlists_are_not_followed(tmp_path, content):
    from mcn_ext.prepare import Skipped

    write_video(tmp_path / "good.mkv")
    path = tmp_path / "x.mp4"
    path.write_text(content.format(good=tmp_path / "good.mkv"))
    with pytest.raises(Skipped, match="x.mp4: "):
        open_media(path)
    open_media(tmp_path / "good.mkv").close()
