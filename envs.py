"""Task families of SMAC (Pong et al., "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974), Appendix C.2: Gymnasium's MuJoCo robots, a robot arm in PyBullet, and a point mass
for teaching and tests. A family is a class and a row of sizes, see `Spec` and the rows at the end of this file.

    env = envs.make("HopperParam")                          # actions in [-1, 1], float32 observations, 200 steps
    tasks = envs.sample_tasks("HopperParam", num_tasks=55)  # (55, 41)
    env.unwrapped.set_task(tasks[0])
    obs, info = env.reset(seed=0)

Importing this file also registers every family with Gymnasium: `gymnasium.make("smac/HopperParam-v0")`.

The constant bonus for staying alive is paid on every step, also on the one where the robot falls. Gymnasium's v5
robots pay it only while healthy, so here they pay none (`healthy_reward=0`) and each `step` below adds it.
Where this file and the paper's text differ, a comment says `PAPER: ... CODE: ...`.
"""

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

for number in range(
    3
):  # a stream that is closed: GLFW, below, needs it open, and the next file would take its place
    try:
        os.fstat(number)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

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

from plumbing.errors import InputError


@dataclass(frozen=True)
class Spec:
    """The row of a task family: its class, its sizes, and what the scripts shall change for it.

    The class is a Gymnasium environment whose constructor needs no argument. It has `set_task(task)`, which raises
    ValueError if there is no such task, and `sample_tasks(rng, num_tasks)` -> (num_tasks, task_dim), a static method
    that gets a numpy RandomState. It may have `sparse = True` (reward 0 in a step that achieves the goal, else less:
    an episode succeeds if its last reward is 0); `ground_velocity = (column, seconds)`: the first of the two
    columns of an observation that hold the velocity over ground, and the seconds of a step; and `one_process = True` if
    its episodes can not be played in forked processes, as evaluations do where PyTorch has more than one thread.
    """

    env_class: type
    obs_dim: int
    action_dim: int
    task_dim: int  # length of one task, the array that `set_task` takes
    horizon: int  # environment steps after which an episode is truncated
    num_train_tasks: int  # the first rows of sample_tasks(env_id, num_train_tasks + num_test_tasks)
    num_test_tasks: int  # the last rows
    task_range: tuple[float, float] = (
        -100.0,
        100.0,
    )  # other numbers are no task: a guard against damaged files
    presets: Mapping = field(
        default_factory=dict, hash=False
    )  # {script: {flag: value}}, of one's own family

    def __post_init__(self):
        if not (isinstance(self.env_class, type) and issubclass(self.env_class, gym.Env)):
            raise InputError(
                f"{self.env_class} is no task family: it is no subclass of gymnasium.Env"
            )
        missing = [
            name for name in ("set_task", "sample_tasks") if not hasattr(self.env_class, name)
        ]
        if missing:
            raise InputError(f"{self.env_class} is no task family: it has no {', '.join(missing)}")
        for name in (
            "obs_dim",
            "action_dim",
            "task_dim",
            "horizon",
            "num_train_tasks",
            "num_test_tasks",
        ):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise InputError(
                    f"{name} of a task family is {getattr(self, name)}, expected a whole number above 0"
                )
        ground = getattr(self.env_class, "ground_velocity", None)
        if ground and not 0 <= ground[0] <= self.obs_dim - 2:
            words = f"a column below {self.obs_dim - 1} of its observations, and seconds"
            raise InputError(f"ground_velocity of {self.env_class} is {ground}, expected {words}")


SPECS: dict[
    str, Spec
] = {}  # filled by `register`; the paper's families are at the end of this file


def register(env_id: str, spec: Spec) -> None:
    """Add a task family: from then on `--env-id {env_id}` works in every script, or `--env-id module:{env_id}` if the
    call stands in a module of one's own."""
    if not env_id.isidentifier():
        raise InputError(
            f"{env_id!r} can not be the name of a task family: it must be a Python name"
        )
    if env_id in SPECS and SPECS[env_id].env_class.__module__ in (__name__, "sawyer"):
        raise InputError(f"{env_id} is a family of envs.py: one's own needs another name")
    SPECS[env_id] = spec
    gym.registry.pop(f"smac/{env_id}-v0", None)
    # Gymnasium's own checker would check every step.
    gym.register(
        f"smac/{env_id}-v0",
        spec.env_class,
        max_episode_steps=spec.horizon,
        disable_env_checker=True,
    )


