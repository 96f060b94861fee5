"""A saved model is complete or absent after any failure, and is loaded unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glassllama import load
from glassllama.base.config import LlamaConfig
from glassllama.base.errors import ConfigError, GlassError, TokenizerError
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.models.llama import Llama
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.save import UNFINISHED, save_model
from glassllama.weights.tokenizer import tokenizer_from_folder
from tolerances import assert_logits

TOKENIZER = CharTokenizer("\n !abcdefghijklmnopqrstuvwxyzéλ日🙂")
V = TOKENIZER.vocab_size
SIZES: dict[str, Any] = {"vocab_size": V, "max_seq_len": 48}
Any_ = Llama | GPT | Bigram


def models(seed: int = 0) -> dict[str, Any_]:
    shape: dict[str, Any] = {**SIZES, "dim": 24, "n_layers": 2, "n_heads": 4, "ffn_dim": 36}
    heads: dict[str, Any] = {"n_kv_heads": 2, "head_dim": 6, "norm_eps": 1e-5, "rope_theta": 1e4}
    made: dict[str, Any_] = {
        "bigram": Bigram(BigramConfig(**SIZES)),
        "GPT": GPT(GPTConfig(**shape)),
        "GPT without biases": GPT(GPTConfig(**shape, bias=False, tie_embeddings=False)),
        "Llama": Llama(LlamaConfig(**shape, **heads)),
        "Llama with qk_norm": Llama(LlamaConfig(**shape, **heads, qk_norm=True)),
    }
    for model in made.values():
        model.initialize(torch.Generator().manual_seed(seed))
        for parameter in model.parameters():
            parameter.data *= 10.0 if parameter.ndim > 1 else 1.0
        model.requires_grad_(False)
    return made


@pytest.mark.parametrize("name", models())
def test_saved_models_are_loaded_unchanged(name: str, tmp_path: Path) -> None:
    model = models()[name]
    save_model(tmp_path / "runs" / "x", model, TOKENIZER)
    assert sorted(p.name for p in (tmp_path / "runs" / "x").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    llm = load(tmp_path / "runs" / "x", backend="torch")
    assert llm.checkpoint.config == model.config
    ids = TOKENIZER.encode("hello 日 λ🙂!")
    expected = model(torch.tensor([ids]))[0].numpy()
    if "bigram" in name:  # a lookup without sums
        assert (llm.logits(ids) == expected).all()
    else:
        assert_logits(llm.logits(ids), expected, model.config)
    assert llm.tokenizer.encode("hello 日") == TOKENIZER.encode("hello 日")
    answer = llm.generate("hello", max_tokens=10, ignore_eos=True)
    assert len(answer.ids) == 10
    assert answer.prompt_ids[0] == TOKENIZER.bos


@pytest.mark.parametrize("name", models())
def test_auto_selects_the_engine_for_llamas_only(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, models()[name], TOKENIZER)
    llm = load(tmp_path)
    if name.startswith("Llama"):
        assert (llm.backend, llm.checkpoint.notes) == ("engine", [])
        return
    title = name.split()[0]
    assert llm.backend == "torch"
    assert llm.notes == [f"a {title} runs on the torch backend only"]
    for wanted in ({"backend": "engine"}, {"stream_layers": True}):
        with pytest.raises(ConfigError, match=f"{tmp_path}: a {title} runs on the torch backend"):
            load(tmp_path, **wanted)  # type: ignore[arg-type]


def test_generation_ends_at_the_last_position(tmp_path: Path) -> None:
    save_model(tmp_path, models()["GPT"], TOKENIZER)
    answer = load(tmp_path).generate("hello", ignore_eos=True)
    assert (answer.finish_reason, len(answer.prompt_ids) + len(answer.ids)) == ("length", 48)
    with pytest.raises(GlassError, match=r"48"):
        load(tmp_path).generate("a" * 60)


def test_a_tokenizer_without_bos_stays_without_bos(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abc\n")
    tokenizer.bos = None
    save_model(tmp_path, Bigram(BigramConfig(vocab_size=8, max_seq_len=9)), tokenizer)
    read = tokenizer_from_folder(tmp_path)
    assert isinstance(read, CharTokenizer)
    assert (read.bos, read.stop_ids, read.characters) == (None, {5}, ("\n", "a", "b", "c"))
    assert read.encode("ab", bos=True) == [1, 2]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "vocab"), {"ab": 0}),
        (("model", "vocab"), {"a": 1, "b": 0}),
        (("model", "vocab"), ["a"]),
        (("model", "unk_token"), "a"),
        (("normalizer",), {"type": "NFC"}),
        (("pre_tokenizer",), {"type": "Whitespace"}),
        (("added_tokens",), [{"id": 5, "content": "zz", "special": True}]),
    ],
)
def test_a_file_with_other_stages_is_not_read_as_a_character_tokenizer(
    path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    save_model(tmp_path, models()["bigram"], TOKENIZER)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        tokenizer_from_folder(tmp_path)


def test_other_tokenizers_are_copied(tmp_path: Path, llama3_ranks: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.model").symlink_to(llama3_ranks)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = tokenizer_from_folder(source)
    model = Bigram(BigramConfig(vocab_size=5, max_seq_len=9))
    save_model(out, model, tokenizer, vocabulary=source)
    assert tokenizer_from_folder(out).encode("Straße 日") == tokenizer.encode("Straße 日")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    for nothing in (None, tmp_path):
        with pytest.raises(TokenizerError, match="no tokenizer files to copy"):
            save_model(tmp_path / "none", model, tokenizer, vocabulary=nothing)
    assert not (tmp_path / "none").exists()


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    for name, model in models().items():
        save_model(tmp_path / name, model.bfloat16(), TOKENIZER)
        checkpoint = open_checkpoint(tmp_path / name)
        assert {checkpoint.info(ours).dtype for ours in checkpoint.names} == {"BF16"}
        executor = load(tmp_path / name, backend="torch").executor
        weights = dict(executor.model.named_parameters())  # type: ignore[attr-defined]
        assert all(torch.equal(weights[ours], p) for ours, p in model.named_parameters())


def test_dropout_and_training_mode_are_not_saved(tmp_path: Path) -> None:
    from glassllama.nn.init import add_dropout

    model = models()["GPT"]
    save_model(tmp_path / "without", model, TOKENIZER)
    add_dropout(model, 0.5)
    save_model(tmp_path / "with", model.train(), TOKENIZER)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_shards_of_another_model_in_the_folder_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(GlassError, match="in shards"):
        save_model(tmp_path, models()["bigram"], TOKENIZER)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_files_in_the_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save_file({"moments": torch.zeros(3)}, tmp_path / "training.safetensors")
    for name in ("Llama", "bigram", "GPT"):  # one replaces the other
        save_model(tmp_path, models()[name], TOKENIZER)
        assert type(open_checkpoint(tmp_path).config) is type(models()[name].config)
    assert (tmp_path / "notes.txt").read_text() == "mine"


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)  # no threads, so that this process may be forked
from weights.test_save import TOKENIZER, models, state_of
from glassllama.weights.save import save_model

both, out, chance = [models(seed)["GPT"] for seed in (0, 1)], Path(sys.argv[1]), random.Random(0)
for moment in range(50):
    saved, tell = os.pipe()
    child = os.fork()
    if child == 0:
        for n in range(10 ** 9):
            save_model(out, both[n % 2], TOKENIZER)
            os.write(tell, b"1") if n == 0 else None
            time.sleep(0.005)  # while a folder is rewritten, it contains no model
    if moment % 2:  # otherwise possibly before the end of the first save
        os.read(saved, 1)
    time.sleep(0.03 * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved), os.close(tell)
    print(state_of(out), flush=True)
"""


