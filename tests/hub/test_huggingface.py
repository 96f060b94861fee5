"""Models of the Hugging Face Hub, against a local test server with its HTTP API."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from glassllama.base.errors import DownloadError
from glassllama.hub.huggingface import choose
from glassllama.hub.names import HubId, looks_like_path, parse_hub_id
from hub.stand_in import COMMIT, Repository

if TYPE_CHECKING:
    from hub.stand_in import Sandbox, StandIn

SMALL = {
    "README.md": b"# not downloaded",
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
}


def noise(seed: str, size: int = 200_000) -> bytes:
    return (hashlib.sha256(seed.encode()).digest() * (size // 32 + 1))[:size]


def index_of(*shards: str) -> bytes:
    return json.dumps(
        {"weight_map": {f"layer.{i}": name for i, name in enumerate(shards)}}
    ).encode()


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {
    **SMALL,
    **{name: noise(name) for name in SHARDS},
    "model.safetensors.index.json": index_of(*SHARDS),
    "original/consolidated.00.pth": noise("meta"),
    "original/params.json": b'{"dim": 64}',
    "original/tokenizer.model": b"IQ== 0",
    "pytorch_model.bin": noise("pickle"),
}
SINGLE = {**SMALL, "model.safetensors": noise("single")}
GGUFS = {
    "tiny-Q4_K_M.gguf": noise("q4km"),
    "tiny-Q4_K_S.gguf": noise("q4ks"),
    "tiny-Q8_0-00001-of-00002.gguf": noise("q8a"),
    "tiny-Q8_0-00002-of-00002.gguf": noise("q8b"),
    "README.md": b"# quantized",
}
PTH_NAMES = ["consolidated.00.pth", "params.json", "tokenizer.model"]


@pytest.fixture(autouse=True)
def repositories(stand_in: StandIn) -> dict[str, Repository]:
    stand_in.repositories = {
        "org/sharded": Repository(SHARDED),
        "org/single": Repository(SINGLE),
        "org/ggufs": Repository(GGUFS),
        "org/pickles": Repository({**SMALL, "pytorch_model.bin": b"pickle"}),
        "meta-llama/Llama-3.2-1B": Repository(SINGLE, gated=True),
        "org/private": Repository(SINGLE, token="hf_right"),
    }
    return stand_in.repositories


def names_in(folder: str) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def test_only_the_files_of_the_model_are_downloaded(sandbox: Sandbox, stand_in: StandIn) -> None:
    answer = sandbox.run(name="org/sharded")
    expected = sorted(
        n for n in SHARDED if "/" not in n and n not in ("README.md", "pytorch_model.bin")
    )
    assert names_in(answer["path"]) == expected
    assert all((Path(answer["path"]) / name).read_bytes() == SHARDED[name] for name in expected)
    assert Path(answer["path"]).is_relative_to(sandbox.home / "hf"), (
        "in the cache of huggingface_hub"
    )
    total = sum(len(SHARDED[name]) for name in expected)
    rest = total - len(SHARDED["model.safetensors.index.json"])  # which was downloaded before
    assert answer["progress"][-1] == [rest, rest]
    assert answer["cached"] == [{"name": "org/sharded", "path": answer["path"], "bytes": total}]


OTHER_NAMES = {
    "six digits": ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"),
    "one file": ("model.safetensors",),
    "renamed": ("pytorch_model-00001-of-00001.safetensors",),
    "below": ("shards/1.safetensors", "shards/deep/2.safetensors"),
    "dotted": ("a.safetensors-1.safetensors", "b"),
}


@pytest.mark.parametrize("names", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_weights_are_the_files_that_the_index_names(
    sandbox: Sandbox, repositories: dict[str, Repository], names: tuple[str, ...]
) -> None:
    index = {"model.safetensors.index.json": index_of(*names)}
    files = {**SMALL, **index, **{name: noise(name) for name in names}}
    repositories["org/other"] = Repository({**files, "model-00009-of-00009.safetensors": b"old"})
    answer = sandbox.run(name="org/other")
    assert names_in(answer["path"]) == sorted(name for name in files if name != "README.md")
    assert sandbox.run(name="org/other", offline=True)["path"] == answer["path"]
    (Path(answer["path"]) / names[-1]).unlink()
    assert "missing or incomplete" in sandbox.run(name="org/other", offline=True)["error"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (index_of("absent.safetensors"), "names 'absent.safetensors', which is not there (1 of 1"),
        (index_of("../up.safetensors"), "names '../up.safetensors': no file inside the repository"),
        (b'{"weight_map": {"a": 7}}', "names 7: no file inside"),
        (b'{"weight_map": {}}', "expected a weight_map"),
        (b"not json", "expected a weight_map"),
    ],
)
def test_an_invalid_index_is_an_error(
    sandbox: Sandbox, repositories: dict[str, Repository], index: bytes, words: str
) -> None:
    repositories["org/bad"] = Repository({**SMALL, "model.safetensors.index.json": index})
    error = sandbox.run(name="org/bad")["error"]
    assert error.startswith("org/bad: model.safetensors.index.json")
    assert words in error


def test_a_single_file_that_the_index_does_not_name_is_the_model(
    sandbox: Sandbox, repositories: dict[str, Repository]
) -> None:
    """The same rule as in weights/model_files.py. The shards are not downloaded."""
    index = {"model.safetensors.index.json": index_of("a.safetensors", "gone.safetensors")}
    repositories["org/both"] = Repository({**SINGLE, **index, "a.safetensors": b"old"})
    answer = sandbox.run(name="org/both")
    assert "model.safetensors" in names_in(answer["path"])
    assert "a.safetensors" not in names_in(answer["path"])
    assert sandbox.run(name="org/both", offline=True)["path"] == answer["path"]


@pytest.mark.parametrize(
    ("name", "files", "missing"),
    [
        ("org/bare", {"model.safetensors": b"x", "tokenizer.json": b"{}"}, "config.json"),
        ("org/part:Q8_0", {"a-Q8_0-00001-of-00002.gguf": b"x"}, "part 2 of 2"),
    ],
)
def test_an_incomplete_model_is_refused_before_its_weights_are_downloaded(
    sandbox: Sandbox, repositories: dict[str, Repository], stand_in: StandIn, name: str,
    files: dict[str, bytes], missing: str,
) -> None:  # fmt: skip
    repositories[name.partition(":")[0]] = Repository(files)
    stand_in.requests.clear()
    assert f"incomplete model: {missing} is missing" in sandbox.run(name=name)["error"]
    assert not [path for path in map(str, stand_in.requests) if "resolve" in path]


def test_file_names_in_errors_are_short_and_printable(
    sandbox: Sandbox, repositories: dict[str, Repository]
) -> None:
    names = ["\x1b[31mevil\x07\n.bin", "/tmp/outside.gguf", "../outside.gguf", "y" * 5000 + ".gguf"]
    repositories["org/odd"] = Repository({name: b"1" for name in names})
    for name in ("org/odd", "org/odd:Q9"):
        error = sandbox.run(name=name)["error"]
        assert error.isprintable()
        assert len(error) < 600
        assert "outside" not in error


@pytest.mark.parametrize("revision", ["..", "a/../b", "/x", "x//y", "q" * 300])
def test_revisions_with_paths_outside_are_refused(revision: str) -> None:
    assert parse_hub_id(f"org/r@{revision}") is None
    assert parse_hub_id("org/r@refs/pr/1") is not None


def test_split_gguf_files_with_uppercase_suffix() -> None:
    parts = ["a-Q4_0-00001-of-00002.GGUF", "a-Q4_0-00002-of-00002.GGUF"]
    id = HubId(repo="org/r", gguf="q4_0")
    assert choose(parts, id, False, None) == parts
    numbers_too_high = ["a-Q4_0-00002-of-00002.gguf", "a-Q4_0-00003-of-00002.gguf"]
    for some, part in ((parts[:1], 2), (parts[1:], 1), (numbers_too_high, 1)):
        with pytest.raises(DownloadError, match=f"incomplete model: part {part} of 2 is missing"):
            choose(some, id, False, None)
    with pytest.raises(DownloadError, match=r"name one of its GGUF files, as in org/r:a-Q4_0-"):
        choose(parts, HubId(repo="org/r"), False, None)
    assert looks_like_path("a/b.GGUF")


def test_a_cached_model_is_used_without_a_request(sandbox: Sandbox, stand_in: StandIn) -> None:
    first = sandbox.run(name="org/single")
    stand_in.requests.clear()
    assert sandbox.run(name="org/single")["path"] == first["path"]
    assert sandbox.run(name="org/single", offline=True)["path"] == first["path"]
    assert stand_in.requests == []


def test_prefer_pth_takes_the_files_of_meta(sandbox: Sandbox) -> None:
    answer = sandbox.run(name="org/sharded", prefer_pth=True)
    assert Path(answer["path"]).name == "original"
    assert names_in(answer["path"]) == PTH_NAMES
    assert sandbox.run(name="org/sharded", prefer_pth=True, offline=True)["path"] == answer["path"]
    # Afterwards Meta's files are not used as the model in the usual format.
    usual = sandbox.run(name="org/sharded")
    assert set(SHARDS) <= set(names_in(usual["path"]))


def test_prefer_pth_without_pth_files(sandbox: Sandbox) -> None:
    error = sandbox.run(name="org/single", prefer_pth=True)["error"]
    assert error.startswith(
        "org/single: expected consolidated.*.pth with params.json, found README"
    )


@pytest.mark.parametrize(
    ("gguf", "files"),
    [
        ("Q4_K_M", ["tiny-Q4_K_M.gguf"]),
        ("q4_k_m", ["tiny-Q4_K_M.gguf"]),
        ("tiny-Q4_K_S.gguf", ["tiny-Q4_K_S.gguf"]),
        ("Q8_0", ["tiny-Q8_0-00001-of-00002.gguf", "tiny-Q8_0-00002-of-00002.gguf"]),
    ],
)
def test_one_gguf_of_many(sandbox: Sandbox, gguf: str, files: list[str]) -> None:
    answer = sandbox.run(name=f"org/ggufs:{gguf}")
    assert Path(answer["path"]).name == files[0]
    assert names_in(str(Path(answer["path"]).parent)) == files
    assert Path(answer["path"]).read_bytes() == GGUFS[files[0]]
    assert [model["name"] for model in answer["cached"]] == [f"org/ggufs:{files[0]}"]
    assert sandbox.run(name=f"org/ggufs:{gguf}", offline=True)["path"] == answer["path"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/ggufs:Q5_0", "org/ggufs:Q5_0: no file matches; expected one of tiny-Q4_K_M.gguf, "),
        ("org/ggufs:Q4_K", "org/ggufs:Q4_K: no file matches"),
        ("org/ggufs:tiny", "org/ggufs:tiny: 3 files match; expected one of tiny-Q4_K_M.gguf, "),
        ("org/ggufs", "name one of its GGUF files, as in org/ggufs:tiny-Q4_K_M.gguf"),
        ("org/pickles", "expected model.safetensors, model.safetensors.index.json or consolidated"),
        ("org/single:Q4_0", "org/single:Q4_0: no file matches; it has no GGUF files"),
        ("org/absent", "org/absent: neither a file or folder here nor a repository at http://127"),
        ("org/single@v9", "org/single@v9: org/single has no revision 'v9'; see https://"),
    ],
)
def test_missing_repositories_files_and_revisions_are_errors(
    sandbox: Sandbox, name: str, expected: str
) -> None:
    answer = sandbox.run(name=name)
    assert answer["class"] == "DownloadError"
    assert expected in answer["error"]
    assert "\n" not in answer["error"]
    assert answer["cached"] == []


def test_a_revision_by_its_commit(sandbox: Sandbox) -> None:
    answer = sandbox.run(name=f"org/single@{COMMIT}")
    assert Path(answer["path"]).name == COMMIT
    assert sandbox.run(name=f"org/single@{COMMIT}", offline=True)["path"] == answer["path"]


def test_a_gated_model_is_an_error_with_license_page_and_login(sandbox: Sandbox) -> None:
    answer = sandbox.run(name="llama3.2-1b")
    error = answer["error"]
    assert error.startswith("meta-llama/Llama-3.2-1B: gated: accept its license (Llama 3.2 Comm")
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B" in error
    assert "HF_TOKEN" in error
    assert "\n" not in error
    assert answer["cached"] == []


def test_hf_token_is_used_for_a_private_model(sandbox: Sandbox) -> None:
    assert (
        "set HF_TOKEN to a valid token if it is private" in sandbox.run(name="org/private")["error"]
    )
    sandbox.environment["HF_TOKEN"] = "hf_right"
    path = sandbox.run(name="org/private")["path"]
    assert (Path(path) / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]


@pytest.mark.parametrize("by", ["flag", "HF_HUB_OFFLINE"])
def test_offline_makes_no_request(sandbox: Sandbox, stand_in: StandIn, by: str) -> None:
    if by == "flag":
        answer = sandbox.run(name="org/single", offline=True)
    else:
        sandbox.environment["HF_HUB_OFFLINE"] = "1"
        answer = sandbox.run(name="org/single")
    assert answer["error"].startswith(
        "org/single: missing or incomplete in the Hugging Face cache ("
    )
    assert "download it once while online" in answer["error"]
    assert stand_in.requests == []


def test_no_network(sandbox: Sandbox) -> None:
    sandbox.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # a closed port
    error = sandbox.run(name="org/single")["error"]
    here = "org/single: no file or folder here, and "
    assert error.startswith(f"{here}could not be fetched from http://127.0.0.1:9 (")
    assert "check the network" in error
    assert "\n" not in error


def test_a_broken_connection_is_resumed(
    sandbox: Sandbox, stand_in: StandIn, repositories: dict[str, Repository]
) -> None:
    content = noise("large", 24_000_000)  # huggingface_hub reads pieces of 10 MB
    repositories["org/large"] = Repository({**SINGLE, "model.safetensors": content})
    stand_in.break_after["model.safetensors"] = [22_000_000]
    answer = sandbox.run(name="org/large")
    assert (Path(answer["path"]) / "model.safetensors").read_bytes() == content
    first, second = stand_in.gets("model.safetensors")
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) >= 10_000_000
    total = answer["progress"][-1][1]
    assert [done for done, _ in answer["progress"] if 0 < done < total], "progress inside a file"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_download_leaves_no_model(
    sandbox: Sandbox, stand_in: StandIn, kill: signal.Signals
) -> None:
    stand_in.stall.set()
    with sandbox.start(name="org/single") as process:
        deadline = time.monotonic() + 300
        while not stand_in.gets("model.safetensors"):
            assert time.monotonic() < deadline, "the weights were never requested"
            time.sleep(0.02)
        process.send_signal(kill)
        process.communicate(timeout=300)
    stand_in.release.set()
    stand_in.stall.clear()
    assert "missing or incomplete" in sandbox.run(name="org/single", offline=True)["error"]
    path = Path(sandbox.run(name="org/single")["path"])
    assert (path / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]


def test_a_damaged_file_is_deleted_and_the_others_stay(
    sandbox: Sandbox, stand_in: StandIn, repositories: dict[str, Repository]
) -> None:
    whole = dict(SHARDED)
    repositories["org/sharded"].damaged[SHARDS[1]] = b"damaged" + whole[SHARDS[1]][7:]
    answer = sandbox.run(name="org/sharded")
    assert f"org/sharded: sha256 of {SHARDS[1]} is " in answer["error"]
    assert "it was deleted, try again" in answer["error"]
    assert answer["cached"] == []
    assert "missing or incomplete" in sandbox.run(name="org/sharded", offline=True)["error"]
    repositories["org/sharded"].damaged.clear()
    stand_in.requests.clear()
    path = Path(sandbox.run(name="org/sharded")["path"])
    assert (path / SHARDS[1]).read_bytes() == whole[SHARDS[1]]
    assert stand_in.gets(SHARDS[0]) == [], "the good shard is not downloaded again"


def test_a_cache_that_cannot_be_written(sandbox: Sandbox) -> None:
    (sandbox.home / "hf").write_text("in the way")
    error = sandbox.run(name="org/single")["error"]
    assert error.startswith("org/single: ")
    assert "\n" not in error


def test_two_processes_end_with_one_model(sandbox: Sandbox) -> None:
    both = [sandbox.start(name="org/sharded") for _ in range(2)]
    for process in both:
        with process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        path = Path(json.loads(out)["path"])
        assert all((path / name).read_bytes() == SHARDED[name] for name in SHARDS)
