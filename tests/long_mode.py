"""How much the tests try: a part of it, or with GLASSLLAMA_LONG=1 (`make parity`) all of it."""

import os

LONG = os.environ.get("GLASSLLAMA_LONG") == "1"
SEEDS = 100 if LONG else 30  # of random texts
