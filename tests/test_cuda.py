"""On a GPU: the step equals the CPU's. Needs torch, numpy, h5py and pytest only."""

import pytest
import torch

from mcn_ext.data import to_device
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from tests.test_model import SIZES, batch


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_on_a_gpu_equals_the_cpu(dtype):
    torch.manual_seed(0)
    model, data = MCN("AVT", **SIZES).eval(), batch()
    flat = {k: v for k, v in data.items() if not isinstance(v, dict)}
    for group in ("video", "valid"):
        flat |= {f"{group}.{k}": v for k, v in data[group].items()}
    objective = Objective(model.modalities, model.modalities, cluster_size=2, queue_size=1,
                          refit_every=1)
    want = objective(*model(data), data)["total"]
    model = model.cuda()
    moved = to_device(flat, torch.device("cuda"), None)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        embeddings, errors = model(moved)
    objective = Objective(model.modalities, model.modalities, cluster_size=2, queue_size=1,
                          refit_every=1)
    got = objective(embeddings, errors, moved)["total"]
    torch.testing.assert_close(got.cpu(), want, rtol=1e-3 if dtype == torch.float32 else 5e-2,
                               atol=1e-3)
    got.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