def state_of(folder: Path) -> str:
    """The hash of the weights if the folder contains a model, else the reason why it does not."""
    try:
        checkpoint = open_checkpoint(folder)
    except GlassError as error:
        return str(error)
    assert checkpoint.tokenizer.vocab_size == V
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_at_fifty_moments(tmp_path: Path) -> None:
    """One of the two models, or no model: never a mixture or a partial file."""
    whole = set()
    for seed in (0, 1):
        save_model(tmp_path / str(seed), models(seed)["GPT"], TOKENIZER)
        whole.add(state_of(tmp_path / str(seed)))
    assert len(whole) == 2
    out = tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parents[1]))
    ran = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    states = ran.stdout.splitlines()
    assert len(states) == 50
    assert whole & set(states), "some moments were between two saves"
    assert all("no such" in s or "no model here" in s for s in set(states) - whole)
    save_model(out, models()["GPT"], TOKENIZER)
    assert not list(out.glob(f"{UNFINISHED}*")), "the next save removes leftover files"


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("limit", [0, 100, 2000])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """Simulated by a limit on the size of files, which fails at the same system call."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(GlassError, match="the model cannot be saved"):
            save_model(tmp_path / "x", models()["GPT"], TOKENIZER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)
    with pytest.raises(GlassError, match="no model here"):
        open_checkpoint(tmp_path / "x")
    assert not list((tmp_path / "x").glob(f"{UNFINISHED}*"))


def test_nowhere_to_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GlassError, match=r"file/x: the model cannot be saved \(Not a directory\)"):
        save_model(tmp_path / "file" / "x", models()["bigram"], TOKENIZER)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_the_weights_have_the_same_permissions_as_other_files(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):  # the second one replaces the first
            save_model(tmp_path, models()["bigram"], TOKENIZER)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
