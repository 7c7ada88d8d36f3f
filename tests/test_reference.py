"""The losses in plain PyTorch against the equation in float64. Edges: see test_loss.py, `way`."""

import pytest
import torch
from torch.testing import assert_close

from mcn_ext.reference import cluster_loss, contrastive_loss, mcn_loss, unit_rows


def textbook(x, y, temperature, margin, normalize, ids=None, valid=None):
    """The equation, row by row, in Python: nothing shared with the implementation."""
    x, y = x.double(), y.double()
    n = len(x)
    if normalize:
        x, y = (torch.stack([row / max(row.norm(), 1e-12) for row in rows]) for rows in (x, y))
    rows = [i for i in range(n) if valid is None or valid[i]]
    total = 0.0
    for a, b in ((x, y), (y, x)):
        for i in rows:
            logits = []
            for j in rows:
                if i != j and ids is not None and ids[i] == ids[j]:
                    continue
                logits.append((a[i] @ b[j] - (margin if i == j else 0.0)) / temperature)
            own = (a[i] @ b[i] - margin) / temperature
            total = total + torch.logsumexp(torch.stack(logits), 0) - own
    return total / max(len(rows), 1)


def pair(n, d, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2, n, d, generator=g, dtype=torch.float64).to(dtype)
    return [x.requires_grad_() for x in rows.unbind()]


@pytest.mark.parametrize("n, d", [(2, 1), (3, 5), (7, 16), (20, 4)])
@pytest.mark.parametrize("normalize", [True, False])
def test_contrastive_equals_textbook(n, d, normalize):
    x, y = pair(n, d)
    ids = torch.arange(n) // 2
    valid = torch.arange(n) % 3 != 1
    for kwargs in ({}, {"ids": ids}, {"valid": valid}, {"ids": ids, "valid": valid}):
        loss = contrastive_loss(x, y, temperature=0.3, margin=0.05, normalize=normalize, **kwargs)
        expected = textbook(x, y, 0.3, 0.05, normalize, **kwargs)
        assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        got, want = (
            torch.autograd.grad(v, (x, y), materialize_grads=True) for v in (loss, expected)
        )
        assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_cluster_equals_cross_entropy(k):
    x, _ = pair(11, 6)
    mu, labels = torch.randn(k, 6, dtype=torch.float64), torch.arange(11) % k
    z = unit_rows(x) @ unit_rows(mu).T
    z = (z - 0.01 * torch.nn.functional.one_hot(labels, k)) / 0.2
    expected = torch.nn.functional.cross_entropy(z, labels)
    assert_close(cluster_loss(x, mu, labels, temperature=0.2, margin=0.01), expected)


@pytest.mark.parametrize(
    "dtype, scale",
    [
        *((torch.float32, scale) for scale in (1e-10, 1.0, 1e4, 1e30)),
        (torch.bfloat16, 1.0),
        (torch.float16, 1.0),
    ],
)
def test_any_type_and_norm_is_as_exact_as_fp32(dtype, scale):
    rows = [(x.detach() * scale).requires_grad_() for x in pair(64, 32, dtype)]
    exact = [x.detach().double().requires_grad_() for x in rows]
    loss, expected = contrastive_loss(*rows), contrastive_loss(*exact)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    eps = torch.finfo(dtype).eps
    for got, want in zip(
        torch.autograd.grad(loss, rows), torch.autograd.grad(expected, exact), strict=True
    ):
        assert got.dtype == dtype
        size = 4 * max(eps, 1e-6)
        assert_close(got.double(), want, rtol=size, atol=size * float(want.abs().max()))


def test_autocast_does_not_reach_the_losses():
    x, y = pair(32, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(x, y)
    assert torch.equal(inside, contrastive_loss(x, y))


@pytest.mark.parametrize("k", [2, 7])
def test_a_clustering_term_of_1_is_no_better_than_uniform(k):
    x, mu = torch.eye(6, 8)[:1].repeat(6, 1), torch.eye(6, 8)[1:2].repeat(k, 1)
    labels = torch.zeros(6, dtype=torch.int64)
    terms = mcn_loss({"a": x, "b": x}, [("a", "b")], mu, labels, margin=0.0)
    assert_close(terms.cluster, torch.tensor(1.0))
