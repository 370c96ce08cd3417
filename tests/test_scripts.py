"""What holds for every algorithm script: copies of a function are identical, no flag without a reader, house style."""

import ast
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import envs
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
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


@pytest.mark.parametrize("name", ["point_direction", "hopper_small", "hopper_param", "cheetah_small", "sawyer_small"])
def test_the_readmes_tables_are_those_of_the_results(name, tmp_path, monkeypatch):
    results = tmp_path / "benchmark" / "results"
    results.mkdir(parents=True)
    shutil.copytree(plot.RESULTS / name, results / name, ignore=shutil.ignore_patterns("*.md", "*.png"))
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.setattr(plot, "RESULTS", results)
    plot.main(name)
    assert (results / name / "table.md").read_text().strip() in source("README.md")


@pytest.mark.parametrize("script, may_be_empty", [(smac, True), (pearl, False), (meta_bc, False)])
def test_a_batch_has_the_transitions_of_one_buffer_and_the_context_of_the_other(script, may_be_empty):
    buffer, tasks = buffers.ReplayBuffer(4, 1, 1, 100), (0, 1, 3) if may_be_empty else (0, 1, 2, 3)
    for task in tasks:
        for sign, where in ((1, {"context": False}), (-1, {"rl": False})):
            path = {"obs": torch.full((6, 1), sign * (task + 1.0)), "actions": torch.zeros(5, 1)}
            buffer.add(task, path | {"rewards": torch.full((5,), 9.0), "terminals": torch.zeros(5)}, **where)
    args, seen = script.Args(rl_batch=3, context_batch=2, meta_batch=4, latent_dim=2), set()
    for seed in range(8):
        batch = script.sample_batch(buffer, args, torch.Generator().manual_seed(seed))
        drawn = batch["obs"][:, 0, 0]  # (T,), task number + 1
        assert batch["obs"].shape == (4, 3, 1) and (batch["obs"] == drawn[:, None, None]).all()
        assert batch["context"].shape == (4, 2, 3) and (batch["context"][..., 0] == -drawn[:, None]).all()
        assert (batch["context"][..., 1] == 0).all() and (batch["context"][..., 2] == 9).all()  # (s, a, r)
        seen |= {int(number) - 1 for number in drawn}
    assert seen == set(tasks)


def test_the_flags_are_those_of_the_papers_tables():
    """Table 1, and of Table 2: horizon, AWR beta, reward scale, tasks, transitions a task, lambda_pearl."""
    columns = {
        "CheetahVelocity": (200, 100, 5, 100, 30, 1600, 1), "AntDirection": (200, 100, 5, 100, 20, 1600, 1),
        "SawyerManipulation": (50, 0.3, 1, 50, 10, 3750, 0), "WalkerParam": (200, 100, 5, 50, 5, 1200, 1),
        "HopperParam": (200, 100, 5, 50, 5, 1200, 1), "HumanoidDirection": (200, 100, 5, 50, 5, 1200, 1),
    }  # fmt: skip
    for env_id, (horizon, beta, scale, train, test, transitions, lambda_pearl) in columns.items():
        args, spec = smac.parse_args(["--env-id", env_id]), envs.SPECS[env_id]
        assert (args.rl_batch, args.context_batch, args.meta_batch, args.latent_dim) == (256, 64, 4, 5)
        assert args.q_hidden == args.policy_hidden == (300,) * 3
        assert args.decoder_hidden == (64,) * 2 and args.encoder_hidden == (200,) * 3
        assert (args.gamma, args.tau, args.lr, args.offline_steps) == (0.99, 0.005, 3e-4, 50_000)
        assert args.updates_per_iteration == 4 * (args.prior_steps + args.posterior_steps)
        assert args.tasks_per_iteration == (1 if env_id == "SawyerManipulation" else 5)
        assert (spec.horizon, spec.num_train_tasks, spec.num_test_tasks) == (horizon, train, test)
        assert (args.awr_lambda, args.reward_scale, args.lambda_pearl) == (beta, scale, lambda_pearl)
        if (ROOT / "datasets" / f"{env_id}.npz").exists():
            data = buffers.load_dataset(ROOT / "datasets" / f"{env_id}.npz", env_id, spec)
            stored = np.zeros(train)
            for task, path in data["rl"] + data["encoder"]:
                stored[task] += len(path["actions"])
            assert (stored == transitions).all()
        for script in (pearl, meta_bc):
            other = script.parse_args(["--env-id", env_id])
            shared = "rl_batch context_batch meta_batch latent_dim policy_hidden encoder_hidden lr gamma tau"
            for name in shared.split():
                assert getattr(other, name, getattr(args, name)) == getattr(args, name)
