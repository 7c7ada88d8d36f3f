"""Encoders, model and objective."""

import pytest
import torch
from torch.nn import functional as F

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
    objective = Objective(
        names, names, recon_weight=1.0, cluster_size=2, queue_size=1, refit_every=1
    )
    objective(embeddings, errors, data)
    assert objective.clusters.centroids is None  # not before the step counts
    objective.enqueue()
    terms = objective(*model(data), data)
    assert terms["cluster"] > 0
    terms["total"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert ("DAVEnet.conv1.weight" in model.state_dict()) == ("A" in modalities)


def test_noisy_clips_come_in_by_and_by():
    names = ["audio", "video", "text"]
    objective = Objective(
        names,
        ["text"],
        cluster_size=2,
        queue_size=1,
        refit_every=1,
        clean_first=0.5,
        first=("audio", "video"),
    )
    angle = torch.tensor([0.1, 1.5, 0.2, 0.9, 0.0, 0.5])  # between a clip's sound and its video
    rows = {
        "audio": torch.stack([angle.cos(), angle.sin()], dim=1),
        "video": torch.tensor([[1.0, 0.0]]).repeat(6, 1),
        "text": torch.randn(6, 2),
    }
    valid = {name: torch.ones(6, dtype=torch.bool) for name in names}
    valid["audio"][4] = False  # nothing is known of it: it stays
    for progress, left in ((0.0, [0, 2, 4, 5]), (0.25, [0, 2, 3, 4, 5]), (0.49, list(range(6)))):
        objective.progress = progress
        kept = objective.clean(rows, valid)
        assert kept["text"].nonzero().flatten().tolist() == left
        assert torch.equal(kept["audio"], kept["text"] & valid["audio"])
    ids, errors = torch.arange(6), {"text": torch.rand(6)}
    batch_ = {"valid": valid, "clip_id": ids, "caption_id": ids}
    objective.progress = 0.0
    early = objective(rows, errors, batch_)["contrastive"]
    objective.enqueue()
    assert objective.clusters.queue[-1].any(dim=1).all()  # all are clustered
    objective.progress = 0.5
    late = objective(rows, errors, batch_)["contrastive"]
    plain = Objective(names, ["text"], cluster_weight=0.0)(rows, errors, batch_)["contrastive"]
    assert late == plain and not torch.isclose(early, late)


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
    objective(embeddings, errors, batch())["total"].backward()
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
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_same_words_are_no_negatives():
    model = MCN("VT", **SIZES).eval()
    data = batch()
    data["caption_id"] = torch.zeros(6, dtype=torch.int64)
    objective = Objective(
        ["video", "text"], ["video", "text"], cluster_weight=0.0, recon_weight=0.0
    )
    assert objective(*model(data), data)["total"] == 0
    with torch.no_grad():
        audio = Objective(
            ["video", "audio"], ["video", "audio"], cluster_weight=0.0, recon_weight=0.0
        )
        model = MCN("AV", **SIZES).eval()
        assert audio(*model(data), data)["total"] > 0  # without text the clips differ


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_joint_pairs_are_each_modality_with_the_mean_of_the_others(similarity):
    torch.manual_seed(0)
    names = ["audio", "text", "video"]
    rows = {name: torch.randn(6, 16, requires_grad=True) for name in names}
    data = batch()
    data["valid"]["audio"][2] = False
    data["valid"]["text"][4] = data["valid"]["video"][4] = False
    with torch.no_grad():
        rows["audio"][2] = torch.nan  # what is not there reaches neither loss nor gradients
    data["caption_id"][1] = data["caption_id"][0]
    objective = Objective(
        names,
        names,
        cluster_weight=0.0,
        recon_weight=0.0,
        joint_pairs=True,
        similarity=similarity,
        temperature=0.5,
    )
    total = objective(rows, {}, data)["total"]
    total.backward()

    terms, valid = [], data["valid"]
    unit = {
        n: F.normalize(x.detach()) if similarity == "cosine" else x.detach()
        for n, x in rows.items()
    }
    for name in names:
        others = [n for n in names if n != name]
        parts = torch.stack([torch.where(valid[n][:, None], unit[n], 0.0) for n in others])
        mean = parts.sum(0) / torch.stack([valid[n] for n in others]).sum(0).clamp_min(1)[:, None]
        both = valid[name] & (valid[others[0]] | valid[others[1]])
        for a, b, ok in (
            (rows[others[0]], rows[others[1]], valid[others[0]] & valid[others[1]]),
            (mean, rows[name], both),
        ):
            caption = name == "text" if a is mean else "text" in others
            terms.append(
                contrastive_loss(
                    a.detach(),
                    b.detach(),
                    temperature=0.5,
                    normalize=similarity == "cosine",
                    ids=data["caption_id" if caption else "clip_id"],
                    valid=ok,
                )
            )
    torch.testing.assert_close(total.detach(), sum(terms) / 6)
    for name, x in rows.items():
        assert torch.isfinite(x.grad).all() and not x.grad[~valid[name]].any(), name
        assert x.grad.any(), name


def test_joint_pairs_need_three_modalities():
    assert Objective(["audio", "text"], ["text"], joint_pairs=True).joint_pairs == []
    frozen = Objective(["audio", "video", "text"], ["text"], joint_pairs=True)
    assert len(frozen.pairs) == 2 and len(frozen.joint_pairs) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training_step_is_finite(dtype):
    model = MCN("AVT", **SIZES)
    data = batch()
    objective = Objective(
        model.modalities, model.modalities, cluster_size=2, queue_size=1, refit_every=1
    )
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            embeddings, errors = model(data)
        terms = objective(embeddings, errors, data)
        objective.enqueue()
    terms["total"].backward()
    assert terms["cluster"] > 0
    assert terms["total"].dtype == torch.float32 and torch.isfinite(terms["total"])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
