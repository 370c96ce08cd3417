"""Look at an agent: python benchmark/watch.py RUN_OR_FILE [--video film.gif]

RUN_OR_FILE is the folder of a run of any of the six scripts, ended or stopped (its checkpoint is read), or an agent
file as benchmark/agents.py writes it. Plays meta-episodes on test tasks and prints the returns: of the two exploration
episodes (a mean), of the third, after adaptation, and of the third with z from elsewhere, which is the exploration of
the task above in the table, or the prior, where the agent has a posterior over z (SMAC, PEARL, meta-BC, FOCAL). What the
second is above the last two is adaptation. --explore adds two other ways to explore: random
actions, and IDAQ's choice of what to read. --video films one meta-episode on each of the first three test tasks.
"""

import dataclasses
import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import film  # isort: skip, it comes before whatever imports MuJoCo
import buffers
import envs
import focal
import sawyer
from buffers import InputError
from plumbing.files import (
    MAX_TASKS,
    MAX_TEXT,
    check_array,
    check_replaceable,
    read_npz,
    write_file,
)
from plumbing.flags import launch_tool, print_safely, read_flags

# What acting needs of each script's agent: the beginnings of its parameters' names
SCRIPTS = dict.fromkeys(
    ("smac_offline_online", "pearl_online_oracle", "meta_bc", "borel", "focal"),
    ("policy.", "encoder."),
)
SCRIPTS["macaw"] = "policy.", "value.", "raw_adv_coef"
MAX_PLAYED = 1000  # environments side by side: of MuJoCo 1.5 MB each, of PyBullet 28
COLUMNS = {  # of --out, and the returns that stand there
    "own context": "after adaptation", "another task's": "another task's context", "prior": "the prior",
    "own context, sampled actions": "sampled actions",
}  # fmt: skip

WAYS = {"random": "random exploration", "idaq": "IDAQ"}  # of `explore` in focal.py, with --explore
CAN_EXPLORE = "smac_offline_online", "meta_bc", "focal"


@dataclasses.dataclass
class Args:
    agent: tyro.conf.Positional[Path]  # folder of a run, or an agent file
    tasks: int = 6  # test tasks, evenly spaced; all of them if there are fewer
    episodes: int = 1  # meta-episodes a test task
    video: Optional[Path] = None  # film to write, .gif or .mp4
    explore: bool = False  # also print the returns after two other ways to explore; not in --out
    every: int = 4  # environment steps a picture of the film
    out: Optional[Path] = (
        None  # table in Markdown that gets a line for the agent: all test tasks, standard errors
    )
    env_id: Optional[str] = None  # module:Name, if the agent is of a family of one's own
    dataset: Optional[Path] = None  # the dataset of the agent; default datasets/{env_id}.npz


# ===== Reading


def data_hash(path):
    """The hash of the data that an agent was trained on; None or "" where it is unknown.

    PEARL has no data. path: the folder of a run, or an agent file. Raises InputError.
    """
    file = path / "checkpoint.npz" if path.is_dir() else path

    def accept(name, dtype, shape):
        return name == "sha256" and check_array(f"{file}: {name}", dtype, shape, "U", (), MAX_TEXT)

    return read_npz(file, accept).get("sha256")


def load_dataset(path, env_id, dataset=None):
    """The dataset that an agent was trained on, as `buffers.load_dataset` returns it.

    Args:
        path: the folder of a run, or an agent file.
        dataset: its file; by default datasets/{env_id}.npz.
    Raises:
        InputError: that dataset holds other data, or cannot be read.
    """
    data = buffers.load_dataset(env_id, dataset)
    trained_on = data_hash(path)
    if trained_on and trained_on != data["sha256"]:
        raise InputError(
            f"the data of {path} are others than in this dataset: name theirs with --dataset"
        )
    return data


