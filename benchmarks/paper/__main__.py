"""``python -m benchmarks.paper``, from the root of the repository."""

import sys

from .cli import main

sys.exit(main())
