"""Somebody else's tasks: the README's example, and what environments, rows and data may bring."""

import csv
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import plumbing.files
import smac_offline_online as smac
from plumbing.errors import InputError
from plumbing.flags import parse_args

ROOT = Path(envs.__file__).resolve().parent
SCRIPTS = [smac, pearl, meta_bc, focal, macaw, borel]
SIZES = dict(obs_dim=3, action_dim=2, task_dim=1, horizon=4, num_train_tasks=3, num_test_tasks=2)
TINY = {  # flags that make a run as short as it can be
    "policy_hidden": (8,),
    "q_hidden": (8,),
    "encoder_hidden": (8,),
    "decoder_hidden": (8,),
    "value_hidden": (8,),
    "rl_batch": 4,
    "context_batch": 4,
    "meta_batch": 2,
    "latent_dim": 2,
    "offline_steps": 2,
    "vae_steps": 1,
    "online_iterations": 1,
    "updates_per_iteration": 1,
    "prior_steps": 1,
    "posterior_steps": 1,
    "initial_steps": 1,
    "vae_tasks": 2,
    "vae_trajectories": 2,
    "elbo_terms": 2,
    "eval_every": 100,
    "weight_transform": False,
    "dataset_iteration": 1,
    "device": "cpu",
}


class Family(gym.Env):
    """Observation: the step, the task and the last reward, float64 as Gymnasium's MuJoCo has it.

    It never ends.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    task = (0.0,)

    @staticmethod
    def sample_tasks(rng, num_tasks):
        return rng.uniform(-1, 1, (num_tasks, 1))

    def set_task(self, task):
        self.task = task

    def observation(self, reward=0.0):
        return np.array([self.t, self.task[0], reward])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        reward = float(action[0] * self.task[0])
        return self.observation(reward), reward, False, False, {}


@pytest.fixture
def register():
    """register(**changes) -> the row of a family "Mine": Family with other methods or sizes."""

    def make(name="Mine", base=Family, **changes):
        row = {key: changes.pop(key) for key in ("presets", "task_range", *SIZES) if key in changes}
        spec = envs.Spec(type(name, (base,), changes), **SIZES | row)
        envs.register(name, spec)
        made.add(name)
        return spec

    made = set()
    yield make
    for name in made:
        del envs.SPECS[name]
        del gym.registry[f"smac/{name}-v0"]


def make_paths(env_id="Mine", num_tasks=3, episodes=2):
    """Play random actions.

    Returns [(task number, trajectory)] of every training task; training tasks; test tasks.
    """
    rng, env, entries = torch.Generator().manual_seed(0), envs.make(env_id), []
    tasks = envs.sample_tasks(env_id, num_tasks + 2)
    for task in range(num_tasks):
        env.unwrapped.set_task(tasks[task])
        for _ in range(episodes):
            played = envs.Episodes([env], rng)
            while played.live:
                played.step(2 * torch.rand(1, env.action_space.shape[0], generator=rng) - 1)
            entries += [(task, path) for path in played.paths()]
    return entries, tasks[:num_tasks], tasks[num_tasks:]


@pytest.fixture
def data(tmp_path, register, quick):
    """A file of data of the family as it is."""
    register()
    entries, train_tasks, test_tasks = make_paths()
    buffers.save_dataset(
        tmp_path / "mine.npz", "Mine", train_tasks, test_tasks, entries, [], "python test"
    )
    return tmp_path / "mine.npz"


def train(script, data, folder, env_id="Mine", **flags):
    """A tiny run: the agent, and the run's folder."""
    flags = TINY | {"dataset": str(data), "run_dir": str(folder)} | flags
    known = vars(script.Args())
    agent = buffers.train(
        script, env_id=env_id, **{name: value for name, value in flags.items() if name in known}
    )
    return agent, Path(folder) / f"{env_id.rpartition(':')[2]}__{Path(script.__file__).stem}__1"


def refusal(function, *args, **flags):
    """The one sentence with which it refuses."""
    with pytest.raises(InputError) as error:
        function(*args, **flags)
    sentence = str(error.value)
    assert 10 < len(sentence) <= 500 and "\n" not in sentence
    return sentence


# ----- The README's example


def blocks():
    """The indented blocks of the README's section on one's own tasks."""
    section = (ROOT / "README.md").read_text().split("\n## Your own tasks\n")[1].split("\n## ")[0]
    found = re.findall(r"\n\n((?:    .*\n|\n)+)", section + "\n")
    return [textwrap.dedent(block).strip() + "\n" for block in found]


