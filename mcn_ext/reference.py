"""The losses in plain PyTorch: the specification every faster implementation is tested against.

For embeddings x, y of shape (N, D), rows paired::

    S = x_hat y_hat^T              x_hat = x / max(|x|, eps) when normalize=True, else x
    z = (S - margin * I) / temperature
    contrastive = mean_i [lse_j z_ij - z_ii] + mean_j [lse_i z_ij - z_jj]
    cluster     = mean_i [lse_k z_ik - z_i,label(i)]
                  with z = (x_hat mu_hat^T - margin * onehot) / temperature

Each bracket is computed as ``softplus(lse without the positive - positive)``: the same number, but
exact when it is nearly 0, where ``lse - positive`` cancels to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mcn_ext.distributed import gather

EPS = 1e-12  # |x| at or below it counts as zero: no direction, no gradient
KINDS = ("softmax", "dcl", "rince", "sigmoid")
BIAS = -10.0  # of the sigmoid loss: SigLIP's start, as nearly all pairs are negatives
LARGEST_EXPONENT = 60.0  # e^60 is 1e26: times a weight and a logit it is far from fp32's end


class LossTerms(NamedTuple):
    """What :func:`mcn_loss` returns; scalars, fp32 (fp64 for fp64 inputs). Only ``total`` carries a
    gradient: the terms are for the log, ``cluster_weight`` sets their balance."""

    total: Tensor
    contrastive: Tensor
    cluster: Tensor


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x (N, D) at unit length, for any finite norm; a zero row stays zero, gradient zero.

    The largest entry is divided out first: squares of 1e-30 or 1e30 leave fp32, the ratio does not.
    """
    if x.shape[1] == 0:
        return x
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = scaled.norm(dim=1, keepdim=True)
    # |x| = norm * largest; a row below EPS has no direction, and x / EPS without a gradient.
    alive = norm.detach() * largest > EPS
    # The inner where keeps the unused branch finite: autograd multiplies by 0, and 0 * inf is NaN.
    return torch.where(
        alive, scaled / torch.where(alive, norm, torch.ones_like(norm)), (x / EPS).detach()
    )


