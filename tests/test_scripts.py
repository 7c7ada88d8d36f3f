"""The scripts, as users run them: stage 1, stage 2, evaluate, and what goes wrong."""

import json
import math
import os

import h5py
import numpy as np
import pytest
import torch

from mcn_ext import report
from mcn_ext.data.words import WordVectors
from mcn_ext.evaluation import epochs
from mcn_ext.train import checkpoint, guard
from mcn_ext.train.log import read
from tests.conftest import ROOT, SMALL, WORDS, call, run, stage1, torchrun

TERMS = ("total", "contrastive", "cluster", "reconstruction")
STAGE2 = "train_stage2.py --device cpu --epochs 2 --log_every 1 --add"
EVALUATE = "evaluate.py --device cpu --youcook2"

# Total loss of a small run's first 10 steps: the mathematics, frozen. In float64, where processors
# and threads agree to 9 digits; in fp32 Adam makes 4 % of their rounding by the tenth step.
GOLDEN = [
    8.28699008,
    8.20907304,
    7.7864508,
    6.93139119,
    5.72072219,
    6.14801529,
    6.44033266,
    5.44710944,
    6.37473833,
    5.20966566,
]


def write_vectors(path):
    """The same vectors whatever the version of gensim."""
    rows = [f"{w} {' '.join(map(str, v))}" for w, v in zip(WORDS, np.eye(8, 10), strict=True)]
    path.write_text("\n".join(["8 10", *rows]) + "\n")


def losses(run_folder):
    return [[row[t] for t in TERMS] for row in read(run_folder / "log.jsonl")]


@pytest.fixture(scope="module")
def work(tmp_path_factory, store_path):
    """A folder with a finished stage 1 (AV) and stage 2 (T) run on the small store."""
    pytest.importorskip("gensim")  # vectors are trained on the captions
    folder = tmp_path_factory.mktemp("work")
    stage1(store_path, cwd=folder, pictures=True)
    call(STAGE2, "T", cwd=folder)
    return folder


