"""``python -m convdit``: the same as the command ``convdit``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
