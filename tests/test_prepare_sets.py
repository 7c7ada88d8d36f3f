"""Converting the field's own files: HowTo100M, YouCook2, MSR-VTT, CrossTask, MiningYouTube."""

import json
import os
import pickle
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcn_ext.data.store import Store, validate
from mcn_ext.data.store_writer import StoreWriter
from mcn_ext.evaluation.localization import load_steps
from mcn_ext.prepare.__main__ import main
from tests.conftest import ROOT, STREAMS, run

RATES = {"2d": 1.0, "3d": 1.5, "mel": 100.0}
QUICK = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# What a damaged or hostile pickle may have in the place of numbers and texts.
VALUES = st.one_of(
    st.none(),
    st.floats(),
    st.integers(-(10**400), 10**400),
    st.text(max_size=5),
    st.lists(st.floats(width=32), max_size=4),
    st.sampled_from([{}, [["nested"]], "\ud83d", "a\0b", np.ones((2, 2)), np.array(1.0)]),
    st.sampled_from([torch.ones(12), torch.ones(40, 5), np.full((40, 3), 1e30), b"bytes"]),
)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


# ---------------------------------------------------------------------------------- HowTo100M

HOWTO = ["howto100m", "--list", "list.csv", "--features", "features", "--captions"]


def make_howto(folder, n=6):
    """A small feature folder in the published layout; video 1 has no sound."""
    rng = np.random.default_rng(0)
    captions, paths = {}, []
    for i in range(n):
        name = f"vid{i:08d}"
        paths.append(f"Food/Cakes/{name}")
        place = folder / "features" / paths[-1]
        place.mkdir(parents=True)
        np.savez(place / f"{name}_2d.npz", features=rng.random((30, 12)).astype(np.float16))
        np.savez_compressed(place / f"{name}_3d.npz", features=rng.random((45, 6), np.float32))
        if i != 1:
            mel = rng.uniform(-80, 0, (40, 3000)).astype(np.float16)
            np.savez(place / f"{name}_spec.npz", arr_0=mel)
        text = ["chop the onion", "now fry", "egg"]
        captions[name] = {"start": [1.0, 5.0, 20.0], "end": [3.0, 9.0, 22.5], "text": text}
    (folder / "list.csv").write_text("path\nNone/" + "\n".join(paths) + "\n")
    (folder / "caption.pickle").write_bytes(pickle.dumps(captions))
    return paths, captions


def test_howto100m(convert, tmp_path):
    make_howto(tmp_path)
    said, _ = convert(*HOWTO, "caption.pickle")
    assert "6 of 6 videos, streams 2d 12, 3d 6, mel 40, 1 without audio; none skipped" in said
    store = Store(tmp_path / "out.h5")
    assert store.rates == RATES
    with np.load("features/Food/Cakes/vid00000003/vid00000003_spec.npz") as f:
        np.testing.assert_array_equal(store.clips(3, "mel", [5.0], [9.0])[0], f["arr_0"].T[500:901])
    assert store.caption_texts(3) == ["chop the onion", "now fry", "egg"]
    assert len(store.clips(1, "mel", [0.0], [9.0])[0]) == 0
    validate(tmp_path / "out.h5")


