"""`python -m ldmscale JOB ...`, for torchrun -m and for places without console scripts."""

import sys

from ldmscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
