"""Training on features of frozen encoders, in stores with neither spectrograms nor word vectors."""

import json
import shutil
from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mcn_ext.data.clips import ClipReader, collate, missing_inputs, to_device
from mcn_ext.data.store import Store, StoreError, validate
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from mcn_ext.train import replay
from tests.conftest import SMALL, WORDS, call, stage1, write_store

CPU = torch.device("cpu")


def add_features(path, mel=False):
    """Give a store audio streams ``beats`` and ``clip`` and captions' features ``clip``, which tell
    the caption's word; take its spectrograms, unless ``mel``. The last video has no ``beats``."""
    rng = np.random.default_rng(7)
    with h5py.File(path, "a") as file:
        said = [WORDS.index(text.split()[1]) for text in file["caption/text"].asstr()]
        for name, dim in (("beats", 10), ("clip", 5)):
            rows = rng.normal(size=(len(WORDS), dim))[np.repeat(said, 2)]  # 2 s a caption, 1 Hz
            offset = 2 * file["caption/offset"][:]
            if name == "beats":
                offset[-1] = offset[-2]
            group = file.create_group(name)
            group["data"], group["offset"] = np.float16(rows[: offset[-1]]), offset
            group.attrs.update(rate_hz=1.0, modality="audio")
        file["caption/clip"] = np.float16(rng.normal(size=(len(WORDS), 7))[said])
        file["caption/clip"].attrs["model"] = "an encoder"
        if not mel:
            del file["mel"]
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """(training, evaluation) stores with neither spectrograms nor word vectors."""
    folder = tmp_path_factory.mktemp("features")
    train = write_store(folder / "train.h5", silent_every=0)
    test = write_store(folder / "eval.h5", 24, 1, silent_every=0)
    return add_features(train), add_features(test)


def test_the_store_says_what_is_what(stores, tmp_path):
    store = Store(stores[0])
    assert store.streams("V") == {"2d": 12, "3d": 6} and store.streams("A") == {
        "beats": 10,
        "clip": 5,
    }
    assert store.text_dims == {"clip": 7} and store.text_model("clip") == ("an encoder", "unknown")
    described = "caption/clip: features of captions, 7 wide, by an encoder"
    assert described in validate(stores[0])["streams"]
    old = Store(write_store(tmp_path / "old.h5"))
    assert old.streams("A") == {"mel": 40} and old.text_dims == {}
    for name, attribute in (("2d", "smell"), ("mel", "text")):
        with h5py.File(tmp_path / "old.h5", "a") as file:
            file[name].attrs["modality"] = attribute
        with pytest.raises(StoreError, match=f"{name}: attribute modality is '{attribute}'"):
            Store(tmp_path / "old.h5")
        with h5py.File(tmp_path / "old.h5", "a") as file:
            del file[name].attrs["modality"]


def test_a_run_goes_on_when_other_features_of_captions_are_added(tmp_path):
    path = write_store(tmp_path / "a.h5", silent_every=0)
    before = Store(path).fingerprint()
    assert before == "761b838166dad8be"  # as before there were features: runs resume
    with h5py.File(path, "a") as file:
        file["caption/clip"] = np.zeros((60, 7), np.float16)
        file["caption/clip"].attrs["crc32"] = np.uint32(1)
    assert Store(path).fingerprint() == before
    first = Store(path).fingerprint("clip")
    with h5py.File(path, "a") as file:
        file["caption/clip"].attrs["crc32"] = np.uint32(2)
    assert before != first != Store(path).fingerprint("clip")


def test_missing_inputs_is_named_with_what_there_is(stores):
    store = Store(stores[0])
    assert missing_inputs(store, "AVT", ["beats", "clip"], "clip") == ""
    lack = missing_inputs(store, "AV")
    assert "no audio stream 'mel'; it has" in lack and "beats (audio)" in lack
    assert "'2d' is no audio stream; prepare it as 2d=DIR" in missing_inputs(store, "AV", ["2d"])
    lack = missing_inputs(store, "T", text="x")
    assert lack.startswith("no features of captions 'x' (to make them: python -m mcn_ext.prepare")
    assert lack.endswith("clip (captions)")
    sizes = MCN("AT", audio_dims={"clip": 6}, text="clip", word_dim=7).sizes
    lack = missing_inputs(store, "AVT", ["clip"], "clip", sizes)
    assert lack.startswith("clip is 5 wide, the model was trained on 6")


