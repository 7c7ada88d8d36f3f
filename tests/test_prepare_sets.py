"""Preparing MSR-VTT, CrossTask and MiningYouTube from files as they are published."""

import itertools
import json
import os
import pickle

import numpy as np
import pytest
import torch

from mcn_ext.data.store import Store, validate
from mcn_ext.data.store_writer import StoreWriter
from mcn_ext.evaluation.localization import load_steps
from mcn_ext.prepare import crosstask, youcook2
from mcn_ext.prepare.__main__ import main
from mcn_ext.prepare.unpickle import UnsafePickle

RATES = {"2d": 1.0, "3d": 1.5, "mel": 100.0}


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


# --------------------------------------------------------------------------------------- MSR-VTT


def msrvtt_items(n=6):
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"video{9000 + i}",
            "eval_caption": f"a man cooks {i}",
            "caption": [f"said {i} {k}" for k in range(3)],
            "2d_pooled": rng.random(12).astype(np.float32),
            "3d_pooled": rng.random(6).astype(np.float32),
            "2d": rng.random((9, 12)),
            "3d": rng.random((13, 6)),
            "audio": torch.rand(40, 200 + i),
        }
        for i in range(n)
    ]


def msrvtt(tmp_path, items, **kwargs):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(items))
    return youcook2.prepare(tmp_path / "m.pkl", tmp_path / "m.h5", kind="msrvtt", **kwargs)


def test_msrvtt_for_evaluation(tmp_path):
    items = msrvtt_items()
    items[1]["audio"] = None  # kept and counted
    del items[2]["audio"]
    items[3]["2d"] = items[3].pop("2d_pooled")  # pooled under the other name
    items[4].pop("3d_pooled")  # and not pooled under the other: skipped
    items[5]["2d_pooled"][3] = np.nan
    said = msrvtt(tmp_path, items)
    assert (
        "4 of 6 clips, streams 2d 12, 3d 6, mel 40, 2 without audio" in said and "2 skipped" in said
    ), said
    listed = (tmp_path / "m.h5.skipped.csv").read_text()
    assert "3d has shape (13, 6), the other clips have (6,)" in listed and "NaN" in listed
    store = Store(tmp_path / "m.h5")
    assert store.ids() == [f"video900{i}" for i in range(4)]
    assert "MSR-VTT" in store.source and store.n_captions == 4
    assert store.caption_texts(1) == ["a man cooks 1"]
    for i, key in ((0, "2d_pooled"), (3, "2d")):
        _, start, end = store.caption_times(i)
        np.testing.assert_allclose(store.clips(i, "2d", start, end)[0][0], items[i][key], rtol=1e-3)
        assert len(store.clips(i, "mel", start, end)[0]) == 200 + i
    assert store.caption_times(1)[2].tolist() == [1.0] and store.row_counts("mel")[1:3].sum() == 0
    assert validate(tmp_path / "m.h5")["captions"] == 4


def test_msrvtt_for_training_keeps_every_caption(tmp_path):
    items = msrvtt_items(4)
    for item in items:
        del item["eval_caption"]
    items[1]["caption"] = "one alone"
    items[2]["caption"] = []
    items[3]["caption"] = ["fine", ["nested"]]
    assert "2 of 4 clips" in msrvtt(tmp_path, items)
    store = Store(tmp_path / "m.h5")
    assert store.caption_texts(0) == ["said 0 0", "said 0 1", "said 0 2"]
    assert store.caption_texts(1) == ["one alone"]
    _, start, end = store.caption_times(0)
    assert start.tolist() == [0, 0, 0] and end.tolist() == [2, 2, 2]
    listed = (tmp_path / "m.h5.skipped.csv").read_text()
    assert "empty list of captions" in listed and "where a text is expected" in listed


