"""Encoders, model and objective."""

import math

import pytest
import torch

from mcn_ext.model import MCN
from mcn_ext.objective import Objective

SIZES = dict(
    video_dims={"2d": 12, "3d": 6}, word_dim=5, embd_dim=16, recon_dim=8, audio_width=0.0625
)


def batch(n=6, frames=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "video": {"2d": torch.rand(n, 12, generator=g), "3d": torch.rand(n, 6, generator=g)},
        "audio": torch.randn(n, 40, frames, generator=g) * 20 - 40,
        "n_frames": torch.randint(20, frames + 1, (n,), generator=g),
        "text": torch.randn(n, 4, 5, generator=g),
        "text_mask": torch.arange(4) < torch.arange(1, n + 1)[:, None],
        "valid": {m: torch.ones(n, dtype=torch.bool) for m in ("video", "audio", "text")},
        "clip_id": torch.arange(n),
        "caption_id": torch.arange(n),
    }


def test_published_parameter_names_and_shapes():
    with torch.device("meta"):  # names and shapes, no numbers
        model = MCN("AVT", audio_width=1.0, embd_dim=32, recon_dim=8)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name, shape in {
        "DAVEnet.conv1.weight": (128, 1, 40, 1),
        "DAVEnet.layer1.0.conv1.weight": (128, 128, 1, 9),
        "DAVEnet.layer4.0.downsample.0.weight": (1024, 512, 1, 1),
        "DAVEnet.layer4.1.bn2.running_var": (1024,),
        "DAVEnet_projection.weight": (32, 1024),
        "GU_audio.fc.weight": (1024, 1024),
        "GU_audio.cg.fc.bias": (1024,),
        "GU_video.fc.weight": (32, 4096),
        "text_pooling_caption.fc.weight": (32, 300),
        "GU_text_captions.cg.fc.weight": (32, 32),
        "recon_v.0.weight": (8, 32),
        "recon_v.2.weight": (4096, 8),
        "recon_a.2.weight": (1024, 8),
        "recon_t.2.weight": (32, 8),
    }.items():
        assert shapes[name] == shape, name
    assert (
        "DAVEnet.layer1.1.downsample.0.weight" not in shapes
        and "DAVEnet.layer1.0.downsample.0.weight" in shapes
    )


@pytest.mark.parametrize("modalities", ["AV", "VT", "AT", "AVT"])
def test_only_the_modalities_asked_for_exist_and_all_parameters_learn(modalities):
    model = MCN(modalities, **SIZES)
    data = batch()
    embeddings, errors = model(data)
    assert set(embeddings) == set(errors) == set(model.modalities)
    names = list(embeddings)
    objective = Objective(names, names, recon_weight=1.0, cluster_size=2, queue_size=1)
    first = objective(embeddings, errors, data)
    assert objective.clusters.centroids is None  # not before the step counts
    objective.update_clusters(first)
    terms = objective(*model(data), data)
    assert terms.cluster > 0
    terms.total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert ("DAVEnet.conv1.weight" in model.state_dict()) == ("A" in modalities)


def test_frozen_encoders_do_not_move():
    torch.manual_seed(0)
    model = MCN("AVT", **SIZES)
    model.freeze(["audio", "video"])
    model.train()
    assert not model.DAVEnet.bn1.training and model.text_pooling_caption.training
    before = {k: v.clone() for k, v in model.state_dict().items()}
    objective = Objective(model.modalities, ["text"], cluster_weight=0.0)
    assert objective.pairs == [("audio", "text"), ("text", "video")]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    embeddings, errors = model(batch())
    assert set(errors) == {"text"} and not embeddings["audio"].requires_grad
    objective(embeddings, errors, batch()).total.backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("text_pooling", "GU_text", "recon_t")) for k in moved)


def test_reconstruction_target_is_detached():
    model = MCN("V", **SIZES)
    embeddings, errors = model(batch())
    head = [p for n, p in model.named_parameters() if n.startswith("recon_v")]
    grads = torch.autograd.grad(errors["video"].sum(), [*head, model.GU_video.fc.weight])
    assert all(g.any() for g in grads)
    audio = MCN("A", **SIZES)
    with torch.no_grad():
        audio.recon_a[0].weight.zero_(), audio.recon_a[0].bias.zero_()
    _, errors = audio(batch())
    (g,) = torch.autograd.grad(errors["audio"].sum(), audio.DAVEnet.conv1.weight, allow_unused=True)
    # Nothing reaches DAVEnet but through the embedding, which the zeroed head cuts off.
    assert g is None or not g.any()


def test_invalid_rows_leave_the_loss_alone():
    torch.manual_seed(0)
    model = MCN("AVT", **SIZES).eval()
    data = batch()
    data["valid"]["audio"][2] = data["valid"]["text"][4] = False
    objective = Objective(model.modalities, model.modalities, cluster_weight=0.0, recon_weight=1.0)
    with torch.no_grad():
        first = objective(*model(data), data)
        data["audio"][2], data["text"][4] = 5.0, -3.0
        second = objective(*model(data), data)
    torch.testing.assert_close(first.scalars(), second.scalars())


def test_same_words_are_no_negatives():
    model = MCN("VT", **SIZES).eval()
    data = batch()
    data["caption_id"] = torch.zeros(6, dtype=torch.int64)
    objective = Objective(
        ["video", "text"], ["video", "text"], cluster_weight=0.0, recon_weight=0.0
    )
    assert objective(*model(data), data).total == 0
    with torch.no_grad():
        audio = Objective(
            ["video", "audio"], ["video", "audio"], cluster_weight=0.0, recon_weight=0.0
        )
        model = MCN("AV", **SIZES).eval()
        assert audio(*model(data), data).total > 0  # without text the clips differ


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training_step_is_finite(dtype):
    model = MCN("AVT", **SIZES)
    data = batch()
    objective = Objective(model.modalities, model.modalities, cluster_size=2, queue_size=1)
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            embeddings, errors = model(data)
        terms = objective(embeddings, errors, data)
        objective.update_clusters(terms)
    terms.total.backward()
    assert terms.cluster > 0
    assert terms.total.dtype == torch.float32 and torch.isfinite(terms.total)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_learnt_temperature_is_a_parameter_within_limits():
    model, data = MCN("VT", **SIZES), batch()
    options = {"cluster_weight": 0.0, "recon_weight": 0.0}
    fixed = Objective(model.modalities, model.modalities, temperature=0.2, **options)
    learnt = Objective(
        model.modalities, model.modalities, temperature=0.2, learn_temperature=True, **options
    )
    ends = model(data)
    total = learnt(*ends, data).total
    torch.testing.assert_close(total, fixed(*ends, data).total)
    total.backward()
    (scale,) = learnt.parameters()
    near = [Objective(["video", "text"], ["text"], temperature=t, **options) for t in (0.2, 0.201)]
    a, b = (float(o(*ends, data).total) for o in near)
    slope = (b - a) / (math.log(1 / 0.201) - math.log(1 / 0.2))
    assert float(scale.grad) == pytest.approx(slope, rel=0.02) and not list(fixed.parameters())
    with torch.no_grad():
        scale.fill_(9.0)
    learnt.limit_temperature()  # 1 / temperature is at most 100
    assert float(learnt.temperature) == pytest.approx(0.01)
