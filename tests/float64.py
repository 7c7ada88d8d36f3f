"""train_stage1.py in float64 (k-means stays fp32): ``python tests/float64.py --pair AV ...``

What differs between one process and several is then no rounding: in fp32, Adam turns rounding into
whole steps wherever a gradient is nothing but that.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_stage1
from mcn_ext import clustering
from mcn_ext.data import clips
from mcn_ext.train import memory

FLOAT, TO_DEVICE, FIT = torch.Tensor.float, clips.to_device, clustering.spherical_kmeans


def wide(value):
    if isinstance(value, dict):
        return {key: wide(v) for key, v in value.items()}
    return value.double() if value.is_floating_point() else value


def to_device(*arguments):
    return wide(TO_DEVICE(*arguments))


def fit(x, k, *, init, **options):
    torch.set_default_dtype(torch.float32)
    torch.Tensor.float = FLOAT
    centroids, labels = FIT(FLOAT(x), k, init=None if init is None else FLOAT(init), **options)
    use_float64()
    return centroids.double(), labels


def use_float64():
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


if __name__ == "__main__":
    use_float64()
    clips.to_device = memory.to_device = to_device
    clustering.spherical_kmeans = fit
    train_stage1.main(sys.argv[1:])