def test_msrvtt_executes_nothing_and_says_what_it_wants(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickle, match="m.pkl: refused"):
        msrvtt(tmp_path, msrvtt_items(1) + [{"caption": "x", "2d_pooled": Evil()}])
    assert not (tmp_path / "executed").exists()
    for items, message in (
        ({"a": 1}, "2d_pooled, 3d_pooled, audio, eval_caption or caption, id"),
        ([{"caption": "x"}], "no clip has a pooled feature '2d_pooled' or"),
    ):
        with pytest.raises(SystemExit, match=message):
            msrvtt(tmp_path, items)
    with pytest.raises(SystemExit, match="none.pkl: no such file; expected MSR-VTT's"):
        youcook2.prepare(tmp_path / "none.pkl", tmp_path / "m.h5", kind="msrvtt")
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(msrvtt_items(1)))
    command = ["msrvtt", "m.pkl", "--out", "m.h5"]
    assert main(command) == 0 and main(command) == 1 and main([*command, "--overwrite"]) == 0


def test_youcook2_does_not_take_lists_of_captions(tmp_path):
    items = [{"id": "a", "caption": "fry", "2d": np.ones(4, np.float32)}]
    items.append(items[0] | {"caption": ["fry", "boil"]})
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(items))
    assert "1 of 2 clips" in youcook2.prepare(tmp_path / "y.pkl", tmp_path / "y.h5")


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


