"""One call of the hub in a process of its own, as a user's program would make it."""

import json
import sys
from dataclasses import asdict

from glassllama import hub
from glassllama.base.errors import GlassError
from glassllama.hub import datasets
from glassllama.hub.names import PackageFile
from glassllama.hub.package import fetch_package_file


def answer(request: dict) -> None:
    """Do what is asked, and print what came of it."""
    package, web = request.pop("package", None), request.pop("web", None)
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    try:
        if package is not None:
            path = fetch_package_file(PackageFile(**package), progress=progress, **request)
        elif web is not None:
            datasets.TEXTS = {web["short"]: datasets.WebText(**web)}
            path = datasets.fetch_text(web["short"], progress=progress, **request)
        else:
            path = hub.resolve(progress=progress, **request)
        found = {"path": str(path)}
    except GlassError as error:
        found = {"error": str(error), "class": type(error).__name__}
    models = [asdict(model) | {"path": str(model.path)} for model in hub.cached()]
    print(json.dumps(found | {"progress": told, "cached": models}))


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]))
