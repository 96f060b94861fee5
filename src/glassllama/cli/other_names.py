"""What other programs call our verbs, and what they have that this version has not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from glassllama.base.errors import quoted

INSTEAD = {
    "run": "chat", "talk": "chat", "ask": "chat", "repl": "chat", "cli": "chat", "prompt": "chat",
    "complete": "generate", "completion": "generate", "gen": "generate", "sample": "generate",
    "pull": "download", "fetch": "download", "get": "download", "install": "download",
    "ls": "list", "models": "list", "search": "list", "cached": "list",
    "info": "show", "inspect": "show", "describe": "show", "config": "show", "dump": "show",
    "check": "validate", "verify": "validate", "doctor": "validate",
    "benchmark": "bench", "llama-bench": "bench", "speed": "bench",
    "eval": "perplexity", "evaluate": "perplexity", "ppl": "perplexity", "score": "perplexity",
    "encode": "tokenize", "decode": "tokenize", "tokens": "tokenize", "tokenise": "tokenize",
    "predict": "next", "logits": "next", "top": "next", "logprobs": "next",
    "explain": "walkthrough", "explore": "walkthrough", "explorer": "walkthrough",
    "visualize": "walkthrough", "trace": "walkthrough", "walk": "walkthrough",
    "pretrain": "train", "learn": "train", "resume": "train",
    "train_tokenizer": "train-tokenizer", "tokenizer": "train-tokenizer",
}  # fmt: skip
FROM_PYTHON = "from Python: glassllama.load(MODEL)"
FINETUNE = "'train PRESET --data TEXT --init-from MODEL' begins with the weights of a model"
REMOVE = "delete the folder or file that 'list' names"
MISSING = {
    "serve": FROM_PYTHON,
    "server": FROM_PYTHON,
    "api": FROM_PYTHON,
    "embed": FROM_PYTHON,
    "embedding": FROM_PYTHON,
    "quantize": "--quantize q8_0 or q4_0 of 'chat' and 'generate' does it while loading",
    "quantise": "--quantize q8_0 or q4_0 of 'chat' and 'generate' does it while loading",
    "convert": "GGUF, safetensors and .pth are read as they are",
    "export": "a run's folder has the form of Hugging Face already",
    "save": "a run's folder has the form of Hugging Face already",
    "finetune": FINETUNE,
    "fine-tune": FINETUNE,
    "lora": FINETUNE,
    "merge": FINETUNE,
    "rm": REMOVE,
    "remove": REMOVE,
    "delete": REMOVE,
    "uninstall": REMOVE,
    "ps": "a model is in memory only while a command runs",
    "stop": "a model is in memory only while a command runs; Ctrl-C ends it",
    "load": "a model is in memory only while a command runs",
    "unload": "a model is in memory only while a command runs",
    "create": "models are named by their paths: -m FOLDER",
    "cp": "models are named by their paths: -m FOLDER",
    "copy": "models are named by their paths: -m FOLDER",
    "push": "copy the folder to where you want it",
    "upload": "copy the folder to where you want it",
    "publish": "copy the folder to where you want it",
    "login": "for models that need an account set HF_TOKEN",
    "logout": "for models that need an account set HF_TOKEN",
}
ASIDE = {"help": "-h", "version": "--version"}


def no_such_verb(name: str, verbs: Iterable[str]) -> str:
    """What to say of a word that is no verb of ours: the verb that does it, or that none does."""
    if name in ASIDE:
        return f"no such command: {name}; it is an option: glassllama {ASIDE[name]}"
    if name in INSTEAD:
        return f"no such command: {name}; it is called {INSTEAD[name]} here"
    if name in MISSING:
        return f"{name} is not in this version; {MISSING[name]}"
    names = list(verbs)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"no such command: {quoted(name)}; {hint}"