def _working(x: Tensor, valid: Tensor | None) -> Tensor:
    """x in fp32 (fp64 stays), invalid rows zero: matmuls' 0 * NaN would reach valid gradients."""
    if x.dim() != 2:
        raise ValueError(f"embeddings must be (N, D), got {tuple(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    return x if valid is None else torch.where(valid[:, None], x, torch.zeros_like(x))


def _poison(loss: Tensor, *inputs: Tensor) -> Tensor:
    """NaN, gradients too, if any input is not finite: masks and softplus(-inf) would hide it."""
    finite = torch.stack([torch.isfinite(t.detach()).all() for t in inputs]).all()
    return loss * torch.where(finite, 1.0, math.nan)


def _logsumexp(z: Tensor, dim: int) -> Tensor:
    """logsumexp, but -inf with zero gradient (not NaN) where all entries are -inf or none exist."""
    if z.shape[dim] == 0:
        return z.new_full((z.shape[1 - dim],), -math.inf)
    # Subtracted so that exp cannot overflow. It cancels out, so it needs no gradient.
    top = z.detach().amax(dim=dim, keepdim=True)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    total = (z - top).exp().sum(dim=dim)
    empty = total == 0
    return torch.where(empty, -math.inf, total.masked_fill(empty, 1.0).log() + top.squeeze(dim))


def _mean(row: Tensor, valid: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """(Weighted) mean of row (N,) over valid rows; 0 where there is none, or no weight."""
    if weight is None:
        weight = torch.ones_like(row) if valid is None else valid.to(row.dtype)
    # Not row * weight: inf * 0 is NaN.
    kept = torch.where(weight != 0, row, torch.zeros_like(row))
    total = weight.sum()
    return (kept * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact for -inf; torch's softplus is off where it switches, at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _row_loss(kind: str, positive: Tensor, others: Tensor, q: float, lam: float) -> Tensor:
    """Loss of each row (N,) from the log-sums of its positives and of the others."""
    gap = others - positive
    if kind == "softmax":
        return _softplus(gap)
    alone = torch.isneginf(others)  # nothing to be told from
    gap = torch.where(alone, torch.zeros_like(gap), gap)
    if kind == "dcl":
        row = gap
    else:  # RINCE
        # Both powers' logarithms are `first` and first + more. Where these are nearly equal, for q
        # near 0 or lam near 1, their difference is exact as expm1 alone.
        first, more = q * positive, q * (math.log(lam) + _softplus(gap))
        beyond = torch.maximum(first, first + more) > LARGEST_EXPONENT
        powers = [v.clamp(max=LARGEST_EXPONENT).exp() for v in (first, first + more)]
        row = (
            torch.where(more < 1, powers[0] * more.clamp(max=1).expm1(), powers[1] - powers[0]) / q
        )
        # Cut where exp would leave fp32: a row has no gradient from there on.
        row = torch.where(beyond, row.detach(), row)
    return torch.where(alone, torch.zeros_like(row), row)


def check_temperature(temperature: float | Tensor) -> None:
    """ValueError unless it is a number above 0, or a tensor of one element, whose value is not
    looked at: that would wait for the device."""
    fits = (
        temperature.numel() == 1 if isinstance(temperature, Tensor) else 0 < temperature < math.inf
    )
    if not fits:
        raise ValueError(
            f"temperature must be a number above 0, or a tensor of one element, got {temperature}"
        )


def check_kind(kind: str, q: float, lam: float) -> None:
    """ValueError for a loss that there is not, or parameters outside its range."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not (0 < q <= 1 and 0 < lam <= 1):
        raise ValueError(f"q and lam must be in (0, 1], got q = {q}, lam = {lam}")


def check_weights(weight: Mapping, pairs: Sequence) -> None:
    """ValueError for weights of what is no pair."""
    if unknown := set(weight) - {tuple(pair) for pair in pairs}:
        raise ValueError(f"weight is of {sorted(unknown)}, and the pairs are {list(pairs)}")


def _shares(weight: Tensor, valid: Tensor | None) -> Tensor:
    """Weights (N,), the largest 1; 0 where not valid; NaN where it is no weight."""
    fits = (weight >= 0) & (weight < math.inf)
    weight = torch.where(fits, weight, torch.full_like(weight, math.nan))
    if valid is not None:
        weight = torch.where(valid, weight, torch.zeros_like(weight))
    largest = weight.amax() if len(weight) else weight.sum()
    return weight / torch.where(largest > 0, largest, torch.ones_like(largest))


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    margin: float = 0.001,
    normalize: bool = True,
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    weight: Tensor | tuple[Tensor, Tensor] | None = None,
    positives: Tensor | None = None,
    kind: str = "softmax",
    q: float = 0.1,
    lam: float = 0.01,
    bias: float | Tensor = BIAS,
    group=None,
    budget: int | None = None,
) -> Tensor:
    """Contrastive loss in both directions; see the module's first lines for the equation.

    With s the log-sum of exp(z) over a row's positives (its partner, unless ``positives`` says
    more), and o that over the others, a row's loss is, by ``kind``:

    - "softmax": log(e^s + e^o) - s. The masked-margin softmax; with ``positives`` MIL-NCE
      (Miech et al., CVPR 2020, arXiv 1912.06430), whose o is over both directions at once.
    - "dcl": o - s, the positives left out of the denominator (decoupled contrastive learning, Yeh
      et al., ECCV 2022, arXiv 2110.06848).
    - "rince": ((lam (e^s + e^o))^q - e^(q s)) / q; the softmax for q -> 0, while q = 1 bounds what
      a wrong positive can do (Chuang et al., CVPR 2022, arXiv 2201.04309). Exponents end at 60.
    - "sigmoid": sum_j log(1 + exp(-l_ij (z_ij + bias))), l = 1 for positives and -1 for others:
      each entry is asked for itself. The mean of both directions, not their sum (SigLIP, Zhai et
      al., ICCV 2023, arXiv 2303.15343).

    Args:
        x, y: (N, D) embeddings, row i of x paired with row i of y; any float dtype, computed in
            fp32 (fp64 in fp64).
        temperature: float, or a 0-d tensor, which then gets its gradient.
        margin: taken from the cosine of every positive.
        ids: (N,) int64. i != j with ids[i] == ids[j] are the same clip (or caption): in no sum.
        valid: (N,) bool. False rows (silent clip, no caption) are in no row, column or mean.
        weight: (N,) at least 0, or one for each direction: means become weighted means. A row
            without weight in both is as one that is not valid. Negative, NaN or inf: the loss is
            NaN. Gets no gradient.
        positives: (N,) int64. i != j with positives[i] == positives[j] are positives of each other;
            where ``ids`` are equal as well, they are in no sum.
        q, lam: of "rince". bias: of "sigmoid"; a 0-d tensor gets its gradient.
        group: process group. The loss is then that of the global batch, on every rank, and
            gradients are scaled so that averaging them over ranks (DDP) gives the single-process
            gradient.
        budget: bytes the compiled loss may keep of S; of no meaning here.

    Returns a scalar, fp32 (fp64 for fp64 inputs). N = 0 or no valid row: 0 with zero gradients; so
    is a row without others, but for "sigmoid", which it still asks to be near its positives. NaN or
    inf in a valid row: NaN, never hidden. normalize=False is finite as long as the dot products are
    (below 3e38 in fp32); with temperature 1 it is the published form.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} must have the same shape: rows are pairs"
        )
    check_temperature(temperature)
    check_kind(kind, q, lam)
    weights = [] if weight is None else list(weight) if isinstance(weight, tuple) else [weight] * 2
    if group is not None:
        x, y = gather(x, group), gather(y, group)
        ids, valid = gather(ids, group), gather(valid, group)
        positives, weights = gather(positives, group), [gather(w, group) for w in weights]
    with torch.autocast(x.device.type, enabled=False):
        if weights:
            wide = torch.promote_types(x.dtype, torch.float32)
            weights = [_shares(w.detach().to(wide), valid) for w in weights]
            valid = (weights[0] != 0) | (weights[1] != 0)  # NaN is not 0: it is not to be hidden
        # Without autocast: bf16 would leave two or three digits of a cosine.
        x, y = _working(x, valid), _working(y, valid)
        a, b = (unit_rows(x), unit_rows(y)) if normalize else (x, y)
        weights = weights or [None, None]
        # z_ii of the first lines, (N,)
        partner = ((a * b).sum(dim=1) - margin) / temperature
        # The partner is not in the sums: the softplus form adds it, see the first lines.
        skip = torch.eye(len(a), dtype=torch.bool, device=a.device)
        if ids is not None:
            skip = skip | (ids[:, None] == ids[None, :])
        if valid is not None:
            skip = skip | ~valid[:, None] | ~valid[None, :]
        cosine, mates = a @ b.t(), None
        if positives is not None:
            mates = (positives[:, None] == positives[None, :]) & ~skip
            skip = skip | mates
        z = (cosine / temperature).masked_fill(skip, -math.inf)
        near = (cosine - margin) / temperature  # of the other positives, where they are mates
        loss = x.new_zeros(())
        # Over dim 1: x_i against all y. Over dim 0: y_j against all x.
        for dim, share in zip((1, 0), weights, strict=True):
            if kind == "sigmoid":
                row = _softplus(z + bias).sum(dim) + _softplus(-(partner + bias))
                if mates is not None:
                    row = row + torch.where(mates, _softplus(-(near + bias)), 0.0).sum(dim)
                loss = loss + 0.5 * _mean(row, valid, share)
                continue
            s = partner
            if mates is not None:
                s = torch.logaddexp(s, _logsumexp(near.masked_fill(~mates, -math.inf), dim))
            loss = loss + _mean(_row_loss(kind, s, _logsumexp(z, dim), q, lam), valid, share)
        return _poison(loss, x, y, *(w for w in weights if w is not None))


