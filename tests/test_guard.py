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
from tests.conftest import SMALL, stage1, torchrun
from tests.test_model import SIZES, batch, moved

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
    done = stage1(store_path, "--epochs 4", cwd=tmp_path, pictures=modality == "audio")
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


def test_a_fault_in_the_model_is_found_by_module_and_stops_the_run(
    tmp_path, store_path, monkeypatch
):
    forward, calls = model.GatedUnit.forward, []

    def broken(self, x):  # the video's, by its width, after a good step
        y = forward(self, x)
        calls.append(self.fc.in_features == 18 and self.training)
        return y + (-y.detach().abs()).sqrt() if calls[-1] and sum(calls) > 1 else y

    monkeypatch.setattr(model.GatedUnit, "forward", broken)
    monkeypatch.setattr(guard, "MAX_BAD_STEPS", 3)
    done = stage1(store_path, "--out run", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "step 4: 3 bad steps in a row" in done.stderr
    assert "video: embedding not finite in all 16 clips" in done.stdout
    rows = read(tmp_path / "run/log.jsonl")
    assert [row.get("in_a_row") for row in rows] == [None, 1, 2, 3]
    # Saved at the end of epoch 1, in the row of bad steps: what the last good step left.
    saved = checkpoint.load(tmp_path / "run/checkpoint.pt")
    assert saved["step"] == 2 and all(torch.isfinite(v).all() for v in saved["model"].values())
    dumps = guard.find_dumps(tmp_path / "run")
    assert len(dumps) == guard.MAX_DUMPS
    assert "forward: the output of GU_video" in replay(dumps[-1])
    assert "from finite inputs" in replay(dumps[-1])


# What guard.skip keeps of a run's flags, for a replay.
LOSS = dict(temperature=0.1, recon_weight=1.0, cluster_size=3, queue_size=1)
ARGS = LOSS | dict(margin=0.001, similarity="cosine", cluster_weight=1.0, seed=0, data="gone.h5")


class SmallRun:
    """The training loop without data: of MCN, or of another model and its objective."""

    def __init__(self, folder, precision="fp32", net=None, objective=None, scale=64.0, lr=1e-3):
        torch.manual_seed(0)
        self.net = net or model.MCN("AVT", **SIZES)
        self.device = next(self.net.parameters()).device.type
        self.objective = objective or Objective(self.net.modalities, self.net.modalities, **LOSS)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        fp16 = precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device, enabled=fp16, init_scale=scale)
        self.guard = guard.Guard(self.net, self.objective, self.scaler, folder)
        self.autocast = torch.autocast(self.device, torch.float16, enabled=False)

    def step(self, number, content=None):
        """The report of a step that was skipped, or None."""
        content = content or moved(batch(), self.device)
        self.guard.remember()
        with self.autocast:
            embeddings, errors = self.net(content)
        self.terms = self.objective(embeddings, errors, content)
        self.optimizer.zero_grad()
        self.scaler.scale(self.terms.total).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        why, _ = self.guard.check(self.terms.total, norm)
        if why:
            return self.guard.skip(number, why, self.terms, ARGS)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.update_clusters(self.terms)
        return None


@pytest.fixture
def device():
    return "cpu"  # test_cuda.py runs the next test on a GPU


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_bad_step_leaves_no_trace(tmp_path, device, precision, fault):
    run = SmallRun(tmp_path, precision, model.MCN("AVT", **SIZES).to(device))
    if device == "cuda":
        run.autocast = torch.autocast(device, torch.float16, enabled=precision == "fp16")
    for step in range(4):
        assert run.step(step) is None

    def everything():
        clusters = run.objective.clusters
        moments = [v for s in run.optimizer.state.values() for v in s.values()]
        tensors = [*run.net.state_dict().values(), clusters.centroids, *clusters.queue, *moments]
        return [x.clone() for x in tensors] + [torch.tensor(clusters.steps)]

    before, scale, content = everything(), run.scaler.get_scale(), moved(batch(), device)
    if fault == "loss":
        content["text"][1] = float("inf")
        row = run.step(5, content)
    else:
        run.guard.overflows = guard.OVERFLOWS  # no search for the scale any more
        hook = run.net.GU_video.fc.weight.register_hook(lambda g: g * math.nan)
        row = run.step(5)
        hook.remove()
    assert row["skipped"] == f"the {fault} is not finite" and run.guard.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    if fault == "gradient":
        assert run.scaler.get_scale() == (scale / 2 if precision == "fp16" else scale)
        assert row["clips"] == [] and row["gradients"] == "GU_video.fc.weight"
    else:
        assert run.scaler.get_scale() == scale
        assert row["clips"][0]["modality"] == "text" and row["clips"][0]["n_bad"] == 1
    assert run.step(6) is None and run.guard.in_a_row == 0
    json.dumps(row, allow_nan=False)
    dump = checkpoint.load(guard.find_dumps(tmp_path)[0], "mcn_bad_step")
    assert torch.equal(dump["batch"]["clip_id"], content["clip_id"].cpu())