def test_corrupt_videos_are_skipped_counted_and_listed(convert, tmp_path):
    paths, captions = make_howto(tmp_path, n=12)

    def file(i, kind):
        return tmp_path / "features" / paths[i] / f"vid{i:08d}_{kind}.npz"

    file(2, "2d").write_bytes(file(2, "2d").read_bytes()[:300])
    file(3, "3d").write_bytes(b"")
    np.savez(file(4, "2d"), features=np.full((9, 12), np.nan, np.float32))
    np.savez(file(5, "2d"), features=np.ones((9, 13), np.float32))
    np.savez(file(6, "2d"), wrong_key=np.ones((9, 12)))
    np.savez(file(7, "2d"), features=np.array([[Evil()]], dtype=object))
    file(8, "2d").unlink()
    flipped = bytearray(file(9, "3d").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    file(9, "3d").write_bytes(bytes(flipped))
    del captions["vid00000010"]
    captions["vid00000011"] = {"start": [5.0, -3.0], "end": [2.0, -1.0], "text": ["a", "b"]}
    (tmp_path / "caption.pickle").write_bytes(pickle.dumps(captions))
    with open(tmp_path / "list.csv", "a") as f:
        f.write("Food/Cakes/vid00000001\n")
    said, listed = convert(*HOWTO, "caption.pickle")
    assert "2 of 13 videos" in said and "11 skipped" in said
    assert all(f"vid{i:08d}" in listed for i in range(2, 12))
    for reason in ("BadZipFile", "NaN", "width 13", "wrong_key", "Object arrays", "no 2d features"):
        assert reason in listed, reason
    for reason in ("no captions", "twice in", "0 <= start < end"):
        assert reason in listed, reason
    assert Store(tmp_path / "out.h5").ids() == ["vid00000000", "vid00000001"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layout", ["flat", "arr_0"])
def test_the_other_layouts(convert, tmp_path, layout):
    paths, captions = make_howto(tmp_path, n=3)
    (tmp_path / "caption.json").write_text(json.dumps(captions))
    for old in list(tmp_path.glob("features/**/*.npz")):
        if layout == "flat":
            old.rename(old.parent.parent / old.name)
        else:
            with np.load(old) as file:
                (array,) = file.values()
            np.savez(old, arr_0=array)
    assert "3 of 3 videos" in convert(*HOWTO, "caption.json")[0]
    assert Store(tmp_path / "out.h5").caption_texts(2)[1] == "now fry"


@pytest.mark.slow
def test_a_killed_conversion_goes_on_where_it_was(convert, tmp_path):
    make_howto(tmp_path, n=400)
    command = ["-m", "mcn_ext.prepare", *HOWTO, "caption.pickle", "--shard-mib", "2"]
    command += ["--out", "killed.h5"]
    env = {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command], env={**os.environ, **env}, stderr=subprocess.DEVNULL
    )
    while len(list(tmp_path.glob("killed.h5.parts/shard-*"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed.h5").exists()
    done = run(*command, cwd=tmp_path, env=env)
    assert "400 of 400 videos" in done.stdout and "from an earlier, interrupted run" in done.stdout
    convert(*HOWTO, "caption.pickle")
    with h5py.File("killed.h5") as resumed, h5py.File("out.h5") as at_once:
        for name in ("video/id", "2d/data", "3d/data", "mel/data", "mel/offset", "caption/text"):
            assert (resumed[name][:] == at_once[name][:]).all(), name
    # Other inputs under the same name are not mixed in.
    other = StoreWriter(tmp_path / "other.h5", {"2d": STREAMS["2d"]}, "something else")
    other.lock.close()  # as if its process had ended
    command[-1] = "other.h5"
    failed = run(*command, cwd=tmp_path, check=False, env=env)
    assert failed.returncode == 1 and "begun from other inputs" in failed.stderr


@pytest.mark.slow
def test_real_recordings_convert(convert, tmp_path, digits):
    folders = ["--list", digits / "videopaths.txt", "--features", digits / "features"]
    said, _ = convert("howto100m", *folders, "--captions", digits / "caption.pickle")
    assert "120 of 120 videos" in said and "none skipped" in said
    assert validate(tmp_path / "out.h5")["captions"] == 1396
    assert "385 of 385 clips" in convert("youcook2", digits / "val_audio.pkl", out="val.h5")[0]


# -------------------------------------------------------------------------- YouCook2 and MSR-VTT


def clips(n, **values):
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"c{i}",
            "caption": f"step {i}",
            "2d": rng.random(12).astype(np.float32),
            "3d": rng.random(6),
            "audio": torch.rand(40, 200 + i),
        }
        | values
        for i in range(n)
    ]


def save(items):
    with open("clips.pkl", "wb") as file:
        pickle.dump(items, file)
    return "clips.pkl"


def test_youcook2(convert, tmp_path):
    items = clips(6, id="GLd3aX16zBg")
    items[1]["audio"] = None
    items[2]["2d"] = np.full(12, np.nan)
    items[3].pop("3d")
    items[4]["caption"] = ["fry", "boil"]
    items += [{"id": "no words", "2d": items[0]["2d"], "3d": items[0]["3d"]}, "no dictionary"]
    said, listed = convert("youcook2", save(items))
    assert "3 of 8 clips, streams 2d 12, 3d 6, mel 40, 1 without audio; 5 skipped" in said
    assert "no words,no caption in it" in listed and "a list where a text is expected" in listed
    store = Store(tmp_path / "out.h5")
    assert store.ids() == ["GLd3aX16zBg", "GLd3aX16zBg#2", "GLd3aX16zBg#6"]
    assert [store.caption_texts(i) for i in range(3)] == [["step 0"], ["step 1"], ["step 5"]]
    end = store.caption_times(0)[2]
    np.testing.assert_allclose(store.clips(0, "2d", [0], end)[0][0], items[0]["2d"], rtol=1e-3)
    assert len(store.clips(2, "mel", [0.0], store.caption_times(2)[2])[0]) == 205


def test_msrvtt_for_evaluation(convert, tmp_path):
    items = clips(4, eval_caption="a man cooks", caption=["not", "these"])
    for item in items:
        item["2d_pooled"], item["3d_pooled"] = item.pop("2d"), item.pop("3d")
        item["2d"], item["3d"] = np.ones((9, 12)), np.ones((13, 6))
    del items[1]["audio"]
    items[2]["2d"] = items[2].pop("2d_pooled")  # pooled under the other name
    items[3].pop("3d_pooled")  # and not pooled under the other: skipped
    said, listed = convert("msrvtt", save(items))
    assert "3 of 4 clips, streams 2d 12, 3d 6, mel 40, 1 without audio; 1 skipped" in said
    assert "3d has shape (13, 6), the other clips have (6,)" in listed
    store = Store(tmp_path / "out.h5")
    assert "MSR-VTT" in store.source and store.caption_texts(1) == ["a man cooks"]
    for i, key in ((0, "2d_pooled"), (2, "2d")):
        row = store.clips(i, "2d", [0], [1])[0][0]
        np.testing.assert_allclose(row, items[i][key], rtol=1e-3)
    assert store.caption_times(1)[2].tolist() == [1.0]


def test_msrvtt_for_training_keeps_every_caption(convert, tmp_path):
    items = clips(4, caption=["said 0", "said 1"])
    items[1]["caption"] = "one alone"
    items[2]["caption"] = []
    items[3]["caption"] = ["fine", ["nested"]]
    said, listed = convert("msrvtt", save(items))
    assert "2 of 4 clips" in said and "empty list" in listed and "text is expected" in listed
    store = Store(tmp_path / "out.h5")
    assert store.caption_texts(0) == ["said 0", "said 1"]
    assert store.caption_texts(1) == ["one alone"]
    assert np.stack(store.caption_times(0)[1:]).tolist() == [[0, 0], [2, 2]]


def test_pickles_of_something_else(convert, tmp_path, capsys):
    for items, message in (
        ({"a": 1}, "2d_pooled, 3d_pooled, audio, eval_caption or caption, id"),
        ([{"caption": "x"}], "no clip has a pooled feature '2d_pooled' or"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert("msrvtt", save(items))
    with pytest.raises(SystemExit, match="none.pkl: no such file; expected MSR-VTT's"):
        convert("msrvtt", "none.pkl")
    assert main(["msrvtt", save(clips(1, x=Evil())), "--out", "o.h5"]) == 1
    assert "clips.pkl: refused" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@given(st.sampled_from(["2d", "3d", "audio", "caption", "id"]), VALUES)
@QUICK
def test_any_clip_is_kept_or_listed(convert, tmp_path, key, value):
    items = clips(3)
    items[1][key] = value
    said, _ = convert("youcook2", save(items), "--overwrite")
    assert "3 of 3 clips" in said or "2 of 3 clips" in said and "1 skipped" in said
    validate(tmp_path / "out.h5")


# ------------------------------------------------------------------- CrossTask and MiningYouTube

STEPS = {"23521": ["pour egg", "flip pancake", "add jam"], "16815": ["jack up car", "fix tire"]}
RELEASE = """23521
Make Jello Shots
https://www.wikihow.com/Make-Jello-Shots
3
pour egg,flip pancake,add jam

16815
Change a Tire
https://www.wikihow.com/Change-a-Tire
2
jack up car,fix tire
"""
SET = ["--list", "list.csv", "--features", "features", "--features-audio", "audio"]
SET += ["--annotations", "annotations", "--steps"]


def make_set(folder, n=4, by_task=True):
    """A small set in the published layout; video i lasts 12 + i s; v1 has no audio."""
    rng = np.random.default_rng(0)
    for name in ("features", "audio", "annotations"):
        (folder / name).mkdir()
    rows, steps = ["video_id,task" if by_task else "video_id"], dict(STEPS) if by_task else {}
    for i in range(n):
        name, task, seconds = f"v{i}", list(STEPS)[i % 2], 12 + i
        rows.append(f"{name},{task}" if by_task else name)
        np.save(folder / f"features/{name}_2d.npy", rng.random((seconds, 12), np.float32))
        three = rng.random((seconds * 3 // 2, 6)).astype(np.float16)
        np.save(folder / f"features/{name}_3d.npy", three)
        if i != 1:
            np.savez(folder / f"audio/{name}.npz", arr_0=rng.uniform(-80, 0, (40, seconds * 100)))
        inside = np.zeros((seconds, len(STEPS[task])))
        inside[2:5, 0] = inside[4:9, 1] = inside[10:, 0] = 1
        np.save(folder / f"annotations/{f'{task}_{name}' if by_task else name}.npy", inside)
        if not by_task:
            steps[name] = STEPS[task]
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    (folder / "steps.json").write_text(json.dumps(steps))


@pytest.mark.parametrize("kind", ["crosstask", "miningyoutube"])
def test_a_set_of_steps(convert, tmp_path, kind):
    make_set(tmp_path, by_task=kind == "crosstask")
    said, _ = convert(kind, *SET, "steps.json")
    assert "4 of 4 videos, streams 2d 12, 3d 6, mel 40, 1 without audio; none skipped" in said
    store = Store(tmp_path / "out.h5")
    assert store.ids() == ["v0", "v1", "v2", "v3"] and store.rates == RATES
    assert store.caption_texts(0) == ["pour egg", "flip pancake", "pour egg"]  # by their start
    assert np.stack(store.caption_times(0)[1:]).tolist() == [[2, 4, 10], [5, 9, 12]]
    features = np.load("features/v2_3d.npy")
    np.testing.assert_array_equal(store.clips(2, "3d", [4], [9])[0], features[6:14])
    assert store.row_counts("mel").tolist() == [1200, 0, 1400, 1500]
    steps = load_steps(tmp_path / "out.h5")
    assert steps["protocol"] == kind and list(steps["videos"]) == store.ids()
    assert steps["videos"]["v1"] == {
        "task": "16815" if kind == "crosstask" else "all",
        "seconds": 13,
        "steps": STEPS["16815"],
        "segments": [[0, 2, 5], [1, 4, 9], [0, 10, 13]],
    }
    assert main([kind, *SET, "steps.json", "--out", "out.h5"]) == 1  # is there


def test_the_release_files(convert, tmp_path):
    make_set(tmp_path)
    (tmp_path / "tasks_primary.txt").write_text(RELEASE)
    release = tmp_path / "annotations"
    for file in release.iterdir():
        file.unlink()
    # Floor and ceiling; two segments that overlap stay two; the last second is 11; 12 is beyond.
    (release / "23521_v0.csv").write_text("2,3.9,4.1\n1,0.0,2\n2,4.05,11.5\n3,11.2,99\n1,12,13\n")
    (release / "16815_v1.csv").write_text("2,5,7.5\n\n1,3,3\n")  # the other is empty
    (release / "23521_v2.csv").write_text("1,20,30\n")  # only beyond its 14 s
    (release / "16815_v3.csv").write_text("3,1,2\n")  # a step too many
    features = np.load("features/v0_3d.npy")
    (tmp_path / "features/v0_3d.npy").unlink()
    np.savez(tmp_path / "features/v0.npz", features=features)
    said, listed = convert("crosstask", *SET, "tasks_primary.txt")
    assert "2 of 4 videos" in said and "2 skipped" in said, said
    assert "no step is annotated in its 14 s" in listed and "line 1: step 3 of 2" in listed
    videos = load_steps(tmp_path / "out.h5")["videos"]
    assert videos["v0"] == {
        "task": "23521",
        "seconds": 12,
        "steps": STEPS["23521"],
        "segments": [[0, 0, 2], [1, 3, 5], [1, 4, 12], [2, 11, 12]],
    }
    assert videos["v1"]["segments"] == [[1, 5, 8]]
    texts = Store(tmp_path / "out.h5").caption_texts(0)
    assert texts == ["pour egg", "flip pancake", "flip pancake", "add jam"]


def test_one_folder_does_not_mix_3d_features_and_audio(convert, tmp_path):
    make_set(tmp_path)
    for i in range(4):
        (tmp_path / f"features/v{i}_3d.npy").unlink()
        if (audio := tmp_path / f"audio/v{i}.npz").exists():
            audio.rename(tmp_path / f"features/v{i}.npz")
    said, _ = convert("crosstask", *SET, "steps.json", "--features-audio", "features")
    assert "4 of 4 videos, streams 2d 12, mel 40, 1 without audio" in said


def test_damaged_annotations_and_features_are_listed(convert, tmp_path):
    make_set(tmp_path, n=11)
    annotations, features = tmp_path / "annotations", tmp_path / "features"
    (annotations / "23521_v2.npy").unlink()
    np.save(annotations / "16815_v3.npy", np.ones((15, 3)))  # its task has 2 steps
    np.save(annotations / "23521_v4.npy", np.full((16, 3), 0.5))
    (annotations / "16815_v5.npy").write_bytes(b"\x93NUMPY\x01\x00 broken")
    np.save(annotations / "23521_v6.npy", np.array([[Evil()]], object))  # pickled in the file
    np.save(annotations / "16815_v7.npy", np.zeros((19, 2), bool))  # nothing annotated
    (features / "v8_2d.npy").unlink()
    (features / "v9_3d.npy").write_bytes((features / "v9_3d.npy").read_bytes()[:-10])
    with open(tmp_path / "list.csv", "a") as file:
        file.write("v0,23521\nnone,99999\n" + "x" * 300 + ",23521\n")
    said, listed = convert("crosstask", *SET, "steps.json")
    assert "3 of 14 videos" in said and "11 skipped" in said, said
    assert Store(tmp_path / "out.h5").ids() == ["v0", "v1", "v10"]
    # Annotated, without usable features: not in the store, and misses in the evaluation.
    assert list(load_steps(tmp_path / "out.h5")["videos"]) == ["v0", "v1", "v8", "v9", "v10"]
    for reason in (
        "v2,no annotation 23521_v2.npy or .csv",
        "3 columns, its steps are 2",
        "expected 0 and 1",
        "v5,",
        "Object arrays",
        "no step is annotated in its 19 s",
        "no 2d features",
        "v9,",
        "v0,twice in",
        "no steps of task 99999",
        "File name too long",
    ):
        assert reason in listed, (reason, listed)
    assert not (tmp_path / "executed").exists()


def test_inputs_that_are_none_name_flag_and_fix(convert, tmp_path):
    make_set(tmp_path)

    def fails(message, *words):
        with pytest.raises(SystemExit, match=message):
            convert("crosstask", *SET, *words)

    fails("--steps none.json: expected .*No such file", "none.json")
    fails("--features_audio none: no such", "steps.json", "--features_audio", "none")
    for text in ("[]", '{"a": 1}', '{"a": [["x"]]}', "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        fails("--steps bad.json: expected JSON like", "bad.json")
    for text in (RELEASE.replace("\n3\n", "\n4\n"), "\n"):
        (tmp_path / "bad.txt").write_text(text)
        fails("--steps bad.txt: .*tasks_primary.txt", "bad.txt")
    (tmp_path / "other.json").write_text('{"1": ["x"]}')
    fails("--annotations annotations: of none of .* 4 videos; 4 skipped", "other.json")
    for content, message in (
        (b"video_id\nv0\n", "no column"),
        (b'video_id,task\n"' + b"x" * 200_000, "not a CSV"),
        (b"\xff\xfe", "no column"),
        (b"video_id,task\n", "lists no video"),
    ):
        (tmp_path / "list.csv").write_bytes(content)
        fails(f"list.csv: .*{message}", "steps.json")