def test_a_clip_is_its_maxima_and_its_captions_features(stores):
    store = Store(stores[0])
    options = {"audio_streams": ["beats", "clip"], "text": "clip"}
    reader = ClipReader(store, "AT", **options)
    items = [reader.read(0, [(1, 2), (3, 3)]), reader.read(len(store) - 1, [(0, 0)])]
    batch = to_device(collate(items), CPU, None)
    with h5py.File(stores[0]) as file:
        beats, text = file["beats/data"][:], file["caption/clip"][:]
    # From 2.0 to 5.9 s, a row a second: rows 2 to 5.
    assert np.array_equal(batch["audio"]["beats"][0], beats[2:6].max(axis=0))
    assert np.array_equal(batch["text"][0], text[1:3])
    assert np.array_equal(batch["text"][1, :1], text[3:4]) and not batch["text"][1, 1].any()
    assert batch["text_mask"].tolist() == [[True, True], [True, False], [True, False]]
    assert batch["valid"]["audio"].tolist() == [True, True, False]  # the last has no beats
    assert batch["valid"]["text"].all()
    # Equal sets of captions cannot be told apart, so they are not each other's negatives; features
    # of one text may differ in their last digits, as an encoder's do from batch to batch.
    said = [item.split()[1] for item in store.caption_texts(0)]
    i, j = next((i, j) for j in range(6) for i in range(j) if said[i] == said[j])
    k = next(k for k in range(6) if said[k] != said[i])
    store.caption_features = lambda *_: text[:6] + np.arange(6, dtype=np.float16)[:, None] / 1000
    ids = reader.read(0, [(i, i), (j, j), (k, k)])["caption_id"]
    assert ids[0] == ids[1] != ids[2]
    bad = text[:3].copy()
    bad[0], bad[1] = np.nan, 0
    found = reader.as_tokens([bad, bad[:2]])
    assert found["valid.text"].tolist() == [True, False]
    assert np.array_equal(found["text"][0, 0], bad[2]) and not found["text"][1].any()


def test_scale_of_features_does_not_matter_and_theirs_does():
    torch.manual_seed(0)
    model = MCN("AT", audio_dims={"a": 4, "b": 3}, text="c", word_dim=5, embd_dim=8, recon_dim=4)
    assert model.DAVEnet is None and not any("DAVEnet" in name for name in model.state_dict())
    batch = {
        "audio": {"b": torch.randn(6, 3), "a": torch.randn(6, 4)},
        "text": torch.randn(6, 2, 5),
        "text_mask": torch.tensor([[True, True]] * 5 + [[True, False]]),
    }
    rows, errors = model(batch)
    assert rows["audio"].shape == rows["text"].shape == (6, 8) and errors.keys() == rows.keys()
    features, _ = model.encode("audio", batch)
    expected = [F.normalize(batch["audio"][name], dim=1) for name in "ab"]
    assert torch.allclose(features, torch.cat(expected, 1))
    batch["audio"]["a"] *= 100
    batch["text"] *= 100
    for name, row in model(batch)[0].items():
        assert torch.allclose(row, rows[name], atol=1e-6)
    batch["text"][5, 1] = 7  # behind the mask
    assert torch.allclose(model(batch)[0]["text"], rows["text"], atol=1e-6)
    model.freeze(["audio"])
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(("GU_audio", "recon_a"))
    }


