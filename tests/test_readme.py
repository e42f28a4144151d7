"""README.md against the repository: files, line counts, imports, flags, the snippet."""

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from PIL import Image

import evaluate
import train
from test_model import ROOT, save_ours, small

README = (ROOT / "README.md").read_text()
FIVE = ["geometry.py", "model.py", "data.py", "train.py", "evaluate.py"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_line_counts_in_the_readme_are_those_of_the_files():
    told = {name: int(lines) for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)}
    assert list(told) == FIVE   # in a reader's order
    assert told == {name: len((ROOT / name).read_text().splitlines()) for name in FIVE}


def test_imports_go_one_way_and_only_five_packages_are_used():
    allowed = {"geometry": set(), "data": set(), "model": {"geometry"}, "evaluate": {"model", "geometry", "data"},
               "train": {"evaluate", "model", "geometry", "data"}}
    packages = {"torch", "numpy", "PIL", "tiktoken", "regex"}
    for name, ours in allowed.items():
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names | packages | ours, f"{name}.py imports {module}"


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.split()}
    assert top <= {*FIVE, "tests", "assets", "requirements.txt", "README.md", "LICENSE", ".gitignore", ".ci"}


def test_every_flag_in_the_readmes_commands_exists():
    flags = {"train.py": {f.name for f in fields(train.TrainConfig)} | {"help"}, "evaluate.py": set(vars(evaluate.parse(["x"])))}
    seen = 0
    for command in "\n".join(blocks("sh")).replace("\\\n", " ").replace("&&", "\n").split("\n"):
        for program, known in flags.items():
            if program in command:
                used = set(re.findall(r"--(\w+)", command.split(program)[1]))
                assert used <= known, command
                seen += len(used)
    assert seen > 10


def test_every_picture_is_shown_and_every_picture_shown_is_there():
    shown = set(re.findall(r"!\[[^\]]+\]\((assets/\w+\.png)\)", README))
    assert shown == {f"assets/{p.name}" for p in (ROOT / "assets").glob("*.png")} and len(shown) > 5


def test_the_readme_has_no_placeholder():
    assert not re.findall(r"@[A-Z]+@", README)


def test_the_python_snippet_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    save_ours(tmp_path / "out" / "ckpt.pt", small(context_length=77))
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    snippet = next(b for b in blocks("python") if "load_model" in b)
    assert len(snippet.strip().splitlines()) <= 6
    exec(snippet, {})
    assert "tensor([[-" in capsys.readouterr().out


def test_requirements_are_the_five_packages_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "numpy", "tiktoken", "pillow", "pytest"] and all("==" in line for line in lines)
    assert "torch==2.13.0" in lines and torch.__version__.split("+")[0] >= "2.11"