def short_name(env_id: str) -> str:
    """The key of SPECS in `env_id`, which is one or "module:key"."""
    return env_id.rpartition(":")[2]


def lookup(env_id: str) -> Spec:
    """The row of a family; "module:key" imports the module, also from the working directory, where it is registered.

    Raises InputError: there is no such module or key.
    """
    module, _, name = str(env_id).rpartition(":")
    if module and module not in sys.modules:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # for good: the module may import more when it is used
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a module of somebody else raises
            raise InputError(
                f"{env_id}: importing {module} failed, {type(error).__name__}: {error}"
            ) from error
    if name not in SPECS:
        nearest = ", ".join(difflib.get_close_matches(name, SPECS, n=3, cutoff=0.0))
        raise InputError(
            f"there is no environment {env_id}, the nearest are {nearest}; one's own is module:Name"
        )
    return SPECS[name]


def make(env_id: str, render_mode: str | None = None) -> gym.Env:
    """Build one environment of the family `env_id`, truncated at its horizon.

    Choose the task with `env.unwrapped.set_task(task)`, then reset; the families of this file begin with a nominal one.
    Raises InputError: there is no such family, or its environment does not fit its row.
    """
    check_family(lookup(env_id))
    return gym.make(
        f"smac/{short_name(env_id)}-v0", **({"render_mode": render_mode} if render_mode else {})
    )


@functools.cache
def check_family(spec: Spec) -> None:
    """Compare tasks, one reset and one step with the row, so that a mistake costs a second. Raises InputError."""
    name = spec.env_class.__name__

    def compare(size, found, wanted):
        if found != wanted:
            raise InputError(
                f"{name}: {size} is {wanted} in its row, but its environment has {found}"
            )

    try:
        tasks = np.asarray(spec.env_class.sample_tasks(np.random.RandomState(0), 2))
        compare("task_dim, of two tasks,", tasks.shape, (2, spec.task_dim))
        env = spec.env_class()
        env.unwrapped.set_task(tasks[0])
        obs, _ = env.reset(seed=0)
        compare("obs_dim", np.shape(obs), (spec.obs_dim,))
        compare("action_dim", env.action_space.shape, (spec.action_dim,))
        box = env.action_space
        if not isinstance(box, gym.spaces.Box) or (box.low != -1).any() or (box.high != 1).any():
            raise InputError(f"{name}: its actions are {box}, expected a Box from -1 to 1")
        next_obs, reward, terminated, _, _ = env.step(np.zeros(spec.action_dim, np.float32))
        compare("obs_dim of a step", np.shape(next_obs), (spec.obs_dim,))
        if np.asarray(reward).size != 1 or np.asarray(terminated).size != 1:
            raise InputError(
                f"{name}: a step pays a reward of shape {np.shape(reward)}, expected one number"
            )
        with np.errstate(over="ignore"):
            numbers = np.array([*np.ravel(obs), *np.ravel(next_obs), *np.ravel(reward)], np.float32)
        if not np.isfinite(numbers).all():
            raise InputError(
                f"{name}: an observation or reward is NaN or infinite, or no number of float32"
            )
        env.close()
    except InputError:
        raise
    except Exception as error:  # whatever an environment of somebody else raises
        raise InputError(f"{name} can not be used: {type(error).__name__}: {error}") from error


def sample_tasks(env_id: str, num_tasks: int, seed: int = 1337) -> np.ndarray:
    """Draw tasks, independent of any global random state.

    Args:
        env_id: a key of SPECS.
        num_tasks: rows to draw; in the families of this file the first n do not depend on how many more are drawn.
        seed: the default makes CheetahVelocity (130 tasks) and AntDirection (120) the lists of the authors' release.

    Returns float64 (num_tasks, task_dim): target velocity in m/s, direction in rad, a Param family's multipliers, or a
    Sawyer scene and behaviour.
    Raises InputError if `env_id` is unknown. Source: Appendix C.2.
    """
    rng = np.random.RandomState(
        seed
    )  # the legacy generator: its stream is frozen, and made the released lists
    return np.asarray(lookup(env_id).env_class.sample_tasks(rng, num_tasks), np.float64)