def test_run_folder_is_the_documented_one(work, store_path):
    folder = work / "runs/stage1-AV"
    args = json.loads((folder / "args.json").read_text())
    assert args["pair"] == "AV" and args["data"] == str(store_path) and args["batch_size"] == 4
    env = (folder / "env.txt").read_text()
    assert all(word in env for word in ("git:", "torch:", "GPU:", "host:", "command:"))
    rows = read(folder / "log.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    for key in ("step", "epoch", "lr", *TERMS, "clips_per_s", "data_wait", "peak_mib"):
        assert key in rows[0], key
    assert rows[-1]["live_clusters"] >= 1 and rows[-1]["cluster"] > 0 and rows[0]["cluster"] == 0
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["complete"] and content["step"] == 4
    assert not any(k.startswith("GU_text") for k in content["model"])
    assert {"epoch-01.pt", "epoch-02.pt", "curves.png"} <= {p.name for p in folder.iterdir()}


def test_stage_2_keeps_the_frozen_encoders(work):
    first = checkpoint.load(work / "runs/stage1-AV/checkpoint.pt")["model"]
    second = checkpoint.load(work / "runs/stage2-AV_T/checkpoint.pt")
    assert second["sizes"]["modalities"] == "AVT"
    for name, value in first.items():
        if not name.startswith("recon_"):
            assert torch.equal(value, second["model"][name]), name
    assert any(k.startswith("GU_text") for k in second["model"])
    assert (work / "runs/stage2-AV_T/words.npz").exists()


@pytest.mark.slow
def test_evaluate_writes_the_contract_and_draws(work, eval_path, monkeypatch):
    done = call(EVALUATE, eval_path, cwd=work, pictures=True)
    assert all(text in done.stdout for text in ("text->video+audio", "n = 24", "chance"))
    folder = work / "runs/stage2-AV_T"
    result = json.loads((folder / "metrics.json").read_text())["youcook2"]
    assert result["n"] == 24 and result["data"] == str(eval_path)
    assert result["checkpoint"].endswith("checkpoint.pt")
    for direction in ("text->video+audio", "text->video", "text->audio", "audio->video"):
        row = result[direction]
        assert 0 <= row["R@1_ci95"][0] <= row["R@1"] <= row["R@1_ci95"][1] <= 100
        assert row["R@1"] <= row["R@5"] <= row["R@10"] and 1 <= row["MedR"] <= 24
    assert (folder / "similarity.png").exists()
    monkeypatch.chdir(work)
    assert report.main([]) == 0
    text = (folder / "report.md").read_text()
    assert all(part in text for part in ("text->video+audio", "similarity.png", "curves.png"))


@pytest.mark.slow
def test_every_epoch_is_evaluated(work, eval_path, capsys):
    folder = work / "runs/stage2-AV_T"
    call(EVALUATE, eval_path, "--run", folder, cwd=work)
    words = ["--run", str(folder), "--youcook2", str(eval_path), "--device", "cpu"]
    assert epochs.main(words) == 0
    found = json.loads((folder / "epochs.json").read_text())
    last = max(int(file.stem[-2:]) for file in folder.glob("epoch-*.pt"))
    assert [row["epoch"] for row in found["epochs"]] == list(range(1, last + 1))
    # The last epoch's weights are the run's.
    metrics = json.loads((folder / "metrics.json").read_text())["youcook2"]
    results = found["epochs"][-1]["results"]
    assert results == {name: metrics[name] for name in results} and len(results) == 4
    header, *rows = (folder / "epochs.csv").read_text().splitlines()
    assert header.startswith("epoch,R@1 text->video+audio,R@5") and len(rows) == last
    assert f"| {last} | " in capsys.readouterr().out and (folder / "epochs.png").exists()
    with pytest.raises(SystemExit, match="--checkpoint"):
        epochs.main([*words, "--checkpoint", str(folder / "epoch-01.pt")])


@pytest.mark.slow
def test_a_result_of_other_settings_is_kept(work, eval_path):
    folder = work / "runs/stage1-AV"
    for flags in ("--checkpoint runs/stage1-AV/epoch-01.pt", "", "--similarity dot"):
        call(EVALUATE, eval_path, "--run", folder, flags, cwd=work)
    metrics = json.loads((folder / "metrics.json").read_text())
    # Only what was trained.
    assert [k for k in metrics["youcook2"] if "->" in k] == ["audio->video"]
    assert metrics["youcook2"]["similarity"] == "dot"
    assert {(m["set"], m["similarity"]) for m in metrics["replaced"]} == {("youcook2", "cosine")}
    weights = ("--run runs/stage2-AV_T --checkpoint", folder / "checkpoint.pt")
    other = call(EVALUATE, eval_path, *weights, cwd=work, check=False)
    assert other.returncode and "does not lie in --run" in other.stderr


def test_where_a_run_was_told_to_go_is_in_what_comes_next(tmp_path, store_path):
    out = tmp_path / "mine"
    command = ("train_stage1.py --pair AV --data", store_path, *SMALL, "--max_steps 1 --out")
    done = call(*command, out, cwd=tmp_path)
    assert f"train_stage2.py --add T --init {out}" in done.stdout
    (tmp_path / "file").touch()
    refused = call(*command, tmp_path / "file", cwd=tmp_path, check=False)
    assert refused.returncode and "a file, not a folder" in refused.stderr


def test_a_finished_run_says_so_and_other_flags_are_refused(work, store_path):
    again = stage1(store_path, cwd=work).stdout
    assert "step 4 of 4: nothing to do" in again and "train_stage2.py --add T" in again
    other = stage1(store_path, "--lr 0.5", cwd=work, check=False)
    assert other.returncode and "--lr 0.001 (now 0.5)" in other.stderr
    assert "--no-resume" in other.stderr


def test_what_goes_wrong_is_said(work, store_path, tmp_path):
    def fails(message, *command, cwd=work):
        done = call(*command, cwd=cwd, check=False)
        assert done.returncode == 1 and message in done.stderr, done.stderr

    train, evaluate = ("train_stage1.py --pair AV", *SMALL, "--data"), "evaluate.py --youcook2"
    fails("has that modality already", "train_stage2.py --add V --init runs/stage1-AV")
    fails("no stage-1 run without V in", "train_stage2.py --add V")
    fails("no stage-1 run", "train_stage2.py --add T", cwd=tmp_path)
    fails(f"no run in {tmp_path / 'runs'}", evaluate, cwd=tmp_path)
    fails("--youcook2 data/youcook2.h5: no such store", evaluate)
    many = ("--batch_size 64 --out", tmp_path / "x")
    few = "has 10 videos with captions; use --batch_size 10 or less"
    fails(few, *train, store_path, *many)
    other = tmp_path / "other.h5"
    other.write_bytes(store_path.read_bytes())
    with h5py.File(other, "a") as f:
        del f["2d/data"]
        f["2d/data"] = np.zeros((f["2d/offset"][-1], 20), np.float16)
    fails("2d is 20 wide, the model was trained on 12", "train_stage2.py --add T --data", other)
    fails("2d is 20 wide, the model was trained on 12", evaluate, other)
    with h5py.File(other, "a") as f:
        del f["mel"]
    fails("no audio stream 'mel'", *train, other)
    broken = tmp_path / "run"
    broken.mkdir()
    content = (work / "runs/stage1-AV/checkpoint.pt").read_bytes()
    (broken / "checkpoint.pt").write_bytes(content[:5000])
    fails("not a readable checkpoint", "train_stage2.py --add T --init", broken)
    fails("not a readable checkpoint", evaluate, store_path, "--run", broken)


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"mcn_checkpoint": 1, "model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, store_path, monkeypatch):
    check, calls = guard.Guard.check, []

    def too_far(self, *args):  # finite gradients, and a step that leaves fp32
        calls.append(1)
        if len(calls) == 3:
            self.model.GU_video.fc.weight.data[0, 0] = float("inf")
        return check(self, *args)

    monkeypatch.setattr(guard.Guard, "check", too_far)
    flags = "--out late --log_every 100 --save_every 1"
    done = stage1(store_path, flags, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "the weights are not finite and are not saved" in done.stderr
    saved = checkpoint.load(tmp_path / "late/checkpoint.pt")
    assert saved["step"] == 2 and all(torch.isfinite(v).all() for v in saved["model"].values())


@pytest.mark.slow
def test_words_of_an_unfinished_start_are_not_reused(tmp_path, store_path):
    pytest.importorskip("gensim")
    stage1(store_path, "--max_steps 1", pair="VT", cwd=tmp_path)
    (tmp_path / "runs/stage1-VT/checkpoint.pt").unlink()  # as if killed before the first save
    vectors = tmp_path / "words.txt"
    write_vectors(vectors)
    stage1(store_path, "--max_steps 1 --word2vec", vectors, pair="VT", cwd=tmp_path)
    assert WordVectors.load(tmp_path / "runs/stage1-VT/words.npz").dim == 10
    refused = call(STAGE2, "A --word2vec", store_path, cwd=tmp_path, check=False)
    assert refused.returncode == 1 and "leave it out" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_and_finetuning_run(tmp_path, store_path, eval_path, precision):
    pytest.importorskip("gensim")
    stage1(store_path, "--precision", precision, pair="VT", cwd=tmp_path)
    # fp16 skips steps until its scale fits.
    finetune = ("--stage1_encoders finetune --epochs 8 --precision", precision)
    call(STAGE2, "A", *finetune, cwd=tmp_path)
    before, after = (
        checkpoint.load(tmp_path / f"runs/{n}/checkpoint.pt")["model"]
        for n in ("stage1-VT", "stage2-VT_A")
    )
    assert not torch.equal(before["GU_video.fc.weight"], after["GU_video.fc.weight"])
    call(EVALUATE, eval_path, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, learnt",
    [("softmax", ["temperature"]), ("sigmoid", ["temperature", "bias"]), ("milnce", [])],
)
def test_ranks_see_the_same_batches_and_the_same_loss(tmp_path, store_path, loss, learnt):
    """VT has no BatchNorm, so only rounding may differ between one process and several."""
    pytest.importorskip("gensim")
    script = ROOT / "train_stage1.py"
    flags = f"--loss {loss} {'--learn_temperature' if learnt else '--n_candidates 2'} --out"
    command = (script, "--pair VT --data", store_path, *SMALL, flags)
    run(*command, "one", cwd=tmp_path)
    words = np.load(tmp_path / "one/words.npz")["vectors"]
    torchrun(2, *command, "several", cwd=tmp_path)
    np.testing.assert_array_equal(words, np.load(tmp_path / "several/words.npz")["vectors"])
    one, several = np.array(losses(tmp_path / "one")), np.array(losses(tmp_path / "several"))
    np.testing.assert_allclose(several, one, rtol=2e-4, atol=1e-6)
    a, b = (checkpoint.load(tmp_path / n / "checkpoint.pt")["model"] for n in ("one", "several"))
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-5)
    for name in learnt:
        a, b = (read(tmp_path / run / "log.jsonl")[-1][name] for run in ("one", "several"))
        begun = {"temperature": 0.07, "bias": -math.log(16)}[name]  # of 16 clips a step
        assert abs(a - begun) > 1e-4 and b == pytest.approx(a, rel=1e-5)
    if loss == "sigmoid":  # stage 2 goes on with both
        call(STAGE2, "A --init one --lr 1e-9 --max_steps 1", cwd=tmp_path)
        second = read(tmp_path / "runs/stage2-VT_A/log.jsonl")[-1]
        first = read(tmp_path / "one/log.jsonl")[-1]
        assert [second[n] for n in learnt] == pytest.approx([first[n] for n in learnt], rel=1e-4)
    if loss != "softmax":
        return
    for flags, message in (
        ("--batch_size 5", "do not divide by 2 ranks; use --batch_size 4"),
        ("--bach_size 4", "did you mean --batch_size?"),
    ):
        done = torchrun(2, *command, "odd", flags, cwd=tmp_path, check=False)
        assert done.returncode and done.stderr.count(message) == 1


@pytest.mark.slow
def test_the_three_commands_without_flags(tmp_path):
    """As the README opens, on the demo data, with 4 processes; shortened by --max_steps."""
    short = "--max_steps 3 --device cpu"
    torchrun(4, ROOT / "train_stage1.py", "--pair AV", short, cwd=tmp_path, timeout=600)
    call("train_stage2.py --add T", short, cwd=tmp_path)
    done = call("evaluate.py --youcook2 --device cpu", cwd=tmp_path)
    assert "DEMO DATA" in done.stdout and "n = 400" in done.stdout
    assert (tmp_path / "runs/stage2-AV_T-demo/metrics.json").exists()


@pytest.mark.slow
def test_golden_losses(tmp_path, store_path):
    """Ten steps' losses, frozen. If this fails, the mathematics changed: say why in CHANGELOG."""
    pytest.importorskip("gensim")
    vectors = tmp_path / "words.txt"
    write_vectors(vectors)
    command = ("--pair AVT --data", store_path, *SMALL, "--epochs 5 --word2vec", vectors)
    run(ROOT / "tests/float64.py", *command, cwd=tmp_path)
    got = [row[0] for row in losses(tmp_path / "runs/stage1-AVT")]
    np.testing.assert_allclose(got, GOLDEN, rtol=1e-6)
