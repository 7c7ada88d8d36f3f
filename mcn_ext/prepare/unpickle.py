"""The allow-listed unpickler, by its former name."""

from mcn_ext.data.unpickle import UnsafePickle, load_pickle

__all__ = ["UnsafePickle", "load_pickle"]
