"The rules that a reader can feel: width, one thought a statement, cell and module sizes, plain prose."

import ast
import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not re.search(r"/[._]", str(p)))
MODULES = sorted(p for p in (ROOT / "wlsft").rglob("*.py") if p.name != "_modidx.py")
SOURCES = NOTEBOOKS + sorted((ROOT / "tests").glob("*.py"))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def name_of(path):
    return str(path.relative_to(ROOT))


def cells_of(path, kind="code"):
    if path.suffix == ".py":
        return [path.read_text()] if kind == "code" else []
    cells = json.loads(path.read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def exported(path):
    return [c for c in cells_of(path) if c.startswith("#| export")]


def tree_of(code):
    "The syntax tree of a cell; lines of IPython's magic do not count."
    return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "pass", code))


def own_nodes(statement):
    "All nodes of a statement except those of statements inside it."
    for _, value in ast.iter_fields(statement):
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST) and not isinstance(node, (ast.stmt, ast.ExceptHandler)):
                yield from ast.walk(node)


def dense(code):
    "Statements that hold more than one conditional expression or level of comprehension."
    found = []
    for statement in ast.walk(tree_of(code)):
        if not isinstance(statement, ast.stmt):
            continue
        thoughts = 0
        for node in own_nodes(statement):
            thoughts += isinstance(node, ast.IfExp)
            thoughts += len(node.generators) if isinstance(node, COMPREHENSIONS) else 0
        if thoughts > 1:
            found.append(ast.unparse(statement)[:90])
    return found


def named_lambdas(code):
    found = []
    for node in ast.walk(tree_of(code)):
        if not isinstance(node, ast.Assign):
            continue
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        found += [ast.unparse(node)[:90] for v in values if isinstance(v, ast.Lambda)]
    return found


def indexed_tuples(code):
    "`(do(), value)[1]`: a tuple made only for its side effect."
    nodes = [n for n in ast.walk(tree_of(code)) if isinstance(n, ast.Subscript)]
    return [ast.unparse(n)[:90] for n in nodes if isinstance(n.value, ast.Tuple)]


def long_signatures(code):
    found = []
    for node in ast.walk(tree_of(code)):
        if isinstance(node, ast.FunctionDef) and node.name != "finetune":
            names = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            if len([n for n in names if n not in ("self", "cls")]) > 7:
                found.append(node.name)
    return found


def only_imports(code):
    return all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in tree_of(code).body)


def body_lines(code):
    "Lines of an exported cell without blank ones, comments, signatures and docstrings."
    lines = code.split("\n")
    counted = {i for i, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")}
    for node in ast.walk(tree_of(code)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            documented = ast.get_docstring(node) is not None
            counted -= set(range(node.lineno, node.body[0].lineno))
            counted -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1)) if documented else set()
    return len(counted)


def sentences(path):
    "Sentences of a notebook's prose, without code, formulas, tables, headings and addresses."
    out = []
    for text in cells_of(path, "markdown"):
        text = re.sub(r"```.*?```|\$\$.*?\$\$", "", text, flags=re.S)
        text = re.sub(r"\$[^$\n]*\$|`[^`\n]*`", "X", text)
        text = re.sub(r"\]\([^)]*\)", "]", text)
        lines = [line for line in text.split("\n") if not line.lstrip().startswith(("#", "|", "!["))]
        for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", "\n".join(lines)):
            out += re.split(r"(?<=[.?!:])\s+(?=[A-Z*`\"(X])", " ".join(part.split()))
    return [s for s in out if len(s.split()) > 1]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_one_thought_a_statement(path):
    for check in (dense, named_lambdas, indexed_tuples, long_signatures):
        found = list(itertools.chain.from_iterable(map(check, cells_of(path))))
        assert not found, f"{check.__name__}: {found}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "nbs", "tests", "setup.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]


def wide_lines(code):
    "Lines over 110 columns; nbdev wraps the names of `__all__` wider."
    written = re.sub(r"__all__ = \[[^\]]*\]", "", code)
    return [line[:60] for line in written.split("\n") if len(line) > 110]


def test_no_line_needs_scrolling():
    wide = {name_of(path): wide_lines(path.read_text()) for path in MODULES}
    for path in NOTEBOOKS:
        wide[name_of(path)] = wide_lines("\n".join(cells_of(path)))
    assert not any(wide.values()), {name: lines for name, lines in wide.items() if lines}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_fits_in_a_head(path):
    assert len(path.read_text()) <= 12_000


def test_exported_cells_are_short():
    cells = list(itertools.chain.from_iterable(map(exported, NOTEBOOKS)))
    long = [cell[:80] for cell in cells if len(cell) > 1500]
    assert not long, long
    lines = [body_lines(cell) for cell in itertools.filterfalse(only_imports, cells)]
    assert statistics.median(lines) <= 10, statistics.median(lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_plain_prose(path):
    found = sentences(path)
    long = [s for s in found if len(s.split()) > 45]
    assert not long, long
    chained = [s for s in found if ";" in s]
    assert len(chained) <= max(1, 0.08 * len(found)), chained
