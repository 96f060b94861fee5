"""The amount of testing: a part, or with GLASSLLAMA_LONG=1 (`make parity`) everything."""

import os

LONG = os.environ.get("GLASSLLAMA_LONG") == "1"
SEEDS = 100 if LONG else 30  # of random texts
