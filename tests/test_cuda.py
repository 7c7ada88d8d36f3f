"""On a GPU: the step equals the CPU's. Needs torch, numpy, h5py and pytest only."""

import pytest
import torch

from mcn_ext.clustering import spherical_kmeans
from mcn_ext.data.clips import to_device
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from mcn_ext.train.guard import OVERFLOWS, Guard
from tests.test_model import SIZES, batch

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def on_gpu(data):
    flat = {k: v for k, v in data.items() if not isinstance(v, dict)}
    for group in ("video", "valid"):
        flat |= {f"{group}.{k}": v for k, v in data[group].items()}
    return to_device(flat, torch.device("cuda"), None)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_on_a_gpu_equals_the_cpu(dtype, full):
    """``full``: all clips are of full length, which need no mask."""
    torch.manual_seed(0)
    data, found = batch(), []
    if full:
        data["n_frames"][:] = data["audio"].shape[2]
    model = MCN("AVT", **SIZES).eval()
    for moved in (data, on_gpu(data)):
        device = moved["audio"].device.type
        model = model.to(device)
        model.zero_grad()
        objective = Objective(model.modalities, model.modalities, cluster_size=2, queue_size=1)
        with torch.autocast(
            device, dtype=dtype, enabled=device == "cuda" and dtype != torch.float32
        ):
            embeddings, errors = model(moved)
        total = objective(embeddings, errors, moved).total
        total.backward()
        found.append((total.cpu(), [p.grad.cpu() for p in model.parameters()]))
    (want, slopes), (got, near) = found
    torch.testing.assert_close(got, want, rtol=1e-3 if dtype == torch.float32 else 5e-2, atol=1e-3)
    for slope, other in zip(slopes, near, strict=True):
        assert torch.isfinite(other).all()
        if dtype == torch.float32:  # convolutions are in tf32
            assert (other - slope).norm() <= 1e-2 * slope.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clusters_on_a_gpu_are_the_cpus_and_repeat_bit_for_bit(dtype):
    centres = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
    x = (centres[torch.arange(3000) % 16] + 0.1 * noise).to(dtype)
    x[5], x[7] = 0, float("nan")
    start = x[16:32]
    want, labels = spherical_kmeans(x, 16, init=start)
    got, same = spherical_kmeans(x.cuda(), 16, init=start.cuda())
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=0)
    assert torch.equal(same.cpu(), labels)
    for init in (start.cuda(), None):
        first, second = (spherical_kmeans(x.cuda(), 20, init=init) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    _, labels = spherical_kmeans((torch.ones(2000, 8) + 1e-5 * noise[:2000, :8]).cuda(), 64)
    assert len(labels.unique()) == 64


@pytest.mark.parametrize("fault", [None, "loss", "gradient"])
def test_a_bad_step_on_a_gpu_leaves_no_trace(fault, tmp_path):
    torch.manual_seed(0)
    model = MCN("AVT", **SIZES).cuda()
    objective = Objective(model.modalities, model.modalities, cluster_size=2, queue_size=1)
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
    guard = Guard(model, objective, scaler, tmp_path)
    guard.overflows = OVERFLOWS
    data = on_gpu(batch())
    if fault == "loss":
        data["text"][1] = float("inf")
    if fault == "gradient":
        model.GU_video.fc.weight.register_hook(lambda g: g * float("nan"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    guard.remember()
    with torch.autocast("cuda", dtype=torch.float16):
        embeddings, errors = model(data)
    terms = objective(embeddings, errors, data)
    scaler.scale(terms.total).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    why, _ = guard.check(terms.total, norm)
    assert why == (f"the {fault} is not finite" if fault else "")
    if fault:
        row = guard.skip(1, why, terms, {})
        assert (row["clips"][0]["modality"] == "text") if fault == "loss" else not row["clips"]
        assert scaler.get_scale() == (64 if fault == "loss" else 32)
        assert not objective.clusters.queue
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    else:
        scaler.step(optimizer)
        scaler.update()
        objective.update_clusters(terms)
        assert len(objective.clusters.queue) == 1 and guard.norm > 0
