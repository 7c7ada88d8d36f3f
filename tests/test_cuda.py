"""On a GPU: the step equals the CPU's. Needs torch, numpy, h5py and pytest only."""

import pytest
import torch

from mcn_ext.clustering import spherical_kmeans
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from tests.test_guard import test_a_bad_step_leaves_no_trace  # noqa: F401  (here: on the GPU)
from tests.test_model import SIZES, batch, moved

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def device():
    return "cuda"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_on_a_gpu_equals_the_cpu(dtype, full):
    """``full``: all clips are of full length, which need no mask."""
    torch.manual_seed(0)
    data, found = batch(), []
    if full:
        data["n_frames"][:] = data["audio"].shape[2]
    model = MCN("AVT", **SIZES).eval()
    for device in ("cpu", "cuda"):
        content = moved(data, device)
        model = model.to(device)
        model.zero_grad()
        objective = Objective(model.modalities, model.modalities, cluster_size=2, queue_size=1)
        with torch.autocast(
            device, dtype=dtype, enabled=device == "cuda" and dtype != torch.float32
        ):
            embeddings, errors = model(content)
        total = objective(embeddings, errors, content).total
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
