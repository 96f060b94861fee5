"""`glassllama download`: a model or a dataset, into the cache."""

from __future__ import annotations

from glassllama.cli.console import note, progress_bars
from glassllama.cli.options import ModelArgument, Offline, PreferPth, find


def download(
    name: ModelArgument,
    offline: Offline = False,
    pth: PreferPth = False,
) -> None:
    """Download a model once, so that it can be used without a network; prints its path.

    Datasets can be downloaded, too: tinyshakespeare, and shakespeare (all plays).
    Files in the cache are not downloaded again. An interrupted download is resumed if the source
    allows it.
    """
    from glassllama.hub import DATASETS, HUB_MODELS, PACKAGE_MODELS, fetch_dataset

    if name in DATASETS:
        with progress_bars() as bar:
            progress = bar(f"downloading {name}", "bytes")
            path = fetch_dataset(name, offline=offline, progress=progress)
    else:
        path = find(name, offline=offline, pth=pth)
    known = DATASETS.get(name) or PACKAGE_MODELS.get(name) or HUB_MODELS.get(name)
    if known is not None:
        note(f"{name}: license {known.license}")
    print(path)
