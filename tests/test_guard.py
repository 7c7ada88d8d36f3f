"""Steps that are not finite: skipped without a trace, named, replayed."""

import json
import math

import numpy as np
import pytest
import torch

from mcn_ext import model
from mcn_ext.data import clips as data
from mcn_ext.objective import Objective
from mcn_ext.train import checkpoint, guard
from mcn_ext.train.log import read
from mcn_ext.train.replay import replay
from tests.conftest import ROOT, SMALL, call, run
from tests.test_model import SIZES, batch

FAULTS = {
    "audio": lambda item: item["audio"].__setitem__((1, 3, 7), np.nan),
    "video": lambda item: item["video.2d"].__setitem__((1, 3), np.inf),
}


# The third video of epoch 1 in the small store: of its first batch, and rank 1's where there are 2.
VIDEO = int(np.random.default_rng((0, 1)).permutation(10)[2])

NAME = f"video{VIDEO:06d}"


def break_reader(monkeypatch, modality):
    """A reader that goes wrong after its own checks, in one clip of VIDEO, in epoch 1."""
    read_clips = data.TrainingClips.__getitem__

    def broken(self, key):
        item = read_clips(self, key)
        if key == (1, VIDEO):
            FAULTS[modality](item)
        return item

    monkeypatch.setattr(data.TrainingClips, "__getitem__", broken)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["audio", "video"])
def test_one_bad_clip_costs_one_step_and_is_named(tmp_path, store_path, monkeypatch, modality):
    break_reader(monkeypatch, modality)
    command = ("train_stage1.py", "--pair", "AV", "--data", store_path, *SMALL, "--epochs", 4)
    done = call(*command, cwd=tmp_path, pictures=modality == "audio")
    rows = read(tmp_path / "runs/stage1-AV/log.jsonl")
    (bad,) = [row for row in rows if "skipped" in row]
    assert len(rows) == 8 and bad["epoch"] == 1 and bad["skipped"] == "the loss is not finite"
    (clip,) = bad["clips"]
    assert (clip["modality"], clip["stage"], clip["n_bad"]) == (modality, "input", 1)
    assert math.isnan(float(bad["terms"]["contrastive_audio_video"]))
    assert all(math.isfinite(row["total"]) for row in rows if row is not bad)
    assert f"step {bad['step']} skipped" in done.stdout and NAME in done.stdout
    assert f"{modality}: input not finite in 1 of" in done.stdout
    assert (tmp_path / "runs/stage1-AV/curves.png").exists() == (modality == "audio")
    assert f"python -m mcn_ext.train.replay {bad['file']}" in done.stdout
    again = replay(tmp_path / bad["file"])
    part = {"audio": "DAVEnet", "video": "GU_video"}[modality]
    assert f"forward: the output of {part}" in again and NAME in again