def load(path, env_id=None, dataset=None):
    """Read the folder of a run, or an agent file.

    Returns the script's module, the run's flags, the test tasks, {gradient step: agent}. Raises InputError.
    """
    run = path.is_dir()
    file = path / "checkpoint.npz" if run else path
    text = "U", (), MAX_TEXT
    words = read_npz(
        file, lambda x, *has: x == "script" and check_array(f"{file}: {x}", *has, *text)
    )
    name = [*path.resolve().name.split("__"), ""][1] if run else words.get("script")
    if name not in SCRIPTS and run and name:
        known = ", ".join(f"{script}.py" for script in SCRIPTS)
        raise InputError(f"{path} is a run of {name}.py by its name, and not of one of {known}")
    if name not in SCRIPTS:
        raise InputError(f"{path} is no {'folder of a run, by its name' if run else 'agent file'}")
    script = importlib.import_module(name)
    args = read_flags(script.Args, script.PRESETS, file)
    if dataset and hasattr(args, "dataset"):
        args = dataclasses.replace(args, dataset=str(dataset))
    if ":" in args.env_id and args.env_id != env_id:  # a file must not run code
        raise InputError(
            f"the agent's environment is of a module: give --env-id {args.env_id} as well, which "
            "benchmark/watch.py and agents.py have"
        )
    spec = envs.lookup(args.env_id)
    with torch.device("meta"):  # takes no memory, whatever the sizes in the file
        blank = script.Agent(spec.obs_dim, spec.action_dim, args)
    masks = {key for key, _ in blank.named_buffers()}  # they may be -inf
    blank = {
        key: value for key, value in blank.state_dict().items() if key.startswith(SCRIPTS[name])
    }
    kinds = {
        key: np.dtype(str(value.dtype).removeprefix("torch.")).str[1:]
        for key, value in blank.items()
    }
    shapes = {key: (kinds[key], tuple(value.shape)) for key, value in blank.items()}

    def accept(name, dtype, shape):
        phase, _, key = name.rpartition("/")
        if key in shapes and (phase == "agent" if run else re.fullmatch("[0-9]{1,15}", phase)):
            return check_array(f"{file}: {name}", dtype, shape, *shapes[key])
        if name == "test_tasks":
            return check_array(
                f"{file}: {name}", dtype, shape, "f8", (None, spec.task_dim), MAX_TASKS
            )
        return name == "step" and check_array(f"{file}: {name}", dtype, shape, "i8", ())

    arrays, agents = read_npz(file, accept), {}
    phases = {name.rpartition("/")[0] for name in arrays if "/" in name}
    if not phases:
        raise InputError(
            f"{file} has no agent to watch: give a run's folder, or a file that benchmark/agents.py wrote"
        )
    if len(phases) > 10:
        raise InputError(f"{file} holds {len(phases)} agents, expected at most 10")
    for phase in sorted(phases, key=lambda phase: phase.zfill(15)):
        state = {key: arrays.get(f"{phase}/{key}", np.array(np.nan)) for key in shapes}
        for key, array in state.items():
            if np.isnan(array).any() or key not in masks and not np.isfinite(array).all():
                raise InputError(f"{file}: {phase}/{key} is missing, NaN or infinite")
        with torch.device("meta"):
            agent = script.Agent(spec.obs_dim, spec.action_dim, args)
        agent.load_state_dict(
            {key: torch.from_numpy(x) for key, x in state.items()}, strict=False, assign=True
        )
        agents[int(arrays.get("step", 0) if run else phase)] = agent
    if not run:
        return script, args, check_tasks(file, args.env_id, arrays.get("test_tasks", [])), agents
    if name == "pearl_online_oracle":
        tasks = envs.sample_tasks(
            args.env_id, spec.num_train_tasks + spec.num_test_tasks, args.task_seed
        )
        return script, args, tasks[spec.num_train_tasks :], agents
    return script, args, load_dataset(path, args.env_id, dataset)["test_tasks"], agents


def check_tasks(file, env_id, tasks):
    """The tasks, if the environment takes all of them. Raises InputError."""
    env, (low, high) = envs.make(env_id).unwrapped, envs.lookup(env_id).task_range
    try:
        if not len(tasks) or not ((low <= tasks) & (tasks <= high)).all():
            raise ValueError(f"expected at least one, and numbers in {[low, high]}")
        for task in tasks:
            env.set_task(task)
    except ValueError as error:
        raise InputError(f"{file}: test_tasks: {error}") from None
    return tasks


# ===== Playing


