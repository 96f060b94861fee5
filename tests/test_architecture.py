"""Rules of the code base that can be checked in the source: imports, sizes, names.

The lists of exceptions name files that break a rule today; they may only get shorter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import glassllama
from code_size import code_lines
from glassllama.base import errors
from glassllama.llm import LLM, BatchStream, Completion, TextStream

PACKAGE = Path(glassllama.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go to lower levels only; parts of one level do not import each other.
LEVELS = [
    ("base",),
    ("tokenizers", "formats", "nn", "hub"),
    ("models",),
    ("native",),
    ("weights", "generation", "vision"),
    ("train", "walkthrough", "doctor"),
    ("pictures",),
    ("llm",),
    ("server", "benchmark"),
    ("cli", "__init__"),
    ("__main__",),
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# Plain packages do not import native. These files combine the two:
IMPORTS_NATIVE = {
    "weights/pack.py", "weights/packed_cache.py", "train/model.py",
    "weights/tokenizer.py", "weights/tokenizer_gguf.py",
    # the command line measures and explains compiled code
    "benchmark.py", "cli/console.py", "cli/errors.py",
    # not yet
    "weights/backend.py",
}  # fmt: skip
CYCLES: list[set[str]] = []  # exceptions

USES_TORCH = {"nn", "models", "train", "walkthrough", "doctor"}
USES_TORCH_FILES = {
    "weights/load.py", "weights/save.py", "weights/vision.py",
}  # fmt: skip
IMPORTED_LATE = {"torch", "numba"}  # in modules that are imported for `--help`
STARTS_FAST = {"__init__", "__main__", "cli", "llm", "hub"}
# Independent implementations that tests compare with: never imported by the package.
ORACLES = {"transformers", "tokenizers", "tiktoken", "gguf", "sentencepiece", "llama_models"}
COMPARES_SPEED = {"benchmark.py"}  # may import llama_cpp

# isinstance(config, LlamaConfig) elsewhere would tie code to one architecture.
KNOWS_LLAMA = ("models/", "weights/architectures/")

VAGUE = re.compile(r"utils?|helpers?|common|misc|manager|handler", re.IGNORECASE)
LONGEST_FUNCTION, LONGEST_FILE, WIDEST, MODEL_IFS = 60, 500, 100, 20

TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = ("glassllama", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def import_statements(tree: ast.AST, *, late: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports of a file outside `if TYPE_CHECKING`; `late`: those inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not late:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from import_statements(node, late=late)


def imported(path: Path, *, late: bool = True) -> set[str]:
    """Dotted names that a file imports: modules, and names of modules."""
    found = set()
    for node in import_statements(TREES[path], late=late):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, "only absolute imports are allowed"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, late imports included."""
    names = {name for name in imported(path) if name.startswith("glassllama.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES)


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reached = {module: reachable(module) for module in graph}
    groups = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }
    return [set(group) for group in groups]


def test_there_are_no_import_cycles() -> None:
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    new = [group for group in cycles(graph) if not any(group <= known for known in CYCLES)]
    assert not new


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert cycles(graph) == [{"b", "c"}]


def test_imports_go_to_lower_levels() -> None:
    wrong = []
    for path in FILES:
        here = part_of(path)
        for name in imported(path):
            there = name.removeprefix("glassllama.").split(".")[0]
            if not name.startswith("glassllama.") or there in (here, "__version__"):
                continue
            if there == "native" and here != "__main__":
                allowed = relative(path) in IMPORTS_NATIVE
            else:
                allowed = LEVEL[there] < LEVEL[here]
            if not allowed:
                wrong.append(f"{relative(path)}: {name}")
    assert not wrong


def test_every_exception_names_an_existing_file() -> None:
    """Exceptions for files that no longer exist."""
    listed = IMPORTS_NATIVE | USES_TORCH_FILES
    assert not {name for name in listed if not (PACKAGE / name).exists()}


def test_independent_implementations_are_not_imported() -> None:
    for path in FILES:
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & ORACLES, relative(path)
        assert "llama_cpp" not in names or relative(path) in COMPARES_SPEED, relative(path)


def test_torch_is_imported_only_where_allowed() -> None:
    allowed = (*(f"{part}/" for part in USES_TORCH), "native/training/", *USES_TORCH_FILES)
    users = [path for path in FILES if "torch" in {n.split(".")[0] for n in imported(path)}]
    assert [relative(path) for path in users if not relative(path).startswith(allowed)] == [
        "llm.py"  # builds the PyTorch executor
    ]


def test_help_imports_neither_torch_nor_numba() -> None:
    for path in FILES:
        if part_of(path) in STARTS_FAST:
            early = {name.split(".")[0] for name in imported(path, late=False)}
            assert not early & IMPORTED_LATE, f"{relative(path)}: import it where it is needed"


def test_files_functions_and_lines_are_short() -> None:
    long = []
    for path, tree in TREES.items():
        if code_lines(path) > LONGEST_FILE:
            long.append(f"{relative(path)}: {code_lines(path)} code lines")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > WIDEST:
                long.append(f"{relative(path)}:{number}: {len(line)} columns")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = code_lines(path, node.lineno, node.end_lineno)
                if size > LONGEST_FUNCTION:
                    long.append(f"{relative(path)}: {node.name} has {size} code lines")
    assert not long


def test_model_files_have_few_branches() -> None:
    for path, tree in TREES.items():
        if part_of(path) == "models":
            branches = sum(isinstance(node, ast.If | ast.IfExp) for node in ast.walk(tree))
            assert branches <= MODEL_IFS, relative(path)


def test_names_are_not_vague() -> None:
    for path, tree in TREES.items():
        for word in path.relative_to(PACKAGE).parts:
            assert not VAGUE.fullmatch(word.removesuffix(".py")), relative(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                words = re.split(r"_|(?<=[a-z])(?=[A-Z])", node.name)
                vague = [word for word in words if VAGUE.fullmatch(word)]
                assert not vague, f"{relative(path)}: {node.name}"


def calls(path: Path, *functions: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in functions
    ]


def test_only_architectures_ask_for_a_llama_config() -> None:
    asking = {
        relative(path)
        for path in FILES
        if any("LlamaConfig" in ast.dump(call.args[1]) for call in calls(path, "isinstance"))
    }
    assert {name for name in asking if not name.startswith(KNOWS_LLAMA)} == set()


def test_capabilities_of_executors_are_declared() -> None:
    """base/interfaces.py declares them: no code uses getattr or hasattr on an executor."""
    asking = {
        relative(path)
        for path in FILES
        for call in calls(path, "getattr", "hasattr")
        if ast.unparse(call.args[0]).endswith("executor")
    }
    assert not asking


def test_public_names() -> None:
    """Programs use these names. A change needs a line in CHANGELOG.md and a new version."""
    assert glassllama.__all__ == ["LLM", "Completion", "GlassError", "__version__", "load"]
    model = "backend checkpoint executor load_seconds model name notes path scheduler tokenizer"
    calls = (
        "chat close encode encode_chat generate generate_batch logits stream stream_batch "
        "stream_chat trace"
    )
    known = {*LLM.__dataclass_fields__, *dir(LLM)}
    assert {*model.split(), *calls.split(), "__enter__", "__exit__"} <= known
    assert {"completions", "cancel", "close"} <= {*dir(BatchStream)}
    assert {"completion", "close"} <= {*dir(TextStream)}
    result = "dropped_tokens finish_reason ids logprobs prompt_ids text timings"
    assert set(result.split()) <= set(Completion.__dataclass_fields__)


def test_errors_have_one_base_class() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert {name for name in found if name.endswith("Error")} >= {
        "ConfigError", "DownloadError", "FormatError", "GenerationError", "GlassError",
        "MemoryShortError", "MissingExtraError", "TokenizerError", "UntrustedError", "WeightsError",
    }  # fmt: skip
    for name in found:
        assert not name.endswith("Error") or issubclass(getattr(errors, name), errors.GlassError)
