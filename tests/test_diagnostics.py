"""Signs of collapse against what they are by definition."""

import math

import pytest
import torch

from mcn_ext.objective import Objective
from mcn_ext.reference import unit_rows
from mcn_ext.train.diagnostics import (
    SAMPLE,
    diagnose,
    effective_rank,
    signs_of_collapse,
    uniformity,
)


def test_effective_rank():
    for shape in ((12, 40), (40, 12)):
        assert effective_rank(torch.eye(*shape)) == pytest.approx(12)
    line = torch.ones(20, 1) * torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    two = torch.zeros(10, 6)
    two[:5, 0] = two[5:, 3] = 2.0
    assert effective_rank(two) == pytest.approx(2)
    assert effective_rank(torch.zeros(0, 4)) == 0


def test_uniformity():
    x = unit_rows(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    pairs = [
        (-2 * (x[i] - x[j]).square().sum()).exp() for i in range(30) for j in range(30) if i != j
    ]
    assert uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert uniformity(x[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-5)
    assert uniformity(x[:1]) == 0


def objective_with(audio, video, valid=None, clip_id=None):
    names, n = ["audio", "video"], len(audio)
    objective = Objective(names, names, recon_weight=0.0)
    everything = torch.ones(n, dtype=torch.bool)
    batch = {
        "valid": {"audio": everything if valid is None else valid, "video": everything},
        "clip_id": torch.arange(n) if clip_id is None else clip_id,
    }
    return objective, objective({"audio": audio, "video": video}, {}, batch)


def test_diagnose_against_plain_sums():
    g = torch.Generator().manual_seed(0)
    audio, video = torch.randn(40, 6, generator=g), 3 * torch.randn(40, 6, generator=g)
    valid, clip = torch.rand(40, generator=g) < 0.8, torch.arange(40) // 2
    audio[~valid] = float("nan")  # not there: in no number
    video[3], valid[3] = float("inf"), False  # in no loss, though its own modality is there
    got = diagnose(*objective_with(audio, video, valid, clip))
    a, v = unit_rows(audio), unit_rows(video)
    at = valid.nonzero().flatten().tolist()
    positive = sum(float(a[i] @ v[i]) for i in at) / len(at)
    others = [float(a[i] @ v[j]) for i in at for j in at if clip[i] != clip[j]]
    norm = float(video[torch.arange(40) != 3].norm(dim=1).mean())
    for name, value in (
        ("positive_audio_video", positive),
        ("negative_audio_video", sum(others) / len(others)),
        ("alignment_audio_video", 2 - 2 * positive),
        ("norm_video", norm),
    ):
        assert got[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    assert 1 < got["rank_audio"] <= 6 and got["uniformity_audio"] < 0
    assert signs_of_collapse(got) == []


def test_large_batches_are_sampled():
    x = torch.randn(3 * SAMPLE + 1, 4, generator=torch.Generator().manual_seed(0))
    got = diagnose(*objective_with(x, x))
    assert got["positive_audio_video"] == pytest.approx(1) and got["rank_audio"] <= 4


def test_collapse_is_said():
    x = torch.ones(64, 16) + 1e-3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    signs = signs_of_collapse(diagnose(*objective_with(x, x)) | {"largest_share": 0.9})
    assert len(signs) == 4 and "one cluster holds more than half of the clips" in signs[0]
    nobody = torch.zeros(8, dtype=torch.bool)
    assert not signs_of_collapse(diagnose(*objective_with(x[:8], torch.randn(8, 16), nobody)))


def test_pairs_that_agree_and_pairs_that_oppose():
    """At right angles all logits are equal, so a text's gradient is the mean of the others less its
    partner: equal for equal audio and video, the opposite for opposite ones."""
    video = torch.cat([torch.eye(4), torch.zeros(4, 4)], dim=1)
    text = video.flip(1)
    names, there = ["audio", "text", "video"], torch.ones(4, dtype=torch.bool)
    batch = {"valid": dict.fromkeys(names, there), "clip_id": torch.arange(4)}
    batch["caption_id"] = batch["clip_id"]
    options = {"margin": 0.0, "cluster_weight": 0.0, "recon_weight": 0.0}
    for sign, trained in ((1, ["text"]), (-1, ["text"]), (0.5, names)):
        objective = Objective(names, trained, **options)
        embeddings = {"audio": sign * video, "text": text, "video": video}
        got = diagnose(objective, objective(embeddings, {}, batch))
        found = {key for key in got if key.startswith("gradient_")}
        assert found == {f"gradient_{name}" for name in trained}
        assert got["gradient_text"] == pytest.approx(math.copysign(1, sign), abs=1e-5)
    audio, video = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    assert not any("gradient" in key for key in diagnose(*objective_with(audio, video)))
