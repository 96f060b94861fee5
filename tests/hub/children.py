"""Calls of the hub, as forks of a process that has made the imports: forks.py.

huggingface_hub reads its settings from the environment when it is imported. So what it needs of
other packages is imported here, and each fork imports the package itself anew.
"""

import sys

import huggingface_hub.errors
import huggingface_hub.hf_api
import huggingface_hub.utils.tqdm  # noqa: F401
from child import answer  # beside this file

from forks import serve

for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
serve(answer)
