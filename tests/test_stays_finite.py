"""No setting of the objective brings NaN about; bounds of its gradients; what kills the recipe."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mcn_ext import ops, reference
from mcn_ext.clustering import spherical_kmeans
from mcn_ext.objective import Objective
from mcn_ext.reference import unit_rows
from tests.conftest import load_script
from tests.test_guard import SmallRun


def all_finite(tensors):
    return all(bool(torch.isfinite(x).all()) for x in tensors)


class Scaled(nn.Module):
    """Encoders of random rows whose embeddings are ``scale`` times as long as usual."""

    def __init__(self, names, scale):
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16)) for name in names}
        )
        self.scale = scale

    def forward(self, x):
        rows = x["rows"]
        return {m: encoder(rows[m]) * self.scale for m, encoder in self.encoders.items()}, {}


def train_scaled(names, scale, dtype, steps, n=24, seed=0, **options):
    """Number of bad steps, and whether all that was computed and learnt is finite."""
    torch.manual_seed(seed)
    net, precision = Scaled(names, scale), "fp16" if dtype == torch.float16 else "fp32"
    objective = Objective(names, names, recon_weight=0.0, seed=seed, **options)
    run = SmallRun(None, precision, net, objective, scale=2.0**16, lr=1e-2)
    run.autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    g, bad, finite = torch.Generator().manual_seed(seed), 0, True
    for step in range(steps):
        shared = torch.randn(n, 12, generator=g)
        content = {
            "rows": {name: shared + torch.randn(n, 12, generator=g) for name in names},
            "valid": {name: torch.rand(n, generator=g) < 0.9 for name in names},
            "clip_id": torch.arange(n) // 2,
            "caption_id": torch.arange(n),
        }
        row = run.step(step, content)
        finite &= all_finite(run.terms.scalars().values())
        bad += row is not None and "overflow" not in row["skipped"]
    if objective.clusters is not None and objective.clusters.centroids is not None:
        finite &= all_finite([objective.clusters.centroids])
    assert run.guard.skipped < max(0.2 * steps, 24)  # tiny fp16 embeddings: until the scale fits
    return bad, finite and all_finite(net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e2, 1e4])
def test_200_steps_at_any_scale_stay_finite(dtype, scale):
    assert train_scaled(
        ["audio", "text", "video"], scale, dtype, 200, cluster_size=8, queue_size=4
    ) == (0, True)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    names=st.sampled_from([["audio", "video"], ["text", "video"], ["audio", "text", "video"]]),
    temperature=st.floats(0.005, 5),
    margin=st.floats(0, 0.5),
    n=st.integers(1, 30),
    cluster_weight=st.sampled_from([0.0, 0.3, 10.0]),
    cluster_size=st.integers(1, 40),
    queue_size=st.integers(1, 5),
    learn_temperature=st.booleans(),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    reference_losses=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_setting_of_the_objective_goes_nan(
    names, scale, dtype, n, seed, reference_losses, **options
):
    with pytest.MonkeyPatch.context() as patch:
        if reference_losses:
            patch.setenv("MCN_LOSS", "reference")
        assert train_scaled(names, scale, dtype, 8, n=n, seed=seed, **options) == (0, True)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 6),
    temperature=st.floats(0.01, 10),
    log_scale=st.floats(-12, 12),
    normalize=st.booleans(),
    loss_impl=st.sampled_from([ops, reference]),
    data=st.data(),
)
def test_no_rows_give_nan(n, d, temperature, log_scale, normalize, loss_impl, data):
    values = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=2 * n * d, max_size=2 * n * d))
    rows = (torch.tensor(values).reshape(2, n, d) * 10.0**log_scale).requires_grad_()
    ids, valid = torch.randint(4, (2, n), generator=torch.Generator().manual_seed(n))
    options = {"temperature": temperature, "normalize": normalize, "ids": ids, "valid": valid > 0}
    loss = loss_impl.contrastive_loss(*rows, **options)
    assert loss >= 0 and all_finite([loss, *torch.autograd.grad(loss, rows)])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 8),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.01, 0.05, 1.0]),
    loss_impl=st.sampled_from([ops, reference]),
)
def test_gradients_are_bounded_and_never_shorten_a_row(n, d, seed, temperature, loss_impl):
    """|dL/dx_i| <= 4 / (temperature |x_i|), at a right angle to x_i: a step along it lengthens x_i.
    With bounded logits, why the objective has nothing to diverge with."""
    g = torch.Generator().manual_seed(seed)
    norms = 10.0 ** torch.empty(n, 1).uniform_(-10, 10, generator=g)
    x = (unit_rows(torch.randn(n, d, generator=g)) * norms).requires_grad_()
    y = torch.randn(n, d, generator=g)
    loss = loss_impl.contrastive_loss(x, y, temperature=temperature, margin=0.0)
    assert 0 <= loss <= 2 * (2 / temperature + math.log(n)) + 1e-3
    loss.backward()
    # In float64: squares of 1e-20 leave fp32.
    grad, rows = x.grad.double(), x.detach().double()
    length, size = rows.norm(dim=1), grad.norm(dim=1)
    bound = 4 / (temperature * length)
    assert (size <= bound * 1.001).all()
    assert ((grad * rows).sum(1).abs() <= 1e-5 * length * (size + bound)).all()


@pytest.mark.slow
def test_what_kills_the_recipe_does_not_kill_ours():
    """A refit on rows as the recipe has them before its end: long, alike, many."""
    recipe = load_script("benchmarks/nan_recipe.py")
    torch.manual_seed(0)
    rows = (8.0 + 0.08 * torch.randn(10240, recipe.DIM)).half().float()
    published = recipe.Recipe()
    published.queue, published.steps = list(rows.chunk(20)), 20
    published.after_step()
    assert published.centroids.max() > 1e38 and published.statistics["largest_share"] > 0.9
    label = torch.zeros(4, dtype=torch.int64)
    logits = recipe.product(rows[:4], published.centroids)
    assert torch.nn.functional.cross_entropy(logits, label).isnan()
    centroids, labels = spherical_kmeans(rows, recipe.K, max_iter=5)
    assert torch.isfinite(centroids).all()
    counts = torch.bincount(labels, minlength=recipe.K)
    assert counts.min() > 0 and counts.max() < 500
    torch.testing.assert_close(centroids, unit_rows(centroids))
