"""What holds for every algorithm script: copies of a function are identical, no flag without a reader, house style."""

import ast
import itertools
import re
import shutil
from pathlib import Path

import pytest

from benchmark import plot

ROOT = Path(__file__).resolve().parent.parent
OURS = {file.stem for file in ROOT.glob("*.py")}
TREES = {file.name: ast.parse(file.read_text()) for file in sorted(ROOT.glob("*.py"))}
SCRIPTS = [
    name
    for name, tree in TREES.items()
    if any(isinstance(node, ast.ClassDef) and node.name == "Args" for node in tree.body)
]
MAY_DIFFER = {"Args", "Agent", "update", "main", "evaluate", "sample_batch"}


def source(name):
    return (ROOT / name).read_text()


def definitions(name):
    """Top-level functions and classes of a script, as text with their decorators."""
    lines, found = source(name).splitlines(), {}
    for node in TREES[name].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def comments(text):
    """Comments, those on adjacent lines joined to one."""
    found, previous = [], -2
    for number, line in enumerate(text.splitlines()):
        match = re.match(r"\s*# ?(.*)", line)
        if match and previous == number - 1:
            found[-1] += " " + match[1]
        elif match:
            found.append(match[1])
        previous = number if match else previous
    return found


def test_the_scripts_are_found():
    assert {"smac_offline_online.py", "pearl_online_oracle.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))
def test_copies_of_a_function_are_identical(one, other):
    ours, theirs = definitions(one), definitions(other)
    common = (ours.keys() & theirs.keys()) - MAY_DIFFER
    assert {"mlp", "Encoder", "Policy", "QFunctions"} & ours.keys() & theirs.keys() <= common
    assert sorted(name for name in common if ours[name] != theirs[name]) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_has_a_help_text(script):
    (args,) = (node for node in TREES[script].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]
    read = {
        node.attr
        for node in ast.walk(TREES[script])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("args", "known")
    }
    assert fields and [name for name in fields if name not in read] == []
    assert sorted(read - set(fields)) == []  # nor a reader without a flag
    for field, text in zip(args.body[::2], args.body[1::2]):
        assert isinstance(field, ast.AnnAssign), ast.unparse(field)
        assert isinstance(text, ast.Expr) and isinstance(text.value.value, str), f"no help text: {field.target.id}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_of_ours_a_script_imports_only_envs_and_buffers(script):
    imported = set()
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    assert imported & (OURS | folders) == {"envs", "buffers"}


@pytest.mark.parametrize("name", [name for name in TREES if name not in SCRIPTS])
def test_shared_files_import_no_script(name):
    text = source(name)
    assert not [s for s in SCRIPTS if re.search(rf"^\s*(import|from) {s[:-3]}\b", text, re.MULTILINE)]


@pytest.mark.parametrize("name", TREES)
def test_departures_from_the_paper_say_what_the_code_does(name):
    for comment in comments(source(name)):
        assert comment.count("PAPER:") == comment.count("CODE:"), comment
        assert not comment.count("PAPER:") or comment.index("PAPER:") < comment.index("CODE:")


@pytest.mark.parametrize("name", TREES)
def test_house_style(name):
    text = source(name)
    assert not re.search(r"\b(TODO|FIXME|XXX|breakpoint|pdb)\b", text)
    assert ast.get_docstring(TREES[name])
    assert [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120] == []


def test_the_readme_lists_every_departure_from_the_paper():
    rows = re.findall(r"\w+\.py", " ".join(re.findall(r"^\| \d+ \| ([^|]*) \|", source("README.md"), re.M)))
    for name in sorted(OURS):
        tagged = len(re.findall(r"# PAPER: ", source(f"{name}.py")))
        assert rows.count(f"{name}.py") == tagged, name


def test_the_readme_names_functions_that_exist():
    table = source("README.md").split("## The paper in the file")[1].split("\n## ")[0]
    named = {word for row in re.findall(r"\| ([^|]*) \|$", table, re.M) for word in re.findall(r"`(\w+)`", row)}
    defined = set(re.findall(r"^ *(?:def|class) (\w+)|^(\w+) = ", source("smac_offline_online.py"), re.M))
    assert len(named) > 8 and named <= {name for pair in defined for name in pair}


@pytest.mark.parametrize("name", ["point_direction", "hopper_param", "cheetah_small", "sawyer_small"])
def test_the_readmes_tables_are_those_of_the_results(name, tmp_path, monkeypatch):
    results = tmp_path / "benchmark" / "results"
    results.mkdir(parents=True)
    shutil.copytree(plot.RESULTS / name, results / name, ignore=shutil.ignore_patterns("*.md", "*.png"))
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.setattr(plot, "RESULTS", results)
    plot.main(name)
    assert (results / name / "table.md").read_text().strip() in source("README.md")
