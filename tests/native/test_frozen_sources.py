"""The cache digest covers every module whose constants are frozen into compiled code."""

from __future__ import annotations

import ast
from pathlib import Path

from glassllama.native.jit.compile import frozen_sources

PACKAGE = Path(__file__).parents[2] / "src" / "glassllama"
COMPILE = "glassllama.native.jit.compile"
Names = dict[str, str]  # name → the module outside native/ that it depends on


def path_of(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name → (module, name there) of what a file imports from the package, at the top level."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("glassllama.")
        for alias in node.names
        if node.module is not None
    }


def used(nodes: list[ast.stmt] | list[ast.expr]) -> set[str]:
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def outside_names(trees: dict[str, ast.Module]) -> dict[str, Names]:
    """For each module of native/ the names whose values come from outside, also indirectly."""
    found: dict[str, Names] = {module: {} for module in trees}
    changed = True
    while changed:
        changed = False
        for module, tree in trees.items():
            names = dict(found[module])
            for name, (source, original) in imported(tree).items():
                if source not in trees:
                    names[name] = source
                elif original in found[source]:
                    names[name] = found[source][original]
            for node in tree.body:
                if isinstance(node, ast.Assign) and (from_outside := used([node.value]) & {*names}):
                    for target in used([*node.targets]):
                        names.setdefault(target, names[min(from_outside)])
            changed |= names != found[module]
            found[module] = names
    return found


def test_compiled_functions_use_no_other_constants_from_outside() -> None:
    trees = {
        ".".join(("glassllama", *path.relative_to(PACKAGE).with_suffix("").parts)): ast.parse(
            path.read_text()
        )
        for path in (PACKAGE / "native").rglob("*.py")
        if path.name != "__init__.py"
    }
    allowed, seen = set(frozen_sources()), 0
    outside = outside_names(trees)
    for module, tree in trees.items():
        compilers = {name for name, (source, _) in imported(tree).items() if source == COMPILE}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and used(node.decorator_list) & compilers:
                seen += 1
                for name in used(node.body) & {*outside[module]}:
                    source = outside[module][name]
                    assert path_of(source) in allowed, f"{module}.{node.name}: {name} of {source}"
    assert seen > 100
