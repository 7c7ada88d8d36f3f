"""The losses as users call them: compiled where the extension loads, else the reference.

:mod:`mcn_ext.reference` is the specification, in arguments and in values. The compiled losses never
hold more of a similarity matrix than ``budget`` bytes, and compute all terms in one call.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from mcn_ext import reference
from mcn_ext.distributed import Ranks
from mcn_ext.reference import LossTerms

__all__ = ["LossTerms", "build_info", "cluster_loss", "contrastive_loss", "has_cuda", "mcn_loss"]

_tile = 0  # rows and columns of a tile; 0 lets csrc/loss.cpp choose (tests try ragged ones)


def _load() -> str | None:
    """Load the compiled library; None when it loaded, else one sentence that says why not and what
    to do."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "the extension is not built; run `pip install -e . --no-build-isolation`"
    try:
        torch.ops.load_library(str(libraries[0]))
        torch.ops.mcn.loss  # noqa: B018  (an older build has none)
    except (OSError, AttributeError) as error:
        return (
            f"{libraries[0].name} does not load in torch {torch.__version__} "
            f"({error.__cause__ or error}); rebuild it"
        )
    if torch.cuda.is_available() and not json.loads(torch.ops.mcn.build_info())["cuda"]:
        warnings.warn(
            "mcn_ext: the extension was built without CUDA; on GPUs the plain PyTorch "
            "losses run. `MCN_CUDA=1 pip install -e . --no-build-isolation` says what is "
            "missing.",
            stacklevel=3,
        )
    return None


_unavailable = _load()
if _unavailable:
    warnings.warn(f"mcn_ext: {_unavailable}. The plain PyTorch losses run instead.", stacklevel=2)


def build_info() -> dict:
    """How the extension was built (compiler, torch, cuda), or {"error": why it is not there}."""
    return {"error": _unavailable} if _unavailable else json.loads(torch.ops.mcn.build_info())


_cuda = bool(build_info().get("cuda"))  # once: torch.compile does not trace an operator of strings


def has_cuda() -> bool:
    """True when the extension was built with CUDA kernels and loaded."""
    return _cuda


def _compiled_for(x: Tensor) -> bool:
    if os.environ.get("MCN_LOSS") == "reference":  # to compare
        return False
    return not _unavailable and (x.device.type == "cpu" or (x.is_cuda and _cuda))