def meta_episode(script, agent, args, env_list, rng):
    """Of each of E environments the third trajectory and the two of exploration; mu, sigma (E, dz) if z has them."""
    if script.__name__ == "borel":
        return *script.adapt_belief(env_list, agent, rng)[:2], None
    z_train = ()
    if script.__name__ == "focal":  # it explores with the z of training tasks
        z_train = (training_z(agent, args, rng).expand(len(env_list), -1, -1),)
    final, exploration, *posterior = script.adapt(env_list, agent, args, rng, *z_train)
    return final, exploration, posterior


@torch.no_grad()
def training_z(agent, args, rng):
    """The z of N training tasks, from their offline data: (N, dz)."""
    dataset = buffers.load_dataset(args.env_id, args.dataset)
    buffer = buffers.from_dataset(dataset, args.env_id)
    return focal.training_z(agent, buffer, args, rng)


def explore(script, agent, args, env_list, rng, z_train, way, episodes=2):
    """Explore in one of the ways of focal.py, whatever the script, with z_train (N, dz).

    Returns for each of E environments its trajectories; then mu, sigma (E, dz) of the z from them.
    """
    flags = focal.Args(
        explore=way,
        explore_episodes=episodes,
        latent_dim=args.latent_dim,
        next_obs_in_context=args.next_obs_in_context,
    )
    z_each = z_train.expand(len(env_list), -1, -1)  # (E, N, dz)
    exploration, mu, sigma = focal.explore(env_list, agent, flags, rng, z_each)
    if way != "idaq":  # z as the script itself has it: focal.py's has no noise
        with torch.no_grad():
            mu, sigma = script.encode(agent, exploration, args)
    return exploration, mu, sigma


def measure(script, agent, args, tasks, num_tasks, episodes, sampled=False, ways=()):
    """Play. Returns the numbers of the test tasks (T,), and {what: returns (T, episodes)}.

    sampled: also play the third episode with sampled actions in place of deterministic ones.
    ways: also play it after these ways to explore, of WAYS.
    """
    rng = torch.Generator().manual_seed(args.seed)
    numbers, env_list = envs.make_evaluation(args.env_id, tasks, tasks, 1, num_tasks, episodes)[
        "test"
    ]
    final, exploration, posterior = meta_episode(script, agent, args, env_list, rng)
    paths = {
        "exploration": [path for pair in exploration for path in pair],
        "after adaptation": final,
    }
    if posterior:
        contexts = {"the prior": script.prior(len(env_list), args, "cpu")}
        if len(numbers) > episodes:  # a single task has no other
            others = [part.roll(episodes, 0) for part in posterior]  # tasks stand together
            contexts = {"another task's context": others} | contexts
        for name, z in contexts.items():
            paths[name] = script.rollout(env_list, agent, *z, rng, deterministic=True)
        if sampled:
            paths["sampled actions"] = script.rollout(env_list, agent, *posterior, rng)
        z_train = training_z(agent, args, rng) if ways else None
        for way in ways:
            _, *z = explore(script, agent, args, env_list, rng, z_train, way)
            paths[WAYS[way]] = script.rollout(env_list, agent, *z, rng, deterministic=True)
    returns = {
        name: np.array([path["rewards"].sum() for path in some]) for name, some in paths.items()
    }
    for name, values in returns.items():
        if not np.isfinite(values).all():
            cause = "are the agent's weights too large?"
            raise InputError(f"a return with {name} is NaN or infinite: {cause}")
    returns = {name: values.reshape(len(numbers), -1).mean(1) for name, values in returns.items()}
    return numbers[::episodes], {
        name: values.reshape(-1, episodes) for name, values in returns.items()
    }


def describe(env_id, number, task):
    """A test task in words: its number, and what it asks for where that is one thing."""
    family, asks = envs.lookup(env_id).env_class, f": {task[0]:.2f}" if len(task) == 1 else ""
    if issubclass(family, envs.CheetahVelocity):
        asks += " m/s"
    if issubclass(family, envs.Direction):
        asks = f": {np.rad2deg(task[0]) % 360:.0f} deg"
    if issubclass(family, sawyer.SawyerManipulation):
        asks = ": " + sawyer.BEHAVIOURS[int(task[-1])].replace("_", " ")
    return f"task {number}{asks}"