# ----- Evaluation: episodes side by side, and where they lead


def make_evaluation(
    env_id: str, train_tasks, test_tasks, num_train: int = 10, num_test: int = 0, repeats: int = 4
):
    """The tasks of an evaluation: at most num_test test tasks (0: as many as the family's row says) and num_train
    training tasks, `repeats` times each.

    Returns {"test": (row of each task, environments set to them), "train": ...}, E of each.
    """
    pairs, num_test = {}, min(num_test or lookup(env_id).num_test_tasks, len(test_tasks))
    for split, tasks, num in (("test", test_tasks, num_test), ("train", train_tasks, num_train)):
        # Evenly spaced in the first number of a task: tasks drawn at random would favour policies that ignore it.
        middles = (np.arange(num) + 0.5) / num * len(tasks)
        spaced = np.unique(np.argsort(tasks[:, 0])[middles.astype(int)])
        numbers = np.repeat(range(num) if num == len(tasks) else spaced, repeats).tolist()
        pairs[split] = numbers, [make(env_id) for _ in numbers]
        for number, env in zip(*pairs[split]):
            env.unwrapped.set_task(tasks[number])
    return pairs


class Episodes:
    """One episode in each of E environments, side by side: what the agent saw, did and got.

    Args:
        rng: gives the seeds of the resets.
        read_rewards: if False the environments' rewards are dropped unread, and the trajectories have none.
    """

    def __init__(self, env_list, rng, read_rewards=True):
        self.env_list, self.live = env_list, list(range(len(env_list)))
        seeds = torch.randint(2**31 - 1, (len(env_list),), generator=rng).tolist()
        names = ["obs", "actions", "terminals"] + ["rewards"] * read_rewards
        self.records = [{name: [] for name in names} for _ in env_list]
        for record, env, seed in zip(self.records, env_list, seeds):
            record["obs"].append(
                np.array(env.reset(seed=seed)[0], np.float32)
            )  # a copy: some change it in place

    def last(self, name, numbers) -> torch.Tensor:
        """The last entry of some episodes' obs, actions, rewards or terminals: (len(numbers), .)."""
        values = np.array([self.records[i][name][-1] for i in numbers], np.float32)
        return torch.from_numpy(values.reshape(len(numbers), -1))

    def obs(self) -> torch.Tensor:
        """What the live episodes see now: (live, o)."""
        return self.last("obs", self.live)

    def step(self, actions: torch.Tensor) -> None:
        """Act in the live episodes: actions (live, a)."""
        live, self.live = self.live, []
        for i, action in zip(live, actions.cpu().numpy()):
            obs, reward, terminated, truncated, _ = self.env_list[i].step(
                action.copy()
            )  # some change it in place
            got = {
                "obs": np.array(obs, np.float32),
                "actions": action,
                "terminals": terminated,
                "rewards": reward,
            }
            for name, values in self.records[i].items():
                values.append(got[name])
            if not (terminated or truncated):
                self.live.append(i)

    def paths(self) -> list:
        """E trajectories: obs (L+1, o), actions (L, a), terminals (L,) and, if they were read, rewards (L,)."""
        paths = [
            {k: np.array(values, np.float32) for k, values in record.items()}
            for record in self.records
        ]
        return [
            path | {k: path[k].reshape(-1) for k in ("terminals", "rewards") if k in path}
            for path in paths
        ]


def ground_paths(env_id: str, paths: list) -> np.ndarray:
    """Where E trajectories of a family with `ground_velocity` lead, in metres from the start: (E, L+1, 2), NaN after
    their end, L at most the horizon. The robots do not observe where they are, so this is the sum of the velocities in
    the observations."""
    spec = lookup(env_id)
    first, seconds = spec.env_class.ground_velocity
    velocities = [
        path["obs"][: spec.horizon + 1, first : first + 2] for path in paths
    ]  # data may have longer episodes
    ground = np.full((len(paths), max(map(len, velocities)), 2), np.nan, np.float32)
    for row, velocity in zip(ground, velocities):
        row[: len(velocity)] = np.cumsum(velocity * seconds, axis=0)
    return ground


