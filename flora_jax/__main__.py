"""``python -m flora_jax`` is the command ``flora``."""

import sys

from flora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
