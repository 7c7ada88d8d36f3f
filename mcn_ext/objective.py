"""The objective of a step: contrastive + clustering + reconstruction, over the global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from mcn_ext import distributed, ops
from mcn_ext.clustering import OnlineClusters
from mcn_ext.reference import BIAS, LossTerms, unit_rows

LARGEST_SCALE = 100.0  # of a learnt 1 / temperature, as CLIP limits it


@dataclass
class Terms:
    """What :class:`Objective` returns: scalars of the step, and what they were computed from.

    total = contrastive + cluster_weight * cluster + recon_weight * reconstruction; only ``total``
    is to be differentiated. ``embeddings`` and ``errors`` by modality name are detached; ``joint``
    (B, D) is what the clustering queue takes.
    """

    total: Tensor
    contrastive: Tensor
    cluster: Tensor
    reconstruction: Tensor
    embeddings: dict[str, Tensor]
    errors: dict[str, Tensor]
    batch: Mapping
    joint: Tensor | None

    def scalars(self) -> dict[str, Tensor]:
        """The four terms, detached, by name."""
        names = ("total", "contrastive", "cluster", "reconstruction")
        return {name: getattr(self, name).detach() for name in names}


class Objective(nn.Module):
    """Computes a step's loss from embeddings (B, D) and reconstruction errors (B,).

    Contrastive terms are averaged over pairs, the others over modalities, so that stages and orders
    compare. Every term is that of the global batch: averaged over ranks, as DistributedDataParallel
    does, gradients are those of one process.

    Args:
        modalities: names of all that the model embeds; all are in the mean that is clustered.
        trained: names of those that learn; pairs without one are left out, and only these are
            clustered and reconstructed.
        loss: "softmax"; "milnce", whose positives are the clips of one bag (``bag_id``); or a
            ``kind`` of :func:`mcn_ext.reference.contrastive_loss`.
        bias: of "sigmoid", at the start: it is a parameter.
        learn_temperature: the temperature is a parameter, ``log_scale`` = log(1 / temperature).
        similarity: "cosine" (unit rows, the default objective) or "dot" (the published one).
        queue_size: steps whose features are clustered, and steps between two k-means fits.
    """

    def __init__(
        self,
        modalities: list[str],
        trained: list[str],
        *,
        loss: str = "softmax",
        bias: float = BIAS,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        margin: float = 0.001,
        similarity: str = "cosine",
        cluster_weight: float = 1.0,
        recon_weight: float = 50.0,
        cluster_size: int = 256,
        queue_size: int = 20,
        seed: int = 0,
    ):
        super().__init__()
        self.modalities, self.trained = list(modalities), list(trained)
        # Sorted, so that a pair has the same name in the log of every order.
        self.pairs = [p for p in combinations(sorted(modalities), 2) if set(p) & set(trained)]
        self.fixed_temperature = temperature
        # A logarithm: the scale stays positive, and equal steps change it by equal factors.
        scale = torch.tensor(-math.log(temperature))
        self.log_scale = nn.Parameter(scale) if learn_temperature else None
        self.loss = loss
        self.bias = nn.Parameter(torch.tensor(bias)) if loss == "sigmoid" else None
        self.margin, self.normalize = margin, similarity == "cosine"
        self.cluster_weight, self.recon_weight = cluster_weight, recon_weight
        self.clusters = None
        if cluster_weight:
            # Refitted every queue_size steps: no step is part of two fits.
            self.clusters = OnlineClusters(cluster_size, queue_size, queue_size, seed)

    @property
    def temperature(self) -> float | Tensor:
        if self.log_scale is None:
            return self.fixed_temperature
        return (-self.log_scale).exp()

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Keep a learnt temperature at or above 1 / LARGEST_SCALE; call after the optimiser."""
        if self.log_scale is not None:
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))

    def form(self, batch: Mapping) -> dict:
        """The loss as keywords of :func:`mcn_ext.ops.mcn_loss`."""
        if self.loss == "milnce":
            return {"positives": batch["bag_id"]}
        return {"kind": self.loss} | ({} if self.bias is None else {"bias": self.bias})

    def forward(
        self, embeddings: Mapping[str, Tensor], errors: Mapping[str, Tensor], batch: Mapping
    ) -> Terms:
        """batch: ``valid`` {name: (B,) bool}; ``clip_id``, with text ``caption_id``, for "milnce"
        ``bag_id``: (B,) int64."""
        joint = self.joint(embeddings, batch["valid"]) if self.clusters else None
        loss = self.losses(embeddings, batch, joint, self.pairs, self.trained)
        reconstruction = self.reconstruction(errors, batch["valid"])
        return Terms(
            loss.total + self.recon_weight * reconstruction,
            loss.contrastive,
            loss.cluster,
            reconstruction,
            # Detached: the log reads them, and must not keep the graph of the step.
            {name: x.detach() for name, x in embeddings.items()},
            {name: x.detach() for name, x in errors.items()},
            batch,
            joint,
        )

    def losses(self, embeddings, batch, joint: Tensor | None, pairs, clustered) -> LossTerms:
        """The contrastive terms of ``pairs`` and the clustering terms of ``clustered``."""
        centroids = labels = None
        if self.clusters and self.clusters.centroids is not None and clustered:
            # One label for all modalities of a clip, of their mean: it pulls them to one centroid.
            centroids, labels = self.clusters.centroids, self.clusters.label(joint)
        return ops.mcn_loss(
            {name: embeddings[name] for name in self.modalities},
            pairs,
            centroids,
            labels,
            clustered=clustered,
            cluster_weight=self.cluster_weight,
            temperature=self.temperature,
            margin=self.margin,
            normalize=self.normalize,
            ids={pair: self.ids(pair, batch) for pair in pairs},
            valid=dict(batch["valid"]),
            group=distributed.default_group(),
            **self.form(batch),
        )

    @staticmethod
    def ids(pair: tuple[str, str], batch: Mapping) -> Tensor:
        """(B,) equal for clips that cannot be each other's negatives: the same clip or, in a pair
        with text, the same words, which have one embedding."""
        return batch["caption_id" if "text" in pair else "clip_id"]

    def joint(self, embeddings: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
        """Mean of the present modalities' unit embeddings (B, D), fp32, detached; zero for none."""
        rows = []
        for name in self.modalities:
            # Zeros go in before unit_rows: an invalid row may hold NaN.
            present = torch.where(valid[name][:, None], embeddings[name].detach().float(), 0.0)
            rows.append(unit_rows(present))
        # Of modalities that are present, (B,); at least 1, since a clip may have none.
        count = sum(valid[name].float() for name in self.modalities)
        return sum(rows) / count.clamp_min(1.0)[:, None]

    def reconstruction(self, errors: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
        """Mean over modalities of the mean MSE over the global batch's valid rows.

        The value is this rank's share times the number of ranks: averaged over ranks it is the
        global mean, also when ranks hold different numbers of valid rows.
        """
        terms = []
        for name, error in errors.items():
            # A global batch may have no clip with this modality: its term is then 0, not 0 / 0.
            n = distributed.total(valid[name].sum()).clamp_min(1)
            # Not error * valid: NaN * 0 is NaN.
            mine = torch.where(valid[name], error, torch.zeros_like(error)).sum()
            terms.append(mine * distributed.world() / n)
        if not terms:
            return torch.zeros((), device=next(iter(valid.values())).device)
        return sum(terms) / len(terms)

    def update_clusters(self, terms: Terms) -> None:
        """Take a step's features into the clustering queue; k-means when due. All ranks call
        this, and not for a step that was skipped."""
        if self.clusters:
            self.clusters.push(distributed.gather(terms.joint, distributed.default_group()))

    def statistics(self) -> dict[str, float]:
        """Numbers for log.jsonl: of the clusters, a learnt temperature, the sigmoid's bias."""
        learnt = {} if self.log_scale is None else {"temperature": float(self.temperature.detach())}
        learnt |= {} if self.bias is None else {"bias": float(self.bias.detach())}
        return {**(self.clusters.statistics if self.clusters else {}), **learnt}

    @torch.no_grad()
    def parts(self, terms: Terms) -> dict[str, float]:
        """Every term by pair or modality, unweighted, for the log; all ranks call this."""
        embeddings, batch, joint = terms.embeddings, terms.batch, terms.joint
        parts = {
            f"contrastive_{a}_{b}": self.losses(embeddings, batch, joint, [(a, b)], []).contrastive
            for a, b in self.pairs
        }
        if self.clusters and self.clusters.centroids is not None:
            for name in self.trained:
                parts[f"cluster_{name}"] = self.losses(embeddings, batch, joint, [], [name]).cluster
        for name, error in terms.errors.items():
            parts[f"reconstruction_{name}"] = self.reconstruction({name: error}, batch["valid"])
        return {
            # The mean over ranks: a rank's value may be its share, see reconstruction().
            name: float(distributed.total(value)) / distributed.world()
            for name, value in parts.items()
        }

    def training_state(self) -> dict:
        """For a checkpoint: the clustering queue and centroids, and what is learnt."""
        clusters = self.clusters.state_dict() if self.clusters else None
        return {"clusters": clusters, "objective": self.state_dict()}

    def load_training_state(self, state: Mapping, device: torch.device) -> None:
        """What :meth:`training_state` gave; first-edition checkpoints have no "objective"."""
        self.load_state_dict(state.get("objective", {}))
        if self.clusters:
            self.clusters.load_state_dict(state["clusters"], device)
