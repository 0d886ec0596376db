"""``python -m abste``."""

from __future__ import annotations

import sys

from abste.cli import main

if __name__ == "__main__":
    sys.exit(main())