def test_davenets_own_rows_as_a_stream_give_the_same_stage_2():
    """Frozen DAVEnet, and its embeddings read as a stream through a gate that lets all pass."""
    torch.manual_seed(0)
    options = {"video_dims": {"2d": 6}, "word_dim": 5, "embd_dim": 16, "recon_dim": 8}
    live = MCN("AVT", audio_width=1 / 16, **options)
    stream = MCN("AVT", audio_dims={"davenet": 16}, **options)
    shared = {k: v for k, v in live.state_dict().items() if k in stream.state_dict()}
    shared = {k: v for k, v in shared.items() if not k.startswith(("GU_audio", "recon_a"))}
    stream.load_state_dict(shared, strict=False)
    with torch.no_grad():
        gate = stream.GU_audio
        gate.fc.weight.copy_(torch.eye(16))
        gate.cg["fc"].weight.zero_()
        gate.fc.bias.zero_()
        gate.cg["fc"].bias.fill_(100)  # sigmoid: 1
    losses = []
    for model in (live, stream):
        model.freeze(["audio", "video"])
        model.train()
        torch.manual_seed(1)
        objective = Objective(
            model.modalities, ["text"], temperature=0.1, cluster_size=4, queue_size=2, seed=0
        )
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-2)
        rows = []
        for _ in range(6):
            batch = {
                "video": {"2d": torch.randn(12, 6)},
                "audio": torch.randn(12, 40, 64),
                "n_frames": torch.randint(16, 65, (12,)),
                "text": torch.randn(12, 3, 5),
                "text_mask": torch.ones(12, 3, dtype=torch.bool),
                "clip_id": torch.arange(12),
                "caption_id": torch.arange(12),
                "valid": {name: torch.ones(12, dtype=torch.bool) for name in model.modalities},
            }
            if model is stream:
                with torch.no_grad():
                    batch["audio"] = {"davenet": live.encode("audio", batch)[1]}
            terms = objective(*model(batch), batch)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            objective.update_clusters(terms)
            rows.append(terms.total.item())
        losses.append(rows)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(a != b for a, b in pairwise(losses[0]))  # it learns