def test_the_readmes_example_runs_outside_of_the_repository_and_learns(tmp_path):
    """As the README says: the file, the data, SMAC, and a script from Python."""
    (commands,) = (block for block in blocks() if "python smac" in block)
    (from_python,) = (block for block in blocks() if "sys.path" in block)
    shutil.copy(ROOT / "examples" / "ball.py", tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(words, **more):
        words = [sys.executable if word == "python" else word for word in words]
        found = subprocess.run(
            words, cwd=tmp_path, env=environment | more, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    first, second = (line.split("#")[0].split("&&")[-1].split() for line in commands.splitlines())
    data = float(run(first).split("mean return")[1])
    second[1] = str(ROOT / second[1])
    run(second)
    returns = {}  # of each evaluation on test tasks
    with open(tmp_path / "runs" / "Ball__smac_offline_online__1" / "eval.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "test":
                returns.setdefault(row["gradient_step"], []).append(float(row["return"]))
    # At the end of the offline phase, and of the run; nothing is above 0.
    before, *_, after = [np.mean(values) for values in returns.values()]
    assert after > before + 2 and after > data + 3
    run(["python", "-c", from_python.replace("path/to/this/folder", str(ROOT))], PYTHONPATH="")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "ball.json",
        "ball.npz",
        "ball.py",
        "runs",
    ]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_example_names_every_part_of_a_row():
    example = (ROOT / "examples" / "ball.py").read_text()
    for field in dataclasses.fields(envs.Spec):
        assert field.name in example or field.name in ("env_class", "task_range")


# ----- What an environment may give: any type of number


KINDS = {
    "float64": (np.float64, float),
    "int64": (np.int64, int),
    "uint8": (np.uint8, np.float32),
    "float16": (np.float16, lambda r: np.float16(r)),
    "list": (list, lambda r: np.array(r)),
    "reward of shape (1,)": (np.float32, lambda r: np.array([r])),
    "tensor": (torch.tensor, lambda r: torch.tensor(r)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_observations_rewards_and_ends_of_any_type_are_cast_where_they_enter(register, kind):
    """Rewards 0, 1, 2, ...; the last step is a fall, said by an array where the reward is one."""
    observe, pay = KINDS[kind]

    def observation(self, reward=0.0):
        numbers = [self.t, 7, 3]
        return observe(numbers) if observe in (list, torch.tensor) else np.array(numbers, observe)

    def step(self, action):
        self.t += 1
        reward, fallen = pay(self.t), self.t == 3
        return self.observation(), reward, np.full(np.shape(reward), fallen), False, {}

    register(observation=observation, step=step)
    episodes = envs.Episodes([envs.make("Mine")], torch.Generator().manual_seed(0))
    while episodes.live:
        assert episodes.obs().dtype == torch.float32 and episodes.obs().shape == (1, 3)
        episodes.step(torch.zeros(1, 2))
        assert episodes.last("rewards", [0]).shape == (1, 1)
    (path,) = episodes.paths()
    assert {name: value.shape for name, value in path.items()} == {
        "obs": (4, 3),
        "actions": (3, 2),
        "rewards": (3,),
        "terminals": (3,),
    }
    assert {value.dtype for value in path.values()} == {np.dtype(np.float32)}
    assert path["obs"].tolist() == [[t, 7, 3] for t in range(4)]
    assert path["rewards"].tolist() == [1, 2, 3] and path["terminals"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_takes_float64_observations_and_rewards_of_shape_1(
    register, data, tmp_path, script
):
    def step(self, action):
        obs, reward, *rest = Family.step(self, action)
        return obs, np.array([reward]), *rest

    register(step=step)
    agent, run = train(script, data, tmp_path)
    assert {parameter.dtype for parameter in agent.parameters()} == {torch.float32}
    rows = (run / "eval.csv").read_text().splitlines()
    assert len(rows) > 5 and all(np.isfinite(float(row.split(",")[5])) for row in rows[1:])


@pytest.mark.filterwarnings("ignore:var")  # one task has no spread
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_smallest_family_runs(register, tmp_path, quick, script):
    """One training task, one test task, and episodes of one step that fall and pay nothing."""
    sizes = dict(num_train_tasks=1, num_test_tasks=1, horizon=1)
    register(step=lambda self, action: (self.observation(), 0.0, True, False, {}), **sizes)
    entries, train_tasks, test_tasks = make_paths(num_tasks=1, episodes=3)
    buffers.save_dataset(
        tmp_path / "one.npz", "Mine", train_tasks, test_tasks[:1], entries, [], "test"
    )
    agent, run = train(script, tmp_path / "one.npz", tmp_path)
    assert all(torch.isfinite(parameter).all() for parameter in agent.parameters())
    rows = [row.split(",") for row in (run / "eval.csv").read_text().splitlines()[1:]]
    assert {(row[2], row[4], float(row[5])) for row in rows} == {
        ("test", "0", 0.0),
        ("train", "0", 0.0),
    }


def test_a_family_may_say_when_an_episode_succeeds_and_where_it_leads(register, tmp_path, quick):
    """With `sparse`, test tasks succeed: there the task is above 1, and the last reward is 0.

    `ground_velocity` names columns 1 and 2.
    """

    def step(self, action):
        self.t += 1
        return self.observation(), 0.0 if self.task[0] > 1 else -1.0, False, False, {}

    register(step=step, sparse=True, ground_velocity=(1, 0.5))
    entries, train_tasks, _ = make_paths()
    buffers.save_dataset(tmp_path / "a.npz", "Mine", train_tasks, [[2.0]], entries, [], "test")
    _, run = train(smac, tmp_path / "a.npz", tmp_path)
    events = EventAccumulator(str(run))
    events.Reload()
    success = {
        tag: events.Scalars(tag)[-1].value
        for tag in events.Tags()["scalars"]
        if tag.endswith("success")
    }
    assert success == {
        "charts/test/own_context_success": 1,
        "charts/train/own_context_success": 0,
        "charts/train/offline_context_success": 0,
    }
    with np.load(run / "figures_3.npz") as arrays:
        ground = arrays["own context"]
    assert ground.shape[1:] == (5, 2)
    steps = 0.5 * np.sort(train_tasks, axis=0) * np.arange(1, 6)  # the task is what column 1 shows
    np.testing.assert_allclose(
        np.unique(ground[:, :, 0], axis=0), steps[np.argsort(steps[:, 0])], rtol=1e-5
    )


@pytest.mark.parametrize("column", [-1, 2, 9])
def test_the_velocity_over_ground_must_be_two_columns_of_an_observation(column):
    family = type("Moving", (Family,), {"ground_velocity": (column, 0.1)})
    assert f"ground_velocity of {family} is ({column}, 0.1)" in refusal(envs.Spec, family, **SIZES)


# ----- What does not fit its row is refused before anything else, in one sentence with both sizes


def wrong_second_observation(self, action):
    return np.zeros(5), 0.0, False, False, {}


REFUSED = {
    # name: (changes, words of the sentence)
    "observations too long": (
        dict(obs_dim=2),
        "obs_dim is (2,) in its row, but its environment has (3,)",
    ),
    "observations too short": (
        dict(obs_dim=4),
        "obs_dim is (4,) in its row, but its environment has (3,)",
    ),
    "observations as a column": (
        dict(observation=lambda self, reward=0.0: np.zeros((3, 1))),
        "(3,) in its row, but its environment has (3, 1)",
    ),
    "observations as a dict": (
        dict(observation=lambda self, reward=0.0: {"a": np.zeros(3)}),
        "(3,) in its row, but its environment has ()",
    ),
    "another observation in a step": (
        dict(step=wrong_second_observation),
        "obs_dim of a step is (3,) in its row, but its environment has (5,)",
    ),
    "actions": (dict(action_dim=1), "action_dim is (1,) in its row, but its environment has (2,)"),
    "discrete actions": (
        dict(action_space=gym.spaces.Discrete(3)),
        "its actions are Discrete(3), expected a Box from -1 to 1",
    ),
    "discrete actions, as many as the row says": (
        dict(action_space=gym.spaces.Discrete(2), action_dim=2),
        "its actions are Discrete(2), expected a Box",
    ),
    "actions as a dict": (
        dict(action_space=gym.spaces.Dict(arm=gym.spaces.Box(-1.0, 1.0, (2,)))),
        "its actions are Dict('arm': Box(-1.0",
    ),
    "actions beyond 1": (
        dict(action_space=gym.spaces.Box(0.0, 10.0, (2,))),
        "expected a Box from -1 to 1",
    ),
    "no space of actions": (
        dict(action_space=None),
        "its actions are None, expected a Box from -1 to 1",
    ),
    "discrete observations": (
        dict(observation_space=gym.spaces.Discrete(16), observation=lambda self, reward=0.0: 3),
        "its observations are Discrete(16), expected a Box of one dimension",
    ),
    "a dict of observations": (
        dict(
            observation_space=gym.spaces.Dict(place=gym.spaces.Box(-1.0, 1.0, (3,))),
            observation=lambda self, reward=0.0: {"place": np.zeros(3)},
        ),
        "its observations are Dict('place': Box(-1.0, 1.0, (3,), float32)), expected a Box of one",
    ),
    "images": (
        dict(
            observation_space=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            observation=lambda self, reward=0.0: np.zeros((8, 8, 3), np.uint8),
        ),
        "its observations are Box(0, 255, (8, 8, 3), uint8), expected a Box of one dimension",
    ),
    "tasks": (dict(task_dim=2), "is (2, 2) in its row, but its environment has (2, 1)"),
    "tasks as a vector": (
        dict(sample_tasks=staticmethod(lambda rng, n: rng.uniform(size=n))),
        "is (2, 1) in its row, but its environment has (2,)",
    ),
    "another number of tasks": (
        dict(sample_tasks=staticmethod(lambda rng, n: np.zeros((7, 1)))),
        "is (2, 1) in its row, but its environment has (7, 1)",
    ),
    "a reward for each action": (
        dict(step=lambda self, action: (self.observation(), np.zeros(2), False, False, {})),
        "a reward of shape (2,), expected one number",
    ),
    "an end for each action": (
        dict(step=lambda self, action: (self.observation(), 0.0, np.zeros(2), False, {})),
        "a `terminated` of shape (2,), expected one number",
    ),
    "no number as a reward": (
        dict(step=lambda self, action: (self.observation(), "much", False, False, {})),
        "could not convert string",
    ),
    "a reward that is None": (
        dict(step=lambda self, action: (self.observation(), None, False, False, {})),
        "NaN or infinite",
    ),
    "NaN": (
        dict(observation=lambda self, reward=0.0: np.array([0, np.nan, 0])),
        "observation or reward is NaN or infinite",
    ),
    "too large for float32": (
        dict(observation=lambda self, reward=0.0: np.array([0, 1e300, 0])),
        "observation or reward is NaN or infinite",
    ),
    "a step of four": (
        dict(step=lambda self, action: (self.observation(), 0.0, False, {})),
        "not enough values to unpack",
    ),
    "a reset without info": (
        dict(reset=lambda self, seed=None, options=None: np.zeros(3)),
        "cannot be used",
    ),
    "a reset without a seed": (
        dict(reset=lambda self: (np.zeros(3), {})),
        "unexpected keyword argument 'seed'",
    ),
    "arguments": (
        dict(__init__=lambda self, level: None),
        "missing 1 required positional argument: 'level'",
    ),
    "it ends the program": (
        dict(set_task=lambda self, task: sys.exit(0)),
        "called sys.exit(0), so that the run did not end",
    ),
    "an error of its own": (
        dict(set_task=lambda self, task: {}[str(task.shape)]),
        "KeyError: '(1,)'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_environment_that_does_not_fit_its_row_is_refused_before_the_first_step(
    register, data, tmp_path, name
):
    changes, words = REFUSED[name]
    register(**changes)
    for refused in (lambda: envs.make("Mine"), lambda: train(pearl, data, tmp_path)):
        sentence = refusal(refused)
        assert words in sentence and "Mine" in sentence
    assert (
        str(data) in refusal(train, smac, data, tmp_path) or "Mine" in sentence
    )  # or the data do not fit the row
    assert not list(tmp_path.glob("*__*"))


@pytest.mark.parametrize("env_class", [object, Family.sample_tasks, "Mine", "a b:Mine", ":", None])
def test_what_is_no_environment_is_refused(env_class):
    assert "it is no subclass of gymnasium.Env" in refusal(envs.Spec, env_class, **SIZES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.0, None, "3", True, 1_000_001, 2**70])
def test_a_row_is_made_of_whole_numbers(size, value):
    words = f"{size} of a task family is {value!r}, expected a whole number from 1 to 1,000,000"
    assert words in refusal(envs.Spec, Family, **SIZES | {size: value})


@pytest.mark.parametrize(
    "value",
    [
        [-1.0, 1.0],
        np.array([-1.0, 1.0]),
        np.zeros((1000, 1000)),
        None,
        3.0,
        "ab",
        (),
        (1.0,),
        (-1.0, 0.0, 1.0),
        (1.0, -1.0),
        (0.0, 0.0),
        (0.0, float("nan")),
        ("a", "b"),
        (None, 1.0),
        (np.zeros(2), np.ones(2)),
    ],
    ids=str,
)
def test_the_range_of_tasks_is_a_tuple_of_two_numbers(value):
    sentence = refusal(envs.Spec, Family, **SIZES, task_range=value)
    assert sentence.startswith("task_range of a task family is ")
    assert sentence.endswith("expected a tuple of two numbers, the lower one first")


@pytest.mark.parametrize("value", [(0, 1), (np.float32(-2), np.int64(5)), (-np.inf, np.inf)])
def test_ranges_of_tasks_that_are_taken(register, value):
    register(task_range=value)
    assert envs.lookup("Mine").task_range == value
    envs.make("Mine")


@pytest.mark.parametrize("value", [None, [], "smac", 3, {"macaw": None}, {"macaw": [("lr", 1.0)]}])
def test_presets_are_a_dict_of_dicts(value):
    sentence = refusal(envs.Spec, Family, **SIZES, presets=value)
    assert sentence.startswith("presets of a task family are ")
    assert sentence.endswith("expected a dict {script: {flag: value}}")


@pytest.mark.parametrize("missing", ["set_task", "sample_tasks"])
def test_a_class_without_what_a_family_needs_is_refused(missing):
    methods = {"set_task": Family.set_task, "sample_tasks": staticmethod(Family.sample_tasks)}
    del methods[missing]
    assert f"it has no {missing}" in refusal(envs.Spec, type("Half", (gym.Env,), methods), **SIZES)


# ----- Episodes end at the row's horizon


@pytest.mark.parametrize("limit, length", [(None, 4), (4, 4), (9, 4), (3, 3)])
def test_episodes_end_at_the_horizon_at_the_latest(register, limit, length):
    """An environment without a limit, with the row's, with a longer and with a shorter one."""

    def step(self, action):
        obs, reward, *_ = Family.step(self, action)
        return obs, reward, False, limit is not None and self.t >= limit, {}

    register(step=step)
    episodes = envs.Episodes([envs.make("Mine")], torch.Generator().manual_seed(0))
    while episodes.live:
        episodes.step(torch.zeros(1, 2))
    (path,) = episodes.paths()
    assert len(path["actions"]) == length and not path["terminals"].any()


@pytest.mark.parametrize("script", [smac, pearl], ids=lambda script: script.__name__)
def test_an_environment_that_never_ends_fills_no_buffer(data, tmp_path, script):
    """Of one transition that is asked for, a whole episode of four comes."""
    flags = dict(online_iterations=3, updates_per_iteration=2, tasks_per_iteration=2)
    _, run = train(script, data, tmp_path, **flags)
    last = (run / "eval.csv").read_text().splitlines()[-1].split(",")
    assert int(last[1]) == 3 * 2 * (4 + 4) + (3 * 4 if script is pearl else 0)


def test_data_may_be_longer_than_an_episode_of_the_agent(register, tmp_path, quick):
    register(horizon=9)
    entries, train_tasks, test_tasks = make_paths()
    register(horizon=4)
    buffers.save_dataset(
        tmp_path / "long.npz", "Mine", train_tasks, test_tasks, entries, [], "test"
    )
    assert {
        len(path["actions"])
        for _, path in buffers.load_dataset("Mine", tmp_path / "long.npz")["rl"]
    } == {9}
    for script in (smac, macaw, borel):
        train(script, tmp_path / "long.npz", tmp_path)


# ----- Datasets: what `save_dataset` writes, `load_dataset` reads


def fill(kind, rng, shape):
    """Numbers of one kind."""
    if kind == "one-hot":
        return (
            np.eye(shape[-1])[rng.integers(shape[-1], size=shape[:-1])]
            if len(shape) > 1
            else np.zeros(shape)
        )
    return {
        "normal": lambda: rng.normal(size=shape),
        "constant": lambda: np.full(shape, 0.25),
        "zero": lambda: np.zeros(shape),
        "large": lambda: 1e30 * rng.normal(size=shape),
        "tiny": lambda: 1e-42 * rng.normal(size=shape),
        "integers": lambda: rng.integers(-9, 9, shape),
    }[kind]()


def random_dataset(rng, kind, num_tasks, episodes, length, obs_dim, action_dim, encoder):
    """Entries of both parts, as somebody may give them.

    They are float64, their tasks come in any order, and their lengths are 1 to `length`.
    """
    parts = []
    for part in ("rl", "encoder")[: 1 + encoder]:
        entries = []
        for task in [*range(num_tasks), *rng.integers(num_tasks, size=num_tasks * (episodes - 1))]:
            steps = length if part == "rl" else int(rng.integers(1, length + 1))
            path = {
                "obs": fill(kind, rng, (steps + 1, obs_dim)),
                "rewards": fill(kind, rng, (steps,)),
            }
            path["actions"] = rng.choice([-1.0, 1.0, 0.5, -0.0], (steps, action_dim))
            path["terminals"] = (
                np.arange(steps) == steps - 1 if rng.random() < 0.5 else np.zeros(steps)
            )
            entries.append((int(task), path))
        parts.append([entries[i] for i in rng.permutation(len(entries))])
    return parts[0], parts[1] if encoder else []


DATASETS = {
    # kind of numbers; tasks, episodes a task, steps an episode; sizes of observation and action;
    # whether there is an encoder part
    "one-hot": ("one-hot", 10, 3, 200, 100, 1, False),
    "constant": ("constant", 10, 3, 200, 100, 6, False),
    "more than a reader unpacks": ("constant", 10, 3, 100, 30, 2, True),
    "all zero": ("zero", 10, 3, 100, 30, 1, True),
    "one task": ("normal", 1, 2, 7, 3, 2, False),
    "one task, one episode of one step": ("normal", 1, 1, 1, 1, 1, False),
    "one step each": ("normal", 20, 5, 1, 2, 2, True),
    "large": ("large", 3, 2, 5, 4, 2, True),
    "denormal": ("tiny", 3, 2, 5, 4, 2, False),
    "whole numbers": ("integers", 3, 2, 5, 4, 2, True),
    "many tasks": ("normal", 1000, 1, 3, 2, 1, False),
    **{f"drawn, {seed}": seed for seed in range(8)},
}


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_saved_is_what_is_loaded(register, tmp_path, monkeypatch, name):
    if name == "more than a reader unpacks":
        monkeypatch.setattr(plumbing.files, "MAX_UNPACKED", 100_000)
    case, rng = DATASETS[name], np.random.default_rng(len(name))
    if isinstance(case, int):
        rng = np.random.default_rng(case)
        kind = rng.choice(["normal", "constant", "one-hot", "integers", "large"])
        case = kind, *rng.integers(1, [9, 5, 30, 12, 5]).tolist(), bool(rng.integers(2))
    _, num_tasks, _, _, obs_dim, action_dim, _ = case

    def observation(self, reward=0.0):
        return np.zeros(obs_dim)

    register(
        observation=observation,
        action_space=gym.spaces.Box(-1.0, 1.0, (action_dim,)),
        step=lambda self, action: (self.observation(), 0.0, False, False, {}),
        obs_dim=obs_dim,
        action_dim=action_dim,
    )
    rl, encoder = random_dataset(rng, *case)
    train_tasks, test_tasks = rng.uniform(-100, 100, (num_tasks, 1)), rng.uniform(-9, 9, (2, 1))
    file, other = tmp_path / "a.npz", tmp_path / "b.npz"
    buffers.save_dataset(
        file, "Mine", train_tasks, test_tasks, rl, encoder, "python 'my file'.py --größe 1"
    )
    found = buffers.load_dataset("Mine", file)
    assert (found["train_tasks"] == train_tasks).all() and (found["test_tasks"] == test_tasks).all()
    assert found["command"] == "python 'my file'.py --größe 1"
    for part, entries in (("rl", rl), ("encoder", encoder)):
        assert [task for task, _ in found[part]] == [task for task, _ in entries]
        for (_, read), (_, given) in zip(found[part], entries):
            for column, values in given.items():
                assert read[column].shape == values.shape
                assert (
                    read[column] == values.astype(bool if column == "terminals" else np.float32)
                ).all()
    parts = {part: found[part] for part in ("train_tasks", "test_tasks", "rl", "encoder")}
    buffers.save_dataset(other, "Mine", **parts, command=found["command"])
    assert buffers.load_dataset("Mine", other)["sha256"] == found["sha256"]
    parts["test_tasks"] = parts["test_tasks"] + 1e-9  # one number differs
    buffers.save_dataset(other, "Mine", **parts, command=found["command"])
    assert buffers.load_dataset("Mine", other)["sha256"] != found["sha256"]
    buffer = buffers.from_dataset(found, "Mine")
    for task in range(0, num_tasks, max(1, num_tasks // 5)):
        wanted = np.concatenate([path["actions"] for number, path in rl if number == task])
        sizes = {where: int(buffer.sizes[where][task]) for where in buffer.sizes}
        held = sum(len(path["actions"]) for number, path in (encoder or rl) if number == task)
        assert sizes == {"rl": len(wanted), "encoder": held, "offline": held}


# ----- Memory grows with transitions, and not with tasks


def num_bytes(buffer):
    """Of all tensors of a replay buffer."""
    tensors = [
        *buffer.fields.values(),
        *buffer.index.values(),
        *buffer.starts.values(),
        *buffer.sizes.values(),
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_memory_is_flat_in_the_number_of_tasks():
    """benchmark/robustness/memory.py measures it in processes, at 500,000 transitions."""
    ten, thousand = (num_bytes(buffers.ReplayBuffer(tasks, 20, 6, 50_000)) for tasks in (10, 1_000))
    data = 50_000 * 4 * (2 * 20 + 6 + 2)
    assert data < ten <= thousand < 1.01 * ten and ten < 1.2 * data


def test_the_measured_memory_is_flat_in_the_number_of_tasks():
    """What benchmark/robustness/memory.py found: no column differs by a tenth between 10 and 1000 tasks."""
    rows = re.findall(
        r"^\| ([\d,]+) \| (.*) \|$",
        (ROOT / "benchmark" / "results" / "memory.md").read_text(),
        re.M,
    )
    assert [tasks for tasks, _ in rows] == ["10", "100", "1,000"]
    columns = np.array([[float(cell) for cell in cells.split(" | ")] for _, cells in rows])
    assert (
        columns.shape == (3, 4)
        and (columns.max(0) < 1.1 * columns.min(0)).all()
        and (columns > 50).all()
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_rooms_of_the_tasks_hold_whatever_comes_in_whatever_order(seed):
    """Up to the last transition: one task gets most, or all as much, in steps of one or many."""
    rng, num_tasks, capacity = np.random.default_rng(seed), 7, 400
    buffer, expected = buffers.ReplayBuffer(num_tasks, 1, 1, capacity), {}
    likely = rng.dirichlet(np.full(num_tasks, (0.1, 0.3, 1.0, 10.0, 1.0)[seed]))
    longest = (1, 1, 5, 3, 60)[seed]
    while buffer.used < capacity:
        task, steps = (
            int(rng.choice(num_tasks, p=likely)),
            min(rng.integers(1, longest + 1), capacity - buffer.used),
        )
        numbers, where = np.arange(buffer.used, buffer.used + steps), rng.integers(1, 4)
        path = {
            "obs": np.zeros((steps + 1, 1)),
            "actions": numbers[:, None],
            "rewards": numbers,
            "terminals": numbers,
        }
        buffer.extend([(task, path)], rl=bool(where & 1), encoder=bool(where & 2))
        for bit, name in ((1, "rl"), (2, "encoder")):
            if where & bit:
                expected.setdefault((name, task), []).extend(numbers.tolist())
        if rng.random() < 0.02:
            buffer.clear_encoder(task)
            expected.pop(("encoder", task), None)
        if rng.random() < 0.05:  # as a resumed run
            copy = buffers.ReplayBuffer(num_tasks, 1, 1, capacity)
            copy.load_state_dict(buffer.state_dict())
            buffer = copy
    for name in ("rl", "encoder"):
        assert buffer.next_free[name] <= len(buffer.index[name])
        for task in range(num_tasks):
            start, size = int(buffer.starts[name][task]), int(buffer.sizes[name][task])
            held = buffer.fields["rewards"][buffer.index[name][start : start + size].long(), 0]
            assert held.tolist() == expected.get((name, task), [])


# ----- Names: asking for a family that is not there gives one sentence, whoever asks


@pytest.mark.parametrize(
    "env_id", ["Mine", "my:Mine", "HoperParam", "", ":", "json:Mine", "no.module:Mine", ".a:B"]
)
def test_an_unknown_family_is_one_sentence_on_every_way(env_id, tmp_path):
    for ask in (
        lambda: envs.lookup(env_id),
        lambda: envs.make(env_id),
        lambda: envs.sample_tasks(env_id, 3),
        lambda: buffers.load_dataset(env_id, str(ROOT / "datasets" / "PointDirection.npz")),
        lambda: buffers.save_dataset(
            tmp_path / "a.npz", env_id, [[0.0]], [[0.0]], *make_data_of_one_step(), "test"
        ),
        lambda: buffers.train(smac, env_id=env_id),
        lambda: parse_args(borel.Args, borel.PRESETS, ["--env-id", env_id]),
    ):
        sentence = refusal(ask)
        assert re.search("there is no environment|importing|--env-id is empty", sentence)
    assert "the nearest are HopperParam," in refusal(envs.lookup, "HoperParam")


def make_data_of_one_step():
    path = {
        "obs": np.zeros((2, 3)),
        "actions": np.zeros((1, 2)),
        "rewards": np.zeros(1),
        "terminals": np.zeros(1),
    }
    return [(0, path)], []


def test_a_command_with_an_unknown_family_ends_with_code_2_and_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smac_offline_online.py", "--env-id", "nowhere:Mine"])
    with pytest.raises(SystemExit) as end:
        buffers.launch(smac.main, smac.Args, smac.PRESETS)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert (
        err.startswith("error: nowhere:Mine: importing nowhere failed, ModuleNotFoundError")
        and err.count("\n") == 1
    )


MODULE = """
import sys, gymnasium, numpy, envs
sys.path.append("of the module")
class {name}(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    sample_tasks = staticmethod(lambda rng, num_tasks: rng.uniform(size=(num_tasks, 1)))
    def set_task(self, task):
        import {helper}  # from the same folder, and only now
    def reset(self, *, seed=None, options=None):
        return numpy.zeros(3), {{}}
    def step(self, action):
        return numpy.zeros(3), 1.0, False, False, {{}}
envs.register("{name}", envs.Spec({name}, 3, 2, 1, 4, 3, 2, presets={presets}))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(name, family, presets) writes a module into the working directory.

    The directory is not on the path.
    """

    def write(name, family, presets="{}"):
        (tmp_path / f"{name}.py").write_text(
            MODULE.format(name=family, helper=f"{name}_helper", presets=presets)
        )
        (tmp_path / f"{name}_helper.py").write_text("")
        made.extend((name, f"{name}_helper"))

    made, families, path = [], set(envs.SPECS), sys.path[:]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.path[:] = path
    for name in made:
        sys.modules.pop(name, None)
    for name in set(envs.SPECS) - families:
        del envs.SPECS[name]
        del gym.registry[f"smac/{name}-v0"]


def test_a_family_of_a_module_in_the_working_directory(module, tmp_path, quick):
    """Data, a run, and resuming it from the command line and from Python need the module's name."""
    module("own_one", "Own", "{'smac_offline_online': {'latent_dim': 3, 'offline_steps': 7}}")
    before = sys.path[:]
    env = envs.make("own_one:Own")
    assert type(env.unwrapped).__module__ == "own_one"
    assert sorted(set(sys.path) - set(before)) == sorted(
        {"of the module", str(tmp_path)} - set(before)
    )
    module("own_more", "More")
    envs.lookup("own_more:More")
    assert sys.path.count(str(tmp_path)) == 1 and sys.path.count("of the module") == 2
    entries, train_tasks, test_tasks = make_paths("own_one:Own")
    file = tmp_path / "own.npz"
    buffers.save_dataset(file, "own_one:Own", train_tasks, test_tasks, entries, [], "test")
    for env_id in ("own_one:Own", "Own"):
        assert len(buffers.load_dataset(env_id, file)["rl"]) == 6

    command = ["--env-id", "own_one:Own", "--dataset", str(file), "--run-dir", str(tmp_path)]
    args = parse_args(smac.Args, smac.PRESETS, command)
    assert (args.latent_dim, args.offline_steps, args.tau) == (3, 7, 0.005)
    _, run = train(smac, file, tmp_path, "own_one:Own", online_iterations=0)
    again = [*command[2:], "--resume", str(run), "--online-iterations", "1"]
    assert "give --env-id own_one:Own as well" in refusal(
        parse_args, smac.Args, smac.PRESETS, again
    )
    assert "give --env-id own_one:Own as well" in refusal(
        buffers.train, smac, resume=str(run), dataset=str(file)
    )
    args = parse_args(smac.Args, smac.PRESETS, [*again, "--env-id", "own_one:Own"])
    assert (
        args.policy_hidden == TINY["policy_hidden"] and args.latent_dim == TINY["latent_dim"]
    )  # the run's flags
    agent = buffers.train(
        smac, env_id="own_one:Own", dataset=str(file), resume=str(run), online_iterations=1
    )
    assert agent.policy.net[0].out_features == TINY["policy_hidden"][0]
    assert (run / "eval.csv").read_text().splitlines()[-1].split(",")[0] == "3"
    sentence = refusal(
        buffers.train, smac, env_id="own_one:Own", dataset=str(file), resume=str(run), lr=0.5
    )
    assert "--lr is 0.0003 in the run to resume and cannot become 0.5" in sentence


def test_a_module_does_not_get_the_family_of_the_same_name_here(module):
    module("own_two", "HopperParam")
    sentence = refusal(envs.lookup, "own_two:HopperParam")
    assert "HopperParam is a family of envs.py" in sentence
    assert envs.lookup("HopperParam").env_class is envs.HopperParam


def test_a_module_that_can_not_be_imported_is_one_sentence(module, tmp_path):
    for text, words in {
        "1 / 0": "ZeroDivisionError: division by zero",
        "import sys; sys.exit(0)": "own_three.py, line 1, called sys.exit(0), so that the run did",
        "exit(3)": "own_three.py, line 1, called sys.exit(3)",
        "def f(:": "SyntaxError",
        "import no_such_thing": "No module named 'no_such_thing'",
        "import envs\nenvs.register('a b', None)": "'a b' cannot be the name of a task family",
    }.items():
        (tmp_path / "own_three.py").write_text(text)
        assert "own_three:Own: importing own_three failed" in (
            sentence := refusal(envs.lookup, "own_three:Own")
        )
        assert words in sentence
        sys.path_importer_cache.clear()


def test_a_row_that_cannot_be_used_is_one_line(module, tmp_path, monkeypatch, capsys):
    """It is found while its module is imported; what is wrong needs no traceback."""
    text = "import envs\nenvs.Spec(envs.PointDirection, 4, 2, 1, 2**70, 3, 2)\n"
    (tmp_path / "own_long.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["smac_offline_online.py", "--env-id", "own_long:Mine"])
    with pytest.raises(SystemExit) as end:
        buffers.launch(smac.main, smac.Args, smac.PRESETS)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith("error: own_long:Mine: importing own_long failed: horizon of a task")


def test_a_row_may_name_its_class(module, tmp_path):
    """It is imported by `lookup`, and what it is is checked then."""
    module("own_four", "Here")
    text = "import envs\n"
    for name, path in {
        "There": "own_four:Here",
        "Nowhere": "own_four:There",
        "NoModule": "own_five:Here",
        "NoFamily": "own_four:sys",
    }.items():
        text += f"envs.register('{name}', envs.Spec('{path}', 3, 2, 1, 4, 3, 2))\n"
    (tmp_path / "own_rows.py").write_text(text)
    assert envs.lookup("own_rows:There").env_class.__name__ == "Here"
    assert type(envs.make("There").unwrapped).__module__ == "own_four"
    assert envs.sample_tasks("own_rows:There", 3).shape == (3, 1)
    assert refusal(envs.make, "Nowhere") == "Nowhere: there is no class own_four:There"
    assert "importing own_five failed, ModuleNotFoundError" in refusal(envs.make, "NoModule")
    assert "it is no subclass of gymnasium.Env" in refusal(envs.make, "NoFamily")


def test_a_family_may_be_registered_again_in_a_notebook(register):
    """The cell is changed and run once more: the new class, sizes and presets hold."""
    register(presets={"smac_offline_online": {"latent_dim": 3}})
    assert len(envs.make("Mine").reset(seed=0)[0]) == 3
    register(observation=lambda self, reward=0.0: np.zeros(5), obs_dim=5, horizon=2, presets={})
    env = envs.make("Mine")
    assert (
        len(env.reset(seed=0)[0]) == 5 and not env.step(np.zeros(2))[3] and env.step(np.zeros(2))[3]
    )
    assert parse_args(smac.Args, smac.PRESETS, ["--env-id", "Mine"]).latent_dim == 5


def test_a_preset_of_a_row_must_be_a_flag_of_its_script(register):
    register(presets={"smac_offline_online": {"learning_rate": 1.0}, "macaw": {"gamma": 2.0}})
    words = "a preset of Mine names learning_rate, and smac_offline_online has no such flag"
    assert words in refusal(parse_args, smac.Args, smac.PRESETS, ["--env-id", "Mine"])
    assert words in refusal(buffers.train, smac, env_id="Mine")
    assert "--gamma is 2.0" in refusal(buffers.train, macaw, env_id="Mine")
    assert parse_args(borel.Args, borel.PRESETS, ["--env-id", "Mine"]).gamma == 0.99


def test_what_a_flag_says_comes_before_the_preset_of_a_row_and_that_before_the_default(register):
    register(presets={"meta_bc": {"lr": 0.5, "offline_steps": 9}})
    args = parse_args(meta_bc.Args, meta_bc.PRESETS, ["--env-id", "Mine", "--lr", "0.25"])
    assert (args.lr, args.offline_steps, args.rl_batch) == (0.25, 9, 256)
    words = buffers.command_line(args, meta_bc.__file__, meta_bc.PRESETS)
    assert words == "python meta_bc.py --env-id Mine --lr 0.25"


def test_a_wrapper_is_refused_since_its_set_task_would_not_be_called(register):
    """Tasks are set on `env.unwrapped`."""

    class Wrapped(gym.Wrapper):
        sample_tasks, set_task = staticmethod(Family.sample_tasks), Family.set_task

        def __init__(self):
            super().__init__(envs.PointDirection())

    with pytest.raises(InputError, match="is a wrapper, whose set_task would not be called"):
        register(base=Wrapped, obs_dim=4, action_dim=2)


def test_a_reset_without_options_is_refused_before_training(register):
    """Gymnasium's wrappers, which every script has around an environment, pass them on."""

    class Without(Family):
        def reset(self, seed=None):
            return super().reset(seed=seed)

    register(base=Without)
    assert "unexpected keyword argument 'options'" in refusal(envs.make, "Mine")


@pytest.mark.parametrize("name", ["Slow", "Lazy"])  # that of the class, and another
def test_a_family_may_be_made_of_a_shipped_one(name, monkeypatch):
    class Slow(envs.PointDirection):
        def step(self, action):
            return super().step(np.asarray(action) / 2)

    monkeypatch.setattr(envs, "SPECS", dict(envs.SPECS))
    envs.register(name, envs.Spec(Slow, 4, 2, 1, 50, 3, 2))
    env = envs.make(name)
    env.unwrapped.set_task([0.0])
    env.reset(seed=0)
    assert env.step(np.ones(2))[1] == pytest.approx(0.1)  # velocity .2 * .5 along x
    gym.registry.pop(f"smac/{name}-v0")


# ----- From Python: presets and checks, and everything is then as it was


def test_train_has_the_presets_of_the_command_line(monkeypatch):
    for module in SCRIPTS:
        monkeypatch.setattr(module, "main", lambda args: args)
        for env_id in ("PointDirection", "SawyerManipulation", "HopperParam"):
            for preset in ({}, {"preset": "short"}):
                words = [
                    "--env-id",
                    env_id,
                    *(f"--{name}={value}" for name, value in preset.items()),
                    "--seed",
                    "5",
                ]
                expected = parse_args(module.Args, module.PRESETS, words)
                assert buffers.train(module, env_id=env_id, seed=5, **preset) == expected
    args = buffers.train(smac, env_id="PointDirection", tau=1.0)
    assert (args.q_hidden, args.lr, args.kl_coef, args.offline_steps, args.tau) == (
        (128, 128),
        1e-3,
        0.002,
        3_000,
        1.0,
    )
    assert buffers.train(smac) == smac.Args()


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(learning_rate=1.0), "smac_offline_online has no flag learning_rate"),
        (dict(lr=-1.0), "--lr is -1.0, it must be above 0"),
        (dict(lr="fast"), "--lr is 'fast', which is not of its type"),
        (dict(q_hidden=[8, 8]), "--q-hidden is [8, 8], which is not of its type"),
        (dict(preset="shrt"), "--preset is 'shrt', which is not of its type"),
        (dict(tau=2.0), "--tau is 2.0"),
        (dict(meta_batch=10_000, rl_batch=10_000), "must be at most 32768"),
        (dict(dataset="nowhere.npz"), "there is no dataset at nowhere.npz"),
        (dict(resume="nowhere"), "there is no file nowhere"),
    ],
)
def test_train_checks_its_flags(tmp_path, flags, words):
    flags = {"env_id": "PointDirection", "run_dir": str(tmp_path)} | flags
    assert words in refusal(buffers.train, smac, **flags)
    assert list(tmp_path.iterdir()) == []


def surroundings():
    """What a run could leave behind in the process that it is called in."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    threads, hooks = (
        threading.enumerate(),
        (threading.excepthook, sys.excepthook, sys.unraisablehook),
    )
    precision, modes = (
        torch.get_float32_matmul_precision(),
        (torch.is_grad_enabled(), torch.get_default_dtype()),
    )
    return (
        handlers,
        threads,
        hooks,
        precision,
        modes,
        torch.get_num_threads(),
        tqdm.monitor_interval,
        os.getcwd(),
    )


def stop(number):
    """In place of `update`: this signal, twice if it is SIGINT."""

    def update(*args, **flags):
        for _ in range(2 if number == signal.SIGINT else 1):
            os.kill(os.getpid(), number)
        return update.of_the_script(*args, **flags)

    update.of_the_script = smac.update
    return update


def fail(*args, **flags):
    raise ZeroDivisionError


def full_disk(*args, **flags):
    raise OSError(28, "No space left on device")


ENDS = {
    "it runs to its end": (None, None, None),
    "an error": ("update", fail, ZeroDivisionError),
    "an error in an evaluation": ("evaluate", fail, ZeroDivisionError),
    "a full disk": ("evaluate", full_disk, InputError),
    "NaN": (
        "update",
        lambda *args, **flags: {"losses/critic": torch.tensor(float("nan"))},
        InputError,
    ),
    "Ctrl-C, twice": ("update", stop(signal.SIGINT), KeyboardInterrupt),
    "SIGTERM": ("update", stop(signal.SIGTERM), SystemExit),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_leaves_the_process_as_it_was_however_it_ends(data, tmp_path, monkeypatch, end):
    name, function, error = ENDS[end]
    mine, before_all = lambda *_: None, signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, mine)  # as a notebook or another library may have set it
    monkeypatch.setattr(threading, "excepthook", lambda hook: None)
    torch.set_float32_matmul_precision("high")
    try:
        if name:
            monkeypatch.setattr(smac, name, function)
        before = surroundings()
        if error:
            with pytest.raises(error):
                train(smac, data, tmp_path)
        else:
            train(smac, data, tmp_path)
        assert surroundings() == before
        monkeypatch.undo()
        if error:  # nothing holds the folder: the run that broke off goes on, or begins again
            folder = tmp_path / "Mine__smac_offline_online__1"
            again = {"resume": str(folder)} if (folder / "checkpoint.npz").exists() else {}
            assert bool(again) == (end == "SIGTERM")
            train(smac, data, tmp_path, **again)
    finally:
        signal.signal(signal.SIGTERM, before_all)
        torch.set_float32_matmul_precision("highest")


def test_a_run_in_a_thread(data, tmp_path):
    """It cannot take signals there: they stay with the main thread. It ends like any other."""
    before, results = surroundings(), []

    def work():
        results.append(train(smac, data, tmp_path / "thread")[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert surroundings() == before and len(results) == 1
    agent, _ = train(smac, data, tmp_path / "main")
    assert all(
        torch.equal(value, agent.state_dict()[name])
        for name, value in results[0].state_dict().items()
    )
    assert (tmp_path / "thread" / "Mine__smac_offline_online__1" / "checkpoint.npz").exists()


def test_refusals_in_a_thread_leave_no_folder(data, tmp_path):
    sentences = []
    thread = threading.Thread(
        target=lambda: sentences.append(refusal(train, smac, data, tmp_path / "a", gamma=3.0))
    )
    thread.start()
    thread.join()
    assert "--gamma is 3.0" in sentences[0] and not (tmp_path / "a").exists()
