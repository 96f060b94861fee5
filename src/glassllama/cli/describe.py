"""`glassllama describe` and `classify`: pictures and models that read them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from glassllama.cli.console import is_terminal, note, print_json
from glassllama.cli.options import JSON, BackendOptions, ChatOptions, ModelOptions
from glassllama.cli.render import completion_json, show_stream, speed_line


def describe(
    model_options: ModelOptions,
    backend_options: BackendOptions,
    sampling: ChatOptions,
    image: Path = typer.Argument(
        ..., metavar="IMAGE", help="A PNG, JPEG, WebP or GIF file (its first frame)."
    ),
    prompt: str | None = typer.Argument(
        None, metavar="PROMPT",
        help="A question, or a task such as 'detect cat'. Without it: a description.",
    ),
    draw: Path | None = typer.Option(
        None, "--draw", metavar="FILE",
        help="Draw the boxes of the answer (<loc0000> tokens) on the picture; save it as FILE.",
    ),
    json: bool = JSON,
) -> None:  # fmt: skip
    """Ask a vision-language model about a picture.

    For example: glassllama describe cat.png "What is on the sofa?" -m FOLDER
    """
    sampling.options()  # errors in them before the model is loaded
    from glassllama.vision.images import read_image

    model_options.path()  # a missing model, and then a bad picture, before anything is loaded
    picture = read_image(image)
    llm = backend_options.load(model_options)
    values: Any = sampling.with_defaults(llm.sampling_defaults).options()
    values.pop("logprobs", None)
    if json:
        completion = llm.describe(picture, prompt or "", **values)
    else:
        completion = show_stream(
            lambda bar: llm.stream_description(picture, prompt or "", progress=bar, **values), []
        )
    boxes = draw_answer(picture, completion.text, draw)
    if json:
        print_json(completion_json(llm, completion) | {"boxes": boxes})
    elif is_terminal(sys.stdout):
        note(f"\n{speed_line(completion)}")


def classify(
    model_options: ModelOptions,
    image: Path = typer.Argument(
        ..., metavar="IMAGE", help="A PNG, JPEG, WebP or GIF file (its first frame)."
    ),
    labels: list[str] = typer.Argument(..., metavar="LABELS", help="What the picture may show."),
    template: str = typer.Option(
        "This is a photo of {}.", metavar="TEXT", help="The text of a label, which is put for {}."
    ),
    json: bool = JSON,
) -> None:  # fmt: skip
    """How well labels describe a picture: the probability of each, by a SigLIP model.

    For example: glassllama classify cat.png "a cat" "two dogs" -m FOLDER
    """
    if "{}" not in template:
        raise typer.BadParameter("must contain {}, the place of the label", param_hint="--template")
    from glassllama.base.errors import ConfigError
    from glassllama.pictures import ImageTextModel, is_siglip
    from glassllama.vision.images import read_image

    path, picture = model_options.path(), read_image(image)
    if not is_siglip(path):
        raise ConfigError(f"{path}: classify needs a SigLIP model; choose one with -m FOLDER")
    model = ImageTextModel(path, model_options.model)
    [scores] = model.scores(picture, [template.replace("{}", label) for label in labels])
    found = sorted(zip(labels, scores.tolist(), strict=True), key=lambda pair: -pair[1])
    if json:
        print_json({"model": model.name, "scores": dict(found)})
        return
    for label, score in found:
        print(f"{score:6.1%}  {label}")


def draw_answer(picture: Any, answer: str, file: Path | None) -> list[dict[str, Any]]:
    """The boxes of an answer, drawn into `file` if one is given. Raises FormatError."""
    from dataclasses import asdict

    from glassllama.base.errors import FormatError
    from glassllama.vision.boxes import draw_boxes, parse_boxes

    boxes = parse_boxes(answer, *picture.size)
    if file is not None:
        if not boxes:
            note("note: the answer has no boxes, so the picture is saved as it is")
        try:
            draw_boxes(picture, boxes).save(file)
        except (OSError, ValueError) as error:
            raise FormatError(f"{file}: the picture cannot be saved ({error})") from None
        note(f"{file}: {len(boxes)} boxes")
    return [asdict(box) for box in boxes]
