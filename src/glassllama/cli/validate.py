"""`glassllama validate`: check the files of a model."""

from __future__ import annotations

from glassllama.base.errors import GlassError
from glassllama.cli.console import print_json, progress_bars
from glassllama.cli.options import Json, ModelArgument, Offline, PreferPth, find


def validate(
    model: ModelArgument,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Check a model's files: structure, checksums, every number, tokenizer, chat template.

    Lists all problems, and exits with 1 if there are any.
    """
    from glassllama.hub import PACKAGE_MODELS
    from glassllama.weights.inspection import validate as validate_files

    path = find(model, offline=offline, pth=pth)
    hashes = [file.sha256 for file in PACKAGE_MODELS.values() if file.location == path]
    with progress_bars() as bars:
        found = validate_files(path, sha256="".join(hashes[:1]), bars=bars)
    problems = [finding.text for finding in found if not finding.ok]
    if json:
        fine = [finding.text for finding in found if finding.ok]
        print_json({"path": str(path), "ok": not problems, "checked": fine, "problems": problems})
    else:
        for finding in found:
            print(f"{'ok     ' if finding.ok else 'problem'}  {finding.text}")
    if problems:
        raise GlassError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}, see above")
