"""Finds places in videos for a sentence: ``python -m mcn_ext.search``."""

from mcn_ext.evaluation.search import main
from mcn_ext.train.flags import run

if __name__ == "__main__":
    run(main)
