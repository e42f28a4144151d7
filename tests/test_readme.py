"""README.md against the repository: files, line counts, imports, flags, figures, the snippet."""

import ast
import re
import runpy
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from common import ROOT, photo, save_ours, small

import train

README = (ROOT / "README.md").read_text()
FIVE = ["geometry.py", "model.py", "train.py", "evaluate.py", "data.py"]  # in a reader's order
IMPORTS = {
    "geometry": set(),
    "data": set(),
    "model": {"geometry"},
    "evaluate": {"model", "geometry", "data"},
    "train": {"evaluate", "model", "geometry", "data"},
}
PACKAGES = {"torch", "numpy", "PIL", "tiktoken", "regex"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """The lines of all shell blocks, one command each."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ").replace("&&", "\n")
    return [line.strip() for line in text.splitlines() if line.strip()]


def imported(tree):
    """Syntax tree -> modules that are imported anywhere in it."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    return modules


def test_the_line_counts_in_the_readme_are_those_of_the_files():
    stated = re.findall(r"^\|`(\w+\.py)`\|(\d+)\|", README, re.MULTILINE)
    counts = [(name, str(len((ROOT / name).read_text().splitlines()))) for name in FIVE]
    assert stated == counts


def test_the_readme_is_short_and_has_no_placeholder():
    assert len(README.splitlines()) <= 175
    assert len(README.split()) <= 2400
    assert not re.findall(r"@[A-Z0-9]+@|\{…\}|\|N\||TODO", README)


def test_no_line_of_code_is_wider_than_100_columns():
    for folder in (ROOT, ROOT / "lab", ROOT / "tests"):
        for path in folder.glob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert len(line) <= 100, f"{path}, line {number}"


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_go_one_way_and_only_five_packages_are_used(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    if name == "data":  # only the source `shapes` needs the toy world
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        opening = next(node for node in functions if node.name == "open_source")
        assert [module for module in imported(opening)] == ["lab.shapes"]
        tree.body.remove(opening)
    for module in imported(tree):
        allowed = PACKAGES | sys.stdlib_module_names | IMPORTS[name]
        assert module.split(".")[0] in allowed, f"{name} imports {module}"


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.split()}
    others = {"tests", "lab", "requirements.txt", "README.md", "LICENSE", ".gitignore", ".ci"}
    assert top == {*FIVE, *others}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_flag_in_the_readmes_commands_exists(monkeypatch, capsys):
    used = {}
    for command in commands():
        for program in re.findall(r"train\.py|evaluate\.py|-m lab\.\w+", command):
            flags = re.findall(r"--(\w+)", command.split(program)[1])
            used.setdefault(program, set()).update(flags)
    assert used["train.py"] <= {f.name for f in fields(train.TrainConfig)}
    others = {program for program, flags in used.items() if flags} - {"train.py"}
    assert {"evaluate.py", "-m lab.convert"} <= others
    for program in others:
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit):
            module = program.removeprefix("-m ").removesuffix(".py")
            runpy.run_module(module, run_name="__main__")
        shown = capsys.readouterr().out
        assert used[program] <= set(re.findall(r"--(\w+)", shown)), program


def test_every_command_in_the_readme_starts_a_program_that_exists():
    programs = []
    for command in commands():
        programs += re.findall(r"(\w+\.py)\b", command.split(" --")[0])[:1]
        programs += [f"lab/{name}.py" for name in re.findall(r"-m lab\.(\w+)", command)]
    assert {"train.py", "evaluate.py", "lab/figures.py", "lab/convert.py"} <= set(programs)
    for program in programs:
        assert (ROOT / program).is_file(), program


def test_every_figure_is_shown_with_a_visible_line_under_it():
    """On GitHub, an alternative text is visible only to those who cannot see the figure."""
    figure = r"!\[([^\]]+)\]\((lab/\w+\.png)\)(?:<br>\n?|\n)(\*[^*\n]+\*)?"
    shown = re.findall(figure, README)
    paths = [path for _, path, _ in shown]
    assert sorted(paths) == sorted(f"lab/{path.name}" for path in ROOT.glob("lab/*.png"))
    for text, path, line in shown:
        assert len(text) > 20 and len(line) > 40, path


def test_the_python_snippet_runs_as_it_is(tmp_path, monkeypatch, capsys):
    """It loads the quick start's checkpoint and searches a folder of photos."""
    (tmp_path / "out").mkdir()
    (tmp_path / "photos").mkdir()
    save_ours(tmp_path / "out" / "ckpt.pt", small(context_length=77))
    photo(90, 60).save(tmp_path / "photos" / "beach.jpg")
    monkeypatch.chdir(tmp_path)
    snippet = next(block for block in blocks("python") if "load_model" in block)
    exec(snippet, {})
    shown = capsys.readouterr().out
    probabilities = [float(p) for p in re.search(r"tensor\(\[\[(.+?)\]\]", shown)[1].split(",")]
    assert sum(probabilities) == pytest.approx(1, abs=1e-3)
    assert "photos/beach.jpg" in shown


def test_requirements_are_the_five_packages_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = [line.split("==")[0] for line in lines]
    assert names == ["torch", "numpy", "tiktoken", "pillow", "pytest"]
    assert all(re.fullmatch(r"\w+==[\d.]+", line) for line in lines)
    assert torch.__version__.split("+")[0] == lines[0].split("==")[1]