def test_a_fault_in_the_model_is_found_by_module(tmp_path, store_path, monkeypatch):
    forward = model.GatedUnit.forward

    def broken(self, x):  # the video's, by its width
        y = forward(self, x)
        return y + (-y.detach().abs()).sqrt() if self.fc.in_features == 18 else y

    monkeypatch.setattr(model.GatedUnit, "forward", broken)
    monkeypatch.setattr(guard, "MAX_BAD_STEPS", 3)
    command = ("train_stage1.py", "--pair", "AV", "--data", store_path, *SMALL)
    done = call(*command, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "3 bad steps in a row" in done.stderr
    assert "video: embedding not finite in all 16 clips" in done.stdout
    rows = read(tmp_path / "runs/stage1-AV/log.jsonl")
    assert [row["in_a_row"] for row in rows] == [1, 2, 3]
    dumps = guard.find_dumps(tmp_path / "runs/stage1-AV")
    assert len(dumps) == guard.MAX_DUMPS
    assert "forward: the output of GU_video" in replay(dumps[-1])
    assert "from finite inputs" in replay(dumps[-1])


def small_run(tmp_path, precision="fp32", scale=2.0**10):
    torch.manual_seed(0)
    net = model.MCN("AVT", **SIZES)
    objective = Objective(
        net.modalities,
        net.modalities,
        cluster_size=3,
        queue_size=1,
        temperature=0.1,
        recon_weight=1.0,
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=scale)
    keeper = guard.Guard(net, objective, scaler, tmp_path)
    return net, objective, optimizer, scaler, keeper


# What guard.skip keeps of a run's flags, for a replay.
ARGS = dict(
    temperature=0.1,
    margin=0.001,
    similarity="cosine",
    cluster_weight=1.0,
    recon_weight=1.0,
    cluster_size=3,
    queue_size=1,
    seed=0,
    data="gone.h5",
)


def one_step(net, objective, optimizer, scaler, keeper, content, step, factor=1.0):
    keeper.remember()
    terms = objective(*net(content), content)
    optimizer.zero_grad()
    scaler.scale(terms.total * factor).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    why, _ = keeper.check(terms.total, norm)
    if why:
        return keeper.skip(step, why, terms, ARGS)
    scaler.step(optimizer)
    scaler.update()
    objective.update_clusters(terms)
    return None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_bad_step_leaves_no_trace(tmp_path, precision, fault):
    parts = small_run(tmp_path, precision)
    net, objective, optimizer, scaler, keeper = parts
    for step in range(4):
        assert one_step(*parts, batch(), step) is None

    def everything():
        return [
            x.clone()
            for x in (
                *net.state_dict().values(),
                objective.clusters.centroids,
                *objective.clusters.queue,
                *[v for s in optimizer.state.values() for v in s.values()],
                torch.tensor([scaler.get_scale(), objective.clusters.steps]),
            )
        ]

    before, content = everything(), batch()
    if fault == "loss":
        content["text"][1] = float("inf")
        row = one_step(*parts, content, 5)
    else:
        keeper.overflows = guard.OVERFLOWS  # no search for the scale any more
        hook = net.GU_video.fc.weight.register_hook(lambda g: g * math.nan)
        row = one_step(*parts, content, 5)
        hook.remove()
    assert row["skipped"] == f"the {fault} is not finite" and keeper.skipped == 1
    after = everything()
    if fault == "gradient" and precision == "fp16":
        assert after[-1][0] == before[-1][0] / 2  # the scale alone moves
        after[-1][0] = before[-1][0]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if fault == "gradient":
        assert row["clips"] == [] and row["gradients"] == "GU_video.fc.weight"
    else:
        assert row["clips"][0]["modality"] == "text" and row["clips"][0]["n_bad"] == 1
    assert one_step(*parts, batch(), 6) is None and keeper.in_a_row == 0
    json.dumps(row, allow_nan=False)
    dump = checkpoint.load(guard.find_dumps(tmp_path)[0], "mcn_bad_step")
    assert torch.equal(dump["batch"]["clip_id"], content["clip_id"])


def test_an_overflow_of_the_loss_scale_is_no_bad_step(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BAD_STEPS", 1)
    parts = small_run(tmp_path, "fp16", scale=2.0**20)
    scaler, keeper = parts[3], parts[4]
    hook = parts[0].GU_video.fc.weight.register_hook(
        lambda g: g * (math.inf if scaler.get_scale() > 2**17 else 1)
    )
    rows = [one_step(*parts, batch(), step) for step in range(5)]
    hook.remove()
    assert [row is not None for row in rows] == [True, True, True, False, False]
    assert rows[0] == {
        "skipped": "fp16 overflow: loss scale 1.04858e+06 to 524288",
        "gradients": "GU_video.fc.weight",
    }
    keeper.give_up(5)  # does not
    assert keeper.skipped == 3 and keeper.in_a_row == 0 and not guard.find_dumps(tmp_path)


@pytest.mark.slow
def test_a_scale_that_is_never_found_is_a_bad_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BAD_STEPS", 3)
    parts = small_run(tmp_path, "fp16")
    parts[0].GU_video.fc.weight.register_hook(lambda g: g * math.nan)
    keeper = parts[4]
    for step in range(guard.OVERFLOWS + 3):
        keeper.give_up(step)
        row = one_step(*parts, batch(), step)
        assert row["gradients"] == "GU_video.fc.weight"
    assert "8th in a row; gradients not finite: GU_video.fc.weight" in capsys.readouterr().out
    assert keeper.in_a_row == 3
    with pytest.raises(SystemExit, match="3 bad steps in a row"):
        keeper.give_up(step)


def test_gradients_too_long_for_their_norm_are_a_bad_step(tmp_path):
    """Finite entries, an infinite norm: no loss scale helps, Adam's squares would be infinite."""
    parts = small_run(tmp_path, "fp16")
    parts[0].GU_video.fc.weight.register_hook(lambda g: torch.full_like(g, 1e30))
    row = one_step(*parts, batch(), 1)
    assert row["skipped"] == "the gradient is not finite" and row["in_a_row"] == 1


def test_the_newest_bad_steps_are_kept(tmp_path):
    parts = small_run(tmp_path)
    content = batch()
    content["text"][1] = math.nan
    for step in range(1, 9):
        one_step(*parts, content if step % 2 else batch(), step)
    assert [p.name for p in guard.find_dumps(tmp_path)] == [
        f"bad-step-00000{step}.pt" for step in (3, 5, 7)
    ]


def test_the_replay_finds_a_fault_in_backward(tmp_path, monkeypatch):
    parts = small_run(tmp_path)
    forward = model.MCN._audio

    def fault(gradient):
        gradient = gradient.clone()
        gradient[4] = math.inf
        return gradient

    def broken(self, batch, *rest):
        features, embedding = forward(self, batch, *rest)
        features = features * 1
        features.register_hook(fault)
        return features, self.DAVEnet_projection(self.GU_audio(features))

    monkeypatch.setattr(model.MCN, "_audio", broken)
    row = one_step(*parts, batch(), 1)
    assert row["skipped"] == "the gradient is not finite" and "DAVEnet" in row["gradients"]
    text = replay(guard.find_dumps(tmp_path)[0])
    assert "forward:" not in text
    assert "backward: the gradient of the output of DAVEnet, for 1 clips" in text


def test_skipped_steps_do_not_move_the_schedule(tmp_path, store_path, monkeypatch):
    pytest.importorskip("gensim")
    command = ("train_stage1.py", "--pair", "VT", "--data", store_path, *SMALL, "--epochs", 4)
    call(*command, "--out", "whole", cwd=tmp_path)
    break_reader(monkeypatch, "video")
    call(*command, "--out", "holed", cwd=tmp_path)
    whole, holed = read(tmp_path / "whole/log.jsonl"), read(tmp_path / "holed/log.jsonl")
    assert [row["lr"] for row in holed if "lr" in row] == [row["lr"] for row in whole][:7]


INJECT = """
import os, runpy, sys
import numpy as np
from mcn_ext.data import clips as data
read = data.TrainingClips.__getitem__
def broken(self, key):
    item = read(self, key)
    if key == (1, VIDEO):
        item["audio"][1, 3, 7] = np.nan
    return item
data.TrainingClips.__getitem__ = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_ranks_skip_together_and_name_the_one_clip(tmp_path, store_path):
    (tmp_path / "inject.py").write_text(INJECT.replace("VIDEO", str(VIDEO)))
    flags = ("--pair", "AV", "--data", store_path, *SMALL, "--epochs", 3)
    done = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        tmp_path / "inject.py",
        ROOT / "train_stage1.py",
        *flags,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    rows = read(tmp_path / "runs/stage1-AV/log.jsonl")
    (bad,) = [row for row in rows if "skipped" in row]
    assert len(rows) == 6 and NAME in done.stdout
    assert "audio: input not finite in 1 of 16 clips" in done.stdout  # of both ranks' 8
    files = sorted(p.name for p in (tmp_path / "runs/stage1-AV").glob("bad-step-*"))
    assert len(files) == 2 and files[1].endswith(".rank1.pt")
    again = replay(tmp_path / "runs/stage1-AV" / files[0])
    assert "16 clips" in again and "forward: the output of DAVEnet" in again and NAME in again