# ----- What the classes share


def set_up(env: gym.Env, task) -> None:
    """Give `env` the float32 spaces of its family, unbounded observations and actions in [-1, 1], and a first task."""
    shipped = (parent for parent in type(env).__mro__ if parent.__module__ in (__name__, "sawyer"))
    env.env_id = next(
        parent.__name__ for parent in shipped if parent.__name__ in SPECS
    )  # also of a class made of it
    spec = SPECS[env.env_id]
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, (spec.obs_dim,), np.float32)
    env.action_space = gym.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)
    env.set_task(task)


def check_task(env_id: str, task) -> np.ndarray:
    """A float64 copy (task_dim,) of the task. Raises ValueError on another shape, and on NaN or infinity."""
    task, shape = np.array(task, dtype=np.float64), (SPECS[env_id].task_dim,)
    if task.shape != shape:
        raise ValueError(f"A task of {env_id} has shape {shape}, not {task.shape}.")
    if not np.isfinite(task).all():
        raise ValueError(f"A task of {env_id} must be finite, but this one holds NaN or infinity.")
    return task


def clip(action) -> np.ndarray:
    """The action in [-1, 1], in float64 so that the rewards have full precision."""
    return np.clip(np.asarray(action, np.float64), -1.0, 1.0)


# ----- Walker Param and Hopper Param: the dynamics differ from task to task, the reward does not


class RandomParams:
    """What both Param families add to Gymnasium's robot: reward dx/dt + 1 - 1e-3 |a|^2, and tasks that are physics."""

    @classmethod
    def sample_tasks(cls, rng, num_tasks):
        # PAPER: log-uniform on [1.5^-3, 1.5^3] for all four. CODE: base 1.3 for damping (also in the repository cited).
        nbody, nv, ngeom = cls.sizes
        base = np.repeat(
            [1.5, 1.5, 1.3, 1.5], [nbody, 3 * nbody, nv, 3 * ngeom]
        )  # mass, inertia, damping, friction
        return base ** rng.uniform(-3, 3, (num_tasks, len(base)))

    def _initialize_simulation(self):
        model, data = super()._initialize_simulation()
        # As in rand_param_envs, which the paper cites: .004 s x 4 = .016 s. The authors' own copy of it falls back on
        # Gym's .002 x 4 = .008.
        model.opt.timestep = 0.004
        # The bindings give views: without a copy, the "nominal" values would become those of the task set last.
        self.params = [model.body_mass, model.body_inertia, model.dof_damping, model.geom_friction]
        self.nominal = [param.copy() for param in self.params]
        self.scratch = mujoco.MjData(model)
        return model, data

    def set_task(self, task) -> None:
        """Scale the robot's nominal physics by `task` (task_dim,): multipliers of mass (nbody), inertia (nbody, 3),
        damping (nv), friction (ngeom, 3). Raises ValueError on a wrong shape, and on values not finite and positive."""
        task = check_task(self.env_id, task)
        if (task <= 0).any():
            raise ValueError(f"A task of {self.env_id} holds multipliers, which must be positive.")
        self.task = task
        ends = np.cumsum([param.size for param in self.params])[:-1]
        for param, nominal, factor in zip(self.params, self.nominal, np.split(task, ends)):
            param[:] = nominal * factor.reshape(nominal.shape)
        # Recompute what MuJoCo derives from mass and inertia. The authors' code does not, so there contacts and limits
        # keep the nominal robot's softness. mj_setConst overwrites the MjData it is given: never the live one.
        mujoco.mj_setConst(self.model, self.scratch)

    def _get_obs(self):
        return super()._get_obs().astype(np.float32)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(clip(action))
        info["reward_survive"] = 1.0
        return obs, float(reward + 1.0), terminated, truncated, info


class HopperParam(RandomParams, HopperEnv):
    """Observation (11,): z, angles of torso and 3 joints, all 6 velocities clipped to +-10. Task (41,): multipliers.
    The episode ends when the hopper falls (z <= .7, torso tilt >= .2 rad, or a state component >= 100)."""

    sizes = 5, 6, 5  # bodies (the world is one), degrees of freedom, geoms

    def __init__(self, **kwargs):
        super().__init__(healthy_reward=0.0, **kwargs)
        EzPickle.__init__(
            self, **kwargs
        )  # over the parent's positional arguments, which this class does not take
        set_up(self, np.ones(SPECS["HopperParam"].task_dim))


