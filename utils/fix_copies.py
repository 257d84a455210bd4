"""Copies what both training scripts need from train_dopsd_lora.py into train_dopsd_full.py.

    make fix-copies

Every top-level function or class that stands in both files under one name must be the same text, `main` and
`parse_args` excepted. tests/test_project.py checks it.
"""

import ast
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SOURCE, COPY = ROOT / "train_dopsd_lora.py", ROOT / "train_dopsd_full.py"
OWN = {"main", "parse_args"}


def definitions(text):
    """(first line, last line) of every top-level function and class, decorators included, by name; lines count from
    0."""
    nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {n.name: (min([n.lineno, *(d.lineno for d in n.decorator_list)]) - 1, n.end_lineno) for n in nodes}


def with_copies(source, copy):
    """`copy` with the text of `source` for every definition that both have."""
    lines, theirs = source.splitlines(keepends=True), definitions(source)
    result = copy.splitlines(keepends=True)
    for name, (first, last) in sorted(definitions(copy).items(), key=lambda item: -item[1][0]):
        if name in theirs and name not in OWN:
            result[first:last] = lines[slice(*theirs[name])]
    return "".join(result)


if __name__ == "__main__":
    COPY.write_text(with_copies(SOURCE.read_text("utf-8"), COPY.read_text("utf-8")), "utf-8")
