"""Validates and describes a store: ``python -m mcn_ext.store FILE``."""

import sys

from mcn_ext.console import printable
from mcn_ext.data.store import StoreError, validate
from mcn_ext.data.store_file import VERSION
from mcn_ext.train import flags


def main(argv=None) -> int:
    parser = flags.Parser(prog="python -m mcn_ext.store", description=__doc__)
    parser.add_argument("path", help="a .h5 store or a folder of shards")
    parser.add_argument(
        "--quick", action="store_true", help="check the layout only, do not read every row"
    )
    args = parser.parse_args(argv)
    try:
        info = validate(args.path, check_rows=not args.quick)
    except StoreError as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    print(printable(f"{args.path}: valid mcn-store version {VERSION}, {info['source']}"))
    print(f"  {info['videos']} videos, {info['captions']} captions")
    if not args.quick:
        print("  checksums agree" if info["checksums"] else "  no checksums (an older store)")
    for line in info["streams"]:
        print(" ", line)
    for notice in info["notices"]:
        print("  WARNING:", notice)
    return 0


if __name__ == "__main__":
    flags.run(main)
