"""Bad steps: skipped without a trace, named, replayed."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mcn_ext import model
from mcn_ext.data import clips as data
from mcn_ext.objective import Objective
from mcn_ext.train import checkpoint, guard
from mcn_ext.train.log import read
from mcn_ext.train.replay import FirstNotFinite, replay
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


@contextlib.contextmanager
def unwritten_memory_as_nan():
    """Instead of what happens to lie there, nearly always finite: torch.empty's contents."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


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
    assert math.isnan(float(bad["terms"]["contrastive audio-video"]))
    assert all(math.isfinite(row["total"]) for row in rows if row is not bad)
    assert f"step {bad['step']} skipped" in done.stdout and NAME in done.stdout
    assert f"{modality}: input not finite in 1 of" in done.stdout
    assert (tmp_path / "runs/stage1-AV/curves.png").exists() == (modality == "audio")
    # The replay needs no fault in the reader any more.
    monkeypatch.undo()
    with unwritten_memory_as_nan():  # which is not what went wrong
        again = call(*command, "--detect", cwd=tmp_path).stdout
    part = {"audio": "MCN.DAVEnet", "video": "MCN"}[modality]
    assert f"forward: first in {part}: aten." in again and NAME in again
    named = call(*command, "--detect", tmp_path / bad["file"], cwd=tmp_path).stdout
    assert named.splitlines()[-3:] == again.splitlines()[-3:]
    assert (
        "no bad-step-*.pt in"
        in call(*command, "--out", "other", "--detect", cwd=tmp_path, check=False).stderr
    )


