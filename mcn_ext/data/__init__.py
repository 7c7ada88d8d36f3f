"""Stores, clips and words: from files to the batches a model takes."""
