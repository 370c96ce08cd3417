"""What holds for every script: copies are identical, no flag without a reader, the texts agree with code and files."""

import ast
import io
import itertools
import re
import shlex
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
MAY_DIFFER = {
    "Args", "Agent", "update", "main", "evaluate", "sample_batch", "rollout", "collect",
    "encode", "adapt",
}  # fmt: skip
READ_BY_RUN = (
    "eval_every keep_agents run_dir resume device cuda_graph preset".split()
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_is_one_flat_function_on_one_screen(script):
    main = tree_of(script, "main")
    assert main.end_lineno - main.lineno + 1 <= 66
    for node in ast.walk(main):
        assert node is main or not isinstance(
            node, (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.Global, ast.Nonlocal)
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_one_thought_a_line(script):
    """Measured on files that read well: short lines, and few comprehensions."""
    lines = [line for line in source(script).splitlines() if line.strip()]
    assert np.mean([len(line) for line in lines]) <= 57
    comprehensions = ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp
    found = [node for node in ast.walk(TREES[script]) if isinstance(node, comprehensions)]
    assert len(found) <= 3 * len(lines) / 100
    assert [node.lineno for node in found if len(node.generators) > 1] == []


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
    text = "".join(source(name) for name in TREES if name not in SCRIPTS)
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
        "depth",
        "i_trust_these_files",
        "transitions",
    }  # of benchmark/, datasets/, examples/, git, ruff and TensorBoard
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


def heading_anchors(text):
    """What GitHub makes of the headings of a text in Markdown."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_links_of_the_texts_lead_somewhere():
    texts = [ROOT / "README.md", ROOT / "PAPER.md"]
    for folder in ("benchmark", "datasets", "examples"):
        texts += (ROOT / folder).glob("**/*.md")
    for file in texts:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", file.read_text()):
            if target.startswith("https://"):
                continue
            there = file.parent / target if target else file
            assert there.exists(), (file, target)
            assert not anchor or anchor in heading_anchors(there.read_text()), (file, anchor)


# ----- Batches, flags and data


@pytest.mark.parametrize("script, may_be_empty", [(smac, True), (pearl, False), (meta_bc, False)])
def test_a_batch_has_the_transitions_of_one_buffer_and_the_context_of_the_other(
    script, may_be_empty
):
    buffer, tasks = buffers.ReplayBuffer(4, 1, 1, 100), (0, 1, 3) if may_be_empty else (0, 1, 2, 3)
    for task in tasks:
        for sign, where in ((1, {"encoder": False}), (-1, {"rl": False})):
            path = {"obs": torch.full((6, 1), sign * (task + 1.0)), "actions": torch.zeros(5, 1)}
            path |= {"rewards": torch.full((5,), 9.0), "terminals": torch.zeros(5)}
            buffer.extend([(task, path)], **where)
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