def show(labels, returns):
    """Print a table: a line for each task, means over episodes, and the mean over tasks."""
    width = max(map(len, labels)) + 2
    rows = {"": returns} | {
        label: [x[i].mean() for x in returns.values()] for i, label in enumerate(labels)
    }
    for label, cells in (rows | {"mean": [x.mean() for x in returns.values()]}).items():
        words = (cell if label == "" else f"{cell:.1f}" for cell in cells)
        print_safely(
            f"{label:<{width}}"
            + "".join(f"{word:>{len(name) + 3}}" for word, name in zip(words, returns))
        )


def name_in_tables(path):
    """An agent's name: its path below the results, or below the runs of run.py, or the end of it.

    The folder `agents` of run.py --agents does not count: HopperParam/smac__1.npz is of HopperParam.
    """
    path = path.resolve()
    parts = path.parts[-3:]
    for folder in (ROOT / "benchmark" / "results", ROOT / "runs" / "benchmark"):
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).parts
    if "__" in path.stem:
        parts = [part for part in parts if part != "agents"]
    return "/".join(parts)


def write_row(file, name, step, returns):
    """Append means over tasks and episodes, and their standard errors over episodes, to a table in Markdown."""
    lines, row = [], [name, str(step)]
    for values in (returns.get(what) for what in COLUMNS.values()):
        error = 0 if values is None else np.sqrt(values.var(1, ddof=1).mean() / values.size)
        row.append("" if values is None else f"{values.mean():.1f} ± {error:.1f}")
    old = file.read_text() if file.exists() else ""
    if not old:
        episodes = f"{returns['exploration'].shape[1]} meta-episodes on each test task"
        old = f"{episodes}; ± is the standard error over them, for these tasks.\n\n"
        lines = [["run", "gradient step", *COLUMNS], ["---"] * len(row)]
    new = "".join(f"| {' | '.join(line)} |\n" for line in [*lines, row])
    write_file(file, lambda out: out.write((old + new).encode()))


def main(args):
    """Print the tables, write the film and the line. Raises InputError."""
    if min(args.tasks, args.episodes, args.every) < 1 or args.out and args.episodes < 2:
        raise InputError(
            "--tasks, --episodes and --every must be at least 1, and with --out --episodes at least 2"
        )
    if args.out:
        check_replaceable(args.out)
        if not args.out.absolute().parent.is_dir():
            raise InputError(f"--out {args.out} is no file in a folder that exists")
    if args.video:
        film.check_file(args.video)
    script, flags, tasks, agents = load(args.agent, args.env_id, args.dataset)
    if args.explore and script.__name__ not in CAN_EXPLORE:
        raise InputError(f"--explore is for agents of {', '.join(CAN_EXPLORE)}")
    ways = WAYS if args.explore else ()
    reads_data = bool(ways) or script.__name__ == "focal"
    if reads_data:
        load_dataset(args.agent, flags.env_id, args.dataset)
    num_tasks, columns = len(tasks) if args.out else min(args.tasks, len(tasks)), []
    if num_tasks * args.episodes > MAX_PLAYED:
        raise InputError(
            f"{num_tasks} tasks x {args.episodes} episodes are more than {MAX_PLAYED} environments"
        )
    for step, agent in agents.items():
        print_safely(
            f"{flags.env_id}, {script.__name__}.py, seed {flags.seed}, after {step} gradient steps"
        )
        numbers, returns = measure(
            script, agent, flags, tasks, num_tasks, args.episodes, bool(args.out), ways
        )
        show([describe(flags.env_id, number, tasks[number]) for number in numbers], returns)
        if args.out:
            write_row(args.out, name_in_tables(args.agent), step, returns)
        if args.video:
            columns.append([])
            when = f"after {step} steps"
            if script.__name__ == "smac_offline_online":
                when = f"{'before' if step <= flags.offline_steps else 'after'} self-supervision"
            for number, task in enumerate(tasks[:3]):
                words = describe(flags.env_id, number, task), when
                play = functools.partial(
                    meta_episode,
                    script,
                    agent,
                    flags,
                    rng=torch.Generator().manual_seed(flags.seed),
                )
                columns[-1].append(film.shoot(flags.env_id, task, words, args.every, play))
    if args.video:
        film.save(columns, args.video)
        print_safely(args.video)


if __name__ == "__main__":
    launch_tool(main, Args)