def cluster_loss(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    margin: float = 0.001,
    normalize: bool = True,
    valid: Tensor | None = None,
    group=None,
) -> Tensor:
    """Cross entropy of each row of x (N, D) against its centroid among centroids (K, D).

    labels: (N,) int64 in [0, K); ``valid`` False rows are left out, whatever their label. Centroids
    carry no gradient. Returns a scalar as :func:`contrastive_loss` does; K = 1 gives 0. ValueError
    for a label outside [0, K).
    """
    if labels.shape != x.shape[:1] or centroids.dim() != 2 or centroids.shape[1] != x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, centroids {tuple(centroids.shape)} and labels "
            f"{tuple(labels.shape)} must be (N, D), (K, D) and (N,)"
        )
    check_temperature(temperature)
    centroids = centroids.detach()
    if group is not None:
        x, labels, valid = gather(x, group), gather(labels, group), gather(valid, group)
    if valid is not None:
        # A row that is not valid may have any label; 0 can be looked up.
        labels = torch.where(valid, labels, torch.zeros_like(labels))
    outside = (labels < 0) | (labels >= len(centroids))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"labels[{row}] = {int(labels[row])} is outside [0, {len(centroids)})")
    with torch.autocast(x.device.type, enabled=False):
        x, mu = _working(x, valid), centroids.to(torch.promote_types(x.dtype, torch.float32))
        a, b = (unit_rows(x), unit_rows(mu)) if normalize else (x, mu)
        z = a @ b.t() / temperature
        # Its own centroid is left out of the sum, as the positive is in contrastive_loss.
        own = torch.nn.functional.one_hot(labels, len(mu)).bool()
        positive = ((a * b[labels]).sum(dim=1) - margin) / temperature
        others = _logsumexp(z.masked_fill(own, -math.inf), 1)
        loss = _mean(_softplus(others - positive), valid)
        return _poison(loss, x, mu)


