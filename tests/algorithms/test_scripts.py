"""What holds for every script: copies are identical, no flag without a reader, the texts agree with code and files."""

import ast
import csv
import io
import itertools
import re
import shlex
import shutil
import tokenize
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from benchmark import plot
from plumbing.flags import parse_args

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = {file.stem for file in ROOT.glob("*.py")}
FILES = sorted((*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")))
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in FILES}
MODULES = {
    f"{module.__name__}.py": module for module in (smac, pearl, meta_bc, macaw, borel, focal)
}
SCRIPTS = [
    name
    for name, tree in TREES.items()
    if any(isinstance(node, ast.ClassDef) and node.name == "Args" for node in tree.body)
]
LINES = dict(zip(MODULES, (460, 400, 320, 400, 520, 800)))
SHARED = {
    "buffers.py": 620, "envs.py": 600, "sawyer.py": 400, "plumbing/__init__.py": 2, "plumbing/cores.py": 120,
    "plumbing/files.py": 220,
    "plumbing/flags.py": 200, "plumbing/machine.py": 120, "plumbing/pictures.py": 130, "README.md": 200,
}  # fmt: skip
MAY_DIFFER = {
    "Args", "Agent", "update", "main", "evaluate", "sample_batch", "rollout", "collect",
    "encode", "adapt",
}  # fmt: skip
READ_BY_RUN = (
    "eval_every run_dir resume device cuda_graph preset".split()
)  # by `Run` and `parse_args`, for all scripts


def source(name):
    return (ROOT / name).read_text()


def tree_of(script, name):
    (node,) = (node for node in TREES[script].body if getattr(node, "name", None) == name)
    return node


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
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            words, number = token.string.lstrip("# "), token.start[0]
            joined = previous == number - 1 and token.line.strip() == token.string
            found[-1:] = [f"{found[-1]} {words}"] if joined else [*found[-1:], words]
            previous = number
    return found


def help_texts(script):
    """{flag: the comment behind it}; a flag is one line."""
    lines, texts = source(script).splitlines(), {}
    for node in tree_of(script, "Args").body:
        assert isinstance(node, ast.AnnAssign) and node.lineno == node.end_lineno, ast.unparse(node)
        texts[node.target.id] = lines[node.lineno - 1][node.end_col_offset :].strip()
    return texts


# ----- Shape


def test_the_scripts_are_found():
    assert set(SCRIPTS) == set(MODULES)


@pytest.mark.parametrize("script, most", LINES.items())
def test_a_script_is_short_and_its_main_is_one_flat_function(script, most):
    main = tree_of(script, "main")
    lines = len(source(script).splitlines())
    assert lines <= most, f"{script} shall be read at a sitting: {lines} lines, at most {most}"
    assert main.end_lineno - main.lineno + 1 <= 60
    inside = [
        node
        for node in ast.walk(main)
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef))
    ]
    assert inside == [main] and not any(
        isinstance(node, (ast.Global, ast.Nonlocal)) for node in ast.walk(main)
    )


def test_what_scripts_share_is_small():
    assert SHARED.keys() == TREES.keys() - set(SCRIPTS) | {"README.md"}
    assert {
        name: most for name, most in SHARED.items() if len(source(name).splitlines()) > most
    } == {}


@pytest.mark.parametrize("one, other", list(itertools.combinations(SCRIPTS, 2)))
def test_copies_of_a_function_are_identical(one, other):
    ours, theirs = definitions(one), definitions(other)
    differ = sorted(
        name for name in (ours.keys() & theirs.keys()) - MAY_DIFFER if ours[name] != theirs[name]
    )
    assert not differ, (
        f"{differ} of {one} and {other} are no copies: make them so, rename one, or add it to MAY_DIFFER"
    )


def test_smac_pearl_and_meta_bc_have_the_same_networks_and_meta_episode():
    ours = definitions("smac_offline_online.py")
    shared = (
        "mlp Encoder Policy make_context tanh_gaussian_log_prob kl_to_prior prior adapt".split()
    )
    for script, names in {
        "pearl_online_oracle.py": [*shared, "QFunctions"],
        "meta_bc.py": [*shared, "Decoder", "reward_loss", "rollout", "evaluate"],
        "borel.py": "mlp Policy QFunctions tanh_gaussian_log_prob kl_to_prior".split(),
    }.items():
        assert [name for name in names if definitions(script).get(name) != ours[name]] == [], script


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_has_a_help_text(script):
    texts = help_texts(script)
    read = {
        node.attr
        for node in ast.walk(TREES[script])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "args"
    }
    assert sorted(set(texts) - read) == sorted(set(READ_BY_RUN))
    assert sorted(read - set(texts)) == []  # nor a reader without a flag
    assert [flag for flag, text in texts.items() if not re.match(r"# \S.{5}", text)] == []


