"""Task families of SMAC, and episodes in them.

The families are those of Pong et al., "Offline Meta-Reinforcement Learning with Online
Self-Supervision", ICML 2022 (https://arxiv.org/abs/2107.03974), Appendix C.2: Gymnasium's MuJoCo
robots and a robot arm in PyBullet (sawyer.py). A point mass for teaching and tests joins them.
A family is a class and a row of sizes: see `Spec`, and the rows at the end of this file.

    env = envs.make("HopperParam")  # actions in [-1, 1], float32 observations, 200 steps
    tasks = envs.sample_tasks("HopperParam", num_tasks=55)  # (55, 41)
    env.unwrapped.set_task(tasks[0])
    obs, info = env.reset(seed=0)

Importing this file also registers every family with Gymnasium:
`gymnasium.make("smac/HopperParam-v0")`.

The constant bonus for staying alive is paid on every step, also on the one where the robot falls.
Gymnasium's v5 robots pay it only while healthy, so here they pay none (`healthy_reward=0`), and
each `step` below adds it.
Where this file and the paper's text differ, a comment says `PAPER: ... CODE: ...`.
"""

import dataclasses
import difflib
import functools
import importlib
import numbers
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

# --- Before MuJoCo is imported


def open_closed_streams() -> None:
    """Open standard input, output and error on the null device if the process began without them.

    The next file that is opened takes the lowest free number. If that is 0, 1 or 2, what is printed
    goes into this file, be it a dataset. GLFW, which MuJoCo imports, fails without these streams.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this descriptor
            os.set_inheritable(opened, True)  # so that programs started from here have it too


def import_mujoco() -> None:
    """Import MuJoCo, also where MUJOCO_GL names a way to draw that this machine does not have.

    MuJoCo loads what MUJOCO_GL names when it is imported, and the import fails if that fails.
    Training draws nothing, so MuJoCo is then imported without it. The variable is put back, because
    Gymnasium reads it when a first picture is drawn.
    """
    names = ("MUJOCO_GL", "PYOPENGL_PLATFORM")  # MuJoCo sets the second one
    given = {name: os.environ[name] for name in names if name in os.environ}
    try:
        importlib.import_module("mujoco")
    except Exception:  # it depends on what is missing
        for name in names:
            os.environ.pop(name, None)
        importlib.import_module("mujoco")
        os.environ.update(given)


open_closed_streams()
import_mujoco()

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from gymnasium.utils import EzPickle

from plumbing.errors import InputError, called_exit

# ===== Families by name

SIZES = ("obs_dim", "action_dim", "task_dim", "horizon", "num_train_tasks", "num_test_tasks")
MAX_SIZE = 1_000_000  # of each of them: with more, a run would not end, or not fit into memory


@dataclass(frozen=True)
class Spec:
    """The row of a task family: its class, its sizes, and its presets for the scripts.

    The class is a Gymnasium environment whose constructor needs no argument. It must have

        set_task(task): task is an array (task_dim,); raises ValueError if there is no such task;
        sample_tasks(rng, num_tasks) -> (num_tasks, task_dim): a static method that gets a numpy
            RandomState.

    It may have these attributes:

        sparse = True: the reward is 0 in a step that achieves the goal, and less in any other. An
            episode succeeds if its last reward is 0.
        ground_velocity = (column, seconds): the first of the two columns of an observation that
            hold the velocity over ground, and the seconds of a step.
        one_process = True: its episodes cannot be played in forked processes, as evaluations are
            where PyTorch has more than one thread.

    "module:Class" in place of the class is imported when `lookup` is asked for the family.
    Raises InputError: something of the row cannot be used.
    """

    env_class: type | str
    obs_dim: int
    action_dim: int
    task_dim: int  # length of one task, the array that `set_task` takes
    horizon: int  # environment steps after which an episode is truncated
    num_train_tasks: int  # the first rows of sample_tasks(env_id, num_train_tasks + num_test_tasks)
    num_test_tasks: int  # the last rows
    # A task has no other numbers than these. It is a guard against damaged files.
    task_range: tuple[float, float] = (-100.0, 100.0)
    # {script: {flag: value}}, for a family of one's own
    presets: Mapping = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not is_path_of_class(self.env_class):
            check_class(self.env_class)

        for name in SIZES:
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= MAX_SIZE:
                raise InputError(
                    f"{name} of a task family is {size!r}, "
                    f"expected a whole number from 1 to {MAX_SIZE:,}"
                )

        if not is_range(self.task_range):
            raise InputError(
                f"task_range of a task family is {shorten(self.task_range)}, "
                "expected a tuple of two numbers, the lower one first"
            )
        if not is_presets(self.presets):
            raise InputError(
                f"presets of a task family are {shorten(self.presets)}, "
                "expected a dict {script: {flag: value}}"
            )

        ground = getattr(self.env_class, "ground_velocity", None)
        if ground and not 0 <= ground[0] <= self.obs_dim - 2:
            raise InputError(
                f"ground_velocity of {self.env_class} is {ground}, expected "
                f"a column below {self.obs_dim - 1} of its observations, and seconds"
            )


def is_path_of_class(value) -> bool:
    """Whether it is "module:Class"."""
    if not isinstance(value, str):
        return False
    module, _, name = value.rpartition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def check_class(env_class) -> None:
    """Raises InputError: this class is no task family."""
    if not (isinstance(env_class, type) and issubclass(env_class, gym.Env)):
        raise InputError(f"{env_class} is no task family: it is no subclass of gymnasium.Env")
    if issubclass(env_class, gym.Wrapper):
        raise InputError(
            f"{env_class} is a wrapper, whose set_task would not be called, since tasks are set on "
            "env.unwrapped: make it a subclass of what it wraps"
        )
    missing = [name for name in ("set_task", "sample_tasks") if not hasattr(env_class, name)]
    if missing:
        raise InputError(f"{env_class} is no task family: it has no {', '.join(missing)}")


def is_range(value) -> bool:
    """Whether it is a tuple of two numbers, the lower one first."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    low, high = value
    both_are_numbers = isinstance(low, numbers.Real) and isinstance(high, numbers.Real)
    return both_are_numbers and bool(low < high)


