"""README.md against the repository: files, line counts, imports, flags, pictures, the snippet."""

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from common import ROOT, photo, save_ours, small

import train

README = (ROOT / "README.md").read_text()
FIVE = ["geometry.py", "model.py", "data.py", "train.py", "evaluate.py"]
IMPORTS = {
    "geometry": set(),
    "data": set(),
    "model": {"geometry"},
    "evaluate": {"model", "geometry", "data"},
    "train": {"evaluate", "model", "geometry", "data"},
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """The lines of all shell blocks, one command each."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ").replace("&&", "\n")
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_line_counts_in_the_readme_are_those_of_the_files():
    told = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert [name for name, _ in told] == FIVE  # in a reader's order
    for name, lines in told:
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name


def test_the_readme_is_short_and_has_no_placeholder():
    assert len(README.splitlines()) <= 180
    assert not re.findall(r"@[A-Z0-9]+@", README)


def test_no_line_of_code_is_wider_than_100_columns():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py"), *ROOT.glob("assets/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}, line {number}"


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_go_one_way_and_only_five_packages_are_used(name):
    allowed = {"torch", "numpy", "PIL", "tiktoken", "regex"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] in allowed | IMPORTS[name], f"{name} imports {module}"


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.split()}
    others = {"tests", "assets", "requirements.txt", "README.md", "LICENSE", ".gitignore", ".ci"}
    assert top <= {*FIVE, *others}


def test_every_flag_in_the_readmes_commands_exists():
    shown = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--help"], capture_output=True, text=True
    )
    known = {
        "train.py": {f.name for f in fields(train.TrainConfig)},
        "evaluate.py": set(re.findall(r"--(\w+)", shown.stdout)),
    }
    seen = 0
    for command in commands():
        for program, names in known.items():
            if program in command:
                used = set(re.findall(r"--(\w+)", command.split(program)[1]))
                assert used <= names, command
                seen += len(used)
    assert seen > 10


def test_every_picture_is_shown_and_every_picture_shown_is_there():
    shown = re.findall(r"!\[([^\]]+)\]\((assets/\w+\.png)\)", README)
    assert {path for _, path in shown} == {f"assets/{p.name}" for p in ROOT.glob("assets/*.png")}
    assert all(len(text) > 40 for text, _ in shown)  # it says what there is to be seen


def test_the_python_snippet_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    save_ours(tmp_path / "out" / "ckpt.pt", small(context_length=77))
    photo(90, 60).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    snippet = next(block for block in blocks("python") if "load_model" in block)
    exec(snippet, {})
    assert "tensor([[-" in capsys.readouterr().out


def test_requirements_are_the_five_packages_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = [line.split("==")[0] for line in lines]
    assert names == ["torch", "numpy", "tiktoken", "pillow", "pytest"]
    assert all("==" in line for line in lines) and torch.__version__.split("+")[0] >= "2.11"
