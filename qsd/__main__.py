"""``python -m qsd`` and the console script."""

from __future__ import annotations

import sys

from qsd.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
