"""`glassllama validate`: everything that can be found out about a model's files."""

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
    from glassllama.cli.checks import findings

    path = find(model, offline=offline, pth=pth)
    with progress_bars() as bars:
        found = list(findings(path, bars))
    problems = [finding.text for finding in found if not finding.ok]
    if json:
        fine = [finding.text for finding in found if finding.ok]
        print_json({"path": str(path), "ok": not problems, "checked": fine, "problems": problems})
    else:
        for finding in found:
            print(f"{'ok     ' if finding.ok else 'problem'}  {finding.text}")
    if problems:
        raise GlassError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}, see above")
