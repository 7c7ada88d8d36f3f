"""What commands print: text of the data, as any terminal can show it."""

from __future__ import annotations

import re

# What steers a terminal: control characters (but tab and new line; a carriage return would let a
# caption write over the line before it), and signs that turn the direction of what follows. And
# halves of surrogate pairs, of file names that are not UTF-8, which no stream can encode.
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """A text with each character that steers a terminal as its escape, like ``\\x1b``.

    For all that ids, captions, file names and messages of libraries may hold. What the console's
    encoding lacks is escaped by the stream: see :func:`mcn_ext.train.flags.run`.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], str(text))