def test_a_fault_in_the_model_is_found_by_module(tmp_path, store_path, monkeypatch):
    forward = model.GatedUnit.forward

    def broken(self, x):
        y = forward(self, x)
        return y + (-y.detach().abs()).sqrt() if self is fragile[0] else y

    fragile = [None]
    build = model.MCN.__init__

    def remember(self, *args, **kwargs):
        build(self, *args, **kwargs)
        fragile[0] = self.GU_video

    monkeypatch.setattr(model.MCN, "__init__", remember)
    monkeypatch.setattr(model.GatedUnit, "forward", broken)
    command = (
        "train_stage1.py",
        "--pair",
        "AV",
        "--data",
        store_path,
        *SMALL,
        "--max_bad_steps",
        3,
    )
    done = call(*command, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "3 bad steps in a row (--max_bad_steps)" in done.stderr
    assert "video: embedding not finite in all 16 clips" in done.stdout
    rows = read(tmp_path / "runs/stage1-AV/log.jsonl")
    assert [row["in_a_row"] for row in rows] == [1, 2, 3]
    assert len(guard.find_dumps(tmp_path / "runs/stage1-AV")) == guard.MAX_DUMPS
    again = call(*command, "--detect", cwd=tmp_path).stdout
    assert "first in MCN.GU_video: aten.sqrt.default yields" in again
    assert "from finite inputs" in again


@pytest.mark.parametrize(
    "do, found",
    [
        (
            lambda x: x[1:].view(-1).mul_(math.inf),
            "aten.mul_.Tensor yields 9 of 9 entries not finite in (9,) float32, from finite inputs",
        ),
        (
            lambda x: torch.empty_like(x).fill_(math.nan).add_(1),
            "aten.fill_.Scalar yields 12 of 12 "
            "entries not finite in (4, 3) float32, from finite inputs",
        ),
        (lambda x: torch.div(x, 0, out=torch.empty_like(x)), "from finite inputs"),
        (
            lambda x: torch.empty(4, 3, dtype=torch.half).copy_(x * 1e6),
            "aten.copy_.default yields 12 "
            "of 12 entries not finite in (4, 3) float16, from finite inputs",
        ),
        (lambda x: torch.empty_like(x)[1:].view(-1)[:2], "all finite"),
        (lambda x: torch.empty_like(x).copy_(x).mul(2), "all finite"),
    ],
)
def test_the_first_operation_is_named_and_not_the_memory(do, found):
    x = torch.ones(4, 3)
    with unwritten_memory_as_nan(), FirstNotFinite() as first:
        do(x)
    assert str(first).endswith(found), str(first)


def small_run(tmp_path, precision="fp32", scale=2.0**10, loss_impl="fused", **options):
    torch.manual_seed(0)
    net = model.MCN("AVT", **SIZES)
    objective = Objective(
        net.modalities,
        net.modalities,
        cluster_size=3,
        queue_size=2,
        refit_every=1,
        temperature=0.1,
        recon_weight=1.0,
        loss_impl=loss_impl,
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=scale)
    return (
        net,
        objective,
        optimizer,
        scaler,
        guard.Guard(net, objective, optimizer, scaler, tmp_path, **options),
    )


def one_step(net, objective, optimizer, scaler, keeper, content, step, factor=1.0):
    keeper.before()
    total = objective(*net(content), content)["total"] * factor
    optimizer.zero_grad()
    scaler.scale(total).backward()
    why = keeper.check(total)
    if why:
        return keeper.skip(step, why, {}, net.sizes)
    scaler.step(optimizer)
    scaler.update()
    objective.enqueue()
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
                torch.tensor([scaler.get_scale(), objective.clusters.steps, len(keeper.norms)]),
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


def test_an_overflow_of_the_loss_scale_is_no_bad_step(tmp_path):
    parts = small_run(tmp_path, "fp16", scale=2.0**20, max_bad_steps=1)
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
def test_a_scale_that_is_never_found_is_a_bad_step(tmp_path, capsys):
    parts = small_run(tmp_path, "fp16", max_bad_steps=3)
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


@pytest.mark.parametrize("rule", ["off", "clip", pytest.param("skip", marks=pytest.mark.slow)])
def test_outlier_gradients(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(guard, "NORMS", 2 * guard.ENOUGH_NORMS)  # sooner used to larger ones
    parts = small_run(tmp_path, outliers=rule, factor=4.0)
    net, keeper = parts[0], parts[4]
    for step in range(guard.ENOUGH_NORMS):
        assert one_step(*parts, batch(), step) is None
    usual, before = max(keeper.norms), net.GU_video.fc.weight.clone()
    row = one_step(*parts, batch(), 99, factor=1e3)
    gradient = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert keeper.norm > 20 * usual  # noted before clipping
    if rule == "skip":
        assert row["skipped"].startswith("the gradient is an outlier: norm ")
        assert torch.equal(before, net.GU_video.fc.weight) and keeper.in_a_row == 0
        for step in range(guard.NORMS):  # larger for good: not skipped for ever
            row = one_step(*parts, batch(), step, factor=1e3)
        assert row is None
    else:
        assert keeper.clipped == (rule == "clip")
        assert row is None and not torch.equal(before, net.GU_video.fc.weight)
        assert gradient > 20 * usual if rule == "off" else gradient < 4.5 * usual
    state = keeper.state_dict()
    again = small_run(tmp_path)[4]
    again.load_state_dict(state)
    assert again.norms == keeper.norms and again.skipped == keeper.skipped


@pytest.mark.parametrize("loss_impl", ["fused", "reference"])
def test_the_replay_finds_a_fault_in_backward(tmp_path, loss_impl):
    parts = small_run(tmp_path, loss_impl=loss_impl)
    net, objective = parts[:2]

    def fault(gradient):
        gradient = gradient.clone()
        gradient[4] = math.inf
        return gradient

    net.GU_audio.register_forward_hook(lambda _, __, out: (out.register_hook(fault), None)[1])
    row = one_step(*parts, batch(), 1)
    assert row["skipped"] == "the gradient is not finite" and "DAVEnet" in row["gradients"]
    text = replay(
        Path(),
        tmp_path,
        net,
        objective,
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        lambda ids: [f"clip {i}" for i in ids],
    )
    assert "forward: all finite" in text and "  backward: first aten." in text
    assert "that is not finite: the output of GU_audio, for 1 clips: clip 4" in text


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
    again = call("train_stage1.py", *flags, "--detect", cwd=tmp_path).stdout
    assert "16 clips" in again and "first in MCN.DAVEnet" in again and NAME in again
