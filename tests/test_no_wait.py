"""A training step on a device without numbers: nothing mixes devices, and the host waits once a
step, to decide whether the step counts.

The device is torch's "meta", in the place of a GPU: its tensors have shapes alone.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcn_ext import encoders, ops
from mcn_ext.data.batch import to_device
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from mcn_ext.train.guard import Guard
from tests.test_model import SIZES
from tests.test_model import batch as small_batch

META, aten = torch.device("meta"), torch.ops.aten


class Device(TorchDispatchMode):
    """Counts ``waits`` for what is on the device, which is then 1.0, and refuses what a GPU does.

    Numbers that decide a size (``nonzero``) meta tensors refuse themselves.
    """

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if not x.is_meta]
        if func is aten._local_scalar_dense.default and not here:
            self.waits += 1
            return 1.0
        if (
            func is aten._to_copy.default
            and not here
            and kwargs.get("device") == torch.device("cpu")
        ):
            self.waits += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        if func in (aten._to_copy.default, aten.copy_.default):
            to_it = args[0].is_meta if func is aten.copy_.default else kwargs.get("device") == META
            free = kwargs.get("non_blocking", len(args) > 2 and args[2])
            self.waits += bool(here) and to_it and not free
        elif len(here) < len(tensors) and any(x.dim() for x in here):
            raise RuntimeError(f"{func} mixes devices")
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The compiled losses' Python runs, as far as their kernels; meta tensors have no autocast."""
    monkeypatch.setattr(ops, "_compiled_for", lambda x: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def waits_of_a_step(pair, added="", checkpoint=False, loss="softmax"):
    """Of the second step of a run whose clips have various lengths."""
    model = MCN(pair + added, **SIZES, checkpoint_activations=checkpoint).to(META)
    model.freeze([n for n in model.modalities if added and not added == n[0].upper()])
    model.train()
    trained = [name for name in model.modalities if name not in model.frozen]
    options = {"loss": loss, "cluster_size": 4, "queue_size": 5}
    objective = Objective(model.modalities, trained, **options).to(META)
    objective.clusters.centroids = torch.empty(4, SIZES["embd_dim"], device=META)
    learning = [p for p in (*model.parameters(), *objective.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(learning)
    guard = Guard(model, objective, torch.amp.GradScaler("cpu", enabled=False), None)
    host = small_batch(8)
    flat = {key: value for key, value in host.items() if not isinstance(value, dict)}
    flat["bag_id"] = flat["clip_id"] // 2
    for group in ("video", "valid"):
        flat |= {f"{group}.{name}": value for name, value in host[group].items()}
    for _ in range(2):
        with Device() as device:
            guard.remember()
            batch = to_device(flat, META, None)
            embeddings, errors = model(batch)
            terms = objective(embeddings, errors, batch)
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in learning])
            assert guard.check(terms.total, norm) == ("", True)  # what is not there reads 1.0
            optimizer.step()
            objective.update_clusters(terms)
    return device.waits


@pytest.mark.skipif("error" in ops.build_info(), reason="not built")
@pytest.mark.parametrize(
    "pair, added, checkpoint, loss",
    [
        ("AV", "T", False, "softmax"),
        ("AVT", "", False, "milnce"),
        ("AT", "", True, "sigmoid"),
        ("AV", "", False, "dcl"),
    ],
)
def test_a_step_waits_once(pair, added, checkpoint, loss):
    assert waits_of_a_step(pair, added, checkpoint, loss) == 1


@pytest.mark.skipif("error" in ops.build_info(), reason="not built")
def test_a_wait_more_is_found(monkeypatch):
    def real(n_frames, x):
        return torch.arange(x.shape[-1], device=x.device) < n_frames.to(x.device)[:, None]

    monkeypatch.setattr(encoders, "_real", real)
    assert waits_of_a_step("AV") > 1


def test_what_a_gpu_would_refuse_or_wait_for():
    x = torch.zeros(4, 3, device=META)
    with Device() as device:
        waiting = (
            lambda: x.sum().item(),
            lambda: x.cpu(),
            lambda: bool(x.sum() > 0),
            lambda: x.tolist(),
            lambda: x.copy_(torch.ones(3)),
            lambda: torch.ones(3).to(META),
        )
        for n, wait in enumerate(waiting, 1):
            wait()
            assert device.waits == n
        for refused in (lambda: x.nonzero(), lambda: x[x > 0], lambda: x + torch.zeros(4, 3)):
            with pytest.raises(Exception, match="Meta|mixes devices|meta"):
                refused()
        assert torch.ones(3).to(META, non_blocking=True).device == META and device.waits == n


def test_checkpoints_keep_less_for_the_backward():
    def kept(checkpoint):
        seen = {}

        def keep(x):
            seen[x.untyped_storage()._cdata] = x  # alive, so that no other takes its place
            return x

        model = MCN("AT", **SIZES, checkpoint_activations=checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.embed("audio", small_batch(64, frames=300))
        return sum(x.untyped_storage().nbytes() for x in seen.values())

    assert kept(True) < 0.5 * kept(False)
