"""Contrastive + clustering + reconstruction: one step's terms by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from mcn_ext import distributed, ops, reference
from mcn_ext.clustering import OnlineClusters
from mcn_ext.reference import LossTerms, unit_rows


class Objective:
    """total = contrastive + cluster_weight * cluster + recon_weight * reconstruction.

    All are of the global batch. Contrastive terms are averaged over pairs, the others over
    modalities, so that stages and orders compare.

    ``joint_pairs`` adds to the pairs, with three modalities, each one and the mean of the other
    two: what is asked for when a text looks for a clip's video and sound together (after
    Shvetsova et al., CVPR 2022).

    Args:
        modalities: names, all that the model embeds; all are in the mean that is clustered.
        trained: those that learn; pairs without one are left out, and only these are clustered and
            reconstructed.
        similarity: "cosine" (unit length, the default objective) or "dot" (the published one).
        loss_impl: "fused" (:mod:`mcn_ext.ops`) or "reference" (:mod:`mcn_ext.reference`).
        clean_first: the share of the run in which noisy clips come in, see :meth:`clean`; of a
            second stage, whose first pair is ``first``.

    Attributes: ``progress``, the share of the run that is done, which whoever trains keeps.
    """

    progress = 0.0

    def __init__(
        self,
        modalities: list[str],
        trained: list[str],
        *,
        temperature: float = 0.05,
        margin: float = 0.001,
        similarity: str = "cosine",
        loss_impl: str = "fused",
        cluster_weight: float = 1.0,
        recon_weight: float = 50.0,
        cluster_size: int = 256,
        queue_size: int = 20,
        refit_every: int = 20,
        seed: int = 0,
        joint_pairs: bool = False,
        clean_first: float = 0.0,
        first: tuple[str, str] | None = None,
    ):
        self.clean_first, self.first = clean_first, first
        self.modalities, self.trained = list(modalities), list(trained)
        names = sorted(modalities)
        self.pairs = [p for p in combinations(names, 2) if set(p) & set(trained)]
        self.joint_pairs = [
            ("+".join(n for n in names if n != name), name)
            for name in names
            if joint_pairs and len(names) == 3 and trained
        ]
        self.unit = similarity == "cosine"
        self.loss = dict(temperature=temperature, margin=margin, normalize=self.unit)
        self.mcn_loss = (ops if loss_impl == "fused" else reference).mcn_loss
        self.cluster_weight, self.recon_weight = cluster_weight, recon_weight
        self.clusters = (
            OnlineClusters(cluster_size, queue_size, refit_every, seed) if cluster_weight else None
        )

    def __call__(
        self, embeddings: Mapping[str, Tensor], errors: Mapping[str, Tensor], batch: Mapping
    ) -> dict[str, Tensor]:
        """A step's ``total`` to differentiate, ``contrastive``, ``cluster`` and ``reconstruction``.

        batch: ``valid`` {modality: (B,) bool}; ``clip_id``, with text ``caption_id``: (B,) int64.
        The clustering queue takes the batch in only with :meth:`enqueue`.
        """
        if self.clusters is not None:
            self._joint = self.joint(embeddings, batch["valid"])
        if self.clean_first and self.progress < self.clean_first:
            batch = {**batch, "valid": self.clean(embeddings, batch["valid"])}
        self.last = (
            {name: x.detach() for name, x in embeddings.items()},
            {name: x.detach() for name, x in errors.items()},
            batch,
        )
        terms = self._losses(embeddings, batch, self.pairs + self.joint_pairs, self.trained)
        reconstruction = self.reconstruction(errors, batch["valid"])
        return {
            "total": terms.total + self.recon_weight * reconstruction,
            "contrastive": terms.contrastive,
            "cluster": terms.cluster,
            "reconstruction": reconstruction,
        }

    def _losses(self, embeddings, batch, pairs, clustered) -> LossTerms:
        """The contrastive terms of ``pairs`` and the clustering terms of ``clustered``."""
        centroids = labels = None
        if self.clusters is not None and self.clusters.centroids is not None and clustered:
            centroids = self.clusters.centroids
            labels = self.clusters.label(self._joint)
        rows = {name: embeddings[name] for name in self.modalities}
        valid = dict(batch["valid"])
        for joint, _ in pairs:
            names = joint.split("+")
            if len(names) == 1:
                continue
            rows[joint] = self._mean(embeddings, valid, names, self.unit)
            valid[joint] = torch.stack([valid[name] for name in names]).any(dim=0)
        return self.mcn_loss(
            rows,
            pairs,
            centroids,
            labels,
            clustered=clustered,
            cluster_weight=self.cluster_weight,
            ids={p: self.ids(p, batch) for p in pairs},
            valid=valid,
            group=distributed.default_group(),
            **self.loss,
        )

    @staticmethod
    def ids(pair: tuple[str, str], batch: Mapping) -> Tensor:
        """(B,) equal for clips that cannot be each other's negatives: the same clip or, in a pair
        with text, the same words, which have one embedding."""
        return batch["caption_id" if "text" in pair else "clip_id"]

    @torch.no_grad()
    def clean(
        self,
        embeddings: Mapping[str, Tensor],
        valid: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Masks (B,) that leave out the noisiest clips of the global batch, by the cosine of the
        first pair's embeddings: a share of (1 - progress / clean_first) / 2, half of them at the
        start. The pair was trained on clean and noisy clips alike, and agrees less on the noisy
        ones. Clips that lack one of the pair stay. The clustering queue takes all clips.
        """
        a, b = (unit_rows(embeddings[name].float()) for name in self.first)
        both = valid[self.first[0]] & valid[self.first[1]]
        agreement = torch.where(both, (a * b).sum(dim=1), torch.inf)
        agreement = torch.where(agreement.isnan(), -torch.inf, agreement)
        every = distributed.gather(agreement, distributed.default_group()).sort().values
        number = (every < torch.inf).sum()  # a tensor: the device need not be waited for
        out = (number * ((1 - self.progress / self.clean_first) / 2)).long()
        keep = agreement >= every.index_select(0, out.clamp_max(len(every) - 1).reshape(1))
        return {name: mask & keep for name, mask in valid.items()}

    def enqueue(self) -> None:
        """Take the last batch into the clustering queue; refit when due. Not for a skipped step."""
        if self.clusters is not None:
            self.clusters.push(distributed.gather(self._joint, distributed.default_group()))

    @torch.no_grad()
    def parts(self) -> dict[str, float]:
        """Every term of the last batch by pair or modality, unweighted; all ranks call this."""
        embeddings, errors, batch = self.last
        parts = {
            f"contrastive {a}-{b}": self._losses(embeddings, batch, [(a, b)], []).contrastive
            for a, b in self.pairs + self.joint_pairs
        }
        if self.clusters is not None and self.clusters.centroids is not None:
            parts |= {
                f"cluster {name}": self._losses(embeddings, batch, [], [name]).cluster
                for name in self.trained
            }
        parts |= {
            f"reconstruction {name}": self.reconstruction({name: error}, batch["valid"])
            for name, error in errors.items()
        }
        return {
            name: float(distributed.total(value)) / distributed.world()
            for name, value in parts.items()
        }

    def joint(self, embeddings: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
        """Mean of the present modalities' unit embeddings (B, D), fp32, detached; zero for none."""
        detached = {name: embeddings[name].detach() for name in self.modalities}
        return self._mean(detached, valid, self.modalities)

    @staticmethod
    def _mean(embeddings, valid, names: list[str], unit: bool = True) -> Tensor:
        # Zeros go in before unit_rows: an invalid row may hold NaN, which would reach gradients.
        rows = [torch.where(valid[name][:, None], embeddings[name].float(), 0.0) for name in names]
        total = sum(unit_rows(x) if unit else x for x in rows)
        return total / sum(valid[name].float() for name in names).clamp_min(1.0)[:, None]

    def reconstruction(self, errors: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> Tensor:
        """Mean over modalities of the mean MSE over the global batch's valid rows.

        The value is this rank's share times the number of ranks: averaged over ranks, as DDP does
        with gradients, it is the global mean even when ranks hold different numbers of valid rows.
        """
        terms = []
        for name, error in errors.items():
            n = distributed.total(valid[name].sum()).clamp_min(1)
            terms.append(
                torch.where(valid[name], error, torch.zeros_like(error)).sum()
                * distributed.world()
                / n
            )
        return (
            sum(terms) / len(terms)
            if terms
            else torch.zeros((), device=next(iter(valid.values())).device)
        )
