"""A training step on a GPU that is not there (benchmarks/shapes.py): nothing mixes devices, and the
host waits once a step, to decide whether the step counts."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcn_ext import encoders
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from tests.conftest import load_script
from tests.test_model import SIZES
from tests.test_model import batch as small_batch

shapes = sys.modules["shapes"] = load_script("benchmarks/shapes.py")
memory = load_script("benchmarks/memory.py")


def arguments(**changed):
    return memory.arguments(
        "demo",
        **dict(embd_dim=16, recon_dim=8, audio_width=0.0625, audio_frames=200, cluster_size=4)
        | changed,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair, added, everywhere, checkpoint, short",
    [
        ("AV", "T", 8, False, 0.0),
        ("AVT", "", 16, False, 0.3),
        ("AT", "", 16, True, 0.0),
        ("VT", "A", 8, True, 0.8),
    ],
)
def test_a_step_waits_once(pair, added, everywhere, checkpoint, short):
    found = memory.measure(arguments(), pair, added, 8, everywhere, checkpoint, short)
    assert found["waits"] == 1
    assert found["peak_gib"] > found["before_gib"] > found["weights_gib"] > 0


@pytest.mark.slow
def test_a_wait_more_is_found(monkeypatch):
    """Lengths that are copied from memory that is not pinned."""

    def real(n_frames, x):
        return torch.arange(x.shape[-1], device=x.device) < n_frames.to(x.device)[:, None]

    monkeypatch.setattr(encoders, "_real", real)
    with pytest.raises(shapes.Waits, match="waits for the device"):
        memory.measure(arguments(), "AV", "", 8, 8, False, 0.5)


@pytest.mark.slow
def test_checkpoints_take_less_memory():
    args = arguments(audio_frames=1000)
    kept, again = (memory.measure(args, "AT", "", 64, 64, on) for on in (False, True))
    taken = [found["peak_gib"] - found["before_gib"] for found in (kept, again)]
    assert taken[1] < 0.7 * taken[0]


def test_what_a_gpu_would_refuse():
    waits = (
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).pin_memory().to("cuda"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to("cuda", non_blocking=True),
    )
    with shapes.pretend() as gpu:
        x = torch.zeros(4, 3, device="cuda")
        assert gpu.held.live == 512
        for wait in waits:
            with pytest.raises(shapes.Waits, match="waits for the device"):
                wait(x)
        with pytest.raises(Exception, match="same device|two different devices"):
            x + torch.zeros(4, 3)
        y = x @ x.t()
        assert y.device.type == "cuda" and gpu.held.live == 1024
        assert torch.ones(3).pin_memory().to("cuda", non_blocking=True).device.type == "cuda"
        del x, y
        assert gpu.held.live == 0 and gpu.held.peak == 1536


def test_the_graph_is_walked_as_torch_does_and_holds_as_much():
    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.held = shapes.Held()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.held.show(x)
            return out

    found = []
    for ours in (False, True):
        torch.manual_seed(0)
        model, data = MCN("AVT", **SIZES), small_batch(64)
        objective = Objective(model.modalities, model.modalities, cluster_weight=0.0)
        saved = shapes._Saved()
        with Watch() as watch:
            if ours:
                with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                    total = objective(*model(data), data).total
                shapes._backward(saved)(total)
            else:
                objective(*model(data), data).total.backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, watch.held.peak))
    (grads, peak), (same, near) = found
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, rtol=1e-5, atol=1e-7, msg=name)
    assert near == pytest.approx(peak, rel=0.05)