def test_both_stages_and_evaluation_without_mel_and_without_words(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("mcn_ext.train.inputs.require_gensim", lambda: pytest.fail("no words here"))
    train, test = stores
    refused = stage1(train, pair="AV", cwd=tmp_path, check=False)
    assert "no audio stream 'mel'; it has" in refused.stderr
    flags = "--audio beats --audio_augment 1"
    refused = stage1(train, flags, pair="AV", cwd=tmp_path, check=False)
    assert "--audio_augment 1.0: changes spectrograms" in refused.stderr
    refused = stage1(train, "--text clip --word2vec", train, pair="VT", cwd=tmp_path, check=False)
    assert "--text clip takes no word vectors" in refused.stderr
    stage1(train, "--text clip --epochs 20 --lr 1e-2", pair="VT", cwd=tmp_path)
    assert not (tmp_path / "runs/stage1-VT/words.npz").exists()
    done = call("train_stage2.py --add A --text words --epochs 1", cwd=tmp_path, check=False)
    assert "--text words: the text encoder of runs/stage1-VT was trained on clip" in done.stderr
    call("train_stage2.py --add A --audio beats,clip --epochs 1", cwd=tmp_path)
    call("evaluate.py --youcook2", test, "--fusion sum bank", cwd=tmp_path)
    found = json.loads((tmp_path / "runs/stage2-VT_A/metrics.json").read_text())["youcook2"]
    assert found["text->video"]["R@10"] > 80 and found["without"] == {"audio": 1}
    # The other way round: audio features first, then text.
    stage1(train, "--audio clip --out first", pair="AV", cwd=tmp_path)
    stage2 = "train_stage2.py --add T --init first --out second --epochs 1 --text clip"
    assert "WARNING" not in call(stage2, cwd=tmp_path).stdout
    done = call(stage2, "--preset features", cwd=tmp_path, check=False)
    assert "--preset features: first was trained with demo, whose sizes" in done.stderr
    args = json.loads((tmp_path / "second/args.json").read_text())
    assert (args["audio"], args["text"], args["text_model"]) == ("clip", "clip", "an encoder")
    evaluate = "evaluate.py --run second --fusion sum bank --youcook2"
    assert "WARNING" not in call(evaluate, test, cwd=tmp_path).stdout
    # Features of which nobody knows the encoder, then training features of another one.
    unknown = shutil.copy(test, tmp_path / "unknown.h5")
    with h5py.File(unknown, "a") as file:
        del file["caption/clip"].attrs["model"]
    done = call(evaluate, unknown, cwd=tmp_path)
    assert "unknown.h5: whether the run's encoder made its features is not known" in done.stdout
    shutil.copy(train, tmp_path / "kept.h5")
    with h5py.File(train, "a") as file:
        file["caption/clip"].attrs["model"] = "another"
    done = call(evaluate, test, cwd=tmp_path, check=False)
    assert "--fusion bank" in done.stderr and "are of other weights (another" in done.stderr
    shutil.copy(tmp_path / "kept.h5", train)
    lacking = write_store(tmp_path / "lacking.h5", 24, 1)
    done = call("evaluate.py --run second --youcook2", lacking, cwd=tmp_path, check=False)
    assert "no audio stream 'clip'; no features of captions 'clip'" in done.stderr


def test_features_resume_and_other_features_are_refused(stores, tmp_path):
    train = tmp_path / "train.h5"
    train.write_bytes(stores[0].read_bytes())
    flags = ("--audio beats --text clip --save_every 1",)
    stage1(train, *flags, "--out whole", pair="AT", cwd=tmp_path)
    stage1(train, *flags, "--out parts --max_steps 2", pair="AT", cwd=tmp_path)
    stage1(train, *flags, "--out parts", pair="AT", cwd=tmp_path)
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    done = stage1(
        train, "--audio clip --text clip --out parts", pair="AT", cwd=tmp_path, check=False
    )
    assert "holds a run with --audio beats (now clip)" in done.stderr
    with h5py.File(train, "a") as file:
        file["caption/clip"].attrs["crc32"] = np.uint32(5)
    done = stage1(train, *flags, "--out parts", pair="AT", cwd=tmp_path, check=False)
    assert "other data" in done.stderr


def test_a_kept_step_of_several_ranks_is_joined():
    parts = [{"text": torch.ones(2, n, 3), "text_mask": torch.ones(2, n) > 0} for n in (1, 4)]
    joined = replay.join(parts)
    assert joined["text"].shape == (4, 4, 3) and joined["text_mask"].sum(1).tolist() == [1, 1, 4, 4]
    assert not joined["text"][:2, 1:].any()


def test_the_preset_is_of_features():
    assert SMALL  # sizes of the other tests
    script = __import__("train_stage1")
    args = script.get_parser().parse_args("--pair AV --audio beats,clap".split())
    assert args.audio == "beats,clap" and script.PRESETS["features"]["embd_dim"] == 1024
    for wrong in ("beats,", "davenet,beats", "a,a"):
        with pytest.raises(SystemExit):
            script.get_parser().parse_args(["--pair", "AV", "--audio", wrong])


def test_runs_of_before_there_were_features_go_on(store_path, tmp_path):
    pytest.importorskip("gensim")  # vectors are trained on the captions
    stage1(store_path, "--max_steps 2", cwd=tmp_path)
    file = tmp_path / "runs/stage1-AV/checkpoint.pt"
    content = torch.load(file, weights_only=True)
    for name in ("audio", "text"):
        del content["args"][name]
    del content["sizes"]["audio_dims"], content["sizes"]["text"]
    torch.save(content, file)
    stage1(store_path, cwd=tmp_path)  # resumes, and saves anew
    torch.save(content, file)
    call("train_stage2.py --add T --epochs 1 --batch_size 4 --n_pair 2", cwd=tmp_path)
    done = stage1(store_path, "--audio 2d", cwd=tmp_path, check=False)
    assert "'2d' is no audio stream" in done.stderr
