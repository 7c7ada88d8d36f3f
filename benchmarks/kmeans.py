"""mcn_ext's spherical k-means against others: time of a refit, quality of a fit.

    pip install fast-pytorch-kmeans psutil nvidia-ml-py faiss-cpu     # what is missing is left out
    python benchmarks/kmeans.py [--run runs/stage1-AV] [--out benchmarks/results/kmeans-cpu.json]

Time: N 8192, D 512, K 256 (a GPU: N 45056, D 6144 too), fp32, the same unit rows and the same start
for all, at most 20 rounds. "refit" starts from the centroids of an earlier sample of the same
clusters, as in training; "cold" draws its own start (ours greedy k-means++, theirs random rows).
Median of the repeats, implementations in turn. Inertia: the sum of 1 - cosine to the own centroid.

Quality: mean inertia over 10 seeds, one fit each, at most 100 rounds, on blobs, on rows without
clusters, and on the clustering queue of --run: real embeddings.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import torch  # noqa: E402

from mcn_ext.clustering import spherical_kmeans  # noqa: E402
from mcn_ext.reference import unit_rows  # noqa: E402


def generator(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def mixture(n, d, k, noise, seed, device="cpu"):
    """Unit rows around k directions that are the same for every seed."""
    g = {"generator": generator(0, device), "device": device}
    centres = unit_rows(torch.randn(k, d, **g))
    g["generator"].manual_seed(seed)
    rows = centres[torch.randint(k, (n,), **g)] + noise * torch.randn(n, d, **g)
    return unit_rows(rows)


def inertia(x, centroids, labels):
    return float((1 - (x * unit_rows(centroids)[labels]).sum(1)).double().sum())


# ------------------------------------------------------------------- implementations: x, k -> fit
def ours(x, k, start, rounds, seed):
    return spherical_kmeans(x, k, init=start, max_iter=rounds, generator=generator(seed))


def fast_pytorch(mode):
    def fit(x, k, start, rounds, seed):
        from fast_pytorch_kmeans import KMeans

        fitted = KMeans(k, max_iter=rounds, mode=mode)
        labels = fitted.fit_predict(x, None if start is None else start.clone())
        return fitted.centroids, labels

    return fit


def scikit_learn(x, k, start, rounds, seed):
    from sklearn.cluster import KMeans

    fitted = KMeans(
        k,
        init="k-means++" if start is None else start.numpy(),
        n_init=1,
        max_iter=rounds,
        random_state=seed,
    ).fit(x.numpy())
    return torch.from_numpy(fitted.cluster_centers_), torch.from_numpy(fitted.labels_).long()


def faiss(x, k, start, rounds, seed):
    import faiss

    fitted = faiss.Kmeans(
        x.shape[1], k, niter=rounds, spherical=True, seed=seed + 1, max_points_per_centroid=len(x)
    )
    fitted.train(x.numpy(), init_centroids=None if start is None else start.numpy())
    return torch.from_numpy(fitted.centroids), torch.from_numpy(
        fitted.index.search(x.numpy(), 1)[1][:, 0]
    )


FITS = {
    "ours": ours,
    "fast-pytorch-kmeans, cosine": fast_pytorch("cosine"),
    "fast-pytorch-kmeans, euclidean": fast_pytorch("euclidean"),
    "scikit-learn": scikit_learn,
    "faiss": faiss,
}


def available(names, x):
    usable = []
    for name in names:
        try:
            FITS[name](x[:64], 4, None, 2, 0)
            usable.append(name)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return usable


def times(n, d, k, repeats, device):
    """One row of milliseconds and inertia for each implementation, kind of rows and start."""
    rows = []
    for title, noise in (("clusters", 0.5 / d**0.5), ("overlapping", 1.5 / d**0.5)):
        x, earlier = (mixture(n, d, k, noise, seed, device) for seed in (1, 2))
        start, _ = spherical_kmeans(earlier, k)
        names = available(
            [
                name
                for name in FITS
                if device == "cpu" or "faiss" not in name and "scikit" not in name
            ],
            x,
        )
        for kind, init in (("refit", start), ("cold", None)):
            taken, result = {name: [] for name in names}, {}
            for _ in range(repeats + 1):  # the first warms up
                for name in names:
                    begin = time.perf_counter()
                    result[name] = FITS[name](x, k, init, 20, 0)
                    if device != "cpu":
                        torch.cuda.synchronize()
                    taken[name].append(1e3 * (time.perf_counter() - begin))
            for name in names:
                rows.append(
                    {
                        "rows": title,
                        "kind": kind,
                        "n": n,
                        "d": d,
                        "k": k,
                        "name": name,
                        "ms": median(taken[name][1:]),
                        "inertia": inertia(x, *result[name]),
                        "live": len(result[name][1].unique()),
                    }
                )
    return rows


def quality(name, x, k):
    names = available(["ours", "scikit-learn", "faiss"], x)
    return {
        "rows": name,
        "n": len(x),
        "d": x.shape[1],
        "k": k,
        **{
            fit: mean(inertia(x, *FITS[fit](x, k, None, 100, seed)) for seed in range(10))
            for fit in names
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
        "times": [],
        "quality": [],
    }
    sizes = [(8192, 512, 256)] + ([(45056, 6144, 256)] if device == "cuda" else [])
    for n, d, k in sizes:
        result["times"] += times(n, d, k, args.repeats, device)
    print(
        "| rows | fit | N | D | K | | ms | ours / theirs | inertia | live |\n"
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|"
    )
    for row in result["times"]:
        mine = next(
            r["ms"]
            for r in result["times"]
            if r["name"] == "ours" and all(r[key] == row[key] for key in ("rows", "kind", "n"))
        )
        print(
            f"| {row['rows']} | {row['kind']} | {row['n']} | {row['d']} | {row['k']} | "
            f"{row['name']} | {row['ms']:.0f} | {mine / row['ms']:.2f} | {row['inertia']:.1f} | "
            f"{row['live']} |"
        )
    sets = (
        []
        if device == "cuda"
        else [  # a question of the algorithm, answered on a CPU
            ("blobs", mixture(8192, 64, 64, 0.1, 1), 64),
            ("no clusters", mixture(8192, 64, 1, 1.0, 1), 64),
        ]
    )
    if args.run:
        from mcn_ext.train import checkpoint

        state = checkpoint.load(args.run / checkpoint.LATEST)["training"]["clusters"]
        queue = torch.cat(state["queue"])
        sets += [(f"queue of {args.run}", unit_rows(queue[queue.any(1)]), len(state["centroids"]))]
    print(
        "\n| rows | N | D | K | ours | scikit-learn | faiss | ours / best of the others |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, x, k in sets:
        row = quality(name, x, k)
        result["quality"].append(row)
        others = [row[fit] for fit in ("scikit-learn", "faiss") if fit in row]
        print(
            f"| {name} | {row['n']} | {row['d']} | {k} | {row['ours']:.2f} | "
            f"{row.get('scikit-learn', float('nan')):.2f} | {row.get('faiss', float('nan')):.2f} "
            f"| {row['ours'] / min(others, default=float('nan')):.4f} |"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
