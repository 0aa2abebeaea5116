"""No code block of a page escapes: each has a kind that is known, and is run, read or compared by it."""

import ast
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from srpo_lightning.config.arguments import OWNERS, read_config
from tests.docs.snippets import DIRECTIVES, KINDS, PAGES, REPOSITORY, Block, blocks, commands, guess

ALL = [block for page in PAGES for block in blocks(page)]
SOURCES = [*(REPOSITORY / "examples").glob("*.py"), *(REPOSITORY / "tests" / "families").glob("*.py")]
"""Files that pages quote."""


def of_kind(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in ALL if block.kind == kind], ids=str)


def test_every_block_has_a_known_kind_and_none_is_overlooked():
    counts = Counter(block.kind for block in ALL)
    unknown = [str(block) for block in ALL if block.kind not in KINDS]
    assert not unknown, f"say the kind by a fence, one of {sorted(KINDS - DIRECTIVES)}: {unknown}"
    assert min(counts[kind] for kind in ("shell", "python", "yaml", "text")) > 4, counts
    fences = sum(len(re.findall("(?m)^```", page.read_text())) for page in PAGES)
    assert fences == 2 * sum(counts.values()) - 2 * sum(is_indented(block) for block in ALL), "one inside another"


def is_indented(block: Block) -> bool:
    page = next(page for page in PAGES if page.name == block.page)
    return not page.read_text().splitlines()[block.line - 1].lstrip().startswith("```")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("make demo", "shell"),
        ("PYTHONPATH=x python y", "shell"),
        ("model:\n  policy: 1", "yaml"),
        ("class A: ...", "python"),
        ("0.1  0.2", "unknown"),
    ],
)
def test_a_block_without_a_fence_is_known_by_its_beginning(text, kind):
    assert guess(text) == kind


@of_kind("shell")
def test_programs_targets_files_and_extras_of_commands_are_there(block):
    for command in commands(block):
        program, *rest = command.words
        if program == "make":
            subprocess.run(["make", "--dry-run", *rest], cwd=REPOSITORY, capture_output=True, check=True)
        elif program == "python" and rest[0].endswith(".py"):
            assert (REPOSITORY / rest[0]).is_file(), f"{block}: {rest[0]}"
        elif program == "python":
            assert rest[0] == "-m", f"{block}: python -m MODULE, or a file"
            module = REPOSITORY.joinpath(*rest[1].split("."))
            assert module.is_dir() or module.with_suffix(".py").is_file(), f"{block}: {rest[1]}"
        elif program == "pip":
            (extras,) = (word.removeprefix(".[").removesuffix("]").split(",") for word in rest if word[:2] == ".[")
            text = (REPOSITORY / "pyproject.toml").read_text()
            assert all(f"\n{extra} = [" in text for extra in extras), block
        for word in rest:
            if word.startswith(("configs/", "examples/", "experiments/", "tests/", "srpo_lightning/")):
                assert (REPOSITORY / word).exists(), f"{block}: {word}"


@of_kind("yaml")
def test_a_piece_of_a_configuration_is_taken_beside_a_recipe(block, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for folder in (str(REPOSITORY / "examples"), str(tmp_path)):
        monkeypatch.syspath_prepend(folder)
    for other in ALL:
        if other.kind == "python" and other.page == block.page and other.file:
            (tmp_path / other.file).write_text(other.text)
    assert set(yaml.safe_load(block.text)) <= {*OWNERS, "seed_everything"}, block
    (piece := tmp_path / "piece.yaml").write_text(block.text)
    read_config("configs/emoji_demo.yaml", str(piece))


@of_kind("python")
def test_python_is_quoted_from_a_file_that_tests_run_or_runs_itself(block):
    if block.file:  # tests/docs/test_start_pages.py runs it
        compile(block.text, str(block), "exec")
        return
    imported, named = {}, 0
    for node in ast.parse(block.text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(block), "exec"), imported)
        else:
            named += 1
            assert any(is_quoted(node, other) for other in quotable()), f"{block}: {ast.unparse(node)[:200]}"
    assert named, block


@cache
def quotable() -> list[ast.stmt]:
    return [node for path in SOURCES for node in ast.parse(path.read_text()).body]


def is_quoted(shown: ast.AST, own: ast.AST) -> bool:
    """Whether code of a page is code of a file, but for annotations, docstrings and what `...` stands for."""
    if isinstance(shown, ast.ClassDef) and isinstance(own, ast.ClassDef):
        rest = [node for node in shown.body if not is_text(node)]
        is_same = shown.name == own.name and list(map(ast.dump, shown.bases)) == list(map(ast.dump, own.bases))
        return is_same and all(any(is_quoted(node, other) for other in own.body) for node in rest)
    if isinstance(shown, ast.FunctionDef) and isinstance(own, ast.FunctionDef):
        arguments = [argument.arg for argument in shown.args.args] == [argument.arg for argument in own.args.args]
        body, of_file = ([ast.unparse(n) for n in f.body if not is_text(n)] for f in (shown, own))
        return shown.name == own.name and arguments and body in ([], of_file)
    return plain(shown) == plain(own)


def is_text(node: ast.AST) -> bool:
    """A docstring, or `...`."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def plain(node: ast.AST) -> tuple[str, ...]:
    """An assignment without its annotation."""
    if isinstance(node, ast.AnnAssign) and node.value:
        return ast.unparse(node.target), ast.unparse(node.value)
    if isinstance(node, ast.Assign):
        return ", ".join(map(ast.unparse, node.targets)), ast.unparse(node.value)
    return (ast.unparse(node),)


def test_another_body_is_no_quotation():
    shown, own = (ast.parse(f"class A:\n    def f(self, x):\n        return {value}").body[0] for value in "xy")
    assert is_quoted(own, own)
    assert not is_quoted(shown, own)


def test_files_that_a_page_has_the_reader_write_are_used_by_its_commands():
    for block in ALL:
        if block.file:
            page = next(page for page in PAGES if page.name == block.page)
            assert page.read_text().count(Path(block.file).stem) > 1, block
