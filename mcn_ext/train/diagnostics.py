"""Signs of collapse and of conflict, from the embeddings of one batch: numbers for log.jsonl and
curves.png.

Signs of collapse are computed on at most SAMPLE clips, the same ones on any number of ranks. A
batch that has collapsed may still have a finite, even a falling loss; these numbers show it at the
first logged step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcn_ext import distributed
from mcn_ext.objective import Objective, Terms
from mcn_ext.reference import unit_rows

SAMPLE = 512


def effective_rank(rows: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007): of rows (n, D), from
    1, all on one line, to min(n, D). 0 for no row."""
    if len(rows) == 0:
        return rows.new_zeros(())
    rows = rows.double()  # an eigenvalue's rounding counts by its root
    # Its eigenvalues are the squares of the singular values; the smaller of the two matrices.
    gram = rows @ rows.t() if len(rows) <= rows.shape[1] else rows.t() @ rows
    # Rounding can make an eigenvalue of 0 negative, and its root NaN.
    share = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    return torch.special.entr(share).sum().exp()


def uniformity(rows: Tensor) -> Tensor:
    """log of the mean of exp(-2 |a - b|^2) over pairs of unit rows (n, D) (Wang & Isola 2020): from
    0, all the same, to about -4, spread over the sphere. 0 for fewer than two rows."""
    if len(rows) < 2:
        return rows.new_zeros(())
    similarity = rows @ rows.t()
    apart = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    # For unit rows |a - b|^2 = 2 - 2 cos, so that -2 |a - b|^2 = 4 (cos - 1).
    return (4.0 * (similarity[apart] - 1.0)).exp().mean().log()


def _sample(x: Tensor) -> Tensor:
    """Every n-th row of the global batch, from all ranks."""
    group, n = distributed.default_group(), len(x)
    stride = max(1, -(-n * distributed.world() // SAMPLE))
    first = -distributed.rank() * n % stride  # ranks hold equal, consecutive parts
    return distributed.gather(x[first::stride].contiguous(), group)


def gradient_cosines(objective: Objective, terms: Terms) -> dict[str, Tensor]:
    """{modality: cosine of the gradients (B, D) that its two pairs send to its embeddings}, of
    modalities that learn from two: 1 where they pull the same way, below 0 where they conflict."""
    found: dict[str, list[Tensor]] = {}
    for pair in objective.pairs:
        # fp32: what fp16 would round to 0 has a direction, too.
        rows = {
            name: terms.embeddings[name].detach().float().requires_grad_()
            for name in pair
            if name in objective.trained
        }
        with torch.enable_grad():
            loss = objective.losses(terms.embeddings | rows, terms.batch, None, [pair], [])
        for name, gradient in zip(
            rows, torch.autograd.grad(loss.total, rows.values()), strict=True
        ):
            found.setdefault(name, []).append(gradient)
    cosines = {}
    for name, gradients in found.items():
        if len(gradients) == 2:
            a, b = gradients
            # Over all ranks' rows. A common factor, such as the number of ranks, cancels.
            products = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double()
            product, *squares = distributed.total(products)
            norms = (squares[0] * squares[1]).sqrt()
            cosines[name] = product / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return cosines


@torch.no_grad()
def diagnose(objective: Objective, terms: Terms) -> dict[str, float]:
    """Of a step's batch, by modality: ``norm_*``, mean length of the embeddings;
    ``rank_*``, their :func:`effective_rank` at unit length; ``uniformity_*``. By pair: mean cosine
    of ``positive_*`` and ``negative_*`` clips, ``alignment_*``, mean |x - y|^2 of positives. And
    ``gradient_*``, the :func:`gradient_cosines`. All ranks call this; waits for the device."""
    embeddings, batch = terms.embeddings, terms.batch
    out, unit, valid = {}, {}, {}
    for name, cosine in gradient_cosines(objective, terms).items():
        out[f"gradient_{name}"] = cosine
    for name in objective.modalities:
        rows = _sample(embeddings[name]).float()
        # A clip may be NaN in a modality that no loss reads of it.
        present = valid[name] = _sample(batch["valid"][name]) & torch.isfinite(rows).all(dim=1)
        unit[name] = unit_rows(rows)
        out[f"norm_{name}"] = rows[present].norm(dim=1).sum() / present.sum().clamp_min(1)
        out[f"rank_{name}"] = effective_rank(unit[name][present])
        out[f"uniformity_{name}"] = uniformity(unit[name][present])
    for first, second in objective.pairs:
        both = valid[first] & valid[second]
        ids = _sample(objective.ids((first, second), batch))
        similarity = unit[first] @ unit[second].t()
        others = (ids[:, None] != ids) & both[:, None] & both
        positive = similarity.diagonal()[both].sum() / both.sum().clamp_min(1)
        pair = f"{first}_{second}"
        out[f"positive_{pair}"] = positive
        out[f"negative_{pair}"] = similarity[others].sum() / others.sum().clamp_min(1)
        out[f"alignment_{pair}"] = 2.0 - 2.0 * positive
    # One wait for the device, not one for each number.
    values = torch.stack([value.double() for value in out.values()]).tolist()
    return dict(zip(out, (round(value, 5) for value in values), strict=True))


def signs_of_collapse(values: dict[str, float]) -> list[str]:
    """What in a logged row says that embeddings or clusters have become one, in words."""
    signs = []
    if values.get("largest_share", 0.0) > 0.5:
        signs.append("one cluster holds more than half of the clips")
    for key, value in values.items():
        kind, _, name = key.partition("_")
        # 0 is a batch without the modality.
        if kind == "rank" and 0.0 < value < 2.0:
            signs.append(f"the {name} embeddings lie on one line (effective rank below 2)")
        if kind == "negative" and value > 0.95:
            signs.append(
                f"{name.replace('_', ' and ')} of different clips are alike (cosine above 0.95)"
            )
    return signs