def test_what_a_script_leaves_to_the_run_is_read_there():
    text = "".join(map(source, ("buffers.py", "plumbing/flags.py", "plumbing/machine.py")))
    words = set(re.findall(r"\b(?:args|known)\.(\w+)", text))
    assert set(READ_BY_RUN) <= words


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_comment_behind_each_flag(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    module = MODULES[script]
    with pytest.raises(SystemExit) as end:
        parse_args(module.Args, module.PRESETS, ["--help"], description=module.__doc__)
    shown = re.sub(r"[^\w]+", " ", capsys.readouterr().out)
    assert end.value.code == 0
    for flag, text in help_texts(script).items():
        assert re.sub(r"[^\w]+", " ", text).strip() in shown, flag


def test_the_same_flag_has_the_same_type_in_every_script():
    types = defaultdict(set)
    for script in SCRIPTS:
        for node in tree_of(script, "Args").body:
            types[node.target.id].add(ast.unparse(node.annotation))
    assert {
        flag: kinds for flag, kinds in types.items() if len(kinds) > 1 and flag != "preset"
    } == {}


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
    assert not [
        s for s in SCRIPTS if re.search(rf"^\s*(import|from) {s[:-3]}\b", text, re.MULTILINE)
    ]


@pytest.mark.parametrize("name", TREES)
def test_house_style(name):
    text = source(name)
    assert not re.search(r"\b(TODO|FIXME|XXX|breakpoint|pdb)\b", text)
    assert ast.get_docstring(TREES[name])
    assert [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120] == []


# ----- PAPER.md and README.md


def departures():
    """The rows of PAPER.md's table: (number, files)."""
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", source("PAPER.md").split("\n## ")[1], re.M)
    return [(int(number), re.findall(r"\w+\.py", files)) for number, files in rows]


@pytest.mark.parametrize("name", TREES)
def test_departures_from_the_paper_say_what_the_code_does(name):
    for comment in comments(source(name)):
        assert comment.count("PAPER:") == comment.count("CODE:"), comment
        assert not comment.count("PAPER:") or comment.index("PAPER:") < comment.index("CODE:")


def test_paper_md_lists_every_departure():
    named = [file for _, files in departures() for file in files]
    for name in sorted(TREES):
        assert named.count(name) == sum(
            comment.count("PAPER:") for comment in comments(source(name))
        ), name
    numbers = [number for number, _ in departures()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert set(named) <= set(TREES) and f", of {len(numbers)} in [PAPER.md](PAPER.md)" in flowing(
        source("README.md")
    )
    for row in re.findall(r"\b[Rr]ows? (\d+)", source("PAPER.md")):
        assert int(row) in numbers


def flowing(text):
    """A text without its line breaks."""
    return " ".join(text.split())


def test_paper_md_and_readme_name_flags_that_exist():
    known = {flag for module in MODULES.values() for flag in vars(module.Args())}
    known |= {
        "help",
        "video",
        "out",
        "parallel",
        "check",
        "logdir",
    }  # of benchmark/, ruff and TensorBoard
    for file in ("PAPER.md", "README.md", "datasets/README.md"):
        flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", source(file)))
        named = {flag.removeprefix("no-").replace("-", "_") for flag in flags}
        assert named and named <= known, file


def test_the_readme_names_functions_that_exist():
    table = source("README.md").split("## The paper in the file")[1].split("\n## ")[0]
    named = {
        word
        for row in re.findall(r"\| ([^|]*) \|$", table, re.M)
        for word in re.findall(r"`(\w+)`", row)
    }
    defined = set(
        re.findall(r"^ *(?:def|class) (\w+)|^(\w+) = ", source("smac_offline_online.py"), re.M)
    )
    assert len(named) > 8 and named <= {name for pair in defined for name in pair}


def test_the_readmes_links_lead_somewhere():
    for file in ("README.md", "PAPER.md", "datasets/README.md", "benchmark/results/README.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", source(file)):
            assert (
                target.startswith("https://") or (ROOT / file).parent.joinpath(target).exists()
            ), (file, target)


TABLES = [
    (file, table, text.strip())
    for file in ("README.md", "benchmark/results/README.md")
    for table, text in re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", source(file), re.S)
]


def test_every_table_has_its_place():
    names = [name.removesuffix(".md") for _, name, _ in TABLES]
    made = [file.parent.name for file in plot.RESULTS.glob("*/table.md")]
    assert sorted(names) == sorted([*(f"{name}/table" for name in made), "glance", "larger"])


@pytest.mark.parametrize("file, name, text", TABLES, ids=[name for _, name, _ in TABLES])
def test_tables_in_the_texts_are_those_of_the_results(
    file, name, text, tmp_path, monkeypatch, capsys
):
    results = tmp_path / "benchmark" / "results"
    shutil.copytree(
        plot.RESULTS,
        results,
        ignore=shutil.ignore_patterns("table.md", "glance.md", "larger.md", "*.png", "speed"),
    )
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.setattr(plot, "RESULTS", results)
    monkeypatch.setattr(plot, "picture", lambda *_, **__: None)  # they take a second each
    plot.main(name.split("/")[0])
    made = (results / name).with_suffix(".md").read_text().strip()
    assert text == made


def returns(name, label, seed):
    """{gradient step: return on test tasks, mean over tasks}, without the reader of benchmark/plot.py."""
    cells = defaultdict(list)
    with open(ROOT / "benchmark" / "results" / name / f"{label}__{seed}.csv", newline="") as file:
        for row in csv.DictReader(file):
            if (row["split"], row["context"]) == ("test", "online"):
                cells[int(row["gradient_step"])].append(float(row["return"]))
    return {step: np.mean(values) for step, values in cells.items()}


def test_claims_at_a_glance_are_those_of_the_results():
    """The figures of the prose that carry most: what share of the gain, and SMAC against the oracle at equal steps."""
    text = flowing(source("README.md"))
    (share,) = re.findall(r"the labels give (\d+) % of the gain that true rewards give", text)
    before, after, oracle = (
        at("point_direction", label, step, *TEN)
        for label, step in (("smac", 3_000), ("smac", 12_600), ("smac_oracle_rewards", 12_600))
    )
    assert int(share) == round(100 * (after - before) / (oracle - before))
    (claimed,) = re.findall(
        r"At equal gradient steps the smaller batch has (\d+), three oracle seeds (\d+)", text
    )
    for value, label in zip(
        claimed, ("smac", "pearl")
    ):  # each the mean of three evaluations, the last at 100,000
        curves = [returns("hopper_small", label, seed) for seed in (1, 2, 3)]
        steps = [sorted(step for step in curve if step <= 100_000)[-3:] for curve in curves]
        assert all(last[-1] == 100_000 for last in steps)
        assert int(value) == round(
            np.mean([[c[step] for step in last] for c, last in zip(curves, steps)])
        )


def at(name, label, step, *seeds):
    """The return on test tasks at a gradient step, mean over seeds."""
    return np.mean([returns(name, label, seed)[step] for seed in seeds])


def cheetah_error(num_fastest):
    """Mean error of SMAC's velocity at the end, in m/s, on the fastest test tasks: return / 200 steps."""
    with np.load(ROOT / "datasets" / "CheetahVelocity.npz", allow_pickle=False) as data:
        fastest = set(data["test_tasks"][:, 0].argsort()[-num_fastest:].tolist())
    errors = []
    for seed in (1, 2):
        with open(
            ROOT / "benchmark" / "results" / "cheetah_small" / f"smac__{seed}.csv", newline=""
        ) as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if row["gradient_step"] == "150000" and row["split"] == "test"
            ]
        errors += [-float(row["return"]) / 200 for row in rows if int(row["task"]) in fastest]
    assert len(errors) == 2 * num_fastest
    return np.mean(errors)


def success(label, step, column="test/online"):
    with open(
        ROOT / "benchmark" / "results" / "sawyer_small" / "diagnostics" / f"{label}__1.csv",
        newline="",
    ) as file:
        row = [row for row in csv.DictReader(file) if step in (None, int(row["gradient_step"]))][-1]
    return float(row[f"charts/{column}_context_success"])


def frozen_belief():
    """BOReL's returns at the end with a belief that reads nothing of the scored episode, of ten seeds."""
    folder, last = ROOT / "benchmark" / "results" / "point_direction" / "diagnostics", []
    for seed in TEN:
        with open(folder / f"borel__{seed}.csv", newline="") as file:
            last.append(float([*csv.DictReader(file)][-1]["charts/test/frozen_belief_return"]))
    return last


def sawyer_short(label):
    """Success and return of a short run on test tasks at two evaluations of the offline phase, and means after it."""
    folder = ROOT / "benchmark" / "results" / "short" / "SawyerManipulation" / "actions_to_1"
    with open(folder / "diagnostics" / f"{label}__1.csv", newline="") as file:
        solved = [float(row["charts/test/online_context_success"]) for row in csv.DictReader(file)]
    scores = [*returns("short/SawyerManipulation/actions_to_1", label, 1).values()]
    return [*solved[:2], np.mean(solved[2:])], [*scores[:2], np.mean(scores[2:])]


def scenes():
    """Success on Sawyer's test tasks with 200 scenes: offline, mean of the last three evaluations, end; three runs."""
    folder, rows = (
        ROOT / "benchmark" / "results" / "short" / "SawyerManipulation200" / "diagnostics",
        [],
    )
    for run in ("smac__1", "smac__2", "smac__3"):
        with open(folder / f"{run}.csv", newline="") as file:
            curve = {
                int(r["gradient_step"]): float(r["charts/test/online_context_success"])
                for r in csv.DictReader(file)
            }
        rows.append([curve[15_000], np.mean([*curve.values()][-3:]), curve[35_000]])
    return rows


def own_context(folder, seed):
    """Returns at a run's end with z from its own context, another task's and the prior."""
    text = source(f"benchmark/results/{folder}/adaptation.md")
    row = re.findall(rf"^\| \S*smac__{seed}.npz \| \d+ \| (.*) \|$", text, re.M)[-1]
    return [float(cell.split()[0]) for cell in row.split(" | ")[:3]]


def hopper_ends():
    """The lowest of the last ten evaluations and the highest of the offline phase, of three seeds; means of the ten."""
    curves = [returns("hopper_param", "smac", seed) for seed in (1, 2, 3)]
    ends = [[curve[step] for step in sorted(curve)[-10:]] for curve in curves]
    offline = [max(value for step, value in curve.items() if step <= 50_000) for curve in curves]
    assert all(min(end) > before for end, before in zip(ends, offline))
    return [np.min(ends), max(offline), *np.mean(ends, axis=1)]


def new(label):
    """New transitions of hopper_small, mean over three seeds."""
    last = []
    for seed in (1, 2, 3):
        with open(
            ROOT / "benchmark" / "results" / "hopper_small" / f"{label}__{seed}.csv", newline=""
        ) as file:
            last.append(max(int(row["env_steps"]) for row in csv.DictReader(file)))
    return np.mean(last)


FULL = "benchmark/results/README.md"
TEN = range(1, 11)
ABLATED = "HopperParam", "WalkerParam", "HumanoidDirection", "AntDirection", "SawyerManipulation200"
SHORT = {  # where the short runs end
    "HopperParam": 35_000, "WalkerParam": 35_000, "CheetahVelocity": 30_000, "AntDirection": 35_000,
    "HumanoidDirection": 35_000, "SawyerManipulation200": 35_000,
}  # fmt: skip
PROSE = [  # a file, what it says, and the same from the files of results
    ("README.md", r"MACAW \((\S+)\) and meta-BC \((\S+)\), one seed each, are ahead of its (\S+)\.", lambda: [
        at("hopper_param", "macaw", 25_000, 1), at("hopper_param", "meta_bc", 50_000, 1),
        at("hopper_param", "smac", 50_000, 1, 2, 3)]),
    ("README.md", r"to a mean error of (\S+) m/s, (\S+) on the five fastest tasks", lambda: [
        cheetah_error(30), cheetah_error(5)]),
    ("README.md", r"success on new ones from (\S+) to (\S+) \(\[three runs", lambda: np.mean(scenes(), axis=0)[:2]),
    (FULL, r"test tasks is (\S+), (\S+) and (\S+) after the offline phase, on average over the last three evaluations "
     r"(\S+), (\S+) and (\S+), at the end (\S+), (\S+) and (\S+); ", lambda: np.transpose(scenes()).ravel()),
    ("README.md", r"did not help \((\S+) → (\S+) on test tasks, .*, true rewards did \((\S+) → (\S+)\)", lambda: [
        at("point_direction", label, step, 1, 2, 3)
        for label in ("smac_goal_data", "smac_goal_data_oracle_rewards") for step in (3_000, 12_600)]),
    (FULL, r"\(lowest (\S+), highest (\S+)\)\. Means of the last ten are (\S+), (\S+) and (\S+) ", hopper_ends),
    (FULL, r"with the belief frozen after two episodes it has (\S+) instead of (\S+) ", lambda: [
        np.mean(frozen_belief()), at("point_direction", "borel", 3_000, *TEN)]),
    (FULL, r"test tasks from (\S+) to (\S+), .*? in the same phase \(`smac_oracle_rewards`\) it is (\S+):", lambda: [
        at("point_direction", label, step, *TEN)
        for label, step in (("smac", 3_000), ("smac", 12_600), ("smac_oracle_rewards", 12_600))]),
    (FULL, r"9,600, SMAC is at (\S+) and the oracle at (\S+); the", lambda: [
        at("point_direction", "smac", 9_600, *TEN), at("point_direction", "pearl", 9_600, *TEN)]),
    (FULL, r"does better offline \((\S+) against (\S+)\) and worse at the end \((\S+) against (\S+)\)", lambda: [
        at("point_direction", label, step, *TEN)
        for step in (3_000, 12_600) for label in ("smac_actor_ablation", "smac")]),
    (FULL, r"worth imitating \(`meta_bc`: (\S+)\)", lambda: [at("point_direction", "meta_bc", 3_000, *TEN)]),
    (FULL, r"does follow z .*?: (\S+) with its own context, (\S+) with another's, (\S+) with the prior\.", lambda: (
        np.mean([own_context("point_direction", seed) for seed in TEN], axis=0))),
    ("README.md", r"reads no reward of the scored episode \((\S+)\)", lambda: [np.mean(frozen_belief())]),
    (FULL, r"so that the oracle has (\S+) % more in all", lambda: [
        100 * (new("pearl") / (60_000 + new("smac")) - 1)]),
    (FULL, r"seed 1 has (\S+) with its own context, (\S+) with another task's, (\S+) with the prior, seed 2 (\S+), "
     r"(\S+) and (\S+), seed 3 (\S+), (\S+) and (\S+)\. Before", lambda: [
        number for seed in (1, 2, 3) for number in own_context("short/CheetahVelocity", seed)]),
    (FULL, r"on test tasks (\S+), (\S+) and (\S+) after the offline phase, (\S+), (\S+) and (\S+) at the end, three "
     r"seeds\.", lambda: [
        at("short/AntDirection", "smac", step, seed) for step in (15_000, 35_000) for seed in (1, 2, 3)]),
    (FULL, r"return is (\S+), (\S+) and (\S+) with its own context, (\S+), (\S+) and (\S+) with another ", lambda: [
        own_context("short/SawyerManipulation200", seed)[column] for column in (0, 1) for seed in (1, 2, 3)]),
    (FULL, r"after it (\S+), (\S+) and (\S+), and with the prior (\S+), (\S+) and (\S+) ", lambda: [
        own_context("short/AntDirection", seed)[column] for column in (1, 2) for seed in (1, 2, 3)]),
    (FULL, r"phase is better with it, (\S+)\. After 1,000 steps .*? is (\S+), at its end (\S+): the", lambda: [
        at("short/AntDirection/little_noise", "smac", step, 1) for step in (15_000, 16_000, 35_000)]),
    (FULL, r"as much: (\S+), (\S+) and (\S+) in seed 1's offline phase, then (\S+) and less", lambda: [
        at("short/HumanoidDirection", "smac", step, 1) for step in (5_000, 10_000, 15_000, 20_000)]),
    (FULL, r"Hopper is at (\S+) after it, Walker at (\S+), Humanoid at (\S+), Ant at (\S+), Sawyer with 200 scenes at "
     r"(\S+); SMAC, three seeds, at (\S+), (\S+), (\S+), (\S+) and (\S+)\. ", lambda: [
        at(f"short/{env_id}", "smac_actor_ablation", 15_000, 1) for env_id in ABLATED] + [
        at(f"short/{env_id}", "smac", 15_000, 1, 2, 3) for env_id in ABLATED]),
    (FULL, r"repairs Hopper \((\S+); SMAC (\S+)\), Walker in part \((\S+); (\S+)\) and Humanoid \((\S+); (\S+)\), not "
     r"Ant \((\S+); (\S+)\) and Sawyer \((\S+); (\S+)\)\.", lambda: [number for env_id in ABLATED for number in (
        at(f"short/{env_id}", "smac_actor_ablation", 35_000, 1), at(f"short/{env_id}", "smac", 35_000, 1, 2, 3))]),
    (FULL, r"point mass: (\S+) after the offline phase where SMAC has (\S+), at the end (\S+) and (\S+)\.", lambda: [
        at("short/CheetahVelocity", label, step, *seeds) for step in (20_000, 30_000)
        for label, seeds in (("smac_actor_ablation", (1,)), ("smac", (1, 2, 3)))]),
    (FULL, ", ".join(
        rf"{name} (\S+) and (\S+) \((\S+)\)" for name in (
            "Hopper", "Walker", "Cheetah", "Ant", "Humanoid", "Sawyer with 200 scenes")),
     lambda: [
        at(f"short/{env_id}", label, step, *seeds) for env_id, end in SHORT.items() for label, step, seeds in (
            ("macaw", 10_000, (1,)), ("borel", 9_000, (1,)), ("smac", end, (1, 2, 3)))]),
    (FULL, r"from the start\): Hopper (\S+), Walker (\S+), Cheetah (\S+), Ant (\S+), Humanoid (\S+)\.", lambda: [
        at(f"short/{env_id}", "pearl", end, 1) for env_id, end in [*SHORT.items()][:-1]]),
    (FULL, r"Hopper goes from (\S+) to (\S+), Walker from (\S+) to (\S+), Humanoid from (\S+) to (\S+); .*? Hopper "
     r"from (\S+) to (\S+), Walker from (\S+) to (\S+), Humanoid from (\S+) to (\S+); SMAC from (\S+) to (\S+) ",
     lambda: [
        at(f"short/{env_id}", f"smac_encoder_{loss}", step, 1) for loss in ("q", "reward_then_q")
        for env_id in ABLATED[:3] for step in (15_000, 35_000)] + [
        at("short/HopperParam", "smac", step, 1, 2, 3) for step in (15_000, 35_000)]),
    *((FULL, rf"`{label}`{between} (\S+) and (\S+) → (\S+) \((\S+) and (\S+) → (\S+)\)", lambda label=label: [
        number for three in sawyer_short(label) for number in three])
      for label, between in (("smac", r"\):"), ("smac_scenes", r", \[SawyerManipulation200\]\(\S+\)\):"))),
]  # fmt: skip


@pytest.mark.parametrize("file, pattern, expected", PROSE, ids=range(len(PROSE)))
def test_figures_in_the_prose_are_those_of_the_results(file, pattern, expected):
    (said,) = re.findall(pattern, flowing(source(file)))
    said = [said] if isinstance(said, str) else said
    for word, value in zip(said, expected(), strict=True):
        half = 0.5 * 10.0 ** -len(word.partition(".")[2])  # of the last digit
        assert abs(float(word) - value) <= half + 1e-6, (word, value)


def test_sawyers_table_of_successes_is_that_of_the_results():
    text = source(FULL).split("\n| success |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (\w+), ([^|]*) \| (\S+) \| (\S+) \| (\S+) \|$", text, re.M)
    assert len(rows) == 6
    for label, moment, *cells in rows:
        step = None if moment == "at the end" else 50_000
        for cell, column in zip(
            cells, ("test/online", "train/online", "train/offline"), strict=True
        ):
            assert abs(float(cell) - success(label, step, column)) <= 0.005 + 1e-6


def test_sawyers_table_of_200_scenes_is_that_of_the_results():
    text = source(FULL).split("\n| 200 scenes: success")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (\w+), seed (\d) \| (.*) \|$", text, re.M)
    assert len(rows) == 6
    for label, seed, cells in rows:
        file = (
            ROOT
            / "benchmark/results/short/SawyerManipulation200/diagnostics"
            / f"{label}__{seed}.csv"
        )
        with open(file, newline="") as lines:
            found = [*csv.DictReader(lines)]
        for cell, column in zip(
            cells.split(" | "), ("test/online", "train/online", "train/offline"), strict=True
        ):
            curve = {
                int(row["gradient_step"]): float(row[f"charts/{column}_context_success"])
                for row in found
            }
            for said, value in zip(
                cell.split(" → "), (curve[15_000], np.mean([*curve.values()][-3:])), strict=True
            ):
                assert abs(float(said) - value) <= 0.0005 + 1e-6


def test_figure_9s_table_is_that_of_the_results():
    text = source(FULL).split("\n| the second phase explores |")[1].split("\n\n")[0]
    rows = re.findall(
        r"^\| test tasks, true rewards \| (.*) \|$|^\| t\w+ tasks \| (.*) \|$", text, re.M
    )
    labels = ("smac", "smac_test_tasks", "smac_test_tasks_oracle_rewards")
    for label, cells in zip(labels, ("".join(row).split(" | ") for row in rows), strict=True):
        for seed, said in ((1, cells[:2]), (2, cells[2:])):
            file = (
                ROOT
                / "benchmark/results/short/SawyerManipulation8/diagnostics"
                / f"{label}__{seed}.csv"
            )
            with open(file, newline="") as lines:
                found = [(int(row["gradient_step"]), row) for row in csv.DictReader(lines)]
            curve = [
                float(row["charts/test/online_context_success"])
                for step, row in found
                if step >= 15_000
            ]
            for word, value in zip(said, (curve[0], np.mean(curve[1:])), strict=True):
                assert abs(float(word) - value) <= 0.005 + 1e-6


def test_what_is_said_of_the_gpu_is_in_its_table():
    table, text = source("benchmark/results/speed/gpu.md"), flowing(source(FULL))
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    recorded = {(row[0].strip("| "), row[1]): row[2] for row in rows}
    words = r"SMAC makes (\d+) \(offline\) and (\d+) \(self-supervised\).*?; meta-BC (\S+), PEARL (\d+), "
    said = re.findall(words + r"MACAW (\d+), BOReL (\d+) \(VAE\) and (\d+) \(SAC\)", text)
    names = [
        ("smac_offline_online", "offline"),
        ("smac_offline_online", "self-supervised"),
        ("meta_bc", "offline"),
    ]
    names += [
        ("pearl_online_oracle", "online"),
        ("macaw", "offline"),
        ("borel", "VAE"),
        ("borel", "SAC"),
    ]
    assert [number.replace(",", "") for number in said[0]] == [recorded[name] for name in names]


def cells(file):
    """Rows of the tables of a file, without their heads."""
    rows = [
        line.strip("| ").split(" | ") for line in source(file).splitlines() if line.startswith("| ")
    ]
    return [
        row
        for i, row in enumerate(rows)
        if row[0] != "---" and "---" not in rows[min(i + 1, len(rows) - 1)][0]
    ]


def test_what_is_said_of_evaluations_on_two_cores_is_in_its_table():
    ratios, text = defaultdict(list), flowing(source(FULL))
    for env_id, *_, ratio in cells("benchmark/results/speed/evaluation.md"):
        ratios[env_id].append(ratio)
    names = "Ant", "Cheetah", "Humanoid", "Sawyer", "Walker", "Hopper"
    words = ", ".join(rf"(\S+) on {name}" for name in names[1:-1]) + r", (\S+) and (\S+) on Hopper"
    (said,) = re.findall(r"are (\S+) times as fast as in one process on Ant, " + words, text)
    found = [
        ratio
        for name in names
        for env_id in ratios
        if env_id.startswith(name)
        for ratio in ratios[env_id]
    ]
    assert [*said] == found
    assert f"not faster ({' and '.join(ratios['PointDirection'])})" in text
    least, most = min(map(float, found)), max(map(float, found))
    assert f"two are {least:.1f} to {most:.1f} times as fast on the robots" in flowing(
        source("README.md")
    )


def test_what_is_said_of_a_plain_step_is_in_its_table():
    text, rows = flowing(source(FULL)), cells("benchmark/results/speed/precision.md")

    def ratios(column, place, value):
        return [float(row[column]) for row in rows if row[place] == value]

    for column, place, value, words in (  # plain / shipped, plain / compiled
        (
            8,
            0,
            "the paper's",
            r"without AVX-512 (\S+) \(offline\) and (\S+) times .*? thread, .*?, (\S+) and (\S+) on two",
        ),
        (8, 0, "rl_batch 64", r"(\S+) to (\S+) with 4 x 64"),
        (8, 0, "short", r"(\S+) to (\S+) at the short preset's"),
        (11, 1, "offline", r"compiled step is (\S+) to (\S+) times as fast as the plain one"),
    ):
        (said,), found = re.findall(words, text), ratios(column, place, value)
        assert [*map(float, said)] == (
            found if value == "the paper's" else [min(found), max(found)]
        )
    (percent,) = re.findall(r"what is taken is at most (\d+) % slower than the other", text)
    assert int(percent) == round(100 * max(float(row[10]) for row in rows) - 100)


# ----- Batches, flags and data


@pytest.mark.parametrize("script, may_be_empty", [(smac, True), (pearl, False), (meta_bc, False)])
def test_a_batch_has_the_transitions_of_one_buffer_and_the_context_of_the_other(
    script, may_be_empty
):
    buffer, tasks = buffers.ReplayBuffer(4, 1, 1, 100), (0, 1, 3) if may_be_empty else (0, 1, 2, 3)
    for task in tasks:
        for sign, where in ((1, {"encoder": False}), (-1, {"rl": False})):
            path = {"obs": torch.full((6, 1), sign * (task + 1.0)), "actions": torch.zeros(5, 1)}
            buffer.add(
                task,
                path | {"rewards": torch.full((5,), 9.0), "terminals": torch.zeros(5)},
                **where,
            )
    args, seen, asked = (
        script.Args(rl_batch=3, context_batch=2, meta_batch=4, latent_dim=2),
        set(),
        set(),
    )

    def ask(tasks, *rest, sample=buffer.sample):
        asked.update(tasks.tolist())  # an empty task would give another one's transitions
        return sample(tasks, *rest)

    buffer.sample = ask
    for seed in range(8):
        batch = script.sample_batch(buffer, args, torch.Generator().manual_seed(seed))
        drawn = batch["obs"][:, 0, 0]  # (T,), task number + 1
        assert batch["obs"].shape == (4, 3, 1) and (batch["obs"] == drawn[:, None, None]).all()
        assert (
            batch["context"].shape == (4, 2, 3)
            and (batch["context"][..., 0] == -drawn[:, None]).all()
        )
        assert (batch["context"][..., 1] == 0).all() and (
            batch["context"][..., 2] == 9
        ).all()  # (s, a, r)
        seen |= {int(number) - 1 for number in drawn}
    assert seen == asked == set(tasks)


def parse(module, *words):
    return parse_args(module.Args, module.PRESETS, list(words))


def test_the_flags_are_those_of_the_papers_tables():
    """Table 1, and of Table 2: horizon, AWR beta, reward scale, tasks, transitions a task, lambda_pearl."""
    columns = {
        "CheetahVelocity": (200, 100, 5, 100, 30, 1600, 1), "AntDirection": (200, 100, 5, 100, 20, 1600, 1),
        "SawyerManipulation": (50, 0.3, 1, 50, 10, 3750, 0), "WalkerParam": (200, 100, 5, 50, 5, 1200, 1),
        "HopperParam": (200, 100, 5, 50, 5, 1200, 1), "HumanoidDirection": (200, 100, 5, 50, 5, 1200, 1),
    }  # fmt: skip
    for env_id, (horizon, beta, scale, train, test, transitions, lambda_pearl) in columns.items():
        args, spec = parse(smac, "--env-id", env_id), envs.SPECS[env_id]
        assert (args.rl_batch, args.context_batch, args.meta_batch, args.latent_dim) == (
            256,
            64,
            4,
            5,
        )
        assert args.q_hidden == args.policy_hidden == (300,) * 3
        assert args.decoder_hidden == (64,) * 2 and args.encoder_hidden == (200,) * 3
        assert (args.gamma, args.tau, args.lr, args.offline_steps) == (0.99, 0.005, 3e-4, 50_000)
        assert args.updates_per_iteration == 4 * (args.prior_steps + args.posterior_steps)
        assert args.tasks_per_iteration == (1 if env_id == "SawyerManipulation" else 5)
        assert (spec.horizon, spec.num_train_tasks, spec.num_test_tasks) == (horizon, train, test)
        assert (args.awr_lambda, args.reward_scale, args.lambda_pearl) == (
            beta,
            scale,
            lambda_pearl,
        )
        if env_id != "SawyerManipulation":  # a script of its own makes its data
            slices = pearl.DATASET_SLICES.get(env_id, pearl.DEFAULT_SLICES)
            written = sum(piece[1] for piece in slices if piece)
            # PAPER.md, row 9: of Ant the paper's 400 encoder transitions are not apart
            assert written == {"AntDirection": 1200, "HumanoidDirection": 400}.get(
                env_id, transitions
            )
            assert (
                parse(pearl, "--env-id", env_id).initial_steps >= written
            )  # so that every task has as many
        for script in (pearl, meta_bc):
            other = parse(script, "--env-id", env_id)
            shared = "rl_batch context_batch meta_batch latent_dim policy_hidden encoder_hidden lr gamma tau"
            for name in shared.split():
                assert getattr(other, name, getattr(args, name)) == getattr(args, name)


FILES = sorted((ROOT / "datasets").glob("*.npz"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_dataset_holds_what_its_command_makes_and_its_readme_says(file):
    """Read without buffers.py: tasks, transitions of each task, and the command, three times the same."""
    with np.load(file, allow_pickle=False) as data:
        command, env_id = shlex.split(str(data["command"])), str(data["env_id"])
        tasks = {name: len(data[f"{name}_tasks"]) for name in ("train", "test")}
        held = {
            part: np.bincount(data[f"{part}_tasks"], data[f"{part}_lengths"], tasks["train"])
            for part in ("rl", "encoder")
        }
    assert not any(word.startswith(("/", "~")) for word in command)  # no path of a machine
    spec, num_train = envs.SPECS[env_id], envs.SPECS[env_id].num_train_tasks
    if command[1] == "pearl_online_oracle.py":
        slices = pearl.DATASET_SLICES.get(env_id, pearl.DEFAULT_SLICES)
        made = {part: piece[1] if piece else 0 for part, piece in zip(held, slices)}
    else:  # episodes a task and steps an episode, the scripts' own constants
        sizes = {
            "make_point_direction.py": (6, 50),
            "make_sawyer.py": (50, 75),
            "make_ant.py": (6, 200),
        }
        episodes, steps = sizes[Path(command[1]).name]
        num_train = (
            int(command[3]) if len(command) > 3 else num_train
        )  # then there are fewer episodes a task
        made = {"rl": episodes * spec.num_train_tasks // num_train * steps, "encoder": 0}
    for part, number in made.items():
        assert (held[part] == number).all(), part
    assert tasks == {"train": num_train, "test": spec.num_test_tasks}

    (row,) = re.findall(
        rf"^\| {file.name} \| (.*) \| (.*) \| `(.*)` \|$", source("datasets/README.md"), re.M
    )
    assert row[0] == f"{tasks['train']} + {tasks['test']}"
    total = {part: f"{made[part] * tasks['train']:,}" for part in made}
    assert row[1] == total["rl"] + f", encoder {total['encoder']}" * (made["encoder"] > 0)
    said, stored = shlex.split(row[2]), command
    for words in (said, stored):  # what does not change the data
        for flag in ("--run-dir", "--eval-every", "--checkpoint-every", "--save-dataset"):
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
    assert said[:2] == stored[:2] and sorted(said) == sorted(stored)
    if said[1] == "pearl_online_oracle.py":
        assert parse(pearl, *said[2:]).env_id == env_id  # it still can be given


def test_what_has_no_dataset_is_listed_as_such():
    rows = re.findall(r"^\| (\w+)\.npz \|", source("datasets/README.md"), re.M)
    assert sorted(rows) == [file.stem for file in FILES]
