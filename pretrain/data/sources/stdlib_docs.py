"""The documentation inside every Python: docstrings of the standard library and `pydoc_data.topics`.

Everything is read with `ast`; no module of the library is imported, so nothing of it runs.
"""

import ast
import functools
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, dedented docstring) of modules, classes and functions, in the order of files and lines.

    Empty docstrings and exact repetitions of an earlier one are left out.
    """
    yield from _docstrings()


def stdlib_topics() -> Iterator[tuple[str, str]]:
    """(topic, text) of the language reference that `help()` shows, by topic; none where Python comes without it."""
    file = _library() / "pydoc_data" / "topics.py"
    tree = _parse(file) if file.is_file() else ast.Module([], [])
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            yield from sorted((str(topic), inspect.cleandoc(str(text))) for topic, text in topics.items())


@functools.lru_cache(maxsize=1)
def _docstrings() -> tuple[tuple[str, str], ...]:
    # Kept, because training a tokenizer and writing the shards each read all of it, and parsing takes seconds.
    found: dict[str, str] = {}
    library = _library()
    for file in sorted(library.rglob("*.py"), key=lambda file: file.relative_to(library).parts):
        parts = file.relative_to(library).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts[:-1]):
            module = ".".join(parts).removesuffix(".__init__")
            for name, text in _of_node(_parse(file), module):
                found.setdefault(text, name)
    return tuple((name, text) for text, name in found.items())


def _of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _of_node(child, f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name)


def _parse(file: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have invalid escapes
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates and test inputs that only look like Python
            return ast.Module([], [])


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))