def make_set(folder, n=4, protocol="crosstask"):
    """A small set in the published layout; video i lasts 12 + i s; v1 has no audio."""
    rng = np.random.default_rng(0)
    for name in ("features", "audio", "annotations"):
        (folder / name).mkdir()
    rows, steps = [], {}
    for i in range(n):
        name, task, seconds = f"v{i}", list(STEPS)[i % 2], 12 + i
        rows.append(f"{name},{task}" if protocol == "crosstask" else name)
        np.save(folder / f"features/{name}_2d.npy", rng.random((seconds, 12), np.float32))
        np.save(
            folder / f"features/{name}_3d.npy", rng.random((seconds * 3 // 2, 6)).astype(np.float16)
        )
        if i != 1:
            np.savez(folder / f"audio/{name}.npz", arr_0=rng.uniform(-80, 0, (40, seconds * 100)))
        inside = np.zeros((seconds, len(STEPS[task])))
        inside[2:5, 0] = inside[4:9, 1] = inside[10:, 0] = 1
        stem = f"{task}_{name}" if protocol == "crosstask" else name
        np.save(folder / f"annotations/{stem}.npy", inside)
        steps[name] = STEPS[task]
    header = "video_id,task" if protocol == "crosstask" else "video_id"
    (folder / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "steps.json").write_text(json.dumps(STEPS if protocol == "crosstask" else steps))


def convert(
    folder, out="out.h5", protocol="crosstask", steps="steps.json", audio="audio", **kwargs
):
    return crosstask.prepare(
        folder / "list.csv",
        folder / "features",
        folder / audio if audio else None,
        folder / "annotations",
        folder / steps,
        folder / out,
        protocol=protocol,
        rates=RATES,
        **kwargs,
    )


@pytest.mark.parametrize("protocol", ["crosstask", "miningyoutube"])
def test_a_set_of_steps(tmp_path, protocol):
    make_set(tmp_path, protocol=protocol)
    said = convert(tmp_path, protocol=protocol)
    assert (
        "4 of 4 videos, streams 2d 12, 3d 6, mel 40, 1 without audio; none skipped" in said
        and "steps in" in said
    ), said
    store = Store(tmp_path / "out.h5")
    assert store.ids() == ["v0", "v1", "v2", "v3"] and store.rates == RATES
    assert store.caption_texts(0) == ["pour egg", "flip pancake", "pour egg"]  # by their start
    assert np.stack(store.caption_times(0)[1:]).tolist() == [[2, 4, 10], [5, 9, 12]]
    features = np.load(tmp_path / "features/v2_3d.npy")
    np.testing.assert_array_equal(store.clips(2, "3d", [4], [9])[0], features[6:14])
    assert store.row_counts("mel").tolist() == [1200, 0, 1400, 1500]
    steps = load_steps(tmp_path / "out.h5")
    assert steps["protocol"] == protocol and list(steps["videos"]) == store.ids()
    assert steps["videos"]["v1"] == {
        "task": "16815" if protocol == "crosstask" else "all",
        "seconds": 13,
        "steps": STEPS["16815"],
        "segments": [[0, 2, 5], [1, 4, 9], [0, 10, 13]],
    }
    validate(tmp_path / "out.h5")


def test_the_release_files(tmp_path):
    make_set(tmp_path)
    (tmp_path / "tasks_primary.txt").write_text(RELEASE)
    for file in (tmp_path / "annotations").iterdir():
        file.unlink()
    release = tmp_path / "annotations"
    # Floor and ceiling; two segments that overlap stay two; the last second is 11; 12 is beyond.
    (release / "23521_v0.csv").write_text("2,3.9,4.1\n1,0.0,2\n2,4.05,11.5\n3,11.2,99\n1,12,13\n")
    (release / "16815_v1.csv").write_text("2,5,7.5\n\n1,3,3\n")  # the other is empty
    (release / "23521_v2.csv").write_text("1,20,30\n")  # only beyond its 14 s
    (release / "16815_v3.csv").write_text("3,1,2\n")  # a step too many
    # 3D features without _3d.npy
    features = np.load(tmp_path / "features/v0_3d.npy")
    (tmp_path / "features/v0_3d.npy").unlink()
    np.savez(tmp_path / "features/v0.npz", features=features)
    said = convert(tmp_path, steps="tasks_primary.txt")
    assert "2 of 4 videos" in said and "2 skipped" in said, said
    listed = (tmp_path / "out.h5.skipped.csv").read_text()
    assert (
        "no step is annotated in its 14 s" in listed
        and "16815_v3.csv: line 1: step 3 of 2" in listed
    )
    videos = load_steps(tmp_path / "out.h5")["videos"]
    assert videos["v0"] == {
        "task": "23521",
        "seconds": 12,
        "steps": STEPS["23521"],
        "segments": [[0, 0, 2], [1, 3, 5], [1, 4, 12], [2, 11, 12]],
    }
    assert videos["v1"]["segments"] == [[1, 5, 8]]
    assert Store(tmp_path / "out.h5").caption_texts(0) == [
        "pour egg",
        "flip pancake",
        "flip pancake",
        "add jam",
    ]


def test_one_folder_does_not_mix_3d_features_and_audio(tmp_path):
    make_set(tmp_path)
    for i in range(4):
        (tmp_path / f"features/v{i}_3d.npy").unlink()
        if (audio := tmp_path / f"audio/v{i}.npz").exists():
            audio.rename(tmp_path / f"features/v{i}.npz")
    assert "4 of 4 videos, streams 2d 12, mel 40, 1 without audio" in convert(
        tmp_path, audio="features"
    )


def test_damaged_and_missing_files_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path, n=12)
    annotations, features = tmp_path / "annotations", tmp_path / "features"

    def stem(i):
        return f"{list(STEPS)[i % 2]}_v{i}"

    (annotations / f"{stem(2)}.npy").unlink()
    np.save(annotations / f"{stem(3)}.npy", np.ones((15, 3)))  # its task has 2 steps
    np.save(annotations / f"{stem(4)}.npy", np.full((16, 3), 0.5))
    (annotations / f"{stem(5)}.npy").write_bytes(b"\x93NUMPY\x01\x00 broken")
    np.save(annotations / f"{stem(6)}.npy", np.array([[Evil()]], object))  # pickled in the file
    np.save(annotations / f"{stem(7)}.npy", np.zeros((19, 2), bool))  # nothing annotated
    (features / "v8_2d.npy").unlink()
    whole = (features / "v9_3d.npy").read_bytes()
    (features / "v9_3d.npy").write_bytes(whole[:-10])
    np.save(features / "v10_2d.npy", np.full((22, 12), np.inf, np.float32))
    with open(tmp_path / "list.csv", "a") as file:
        file.write("v0,23521\nnone,99999\n" + "x" * 300 + ",23521\n")
    said = convert(tmp_path)
    assert "3 of 15 videos" in said and "12 skipped" in said, said
    assert not (tmp_path / "executed").exists()
    assert Store(tmp_path / "out.h5").ids() == ["v0", "v1", "v11"]
    # Annotated, without usable features: not in the store, and misses in the evaluation.
    assert sorted(load_steps(tmp_path / "out.h5")["videos"]) == [
        "v0",
        "v1",
        "v10",
        "v11",
        "v8",
        "v9",
    ]
    listed = (tmp_path / "out.h5.skipped.csv").read_text()
    for reason in (
        "v2,no annotation 23521_v2.npy or .csv",
        "3 columns, its steps are 2",
        "expected 0 and 1",
        "v5,",
        "object array",
        "no step is annotated in its 19 s",
        "no 2d features",
        "v9,",
        "NaN, inf or beyond",
        "v0,twice in",
        "no steps of task 99999",
        "File name too long",
    ):
        assert reason in listed, (reason, listed)


@pytest.mark.slow
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    make_set(tmp_path, n=6)
    (tmp_path / "tasks.txt").write_text(RELEASE)
    path = tmp_path / "annotations/23521_v0.npy"  # a video whose length only its features know
    path.unlink()
    path.with_suffix(".csv").write_text("1,2,5\n2,4,9\n1,10,99\n")
    convert(tmp_path, "whole.h5", steps="tasks.txt", workers=1)
    add = StoreWriter.add

    def killed(self, name, *args):
        if name == "v3":
            raise KeyboardInterrupt
        add(self, name, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "add", killed)
        convert(tmp_path, steps="tasks.txt", workers=1, shard_mib=0.01)
    assert not (tmp_path / "out.h5").exists() and not (tmp_path / "out.h5.steps.json").exists()
    said = convert(tmp_path, steps="tasks.txt", workers=1)
    assert "6 of 6 videos (3 from an earlier, interrupted run)" in said
    assert load_steps(tmp_path / "out.h5") == load_steps(tmp_path / "whole.h5")
    stores = [Store(tmp_path / file) for file in ("out.h5", "whole.h5")]
    for i, name in itertools.product(range(6), ("2d", "mel")):
        np.testing.assert_array_equal(*(store.clips(i, name, [0], [99])[0] for store in stores))
    # What is there is replaced only if asked for, also from the command line.
    command = [
        "crosstask",
        "--list",
        "list.csv",
        "--features",
        "features",
        "--features-audio",
        "audio",
        "--annotations",
        "annotations",
        "--steps",
        "tasks.txt",
        "--out",
        "out.h5",
    ]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    (tmp_path / "list.csv").write_text("video_id,task\nv2,23521\n")
    assert main([*command, "--overwrite"]) == 0
    assert list(load_steps(tmp_path / "out.h5")["videos"]) == Store("out.h5").ids() == ["v2"]


def test_inputs_that_are_none_name_flag_and_fix(tmp_path):
    make_set(tmp_path)

    def fails(message, **kwargs):
        with pytest.raises(SystemExit, match=message):
            convert(tmp_path, **kwargs)

    fails("--steps .*none.json: no such file", steps="none.json")
    fails("--features_audio .*none: no such", audio="none")
    for text in ("[]", '{"a": 1}', '{"a": [["x"]]}', "[" * 100_000):
        (tmp_path / "bad.json").write_text(text)
        fails("--steps .*bad.json: expected JSON like", steps="bad.json")
    (tmp_path / "bad.txt").write_text(RELEASE.replace("\n3\n", "\n4\n"))
    fails("--steps .*bad.txt: lines 1 to 6 are not a task as in tasks_primary.txt", steps="bad.txt")
    (tmp_path / "bad.txt").write_text("\n")
    fails("--steps .*bad.txt: lists no task", steps="bad.txt")
    (tmp_path / "other.json").write_text('{"1": ["x"]}')
    fails("--annotations .*: of none of .* 4 videos; 4 skipped", steps="other.json")
    (tmp_path / "list.csv").write_text("video_id\nv0\n")
    fails("--list .*list.csv: no column 'task'")
