"""Encoders, model and objective."""

import pytest
import torch

from mcn_ext import ops
from mcn_ext.data.clips import to_device
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from mcn_ext.reference import contrastive_loss

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


def moved(data, device):
    """A batch on a device, as training copies it there."""
    flat = {k: v for k, v in data.items() if not isinstance(v, dict)}
    for group in ("video", "valid"):
        flat |= {f"{group}.{k}": v for k, v in data[group].items()}
    return to_device(flat, torch.device(device), None)


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


@pytest.mark.parametrize("pair, alike", [("VT", True), ("AV", False)])
def test_same_words_are_no_negatives_of_a_pair_with_text(pair, alike):
    model, data = MCN(pair, **SIZES).eval(), batch()
    data["caption_id"] = torch.zeros(6, dtype=torch.int64)
    names = model.modalities
    objective = Objective(names, names, cluster_weight=0.0, recon_weight=0.0)
    assert (objective(*model(data), data).total == 0) == alike


def test_each_loss_reaches_the_operator(monkeypatch):
    model, data = MCN("AV", **SIZES).eval(), batch()
    data["bag_id"] = torch.tensor([0, 0, 2, 2, 2, 5])
    embeddings, seen = model(data)[0], {}
    compute = ops.mcn_loss

    def noted(*args, **keywords):
        seen.update(keywords)
        return compute(*args, **keywords)

    monkeypatch.setattr(ops, "mcn_loss", noted)
    for loss, wanted in {
        "softmax": {"kind": "softmax"},
        "milnce": {"positives": data["bag_id"]},
        "dcl": {"kind": "dcl"},
        "sigmoid": {"kind": "sigmoid", "bias": -10.0},
    }.items():
        seen.clear()
        options = {"loss": loss, "cluster_weight": 0.0, "recon_weight": 0.0}
        total = Objective(model.modalities, model.modalities, **options)(embeddings, {}, data).total
        expected = contrastive_loss(*embeddings.values(), ids=data["clip_id"], **wanted)
        torch.testing.assert_close(total, expected)
        assert seen.keys() & {"positives", "kind", "q", "lam", "bias"} == wanted.keys()


def test_a_learnt_temperature_is_a_parameter_within_limits():
    model, data = MCN("VT", **SIZES), batch()
    options = {"temperature": 0.2, "cluster_weight": 0.0, "recon_weight": 0.0}
    fixed, learnt = (
        Objective(model.modalities, model.modalities, learn_temperature=learn, **options)
        for learn in (False, True)
    )
    embeddings = {name: x.detach().double() for name, x in model(data)[0].items()}
    total = learnt.double()(embeddings, {}, data).total
    torch.testing.assert_close(total, fixed(embeddings, {}, data).total, rtol=1e-6, atol=0)
    (scale,) = learnt.parameters()
    assert not list(fixed.parameters())

    def loss(log_scale):
        return torch.func.functional_call(
            learnt, {"log_scale": log_scale}, (embeddings, {}, data)
        ).total

    assert torch.autograd.gradcheck(loss, scale)
    with torch.no_grad():
        scale.fill_(9.0)
    learnt.limit_temperature()  # 1 / temperature is at most 100
    assert learnt.temperature.item() == pytest.approx(0.01)
