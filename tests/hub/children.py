"""Calls of the hub package in forks of a process that has made the imports: see forks.py.

huggingface_hub reads its settings from the environment when it is imported. So the packages that it
uses are imported here, and each fork imports huggingface_hub again.
"""

import sys

import huggingface_hub.errors
import huggingface_hub.hf_api
import huggingface_hub.utils.tqdm  # noqa: F401
from child import answer  # in the folder of this file

from forks import serve

for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
serve(answer)
