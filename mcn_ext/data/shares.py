"""Judges whether enough of the data has content: too little of it trains and measures nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping

FEW, SOME = 0.1, 0.5  # below FEW is an error, below SOME a warning
ANYWAY = "MCN_ANYWAY"  # an environment variable; set, errors are warnings


def judge(shares: Mapping[str, float], refuse: bool = True) -> tuple[str, list[str]]:
    """(an error or "", warnings) for shares by what they are of, such as "clips with audio"."""
    low = [f"only {share:.0%} {name}" for name, share in shares.items() if share < SOME]
    few = [f"only {share:.0%} {name}" for name, share in shares.items() if share < FEW]
    if few and refuse and not os.environ.get(ANYWAY):
        return (
            f"{', '.join(few)}: too few. Are these the right features, captions and word vectors? "
            f"To go on all the same, set {ANYWAY}=1 in the environment",
            [],
        )
    return "", low