def test_an_overflow_of_the_loss_scale_is_no_bad_step(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BAD_STEPS", 1)
    run = SmallRun(tmp_path, "fp16", scale=2.0**20)
    run.net.GU_video.fc.weight.register_hook(
        lambda g: g * (math.inf if run.scaler.get_scale() > 2**17 else 1)
    )
    rows = [run.step(step) for step in range(5)]
    assert [row is not None for row in rows] == [True, True, True, False, False]
    assert rows[0] == {
        "skipped": "fp16 overflow: loss scale 1.04858e+06 to 524288",
        "gradients": "GU_video.fc.weight",
    }
    run.guard.give_up(5)  # does not
    assert run.guard.skipped == 3 and run.guard.in_a_row == 0 and not guard.find_dumps(tmp_path)


@pytest.mark.slow
def test_a_scale_that_is_never_found_is_a_bad_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BAD_STEPS", 3)
    run = SmallRun(tmp_path, "fp16")
    run.net.GU_video.fc.weight.register_hook(lambda g: g * math.nan)
    for step in range(guard.OVERFLOWS + 3):
        run.guard.give_up(step)
        assert run.step(step)["gradients"] == "GU_video.fc.weight"
    assert "8th in a row; gradients not finite: GU_video.fc.weight" in capsys.readouterr().out
    assert run.guard.in_a_row == 3
    with pytest.raises(SystemExit, match="3 bad steps in a row"):
        run.guard.give_up(step)


def test_gradients_too_long_for_their_norm_are_a_bad_step(tmp_path):
    """Finite entries, an infinite norm: no loss scale helps, Adam's squares would be infinite."""
    run = SmallRun(tmp_path, "fp16")
    run.net.GU_video.fc.weight.register_hook(lambda g: torch.full_like(g, 1e30))
    row = run.step(1)
    assert row["skipped"] == "the gradient is not finite" and row["in_a_row"] == 1


def test_the_newest_bad_steps_are_kept(tmp_path):
    run, content = SmallRun(tmp_path), batch()
    content["text"][1] = math.nan
    for step in range(1, 9):
        run.step(step, content if step % 2 else None)
    kept = [path.name for path in guard.find_dumps(tmp_path)]
    assert kept == [f"bad-step-00000{step}.pt" for step in (3, 5, 7)]


def test_the_replay_finds_a_fault_in_backward(tmp_path, monkeypatch):
    run, forward = SmallRun(tmp_path), model.MCN._audio

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
    row = run.step(1)
    assert row["skipped"] == "the gradient is not finite" and "DAVEnet" in row["gradients"]
    text = replay(guard.find_dumps(tmp_path)[0])
    assert "forward:" not in text
    assert "backward: the gradient of the output of DAVEnet, for 1 clips" in text


def test_skipped_steps_do_not_move_the_schedule(tmp_path, store_path, monkeypatch):
    rates = []
    for name in ("whole", "holed"):
        stage1(store_path, "--epochs 4 --out", name, cwd=tmp_path)
        break_reader(monkeypatch, "video")
        rates.append([row["lr"] for row in read(tmp_path / name / "log.jsonl") if "lr" in row])
    assert rates[1] == rates[0][:7]


INJECT = """
import sys
import numpy as np
import train_stage1
from mcn_ext.data import clips as data
read = data.TrainingClips.__getitem__
def broken(self, key):
    item = read(self, key)
    if key == (1, VIDEO):
        item["audio"][1, 3, 7] = np.nan
    return item
data.TrainingClips.__getitem__ = broken
train_stage1.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ranks_skip_together_and_name_the_one_clip(tmp_path, store_path):
    script, folder = tmp_path / "inject.py", tmp_path / "runs/stage1-AV"
    script.write_text(INJECT.replace("VIDEO", str(VIDEO)))
    flags = ("--pair AV --data", store_path, *SMALL, "--epochs 3")
    done = torchrun(2, script, *flags, cwd=tmp_path)
    rows = read(folder / "log.jsonl")
    assert len(rows) == 6 and sum("skipped" in row for row in rows) == 1 and NAME in done.stdout
    assert "audio: input not finite in 1 of 16 clips" in done.stdout  # of both ranks' 8
    files = sorted(p.name for p in folder.glob("bad-step-*"))
    assert len(files) == 2 and files[1].endswith(".rank1.pt")
    again = replay(folder / files[0])
    assert "16 clips" in again and "forward: the output of DAVEnet" in again and NAME in again
