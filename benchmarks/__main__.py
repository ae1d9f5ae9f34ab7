"""``python -m benchmarks``: the same as ``convdit bench``."""

import sys

from convdit.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