def _multiplies_16_bits(x: Tensor) -> bool:
    return x.is_cuda  # few CPUs do that well


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
    bias: float | Tensor = reference.BIAS,
    group=None,
    budget: int | None = None,
) -> Tensor:
    """Contrastive loss in both directions; arguments and values of
    :func:`mcn_ext.reference.contrastive_loss`.

    budget: bytes that the similarity matrices may take (default: the environment variable
    MCN_LOSS_BUDGET, else 2 GiB). Within it each is computed once, turned into the gradient with
    respect to it, and kept for backward, in the rows' type on a GPU; above it, and always with 0,
    tiles stream and backward computes them again.

    group: each rank computes its own rows against all ranks' rows of one side: half of the traffic
    of gathering both with gradients, and 1/ranks of the products. All ranks must call with the same
    arguments but for the rows, of which each may hold another number, or none; ValueError on all of
    them if they do not.
    """
    form = {"positives": positives, "kind": kind, "q": q, "lam": lam, "bias": bias}
    if not _compiled_for(x):
        return reference.contrastive_loss(
            x,
            y,
            temperature=temperature,
            margin=margin,
            normalize=normalize,
            ids=ids,
            valid=valid,
            weight=weight,
            group=group,
            **form,
        )
    if x.shape != y.shape:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} must have the same shape: rows are pairs"
        )
    return _loss(
        [x, y],
        [0, 1],
        [] if ids is None else [ids],
        [] if valid is None else [valid, valid],
        weights=[weight],
        temperature=temperature,
        margin=margin,
        normalize=normalize,
        group=group,
        budget=budget,
        **form,
    ).total


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
    """Cross entropy of each row against its centroid; arguments and values of
    :func:`mcn_ext.reference.cluster_loss`. On a GPU a label outside [0, K) is printed and ends the
    context, as in torch's own losses: the host does not wait for the device; and centroids are
    rounded to the rows' dtype, for one matrix product."""
    if not _compiled_for(x):
        return reference.cluster_loss(
            x,
            centroids,
            labels,
            temperature=temperature,
            margin=margin,
            normalize=normalize,
            valid=valid,
            group=group,
        )
    return _loss(
        [x],
        [],
        [],
        [] if valid is None else [valid],
        centroids,
        labels,
        [0],
        temperature=temperature,
        margin=margin,
        normalize=normalize,
        group=group,
    ).total


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
    group=None,
    budget: int | None = None,
    **form,
) -> LossTerms:
    """All contrastive and clustering terms in one call that reuses one buffer; arguments and values
    of :func:`mcn_ext.reference.mcn_loss`, ``budget`` of :func:`contrastive_loss`.

    form: ``positives``, ``kind``, ``q``, ``lam`` and ``bias`` of :func:`contrastive_loss`.
    """
    reference.check_weights(weight or {}, pairs)
    names = list(embeddings)
    nothing = not names or not (pairs or centroids is not None)
    if nothing or not _compiled_for(embeddings[names[0]]):
        return reference.mcn_loss(
            embeddings,
            pairs,
            centroids,
            labels,
            clustered=clustered,
            cluster_weight=cluster_weight,
            temperature=temperature,
            margin=margin,
            normalize=normalize,
            ids=ids,
            valid=valid,
            weight=weight,
            group=group,
            **form,
        )
    index = {name: i for i, name in enumerate(names)}
    flat = []
    for first, second in pairs:
        if first == second:  # a pair's sides are distinct to csrc/loss.cpp
            names.append(second)
        flat += [index[first], index[second] if first != second else len(names) - 1]
    rows = [embeddings[name] for name in names]
    masks = []
    if valid:
        everything = torch.ones(len(rows[0]), dtype=torch.bool, device=rows[0].device)
        masks = [valid.get(name, everything) for name in names]
    if ids is not None:
        ids = [ids.get(tuple(p)) if isinstance(ids, Mapping) else ids for p in pairs]
    clusters = [index[name] for name in (embeddings if clustered is None else clustered)]
    k = 0 if centroids is None else len(centroids)
    return _loss(
        rows,
        flat,
        ids or [],
        masks,
        centroids,
        labels,
        clusters,
        weights=[(weight or {}).get(tuple(p)) for p in pairs],
        temperature=temperature,
        margin=margin,
        normalize=normalize,
        cluster_weight=cluster_weight,
        group=group,
        cluster_scale=1 / math.log(k) if normalize and k > 1 else 1.0,
        budget=budget,
        **form,
    )


