"""The reference losses against a float64 textbook version, gradcheck, and every defined edge."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcn_ext import ops, reference
from mcn_ext.reference import cluster_loss, contrastive_loss, mcn_loss, unit_rows


def textbook(x, y, temperature, margin, normalize, ids=None, valid=None):
    """The equation, row by row, in Python: nothing shared with the implementation."""
    x, y = x.double(), y.double()
    n = len(x)
    if normalize:
        x = torch.stack([r / max(r.norm(), 1e-12) for r in x])
        y = torch.stack([r / max(r.norm(), 1e-12) for r in y])
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


def pair(n, d, dtype=torch.float64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, d, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for _ in range(2)
    ]


@pytest.mark.parametrize("n", [2, 3, 7, pytest.param(33, marks=pytest.mark.slow)])
@pytest.mark.parametrize("d", [1, 5, 16])
@pytest.mark.parametrize("normalize", [True, False])
def test_contrastive_equals_textbook(n, d, normalize):
    x, y = pair(n, d)
    ids = torch.arange(n) // 2
    valid = torch.arange(n) % 3 != 1
    for kwargs in ({}, {"ids": ids}, {"valid": valid}, {"ids": ids, "valid": valid}):
        loss = contrastive_loss(x, y, temperature=0.3, margin=0.05, normalize=normalize, **kwargs)
        expected = textbook(x, y, 0.3, 0.05, normalize, **kwargs)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        got = torch.autograd.grad(loss, (x, y))
        want = torch.autograd.grad(expected, (x, y), allow_unused=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(
                g, torch.zeros_like(g) if w is None else w, rtol=1e-8, atol=1e-10
            )


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_of_both_losses(normalize):
    x, y = pair(6, 4)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    ids, valid = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    mu, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

    def contrastive(x, y, t):
        return contrastive_loss(x, y, temperature=t, normalize=normalize, ids=ids, valid=valid)

    def cluster(x, t):
        return cluster_loss(x, mu, labels, temperature=t, normalize=normalize, valid=valid)

    assert torch.autograd.gradcheck(contrastive, (x, y, temperature))
    assert torch.autograd.gradcheck(cluster, (x, temperature))


@pytest.mark.parametrize("k", [1, 2, 9])
def test_cluster_equals_cross_entropy(k):
    x, _ = pair(11, 6)
    mu, labels = torch.randn(k, 6, dtype=torch.float64), torch.arange(11) % k
    z = unit_rows(x) @ unit_rows(mu).T
    z = (z - 0.01 * torch.nn.functional.one_hot(labels, k)) / 0.2
    expected = torch.nn.functional.cross_entropy(z, labels)
    torch.testing.assert_close(cluster_loss(x, mu, labels, temperature=0.2, margin=0.01), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_input_is_computed_in_fp32(dtype):
    x, y = pair(64, 32, dtype, scale=3.0)
    loss = contrastive_loss(x, y)
    assert loss.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = contrastive_loss(*exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for g, w in zip(
        torch.autograd.grad(loss, (x, y)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert g.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            g.double(), w, rtol=4 * eps, atol=4 * max(eps, 1e-6) * float(w.abs().max())
        )


def test_autocast_does_not_reach_the_losses():
    x, y = pair(32, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(x, y)
    assert torch.equal(inside, contrastive_loss(x, y))


@pytest.mark.parametrize("n", [0, 1])
def test_no_negatives_is_zero_with_zero_gradients(n):
    x, y = pair(n, 3, torch.float32)
    loss = contrastive_loss(x, y)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not y.grad.any()


def test_no_valid_row_and_all_ids_equal_are_zero():
    x, y = pair(5, 3, torch.float32)
    for kwargs in (
        {"valid": torch.zeros(5, dtype=torch.bool)},
        {"ids": torch.zeros(5, dtype=torch.int64)},
    ):
        loss = contrastive_loss(x, y, **kwargs)
        grads = torch.autograd.grad(loss, (x, y))
        assert loss == 0 and not any(g.any() for g in grads)


def test_zero_rows_have_zero_gradients():
    x, y = pair(6, 4, torch.float32)
    with torch.no_grad():
        x[2] = 0
    loss = contrastive_loss(x, y)
    gx, gy = torch.autograd.grad(loss, (x, y))
    assert torch.isfinite(loss) and torch.isfinite(gx).all() and torch.isfinite(gy).all()
    assert not gx[2].any() and gx[1].any()


@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1e4, 1e18, 1e30])
def test_any_norm_gives_the_same_normalized_loss(scale):
    x, y = pair(16, 8, torch.float32)
    big = (x.detach() * scale).requires_grad_()
    loss = contrastive_loss(big, y)
    torch.testing.assert_close(loss, contrastive_loss(x, y), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, big)
    (expected,) = torch.autograd.grad(contrastive_loss(x, y), x)
    torch.testing.assert_close(grad * scale, expected, rtol=1e-3, atol=1e-6)


def test_extreme_logits_are_finite():
    x, y = pair(16, 8, torch.float32, scale=100.0)
    for sign in (1, -1):
        loss = contrastive_loss(x, sign * y, temperature=1.0, normalize=False)
        grads = torch.autograd.grad(loss, (x, y))
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_never_hidden(bad):
    for normalize in (True, False):
        for row in range(3):
            x, y = pair(3, 4, torch.float32)
            with torch.no_grad():
                y[row, 1] = bad
            assert contrastive_loss(x, y, normalize=normalize).isnan()
            assert cluster_loss(
                y, torch.randn(4, 4), torch.zeros(3, dtype=torch.int64), normalize=normalize
            ).isnan()


def test_non_finite_values_in_invalid_rows_do_no_harm():
    x, y = pair(5, 4, torch.float32)
    valid = torch.tensor([True, True, False, True, True])
    with torch.no_grad():
        x[2], y[2] = math.nan, math.inf
    loss = contrastive_loss(x, y, valid=valid)
    keep = [t[valid].detach() for t in (x, y)]
    torch.testing.assert_close(loss, contrastive_loss(*keep))
    gx, gy = torch.autograd.grad(loss, (x, y))
    assert (
        torch.isfinite(gx).all()
        and torch.isfinite(gy).all()
        and not gx[2].any()
        and not gy[2].any()
    )


def test_gradients_are_right_where_the_loss_is_nearly_zero():
    x = torch.eye(4).requires_grad_()
    loss = contrastive_loss(x, torch.eye(4), temperature=1 / 22.0, margin=0.0)
    exact = torch.eye(4, dtype=torch.float64).requires_grad_()
    expected = contrastive_loss(
        exact, torch.eye(4, dtype=torch.float64), temperature=1 / 22.0, margin=0.0
    )
    assert 1e-10 < expected < 1e-8
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    (g,), (w,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-14)


def test_labels_outside_are_named_unless_invalid():
    x, labels = torch.randn(3, 4), torch.tensor([0, 7, 1])
    with pytest.raises(ValueError, match=r"labels\[1\] = 7 is outside \[0, 2\)"):
        cluster_loss(x, torch.randn(2, 4), labels)
    cluster_loss(x, torch.randn(2, 4), labels, valid=torch.tensor([True, False, True]))


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf, torch.ones(3)])
def test_a_temperature_that_cannot_be_is_an_error(value):
    x = torch.randn(3, 4)
    for losses in (reference, ops):
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            losses.contrastive_loss(x, x, temperature=value)
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            losses.cluster_loss(x, x, torch.zeros(3, dtype=torch.int64), temperature=value)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="same shape"):
        contrastive_loss(torch.randn(3, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="must be"):
        cluster_loss(torch.randn(3, 4), torch.randn(2, 5), torch.zeros(3, dtype=torch.int64))


def test_mcn_loss_is_the_mean_of_its_terms():
    g = torch.Generator().manual_seed(1)
    embeddings = {m: torch.randn(9, 5, generator=g) for m in ("audio", "text", "video")}
    valid = {"audio": torch.arange(9) != 4, "text": torch.arange(9) > 0}
    pairs = [("audio", "text"), ("audio", "video"), ("text", "video")]
    mu, labels = torch.randn(4, 5, generator=g), torch.arange(9) % 4
    ids = {p: torch.arange(9) // (i + 1) for i, p in enumerate(pairs)}
    terms = mcn_loss(
        embeddings, pairs, mu, labels, ids=ids, valid=valid, cluster_weight=0.5, temperature=0.2
    )
    both = {
        pairs[0]: valid["audio"] & valid["text"],
        pairs[1]: valid["audio"],
        pairs[2]: valid["text"],
    }
    contrastive = (
        sum(
            contrastive_loss(
                embeddings[a], embeddings[b], ids=ids[a, b], valid=both[a, b], temperature=0.2
            )
            for a, b in pairs
        )
        / 3
    )
    cluster = sum(
        cluster_loss(e, mu, labels, valid=valid.get(m), temperature=0.2)
        for m, e in embeddings.items()
    ) / (3 * math.log(4))
    torch.testing.assert_close(terms.contrastive, contrastive)
    torch.testing.assert_close(terms.cluster, cluster)
    torch.testing.assert_close(terms.total, contrastive + 0.5 * cluster)
    assert mcn_loss(embeddings, pairs).cluster == 0


def test_uniform_clustering_loss_is_one_whatever_k():
    x = torch.zeros(6, 8)
    x[:, 0] = 1
    for k in (2, 7):
        mu = torch.zeros(k, 8)
        mu[:, 1] = 1  # every centroid equally far
        terms = mcn_loss(
            {"a": x, "b": x}, [("a", "b")], mu, torch.zeros(6, dtype=torch.int64), margin=0.0
        )
        torch.testing.assert_close(terms.cluster, torch.tensor(1.0))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    d=st.integers(1, 6),
    temperature=st.floats(0.01, 10),
    log_scale=st.floats(-12, 12),
    normalize=st.booleans(),
    data=st.data(),
)
def test_never_nan_on_finite_input(n, d, temperature, log_scale, normalize, data):
    values = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=2 * n * d, max_size=2 * n * d))
    x, y = (torch.tensor(values, dtype=torch.float32).reshape(2, n, d) * 10.0**log_scale).unbind()
    ids = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), dtype=torch.int64
    )
    valid = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool
    )
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = contrastive_loss(
        x, y, temperature=temperature, normalize=normalize, ids=ids, valid=valid
    )
    grads = torch.autograd.grad(loss, (x, y))
    assert torch.isfinite(loss) and loss >= 0
    assert all(torch.isfinite(g).all() for g in grads)
