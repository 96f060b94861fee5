"""Many calls of the hub, each in a process of its own: forks of this one, which has the imports.

A line on stdin is a request, an environment, a folder and two files; a line on stdout the code that
its process ended with. huggingface_hub takes its settings from the environment when it is imported.
So each process imports it anew: what it needs of other packages is here, itself it is not.
"""

import gc
import json
import os
import signal
import sys

import huggingface_hub.errors
import huggingface_hub.hf_api
import huggingface_hub.utils.tqdm  # noqa: F401
from child import answer  # beside this file

PATIENCE = 300  # seconds until a process that does not end is killed


def forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def become(environment: dict[str, str], folder: str, out: str, err: str) -> None:
    """This process as if it had been started with these."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR), number)
    signal.alarm(PATIENCE)


forget("huggingface_hub")
gc.collect()
gc.freeze()  # what is here stays: no child need look through it
for line in sys.stdin:
    request, *rest = json.loads(line)
    child = os.fork()
    if child == 0:
        become(*rest)
        answer(request)
        break  # to the end that every process comes to, with whatever it says there
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