def _loss(
    rows: list[Tensor],
    pairs: list[int],
    ids: list[Tensor | None],
    valid: list[Tensor],
    centroids: Tensor | None = None,
    labels: Tensor | None = None,
    clustered: Sequence[int] = (),
    *,
    temperature: float | Tensor,
    margin: float,
    normalize: bool,
    weights: Sequence[Tensor | tuple[Tensor, Tensor] | None] = (),
    positives: Tensor | None = None,
    kind: str = "softmax",
    q: float = 0.1,
    lam: float = 0.01,
    bias: float | Tensor = reference.BIAS,
    cluster_weight: float = 1.0,
    cluster_scale: float = 1.0,
    group=None,
    budget: int | None = None,
) -> LossTerms:
    """Arguments checked, gathered and in the types that ``torch.ops.mcn.loss`` takes."""
    reference.check_temperature(temperature)
    reference.check_kind(kind, q, lam)
    if kind != "sigmoid":
        bias = 0.0  # no gradient, also of one that is a tensor
    dtype = rows[0].dtype
    for x in rows:
        if x.dim() != 2 or x.shape != rows[0].shape or x.device != rows[0].device:
            raise ValueError(
                "embeddings must be (N, D), all of one shape, on one device, got "
                f"{', '.join(f'{tuple(x.shape)} {x.device}' for x in rows)}"
            )
        dtype = torch.promote_types(dtype, x.dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    given = [i for i in ids if i is not None]
    bags = [] if positives is None else [positives]
    weights = _both_directions(weights, rows[0], accumulate)
    for name, vectors, wanted_dtype in (
        ("ids", given, torch.int64),
        ("valid", valid, torch.bool),
        ("labels", [] if labels is None else [labels], torch.int64),
        ("positives", bags, torch.int64),
        ("weight", weights, accumulate),
    ):
        for vector in vectors:
            if (
                vector.shape != rows[0].shape[:1]
                or vector.dtype != wanted_dtype
                or vector.device != rows[0].device
            ):
                raise ValueError(
                    f"{name} must be ({len(rows[0])},) {wanted_dtype} on {rows[0].device}, "
                    f"got {tuple(vector.shape)} {vector.dtype} on {vector.device}"
                )
    if centroids is not None:
        if labels is None or centroids.dim() != 2 or centroids.shape[1] != rows[0].shape[1]:
            raise ValueError(
                f"embeddings {tuple(rows[0].shape)} and centroids "
                f"{tuple(centroids.shape)} must be (N, D) and (K, D), with labels"
            )
        centroids = centroids.detach().to(rows[0].device)
    if not _multiplies_16_bits(rows[0]):
        dtype = accumulate
    if budget is None:
        text = os.environ.get("MCN_LOSS_BUDGET", str(2**31))
        if not text.isdecimal():
            raise ValueError(f"MCN_LOSS_BUDGET={text!r} must be bytes, such as {2**31}")
        budget = int(text)
    grad = torch.is_grad_enabled()
    wanted = [int(grad and x.requires_grad) for x in rows]
    # Numbers go to the kernels as they are: copied to a GPU, they would wait for it.
    fixed = [0.0 if isinstance(v, Tensor) else float(v) for v in (temperature, bias)]
    scalars = None
    if isinstance(temperature, Tensor) or isinstance(bias, Tensor):
        make = partial(rows[0].new_full, (), dtype=accumulate)
        scalars = torch.stack(
            [
                v.to(rows[0].device, accumulate, non_blocking=True).reshape(())
                if isinstance(v, Tensor)
                else make(v)
                for v in (temperature, bias)
            ]
        )
    learn_scalars = grad and scalars is not None and scalars.requires_grad
    k = 0 if centroids is None else len(centroids)
    columns, ranks = [], Ranks.of(group)
    if ranks is not None:
        ranks.share_sizes(
            rows[0],
            {
                "width": rows[0].shape[1],
                "dtypes": [str(x.dtype) for x in rows],
                "pairs": pairs,
                "clustered": list(clustered),
                "centroids": k,
                "ids": len(given),
                "masks": len(valid),
                "margin": margin,
                "normalize": normalize,
                "gradients": wanted,
                "budget": budget,
                "scalars": [learn_scalars, scalars is None, fixed],
                "form": [kind, q, lam, len(bags), len(weights)],
            },
        )
        vectors = ranks.gather_vectors([*given, *bags, *valid])
        given, vectors = vectors[: len(given)], vectors[len(given) :]
        bags, valid = vectors[: len(bags)], [v.bool() for v in vectors[len(bags) :]]
        if weights:
            weights = list(ranks.gather(torch.stack(weights, dim=1)).unbind(dim=1))
        before, (pairs, second) = pairs, _columns(pairs, wanted)
        for i in range(0, len(weights), 2):
            if pairs[i] != before[i]:  # its sides have changed places
                weights[i : i + 2] = weights[i + 1], weights[i]
        columns = [
            ranks.gather(x.detach()).to(dtype) if i in second else x.detach().to(dtype)
            for i, x in enumerate(rows)
        ]
    everything = len(rows[0]) if ranks is None else sum(ranks.sizes)
    if None in ids:
        distinct = torch.arange(everything, device=rows[0].device)
        found = iter(given)
        given = [distinct if i is None else next(found) for i in ids]
    rows = [x.to(dtype) for x in rows]
    for i in range(0, len(weights), 2):
        masks = [valid[pairs[i]], valid[pairs[i + 1]]] if valid else []
        weights[i : i + 2] = _one_on_average(weights[i : i + 2], masks)
    largest = len(rows[0]) if ranks is None else max(ranks.sizes)
    kept = [everything] * (len(pairs) // 2) + [k] * (0 if centroids is None else len(clustered))
    needed = largest * sum(kept) * dtype.itemsize
    if dtype != accumulate and kept:  # one at a time becomes 16-bit
        needed += largest * max(kept) * accumulate.itemsize
    total, parts, _, _ = torch.ops.mcn.loss(
        rows,
        given,
        valid,
        columns,
        weights,
        bags[0] if bags else None,
        centroids,
        labels,
        scalars,
        *fixed,
        margin,
        reference.KINDS.index(kind),
        q,
        lam,
        pairs,
        list(clustered),
        normalize,
        cluster_weight,
        cluster_scale,
        wanted,
        learn_scalars,
        0 < budget >= needed,
        _tile,
        [] if ranks is None else ranks.sizes,
        0 if ranks is None else ranks.rank,
        "" if ranks is None else ranks.name,
    )
    return LossTerms(total, parts[0], parts[1])


def _both_directions(
    weights: Sequence[Tensor | tuple[Tensor, Tensor] | None], x: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Each pair's weights of rows and of columns, two (N,) a pair; none, if no pair has any."""
    if all(weight is None for weight in weights):
        return []
    ones = torch.ones(len(x), dtype=dtype, device=x.device)
    both = [w if isinstance(w, tuple) else (ones if w is None else w,) * 2 for w in weights]
    return [w.detach().to(dtype) for pair in both for w in pair]


def _one_on_average(weights: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """A pair's weights (N,) such that their sum over the rows that are there is these rows' number:
    the weighted mean is then a mean."""
    valid = masks[0] & masks[1] if masks else None
    shares = [reference._shares(w, valid) for w in weights]
    n = ((shares[0] != 0) | (shares[1] != 0)).sum()
    # At most n, as the largest share is 1: no share gets lost in the product.
    return [w * (n / torch.where(w.sum() > 0, w.sum(), 1.0)) for w in shares]


def _columns(pairs: list[int], wanted: list[int]) -> tuple[list[int], set[int]]:
    """(pairs, the second of each is in the set; which modalities all ranks must see).

    The set in which every pair has a member that is cheapest to send: rows there, and back the
    gradients that are wanted.
    """
    both = list(zip(pairs[::2], pairs[1::2], strict=True))
    modalities = sorted(set(pairs))
    covers = [
        set(some)
        for size in range(len(modalities) + 1)
        for some in combinations(modalities, size)
        if all(set(some) & {*p} for p in both)
    ]
    second = min(covers, key=lambda some: sum(1 + wanted[i] for i in some))
    return [i for a, b in both for i in ((a, b) if b in second else (b, a))], second


def _fake_loss(
    rows,
    ids,
    valid,
    columns,
    weights,
    bags,
    centroids,
    labels,
    scalars,
    fixed_temperature,
    fixed_bias,
    margin,
    kind,
    q,
    lam,
    pairs,
    clustered,
    normalize,
    weight,
    scale,
    wanted,
    wants_scalars,
    keep,
    tile,
    sizes,
    rank,
    group,
):
    n = rows[0].shape[0]  # not len(): a size that torch.compile leaves open stays open
    everything = sum(sizes) if sizes else n
    clusters = 0 if centroids is None else len(clustered)
    near = 2 * (bags is not None and reference.KINDS[kind] != "sigmoid")
    size = len(pairs) // 2 * (2 + (4 + near) * n + (2 + near + bool(sizes)) * everything)
    size += clusters * (2 + 4 * n)
    kept = [everything] * (len(pairs) // 2) + [0 if not clusters else centroids.shape[0]] * clusters
    dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    make = partial(rows[0].new_empty, dtype=dtype)
    return (
        make(()),
        make(8),
        make(size),
        [rows[0].new_empty(n, m) for m in kept if keep and (any(wanted) or wants_scalars)],
    )


def _fake_loss_backward(upstream, parts, state, kept, rows, *rest):
    wanted = rest[19]
    return parts.new_empty(2), [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, want in zip(rows, wanted, strict=True)
        if want
    ]


if not _unavailable:
    torch.library.register_fake("mcn::loss", _fake_loss)
    torch.library.register_fake("mcn::loss_backward", _fake_loss_backward)