def is_presets(value) -> bool:
    """Whether it is {script: {flag: value}}."""
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(flags, Mapping) for flags in value.values())


def shorten(value) -> str:
    """The beginning of a value's text, so that the rest of a sentence stays readable."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


SPECS: dict[str, Spec] = {}  # filled at the end of this file and by `register`


def register(env_id: str, spec: Spec) -> None:
    """Add a task family of one's own.

    From then on `--env-id {env_id}` works in every script, or `--env-id module:{env_id}` if the
    call stands in a module of one's own. A second call with the same name replaces the first.
    Raises InputError: the name is no Python name, or belongs to a family of this project.
    """
    if not env_id.isidentifier():
        raise InputError(
            f"{env_id!r} cannot be the name of a task family: it must be a Python name"
        )
    if env_id in SHIPPED:
        raise InputError(f"{env_id} is a family of envs.py: one's own needs another name")
    add_row(env_id, spec)


def add_row(env_id: str, spec: Spec) -> None:
    """Make a family known here and to Gymnasium."""
    SPECS[env_id] = spec
    gym_id = f"smac/{env_id}-v0"
    gym.registry.pop(gym_id, None)
    gym.register(
        gym_id,
        spec.env_class,
        max_episode_steps=spec.horizon,
        disable_env_checker=True,  # it would check every step
    )


def short_name(env_id: str) -> str:
    """The key of SPECS in `env_id`, which is one or "module:key"."""
    return env_id.rpartition(":")[2]


def lookup(env_id: str) -> Spec:
    """The row of a family, with its class imported.

    "module:key" first imports the module that registers the family, also from the working
    directory.
    Raises InputError: there is no such module, key or class.
    """
    module, _, name = str(env_id).rpartition(":")
    if module and module not in sys.modules:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # for good: the module may import more when it is used
        import_for(env_id, module)

    if name not in SPECS:
        nearest = ", ".join(difflib.get_close_matches(name, SPECS, n=3, cutoff=0.0))
        raise InputError(
            f"there is no environment {env_id}, the nearest are {nearest}; one's own is module:Name"
        )

    spec = SPECS[name]
    if isinstance(spec.env_class, str):
        module, _, class_name = spec.env_class.rpartition(":")
        env_class = getattr(import_for(env_id, module), class_name, None)
        if env_class is None:
            raise InputError(f"{env_id}: there is no class {spec.env_class}")
        spec = dataclasses.replace(spec, env_class=env_class)
    return spec


def import_for(env_id: str, module: str):
    """The module, imported because a family needs it. Raises InputError: the import failed."""
    failed = f"{env_id}: importing {module} failed"
    try:
        return importlib.import_module(module)
    except InputError as error:  # as of its row, which says all
        raise InputError(f"{failed}: {error}") from None
    except SystemExit as error:
        raise InputError(f"{failed}: {called_exit(error)}") from None
    except ModuleNotFoundError as error:  # a module's name may be misspelt: no need of a traceback
        raise InputError(f"{failed}, ModuleNotFoundError: {error}") from None
    except Exception as error:  # whatever a module of somebody else raises
        raise InputError(f"{failed}, {type(error).__name__}: {error}") from error


def make(env_id: str, render_mode: str | None = None) -> gym.Env:
    """Build one environment of the family `env_id`, truncated at its horizon.

    Choose the task with `env.unwrapped.set_task(task)`, then reset. The families of this project
    begin with a nominal task. Copies and pickles of their environments keep the task.
    Raises InputError: there is no such family, or its environment does not fit its row.
    """
    check_family(lookup(env_id))
    options = {"render_mode": render_mode} if render_mode else {}
    return gym.make(f"smac/{short_name(env_id)}-v0", **options)


@functools.cache
def check_family(spec: Spec) -> None:
    """Compare tasks, spaces, one reset and one step with the row, so that a mistake costs a second.

    Raises InputError: something does not fit, or the environment raises an error of its own.
    """
    name = spec.env_class.__name__
    try:
        check_environment(name, spec)
    except InputError:
        raise
    except SystemExit as error:
        raise InputError(f"{name} cannot be used: {called_exit(error)}") from None
    except Exception as error:  # whatever an environment of somebody else raises
        raise InputError(f"{name} cannot be used: {type(error).__name__}: {error}") from error


def check_environment(name: str, spec: Spec) -> None:
    """What `check_family` does, for a class of this name."""

    def compare(size, actual, expected):
        if actual != expected:
            raise InputError(
                f"{name}: {size} is {expected} in its row, but its environment has {actual}"
            )

    tasks = np.asarray(spec.env_class.sample_tasks(np.random.RandomState(0), 2))
    compare("task_dim, of two tasks,", tasks.shape, (2, spec.task_dim))
    env = spec.env_class()

    # --- Spaces come first: what else is wrong often follows from them.
    action_space = env.action_space
    is_box = isinstance(action_space, gym.spaces.Box)
    if not is_box or (action_space.low != -1).any() or (action_space.high != 1).any():
        raise InputError(
            f"{name}: its actions are {shorten(action_space)}, expected a Box from -1 to 1"
        )
    compare("action_dim", action_space.shape, (spec.action_dim,))
    obs_space = getattr(env, "observation_space", None)  # nothing here needs one
    is_box = isinstance(obs_space, gym.spaces.Box)
    if obs_space is not None and (not is_box or len(obs_space.shape) != 1):
        raise InputError(
            f"{name}: its observations are {shorten(obs_space)}, expected a Box of one dimension"
        )

    # --- One reset and one step
    env.unwrapped.set_task(tasks[0])
    obs, _ = env.reset(seed=0, options=None)  # as Gymnasium's wrappers call it
    compare("obs_dim", np.shape(obs), (spec.obs_dim,))
    next_obs, reward, terminated, _, _ = env.step(np.zeros(spec.action_dim, np.float32))
    compare("obs_dim of a step", np.shape(next_obs), (spec.obs_dim,))
    for what, value in (("a reward", reward), ("a `terminated`", terminated)):
        if np.asarray(value).size != 1:
            raise InputError(
                f"{name}: a step gives {what} of shape {np.shape(value)}, expected one number"
            )
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, and is refused
        values = np.array([*np.ravel(obs), *np.ravel(next_obs), *np.ravel(reward)], np.float32)
    if not np.isfinite(values).all():
        raise InputError(
            f"{name}: an observation or reward is NaN or infinite, or no number of float32"
        )
    env.close()


def sample_tasks(env_id: str, num_tasks: int, seed: int = 1337) -> np.ndarray:
    """Draw tasks, independent of any global random state. Source: Appendix C.2.

    Args:
        env_id: a key of SPECS.
        num_tasks: rows to draw; in the families of this project the first n do not depend on how
            many more are drawn.
        seed: the default makes CheetahVelocity (130 tasks) and AntDirection (120) the lists of the
            authors' release.

    Returns float64 (num_tasks, task_dim): target velocity in m/s, direction in rad, a Param
    family's multipliers, or a Sawyer scene and behaviour.
    Raises InputError: `env_id` is unknown.
    """
    # The legacy generator: its stream is frozen, and it made the released lists.
    rng = np.random.RandomState(seed)
    return np.asarray(lookup(env_id).env_class.sample_tasks(rng, num_tasks), np.float64)


# ===== Evaluation: episodes side by side, and where they lead


def make_evaluation(
    env_id: str, train_tasks, test_tasks, num_train: int = 10, num_test: int = 0, repeats: int = 4
) -> dict:
    """Choose the tasks of an evaluation, and build an environment for each of its episodes.

    Args:
        train_tasks, test_tasks: (., task_dim).
        num_train: training tasks, at most.
        num_test: test tasks, at most; 0 is the number in the family's row.
        repeats: environments of each task.

    Returns {"test": (E numbers of tasks, E environments set to them), "train": ...}.
    """
    num_test = num_test or lookup(env_id).num_test_tasks
    num_test = min(num_test, len(test_tasks))
    evaluation = {}
    for split, tasks, num_tasks in (
        ("test", test_tasks, num_test),
        ("train", train_tasks, num_train),
    ):
        chosen = np.repeat(spread(tasks, num_tasks), repeats).tolist()
        env_list = [make(env_id) for _ in chosen]
        for number, env in zip(chosen, env_list):
            env.unwrapped.set_task(tasks[number])
        evaluation[split] = (chosen, env_list)
    return evaluation


def spread(tasks, num_tasks: int) -> np.ndarray:
    """Numbers of at most `num_tasks` tasks, in ascending order, evenly spaced in their first entry.

    That is the velocity or the direction: tasks drawn at random would favour policies that ignore
    the task. In the Param and the Sawyer families the choice is as good as random: of a Param task
    the entry is the world's mass, which nothing depends on; on Sawyer it is a side, -1 or 1. (NumPy
    may order equal entries otherwise on a processor without AVX2; then these tasks of Sawyer are
    others.)
    """
    middles = (np.arange(num_tasks) + 0.5) / num_tasks * len(tasks)
    return np.unique(np.argsort(tasks[:, 0])[middles.astype(int)])


class Episodes:
    """One episode in each of E environments, side by side: what the agent saw, did and got.

    `live` are the numbers of the environments whose episode goes on.

    Args:
        rng: gives the seeds of the resets.
        read_rewards: if False the environments' rewards are dropped unread, and the trajectories
            have none.
    """

    def __init__(self, env_list, rng, read_rewards=True):
        self.env_list = env_list
        self.live = list(range(len(env_list)))
        names = ["obs", "actions", "terminals"]
        if read_rewards:
            names.append("rewards")
        self.records = [{name: [] for name in names} for _ in env_list]

        seeds = torch.randint(2**31 - 1, (len(env_list),), generator=rng).tolist()
        for record, env, seed in zip(self.records, env_list, seeds):
            obs, _ = env.reset(seed=seed)
            record["obs"].append(np.array(obs, np.float32))  # a copy: some change it in place

    def last(self, name, numbers) -> torch.Tensor:
        """The last obs, actions, rewards or terminals of some episodes: (len(numbers), .)."""
        values = np.array([self.records[i][name][-1] for i in numbers], np.float32)
        return torch.from_numpy(values.reshape(len(numbers), -1))

    def obs(self) -> torch.Tensor:
        """What the live episodes see now: (live, o)."""
        return self.last("obs", self.live)

    def step(self, actions: torch.Tensor) -> None:
        """Act in the live episodes: actions (live, a)."""
        were_live = self.live
        self.live = []
        for i, action in zip(were_live, actions.cpu().numpy()):
            # Some environments change the action that they get in place: they get a copy.
            obs, reward, terminated, truncated, _ = self.env_list[i].step(action.copy())
            record = self.records[i]
            record["obs"].append(np.array(obs, np.float32))
            record["actions"].append(action)
            # A truth value, whatever number the environment gives: the losses use 1 - terminal.
            terminated = bool(np.asarray(terminated).any())
            record["terminals"].append(terminated)
            if "rewards" in record:
                record["rewards"].append(reward)
            if not (terminated or truncated):
                self.live.append(i)

    def paths(self) -> list:
        """E trajectories, float32: obs (L+1, o), actions (L, a), terminals (L,), and rewards (L,)
        if they were read."""
        paths = []
        for record in self.records:
            path = {name: np.array(values, np.float32) for name, values in record.items()}
            for name in ("terminals", "rewards"):
                if name in path:
                    path[name] = path[name].reshape(-1)  # an environment may pay arrays (1,)
            paths.append(path)
        return paths


def random_episodes(env_list, rng) -> list:
    """One episode of uniform actions in each of E environments: E trajectories."""
    episodes = Episodes(env_list, rng)
    action_dim = env_list[0].action_space.shape[0]
    while episodes.live:
        actions = 2 * torch.rand(len(episodes.live), action_dim, generator=rng) - 1
        episodes.step(actions)
    return episodes.paths()


def ground_paths(env_id: str, paths: list) -> np.ndarray:
    """Where E trajectories of a family with `ground_velocity` lead, in metres from the start.

    The robots do not observe where they are, so this is the sum of the velocities in the
    observations.

    Returns (E, L+1, 2), NaN after the end of a trajectory, L at most the horizon.
    """
    spec = lookup(env_id)
    first, seconds = spec.env_class.ground_velocity
    longest = spec.horizon + 1  # data may have longer episodes
    velocities = [path["obs"][:longest, first : first + 2] for path in paths]
    ground = np.full((len(paths), max(map(len, velocities)), 2), np.nan, np.float32)
    for row, velocity in zip(ground, velocities):
        row[: len(velocity)] = np.cumsum(velocity * seconds, axis=0)
    return ground


# ===== What the classes share


def set_up(env: gym.Env, task) -> None:
    """Give `env` the float32 spaces of its family, and a first task.

    Observations are unbounded, actions lie in [-1, 1].
    """
    spec = SPECS[env.env_id]
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, (spec.obs_dim,), np.float32)
    env.action_space = gym.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)
    env.set_task(task)


def check_task(env_id: str, task) -> np.ndarray:
    """A float64 copy (task_dim,) of the task.

    Raises ValueError: the task has another shape, or holds NaN or infinity.
    """
    task = np.array(task, dtype=np.float64)
    shape = (SPECS[env_id].task_dim,)
    if task.shape != shape:
        raise ValueError(f"A task of {env_id} has shape {shape}, not {task.shape}.")
    if not np.isfinite(task).all():
        raise ValueError(f"A task of {env_id} must be finite, but this one holds NaN or infinity.")
    return task


def clip(action) -> np.ndarray:
    """The action in [-1, 1], in float64 so that the rewards have full precision."""
    return np.clip(np.asarray(action, np.float64), -1.0, 1.0)


class Robot:
    """What the five MuJoCo families add to Gymnasium's robots: copies keep the task.

    `copy.deepcopy` and pickle of Gymnasium's robots call the constructor, and no more. Here the
    task, the simulation's state and the random generator's state come along.
    """

    def __getstate__(self):
        kept = {
            "task": self.task,
            "data": self.data,
            "np_random": self._np_random,
            "np_random_seed": self._np_random_seed,
        }
        return super().__getstate__() | kept  # EzPickle's: the constructor's arguments

    def __setstate__(self, state):
        super().__setstate__(state)  # calls the constructor
        self.set_task(state["task"])
        mujoco.mj_copyData(self.data, self.model, state["data"])
        self._np_random = state["np_random"]
        self._np_random_seed = state["np_random_seed"]


# ===== Walker Param and Hopper Param: the dynamics differ from task to task, the reward does not


class RandomParams(Robot):
    """What both Param families share: reward dx/dt + 1 - 1e-3 |a|^2, and tasks that are physics."""

    @classmethod
    def sample_tasks(cls, rng, num_tasks):
        nbody, nv, ngeom = cls.sizes
        # PAPER: log-uniform on [1.5^-3, 1.5^3] for all four. CODE: base 1.3 for damping (also in
        # the repository cited).
        bases = [1.5, 1.5, 1.3, 1.5]  # of mass, inertia, damping, friction
        base = np.repeat(bases, [nbody, 3 * nbody, nv, 3 * ngeom])
        return base ** rng.uniform(-3, 3, (num_tasks, len(base)))

    def _initialize_simulation(self):
        model, data = super()._initialize_simulation()
        # As in rand_param_envs, which the paper cites: .004 s x 4 = .016 s. The authors' own copy
        # of it falls back on Gym's .002 x 4 = .008.
        model.opt.timestep = 0.004
        # MuJoCo's bindings give views: without a copy, the "nominal" values would become those of
        # the task set last.
        self.params = [model.body_mass, model.body_inertia, model.dof_damping, model.geom_friction]
        self.nominal = [param.copy() for param in self.params]
        self.scratch = mujoco.MjData(model)
        return model, data

    def set_task(self, task) -> None:
        """Scale the robot's nominal physics by `task` (task_dim,).

        A task holds multipliers of mass (nbody), inertia (nbody, 3), damping (nv) and friction
        (ngeom, 3). Raises ValueError: a wrong shape, or a value that is not finite and positive.
        """
        task = check_task(self.env_id, task)
        if (task <= 0).any():
            raise ValueError(f"A task of {self.env_id} holds multipliers, which must be positive.")
        self.task = task

        ends = np.cumsum([param.size for param in self.params])[:-1]
        factors = np.split(task, ends)
        for param, nominal, factor in zip(self.params, self.nominal, factors):
            param[:] = nominal * factor.reshape(nominal.shape)

        # Recompute what MuJoCo derives from mass and inertia. The authors' code does not, so there
        # contacts and limits keep the nominal robot's softness. mj_setConst overwrites the MjData
        # that it is given: it must never be the live one.
        mujoco.mj_setConst(self.model, self.scratch)

    def _get_obs(self):
        return super()._get_obs().astype(np.float32)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(clip(action))
        info["reward_survive"] = 1.0
        return obs, float(reward + 1.0), terminated, truncated, info


class HopperParam(RandomParams, HopperEnv):
    """A hopper. Observation (11,): z, angles of torso and 3 joints, all 6 velocities clipped to
    +-10. Task (41,): multipliers. One step is .016 s.

    The episode ends when the hopper falls: z <= .7, torso tilt >= .2 rad, or a component of the
    state >= 100.
    """

    env_id = "HopperParam"
    sizes = 5, 6, 5  # bodies (the world is one), degrees of freedom, geoms

    def __init__(self, **kwargs):
        super().__init__(healthy_reward=0.0, **kwargs)
        # Gymnasium's class has noted its own arguments for copies: here they are replaced by
        # those that this class takes.
        EzPickle.__init__(self, **kwargs)
        set_up(self, np.ones(SPECS["HopperParam"].task_dim))


class WalkerParam(RandomParams, Walker2dEnv):
    """A walker. Observation (17,): z, angles of torso and 6 joints, all 9 velocities clipped to
    +-10. Task (65,): multipliers. One step is .016 s.

    The episode ends when the walker falls: z outside (.8, 2), or torso tilt >= 1 rad.
    """

    env_id = "WalkerParam"
    sizes = 8, 9, 8

    def __init__(self, **kwargs):
        # The v5 default XML changes the friction of one foot. This one is the original's robot.
        super().__init__(xml_file="walker2d.xml", healthy_reward=0.0, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, np.ones(SPECS["WalkerParam"].task_dim))


# ===== Cheetah Velocity


class CheetahVelocity(Robot, HalfCheetahEnv):
    """A half cheetah that shall run at a velocity. It never terminates. One step is .05 s.

    Observation (20,): z, torso and joint angles (8), all velocities (9), torso position (3).
    Task (1,): target velocity in m/s.
    """

    env_id = "CheetahVelocity"

    @staticmethod
    def sample_tasks(rng, num_tasks):
        return rng.uniform(0, 3, num_tasks)[:, None]

    def __init__(self, **kwargs):
        super().__init__(forward_reward_weight=0.0, ctrl_cost_weight=0.05, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, [1.5])

    def _initialize_simulation(self):
        # half_cheetah.xml sets the total mass with an attribute that MuJoCo has deprecated. Loading
        # it prints a warning and writes MUJOCO_LOG.TXT to the working directory. Scaling the masses
        # afterwards gives the same model.
        spec = mujoco.MjSpec.from_file(self.fullpath)
        total_mass = spec.compiler.settotalmass
        spec.compiler.settotalmass = -1.0  # off
        model = spec.compile()
        if total_mass > 0:
            mujoco.mj_setTotalmass(model, total_mass)
            mujoco.mj_setConst(model, mujoco.MjData(model))
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)

    def set_task(self, task) -> None:
        """Aim at velocity task[0] in m/s; task is (1,).

        Raises ValueError: a wrong shape, or a value that is not finite.
        """
        self.task = check_task(self.env_id, task)

    def _get_obs(self):
        torso = self.data.body("torso").xpos
        return np.concatenate([super()._get_obs(), torso]).astype(np.float32)

    def step(self, action):
        # Gymnasium's reward is -.05 |a|^2 here.
        obs, reward, terminated, truncated, info = super().step(clip(action))
        # PAPER: "the absolute difference product". CODE: minus the absolute difference, minus the
        # control cost above.
        info["reward_forward"] = -abs(info["x_velocity"] - self.task[0])
        return obs, float(reward + info["reward_forward"]), terminated, truncated, info


# ===== Ant Direction and Humanoid Direction


class Direction:
    """The task of the Direction families, (1,): an angle in rad."""

    @staticmethod
    def sample_tasks(rng, num_tasks):
        return rng.uniform(0, 2 * np.pi, num_tasks)[:, None]

    def set_task(self, task) -> None:
        """Head for angle task[0] in rad; task is (1,).

        Raises ValueError: a wrong shape, or a value that is not finite.
        """
        self.task = check_task(self.env_id, task)
        self.direction = np.array([np.cos(self.task[0]), np.sin(self.task[0])])  # (2,)


class AntDirection(Direction, Robot, AntEnv):
    """An ant that shall run in a direction. One step is .05 s.

    Observation (27,): qpos[2:] (13: z, quaternion, 8 joints) and qvel (14). Task (1,): an angle in
    rad. The episode ends when the torso's height leaves [.2, 1].
    """

    env_id = "AntDirection"
    ground_velocity = 13, 0.05

    @staticmethod
    def sample_tasks(rng, num_tasks):
        # In degrees, as in the authors' list: drawn in rad, some would differ in their last bits
        return np.deg2rad(rng.uniform(0, 360, num_tasks))[:, None]

    def __init__(self, **kwargs):
        super().__init__(
            forward_reward_weight=0.0,
            healthy_reward=0.0,
            include_cfrc_ext_in_observation=False,
            **kwargs,
        )
        EzPickle.__init__(self, **kwargs)
        set_up(self, [0.0])

    def _get_obs(self):
        return super()._get_obs().astype(np.float32)

    def step(self, action):
        # Gymnasium's reward is minus the costs here.
        obs, reward, terminated, truncated, info = super().step(clip(action))
        # PAPER: velocity . direction, and then -|x-velocity - target|, the Cheetah's. CODE:
        # velocity . direction, minus .5 |a|^2, minus 5e-4 |contact forces clipped to +-1|^2,
        # plus 1; velocity is the torso's displacement / .05 s.
        velocity = np.array([info["x_velocity"], info["y_velocity"]])
        info["reward_forward"] = velocity @ self.direction
        info["reward_survive"] = 1.0
        return obs, float(reward + info["reward_forward"] + 1.0), terminated, truncated, info


class HumanoidDirection(Direction, Robot, HumanoidEnv):
    """A humanoid that shall run in a direction. One step is .015 s.

    Observation (376,): qpos[2:] (22), qvel (23), cinert (14, 10), cvel (14, 6), qfrc_actuator (23),
    84 zeros. Task (1,): an angle in rad. The episode ends when the torso's height leaves (1, 2).
    """

    env_id = "HumanoidDirection"
    ground_velocity = 22, 0.015

    def __init__(self, **kwargs):
        # PAPER: the standard reward, with a cost on contact forces. CODE: no such cost, as if they
        # were 0, which is what mujoco-py reports with MuJoCo 2.0 and later (the authors' version is
        # not on record).
        super().__init__(
            forward_reward_weight=0.0, healthy_reward=0.0, contact_cost_weight=0.0, **kwargs
        )
        EzPickle.__init__(self, **kwargs)
        set_up(self, [0.0])

    def _get_obs(self):
        data = self.data
        parts = [
            data.qpos[2:],
            data.qvel,
            data.cinert.ravel(),  # the world's rows of this and of cvel are zeros
            data.cvel.ravel(),
            data.qfrc_actuator,
            # PAPER: R^376, of which Gym's last 84 are contact forces. CODE: zeros, as above; the
            # real ones reach 4,000 and would swamp a network that reads raw observations.
            np.zeros(84),
        ]
        return np.concatenate(parts).astype(np.float32)

    def step(self, action):
        # The motors take +-.4, and the control cost is charged on that scale.
        control = clip(action) * self.model.actuator_ctrlrange[:, 1]
        obs, reward, terminated, truncated, info = super().step(control)
        velocity = np.array([info["x_velocity"], info["y_velocity"]])  # of the centre of mass
        info["reward_forward"] = 1.25 * velocity @ self.direction
        info["reward_survive"] = 5.0
        return obs, float(reward + info["reward_forward"] + 5.0), terminated, truncated, info


# ===== Point Direction: not in the paper; it runs the whole method in three minutes


class PointDirection(Direction, gym.Env):
    """A point mass on a plane that shall move in a direction. It never terminates.

    Observation (4,): x, y, vx, vy. Task (1,): an angle in rad. Reward: velocity . direction.
    """

    env_id = "PointDirection"
    ground_velocity = 2, 0.1
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.state = np.zeros(4)
        set_up(self, [0.0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        place = self.np_random.normal(0.0, 0.01, 2)
        self.state = np.concatenate([place, np.zeros(2)])
        return self.state.astype(np.float32), {}

    def step(self, action):
        velocity = 0.8 * self.state[2:] + 0.2 * clip(action)
        place = self.state[:2] + 0.1 * velocity
        self.state = np.concatenate([place, velocity])
        reward = float(velocity @ self.direction)
        return self.state.astype(np.float32), reward, False, False, {}

    def render(self):
        """The plane from above, 12 m wide: the point is black, the green dot shows the way."""
        if self.render_mode is None:
            return None
        y, x = np.mgrid[6:-6:480j, -6:6:480j]
        image = np.full((480, 480, 3), 255, np.uint8)
        green, black = (0, 160, 0), (0, 0, 0)
        for centre, colour in ((5.5 * self.direction, green), (self.state[:2], black)):
            image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.1] = colour
        return image


# ===== The families of this project
# Class, sizes of observation, action and task, horizon, training and test tasks (Table 2), range
# of a task's numbers where it has one

SHIPPED = {
    "HopperParam": Spec(HopperParam, 11, 3, 41, 200, 50, 5, (0.01, 100.0)),
    "WalkerParam": Spec(WalkerParam, 17, 6, 65, 200, 50, 5, (0.01, 100.0)),
    "CheetahVelocity": Spec(CheetahVelocity, 20, 6, 1, 200, 100, 30),
    # PAPER: R^20, orientation and the joints' angles and velocities. CODE: 27, with height and
    # torso velocities: the reward is linear in the torso's velocity, which the 20 do not tell.
    "AntDirection": Spec(AntDirection, 27, 8, 1, 200, 100, 20),
    "HumanoidDirection": Spec(HumanoidDirection, 376, 17, 1, 200, 50, 5),
    # sawyer.py is imported when it is asked for, and PyBullet only by its first environment.
    "SawyerManipulation": Spec("sawyer:SawyerManipulation", 13, 4, 9, 50, 50, 10),
    "SawyerManipulation8": Spec("sawyer:SawyerManipulation8", 13, 4, 9, 50, 50, 10),  # Figure 9
    "PointDirection": Spec(PointDirection, 4, 2, 1, 50, 50, 20),  # not in the paper
}
for env_id, spec in SHIPPED.items():
    add_row(env_id, spec)
