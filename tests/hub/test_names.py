"""Names of models: paths, short names, Hub ids, and the errors for all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from glassllama import hub
from glassllama.base.errors import DownloadError
from glassllama.hub import huggingface
from glassllama.hub.names import HUB_ID, HUB_MODELS, PACKAGE_MODELS, HubId, parse_hub_id


def test_a_path_that_exists_comes_before_short_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2-135m").mkdir()
    assert hub.resolve("smollm2-135m") == Path("smollm2-135m")
    assert hub.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("org/name", HubId(repo="org/name")),
        ("org/na.me-2@v1.0", HubId(repo="org/na.me-2", revision="v1.0")),
        ("org/name:Q4_K_M", HubId(repo="org/name", gguf="Q4_K_M")),
        ("o/n@refs/pr/1:x/y.gguf", HubId(repo="o/n", revision="refs/pr/1", gguf="x/y.gguf")),
        ("org/name/more", None),
        ("name", None),
        ("org/name@", None),
        ("../name", None),
        ("org/nämé", None),
        ("org/name\n", None),
    ],
)  # fmt: skip
def test_hub_ids(name: str, id: HubId | None) -> None:
    assert parse_hub_id(name) == id
    assert id is None or str(id) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm-135m", "did you mean smollm2-135m"),
        ("Llama3.2-1B-instrukt", "-instruct? else give a path, a short name"),
        ("", "model '': no such file or folder"),
        ("quite unlike anything", "no known name; give a path, a short name ('glassllama list' "),
        ("x" * 5000, "or a Hub id org/name[@revision][:FILE.gguf]"),
        ("nul\0byte", "no known name"),
        ("~nobody-of-that-name/model", "~nobody-of-that-name/model: no such file or folder"),
        ("./absent.gguf", "./absent.gguf: no such file or folder"),
        ("models/absent.gguf", "models/absent.gguf: no such file or folder"),
    ],
)
def test_unknown_names_are_errors_with_suggestions(name: str, expected: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError) as caught:
        hub.resolve(name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_in_an_existing_folder_is_a_mistyped_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in ("runs/llama", "runs/bigram", "runs/.hidden"):
        Path(folder).mkdir(parents=True)
    Path("model.gguf").touch()
    for name, words in (
        ("runs/lama", "runs/lama: no such file or folder here; did you mean 'runs/llama'? for"),
        ("runs/typo", "runs/typo: no such file or folder here; for the model of that name on"),
        ("./runs/bigam", "./runs/bigam: no such file or folder; did you mean './runs/bigram'?"),
        ("modl.gguf", "modl.gguf: no such file or folder; did you mean 'model.gguf'?"),
        ("run", "no known name; did you mean 'runs'"),
        ("runs/lama@main", "runs/lama@main: missing or incomplete in the Hugging Face cache"),
        ("runs/lama:Q4_0", "runs/lama:Q4_0: missing or incomplete in the Hugging Face cache"),
        ("org/lama", "org/lama: missing or incomplete in the Hugging Face cache"),
    ):
        with pytest.raises(DownloadError) as caught:
            hub.resolve(name, offline=True)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_name_in_runs_is_a_mistyped_path_without_that_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="runs/llama: no such file or folder here; for"):
        hub.resolve("runs/llama")


def test_a_cached_hub_model_is_not_treated_as_a_mistyped_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    entry = huggingface.CacheEntry(path=tmp_path, files=(), complete=True)
    monkeypatch.setattr(huggingface, "find_cached", lambda *_: entry)
    assert hub.resolve("org/name") == tmp_path


@pytest.mark.parametrize("name", ["SmolLM2-135M", "smollm2-135m ", "\tSMOLLM2-135M\n"])
def test_short_names_in_any_case_and_with_spaces(name: str, default_model: Path) -> None:
    assert hub.resolve(name, offline=True) == default_model


def test_the_table_of_hub_models() -> None:
    for name, model in HUB_MODELS.items():
        assert HUB_ID.fullmatch(model.repo)
        assert name == name.lower()
        assert model.gated == model.repo.startswith("meta-llama/")
    assert not set(HUB_MODELS) & set(PACKAGE_MODELS)
    # Sizes on disk, from the files' own figures: 16,060,617,592 bytes for Llama 3 8B.
    assert abs(HUB_MODELS["llama3.1-8b"].bytes - 16_060_617_592) < 200_000