class WalkerParam(RandomParams, Walker2dEnv):
    """Observation (17,): z, angles of torso and 6 joints, all 9 velocities clipped to +-10. Task (65,): multipliers.
    The episode ends when the walker falls (z outside (.8, 2), or torso tilt >= 1 rad)."""

    sizes = 8, 9, 8

    def __init__(self, **kwargs):
        # The v5 default XML changes the friction of one foot; this one is the robot of the original.
        super().__init__(xml_file="walker2d.xml", healthy_reward=0.0, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, np.ones(SPECS["WalkerParam"].task_dim))


# ----- Cheetah Velocity


class CheetahVelocity(HalfCheetahEnv):
    """Observation (20,): z, torso and joint angles (8), all velocities (9), torso position x, y, z (3). Task (1,):
    target velocity in m/s. One step is .05 s. Never terminates."""

    @staticmethod
    def sample_tasks(rng, num_tasks):
        return rng.uniform(0, 3, num_tasks)[:, None]

    def __init__(self, **kwargs):
        super().__init__(forward_reward_weight=0.0, ctrl_cost_weight=0.05, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, [1.5])

    def _initialize_simulation(self):
        # half_cheetah.xml sets the total mass with an attribute that MuJoCo has deprecated: loading it prints a warning
        # and writes MUJOCO_LOG.TXT to the working directory. Scaling the masses afterwards gives the same model.
        spec = mujoco.MjSpec.from_file(self.fullpath)
        total_mass, spec.compiler.settotalmass = spec.compiler.settotalmass, -1.0  # -1: off
        model = spec.compile()
        if total_mass > 0:
            mujoco.mj_setTotalmass(model, total_mass)
            mujoco.mj_setConst(model, mujoco.MjData(model))
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)

    def set_task(self, task) -> None:
        """Aim at velocity task[0] in m/s; task is (1,). Raises ValueError on a wrong shape or a value not finite."""
        self.task = check_task(self.env_id, task)

    def _get_obs(self):
        return np.concatenate([super()._get_obs(), self.data.body("torso").xpos]).astype(np.float32)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(
            clip(action)
        )  # reward is -.05 |a|^2 so far
        # PAPER: "the absolute difference product". CODE: minus the absolute difference, minus the control cost above.
        info["reward_forward"] = -abs(info["x_velocity"] - self.task[0])
        return obs, float(reward + info["reward_forward"]), terminated, truncated, info


# ----- Ant Direction and Humanoid Direction


class Direction:
    """The task of the Direction families, (1,): an angle in rad."""

    @staticmethod
    def sample_tasks(rng, num_tasks):
        return rng.uniform(0, 2 * np.pi, num_tasks)[:, None]

    def set_task(self, task) -> None:
        """Head for angle task[0] in rad; task is (1,). Raises ValueError on a wrong shape or a value not finite."""
        self.task = check_task(self.env_id, task)
        self.direction = np.array([np.cos(self.task[0]), np.sin(self.task[0])])  # (2,)


class AntDirection(Direction, AntEnv):
    """Observation (27,): qpos[2:] (13: z, quaternion, 8 joints) and qvel (14). One step is .05 s. The episode ends when
    the torso's height leaves [.2, 1]."""

    ground_velocity = 13, 0.05

    @staticmethod
    def sample_tasks(rng, num_tasks):
        return np.deg2rad(rng.uniform(0, 360, num_tasks))[:, None]

    def __init__(self, **kwargs):
        off = dict(
            forward_reward_weight=0.0, healthy_reward=0.0, include_cfrc_ext_in_observation=False
        )
        super().__init__(**off, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, [0.0])

    def _get_obs(self):
        return super()._get_obs().astype(np.float32)

    def step(self, action):
        # PAPER: velocity . direction, and then -|x-velocity - target|, the Cheetah's. CODE: velocity . direction, minus
        # .5 |a|^2, minus 5e-4 |contact forces clipped to +-1|^2, plus 1; velocity is the torso's displacement / .05 s.
        obs, reward, terminated, truncated, info = super().step(clip(action))  # the costs
        velocity = np.array([info["x_velocity"], info["y_velocity"]])
        info["reward_forward"], info["reward_survive"] = velocity @ self.direction, 1.0
        return obs, float(reward + info["reward_forward"] + 1.0), terminated, truncated, info