def mcn_loss(
    embeddings: Mapping[str, Tensor],
    pairs: Sequence[tuple[str, str]],
    centroids: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    clustered: Sequence[str] | None = None,
    cluster_weight: float = 1.0,
    temperature: float | Tensor = 0.05,
    margin: float = 0.001,
    normalize: bool = True,
    ids: Tensor | Mapping[tuple[str, str], Tensor] | None = None,
    valid: Mapping[str, Tensor] | None = None,
    weight: Mapping[tuple[str, str], Tensor] | None = None,
    positives: Tensor | None = None,
    group=None,
    budget: int | None = None,
    **kind,
) -> LossTerms:
    """All contrastive and clustering terms: ``total = contrastive + cluster_weight * cluster``.

    contrastive is the mean over ``pairs``; cluster the mean over the ``clustered`` modalities
    (default: all in embeddings), divided by log K when normalize=True, so that 1.0 means "no better
    than uniform" whatever K, and terms compare between stages and orders; 0 without centroids.

    Args:
        embeddings: modality -> (N, D). valid: modality -> (N,) bool; a pair needs both.
        ids: (N,) int64 for all pairs, or pair -> (N,) int64.
        labels: (N,) int64, shared by the modalities.
        weight: pair -> as in :func:`contrastive_loss`. positives: for all pairs.
        kind: ``kind``, ``q``, ``lam`` and ``bias`` of :func:`contrastive_loss`.
    """
    valid, weight = dict(valid or {}), dict(weight or {})
    check_weights(weight, pairs)
    if group is not None:
        # Gathered once here, not again for each pair.
        embeddings = {name: gather(x, group) for name, x in embeddings.items()}
        valid = {name: gather(mask, group) for name, mask in valid.items()}
        labels, positives = gather(labels, group), gather(positives, group)
        weight = {
            pair: tuple(gather(w, group) for w in both)
            if isinstance(both, tuple)
            else gather(both, group)
            for pair, both in weight.items()
        }
        ids = (
            {pair: gather(i, group) for pair, i in ids.items()}
            if isinstance(ids, Mapping)
            else gather(ids, group)
        )
    common = dict(temperature=temperature, margin=margin, normalize=normalize)
    contrastive = next(iter(embeddings.values())).new_zeros((), dtype=torch.float32)
    for first, second in pairs:
        # A pair needs both sides. With one mask, masks[-1] is masks[0].
        masks = [valid[name] for name in (first, second) if name in valid]
        pair_ids = ids.get((first, second)) if isinstance(ids, Mapping) else ids
        contrastive = contrastive + contrastive_loss(
            embeddings[first],
            embeddings[second],
            ids=pair_ids,
            valid=masks[0] & masks[-1] if masks else None,
            weight=weight.get((first, second)),
            positives=positives,
            **common,
            **kind,
        ) / len(pairs)
    if centroids is None:
        return LossTerms(contrastive, contrastive.detach(), torch.zeros_like(contrastive).detach())
    names = list(embeddings if clustered is None else clustered)
    # log K is the cross entropy of equal logits.
    scale = math.log(len(centroids)) if normalize and len(centroids) > 1 else 1.0
    cluster = sum(
        cluster_loss(embeddings[name], centroids, labels, valid=valid.get(name), **common)
        for name in names
    ) / (max(len(names), 1) * scale)
    return LossTerms(
        contrastive + cluster_weight * cluster,
        contrastive.detach(),
        torch.as_tensor(cluster).detach(),
    )


def volume(queries: Tensor, *candidates: Tensor) -> Tensor:
    """Volume (n, m) that unit rows span: query i (n, D) and the modalities (m, D) of candidate j.

    sqrt(det G) with G their Gram matrix; a match is small (GRAM, Cicchetti et al., ICLR 2025,
    arXiv 2412.11959). It is 0 for *every* query where a candidate's modalities agree: linearly
    dependent rows span no volume. So it ranks nothing where video and audio have become alike.
    """
    rows = [unit_rows(x)[None].expand(len(queries), -1, -1) for x in candidates]
    own = unit_rows(queries)[:, None].expand(-1, len(candidates[0]), -1)
    all_rows = torch.stack([own, *rows], dim=2)  # (n, m, modalities, D)
    return torch.linalg.det(all_rows @ all_rows.transpose(2, 3)).clamp_min(0).sqrt()
