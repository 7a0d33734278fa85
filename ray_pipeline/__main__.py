"""`python -m ray_pipeline`."""

import sys

from ray_pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