class HumanoidDirection(Direction, HumanoidEnv):
    """Observation (376,): qpos[2:] (22), qvel (23), cinert (14, 10), cvel (14, 6), qfrc_actuator (23), 84 zeros. One
    step is .015 s. The episode ends when the torso's height leaves (1, 2)."""

    ground_velocity = 22, 0.015

    def __init__(self, **kwargs):
        # PAPER: the standard reward, with a cost on contact forces. CODE: no such cost, as if they were 0, which is
        # what mujoco-py reports with MuJoCo 2.0 and later (the authors' version is not on record).
        off = dict(forward_reward_weight=0.0, healthy_reward=0.0, contact_cost_weight=0.0)
        super().__init__(**off, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, [0.0])

    def _get_obs(self):
        data = self.data
        # PAPER: R^376, of which Gym's last 84 are contact forces. CODE: zeros, as above; the real ones reach 4,000 and
        # would swamp a network that reads raw observations. (The world's rows of cinert and cvel are zeros anyway.)
        parts = [
            data.qpos[2:],
            data.qvel,
            data.cinert.ravel(),
            data.cvel.ravel(),
            data.qfrc_actuator,
            np.zeros(84),
        ]
        return np.concatenate(parts).astype(np.float32)

    def step(self, action):
        # The motors take +-.4, and the control cost is charged on that scale.
        obs, reward, terminated, truncated, info = super().step(
            clip(action) * self.model.actuator_ctrlrange[:, 1]
        )
        velocity = np.array([info["x_velocity"], info["y_velocity"]])  # of the centre of mass
        info["reward_forward"], info["reward_survive"] = 1.25 * velocity @ self.direction, 5.0
        return obs, float(reward + info["reward_forward"] + 5.0), terminated, truncated, info


# ----- Point Direction: not in the paper; it shows the paper's effect in three minutes


class PointDirection(Direction, gym.Env):
    """A point mass on a plane. Observation (4,): x, y, vx, vy. Reward: velocity . direction. Never terminates."""

    ground_velocity = 2, 0.1
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.state = np.zeros(4)
        set_up(self, [0.0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.concatenate([self.np_random.normal(0.0, 0.01, 2), np.zeros(2)])
        return self.state.astype(np.float32), {}

    def step(self, action):
        velocity = 0.8 * self.state[2:] + 0.2 * clip(action)
        self.state = np.concatenate([self.state[:2] + 0.1 * velocity, velocity])
        return self.state.astype(np.float32), float(velocity @ self.direction), False, False, {}

    def render(self):
        """The plane from above, 12 m wide: the point black, and green where the task's direction leads."""
        if self.render_mode is None:
            return None
        y, x = np.mgrid[6:-6:480j, -6:6:480j]
        image = np.full((480, 480, 3), 255, np.uint8)
        for centre, colour in ((5.5 * self.direction, (0, 160, 0)), (self.state[:2], (0, 0, 0))):
            image[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 0.1] = colour
        return image


# ----- The families: class, sizes of observation, action and task, horizon, training and test tasks (Table 2)


register("HopperParam", Spec(HopperParam, 11, 3, 41, 200, 50, 5, (0.01, 100.0)))
register("WalkerParam", Spec(WalkerParam, 17, 6, 65, 200, 50, 5, (0.01, 100.0)))
register("CheetahVelocity", Spec(CheetahVelocity, 20, 6, 1, 200, 100, 30))
# PAPER: R^20, orientation and the joints' angles and velocities. CODE: 27, with height and torso velocities: the reward
# is linear in the torso's velocity, which cannot be told from the 20.
register("AntDirection", Spec(AntDirection, 27, 8, 1, 200, 100, 20))
register("HumanoidDirection", Spec(HumanoidDirection, 376, 17, 1, 200, 50, 5))

import sawyer  # noqa: F401  it registers SawyerManipulation and SawyerManipulation8

register("PointDirection", Spec(PointDirection, 4, 2, 1, 50, 50, 20))  # not in the paper
