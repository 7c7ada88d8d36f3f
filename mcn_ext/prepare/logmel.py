"""Log-mel spectrograms as the field's audio features are made, without librosa.

Mono at 16 kHz: mean removed, pre-emphasis y[t] - 0.97 y[t-1]; windows of 25 ms (Hamming) every
10 ms, centred, zeros beyond the ends; power spectrum; 40 mels (Slaney's scale, triangles of unit
area) from 20 Hz to 8 kHz; dB relative to the loudest entry, at least -80.
"""

from __future__ import annotations

import numpy as np

SAMPLE_RATE, N_FFT, HOP, N_MELS = 16_000, 400, 160, 40
F_MIN, PRE_EMPHASIS, TOP_DB = 20.0, 0.97, 80.0
AMIN = 1e-10  # a power below counts as silence
BLOCK = 4096  # frames at a time: 13 MB of windows in float64


def hz_to_mel(hz):
    """Slaney's scale (Auditory Toolbox, 1998): linear to 1 kHz, 27 steps to 6.4 kHz from there."""
    return np.where(
        hz < 1000, 3 * hz / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4)
    )


def mel_to_hz(mel):
    """The inverse of :func:`hz_to_mel`."""
    return np.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def mel_filters() -> np.ndarray:
    """(40, 201): triangles between neighbours of 42 points equally far apart in mels, area 1."""
    edges = mel_to_hz(np.linspace(hz_to_mel(F_MIN), hz_to_mel(SAMPLE_RATE / 2), N_MELS + 2))
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    low, centre, high = (edges[i : i + N_MELS, None] for i in range(3))
    rise, fall = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Samples (n,) at 16 kHz -> (1 + n // 160, 40) float32 dB in [-80, 0].

    ``samples`` may be a memory map: they are read by blocks, computed in float64. Silence, having
    no loudest entry, is 0 everywhere.
    """
    n, step = len(samples), BLOCK * HOP
    total = sum(samples[lo : lo + step].sum(dtype=np.float64) for lo in range(0, n, step))
    mean = total / max(n, 1)
    window, filters = np.hamming(N_FFT + 1)[:-1], mel_filters().T  # a periodic window
    out = np.empty((1 + n // HOP, N_MELS), np.float32)
    for first in range(0, len(out), BLOCK):
        n_frames = min(BLOCK, len(out) - first)
        begin = first * HOP - N_FFT // 2  # of this block's first window
        length = (n_frames - 1) * HOP + N_FFT
        lo, hi = max(begin, 0), min(begin + length, n)
        # The sample before the block is for the pre-emphasis; the very first has none.
        block = samples[max(lo - 1, 0) : hi].astype(np.float64) - mean
        emphasised = block.copy()
        emphasised[1:] -= PRE_EMPHASIS * block[:-1]
        padded = np.zeros(length)
        padded[lo - begin : hi - begin] = emphasised[lo - hi :]
        windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP] * window
        power = np.abs(np.fft.rfft(windows)) ** 2 @ filters
        out[first : first + n_frames] = 10 * np.log10(np.maximum(power, AMIN))
    out -= out.max()
    return np.maximum(out, -TOP_DB, out=out)
