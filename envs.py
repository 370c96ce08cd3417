"""Task families of SMAC (Pong et al., "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974), Appendix C.2, on Gymnasium's MuJoCo robots; and a point mass for teaching and tests.

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
from dataclasses import dataclass

import gymnasium as gym
import imageio
import mujoco
import numpy as np
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from gymnasium.utils import EzPickle
from gymnasium.wrappers import RenderCollection


@dataclass(frozen=True)
class Spec:
    """Sizes of one task family (Table 2 and Appendix C.2). Training tasks are the first rows of
    `sample_tasks(env_id, num_train_tasks + num_test_tasks)`, test tasks the last."""

    obs_dim: int
    action_dim: int
    task_dim: int
    """length of one task, the array that `set_task` takes"""
    horizon: int
    """environment steps after which an episode is truncated"""
    num_train_tasks: int
    num_test_tasks: int
    task_range: tuple[float, float] = (-100.0, 100.0)
    """numbers outside of it are no task: a guard against damaged files, wider than what `sample_tasks` draws from"""


SPECS: dict[str, Spec] = {
    "HopperParam": Spec(11, 3, 41, 200, 50, 5, (0.01, 100.0)),
    "WalkerParam": Spec(17, 6, 65, 200, 50, 5, (0.01, 100.0)),
    "CheetahVelocity": Spec(20, 6, 1, 200, 100, 30),
    # PAPER: R^20, orientation and the joints' angles and velocities. CODE: 27, with height and torso velocities: the
    # reward is linear in the torso's velocity, which cannot be told from the 20.
    "AntDirection": Spec(27, 8, 1, 200, 100, 20),
    "HumanoidDirection": Spec(376, 17, 1, 200, 50, 5),
    "PointDirection": Spec(4, 2, 1, 50, 50, 20),  # not in the paper
}

# Numbers of bodies (the world is one), degrees of freedom and geoms; a Param task multiplies their mass (nbody),
# inertia (nbody, 3), damping (nv) and friction (ngeom, 3), and is the concatenation of the four, flattened.
PARAM_SIZES = {"HopperParam": (5, 6, 5), "WalkerParam": (8, 9, 8)}

# First of the two columns of an observation that hold the velocity over ground, and the seconds of a step
GROUND_VELOCITY = {"AntDirection": (13, 0.05), "HumanoidDirection": (22, 0.015), "PointDirection": (2, 0.1)}


def make(env_id: str, render_mode: str | None = None) -> gym.Env:
    """Build one environment of the family `env_id`, set to a nominal task.

    Args:
        env_id: a key of SPECS.
        render_mode: None or "rgb_array".

    Returns an env with actions in [-1, 1] (clipped), float32 observations (obs_dim,) and truncation at the horizon.
    Choose the task with `env.unwrapped.set_task(task)`, then reset.
    Raises ValueError if `env_id` is unknown.
    """
    lookup(env_id)
    return gym.make(f"smac/{env_id}-v0", render_mode=render_mode)


def sample_tasks(env_id: str, num_tasks: int, seed: int = 1337) -> np.ndarray:
    """Draw tasks; the first n rows do not depend on how many more are drawn, nor on any global random state.

    Args:
        env_id: a key of SPECS.
        num_tasks: rows to draw.
        seed: the default makes CheetahVelocity (130 tasks) and AntDirection (120) the lists of the authors' release.

    Returns float64 (num_tasks, task_dim): target velocity in m/s, direction in rad, or a Param family's multipliers.
    Raises ValueError if `env_id` is unknown. Source: Appendix C.2.
    """
    task_dim = lookup(env_id).task_dim
    rng = np.random.RandomState(seed)  # the legacy generator: its stream is frozen, and made the released lists
    if env_id == "CheetahVelocity":
        return rng.uniform(0, 3, num_tasks)[:, None]
    if env_id == "AntDirection":
        return np.deg2rad(rng.uniform(0, 360, num_tasks))[:, None]
    if env_id in PARAM_SIZES:
        nbody, nv, ngeom = PARAM_SIZES[env_id]
        # PAPER: log-uniform on [1.5^-3, 1.5^3] for all four. CODE: base 1.3 for damping (also in the repository cited).
        base = np.repeat([1.5, 1.5, 1.3, 1.5], [nbody, 3 * nbody, nv, 3 * ngeom])  # mass, inertia, damping, friction
        return base ** rng.uniform(-3, 3, (num_tasks, task_dim))
    return rng.uniform(0, 2 * np.pi, num_tasks)[:, None]


def lookup(env_id: str) -> Spec:
    """SPECS[env_id], or a ValueError that names the nearest known ids."""
    if env_id not in SPECS:
        nearest = difflib.get_close_matches(str(env_id), SPECS, n=3, cutoff=0.0)
        raise ValueError(f"Unknown environment {env_id!r}: the nearest known names are {', '.join(nearest)}.")
    return SPECS[env_id]


# ----- Evaluation, and looking at it


def make_evaluation(env_id: str, train_tasks, test_tasks, num_train: int, repeats: int) -> dict:
    """{"test": all test tasks, "train": num_train training tasks}, each task `repeats` times.

    Returns for both splits a list of pairs (row of the task, environment set to it).
    """
    # Evenly spaced in sorted order: ten directions drawn at random would favour policies that ignore the task.
    middles = (np.arange(num_train) + 0.5) / num_train * len(train_tasks)
    spaced = np.unique(np.argsort(train_tasks[:, 0])[middles.astype(int)])
    pairs = {"test": [], "train": []}
    for split, tasks, numbers in (("test", test_tasks, range(len(test_tasks))), ("train", train_tasks, spaced)):
        for number in np.repeat(numbers, repeats).tolist():
            pairs[split].append((number, make(env_id)))
            pairs[split][-1][1].unwrapped.set_task(tasks[number])
    return pairs


def film(env_id: str, task, play, file) -> None:
    """Write a GIF of what `play(env)` does in an environment set to `task`.

    Raises OSError if this machine can not render.
    """
    try:
        env = RenderCollection(make(env_id, render_mode="rgb_array"), reset_clean=False)
        env.unwrapped.set_task(task)
        play(env)
        frames = [frame[::2, ::2] for frame in env.render()[::2]]  # every second one, at half the size
        imageio.mimsave(file, frames, duration=40, loop=0)  # 40 ms each
        env.close()
    except Exception as error:  # each graphics library raises its own
        hint = "without a display, MuJoCo needs MUJOCO_GL=egl or MUJOCO_GL=osmesa and that library"
        raise OSError(f"{env_id} can not be rendered here ({str(error) or type(error).__name__}); {hint}") from None


def ground_paths(env_id: str, paths: list) -> np.ndarray:
    """Where E trajectories of a Direction family lead, in metres from the start: (E, L+1, 2), NaN after their end.

    The robots do not observe where they are, so this is the sum of the velocities in the observations.
    """
    first, seconds = GROUND_VELOCITY[env_id]
    ground = np.full((len(paths), max(len(path["obs"]) for path in paths), 2), np.nan, np.float32)
    for row, path in zip(ground, paths):
        row[: len(path["obs"])] = np.cumsum(path["obs"][:, first : first + 2] * seconds, axis=0)
    return ground


# ----- What the classes share


def set_up(env: gym.Env, env_id: str, task) -> None:
    """Give `env` the float32 spaces of its family, unbounded observations and actions in [-1, 1], and a first task."""
    env.env_id, spec = env_id, SPECS[env_id]
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

    def _initialize_simulation(self):
        model, data = super()._initialize_simulation()
        # PAPER: cites rand_param_envs, whose step is .004 s x 4 = .016 s, as here. CODE: the authors' own copy of it
        # falls back on Gym's .002 x 4 = .008.
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

    def __init__(self, **kwargs):
        super().__init__(healthy_reward=0.0, **kwargs)
        EzPickle.__init__(self, **kwargs)  # over the parent's positional arguments, which this class does not take
        set_up(self, "HopperParam", np.ones(SPECS["HopperParam"].task_dim))


class WalkerParam(RandomParams, Walker2dEnv):
    """Observation (17,): z, angles of torso and 6 joints, all 9 velocities clipped to +-10. Task (65,): multipliers.
    The episode ends when the walker falls (z outside (.8, 2), or torso tilt >= 1 rad)."""

    def __init__(self, **kwargs):
        # The v5 default XML changes the friction of one foot; this one is the robot of the original.
        super().__init__(xml_file="walker2d.xml", healthy_reward=0.0, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, "WalkerParam", np.ones(SPECS["WalkerParam"].task_dim))


# ----- Cheetah Velocity


class CheetahVelocity(HalfCheetahEnv):
    """Observation (20,): z, torso and joint angles (8), all velocities (9), torso position x, y, z (3). Task (1,):
    target velocity in m/s. One step is .05 s. Never terminates."""

    def __init__(self, **kwargs):
        super().__init__(forward_reward_weight=0.0, ctrl_cost_weight=0.05, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, "CheetahVelocity", [1.5])

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
        obs, reward, terminated, truncated, info = super().step(clip(action))  # reward is -.05 |a|^2 so far
        # PAPER: "the absolute difference product". CODE: minus the absolute difference, minus the control cost above.
        info["reward_forward"] = -abs(info["x_velocity"] - self.task[0])
        return obs, float(reward + info["reward_forward"]), terminated, truncated, info


# ----- Ant Direction and Humanoid Direction


class Direction:
    """The task of the Direction families, (1,): an angle in rad."""

    def set_task(self, task) -> None:
        """Head for angle task[0] in rad; task is (1,). Raises ValueError on a wrong shape or a value not finite."""
        self.task = check_task(self.env_id, task)
        self.direction = np.array([np.cos(self.task[0]), np.sin(self.task[0])])  # (2,)


class AntDirection(Direction, AntEnv):
    """Observation (27,): qpos[2:] (13: z, quaternion, 8 joints) and qvel (14). One step is .05 s. The episode ends when
    the torso's height leaves [.2, 1]."""

    def __init__(self, **kwargs):
        off = dict(forward_reward_weight=0.0, healthy_reward=0.0, include_cfrc_ext_in_observation=False)
        super().__init__(**off, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, "AntDirection", [0.0])

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

    def __init__(self, **kwargs):
        # PAPER: the standard reward, with a cost on contact forces. CODE: no such cost, as if they were 0, which is
        # what mujoco-py reports with MuJoCo 2.0 and later (the authors' version is not on record).
        off = dict(forward_reward_weight=0.0, healthy_reward=0.0, contact_cost_weight=0.0)
        super().__init__(**off, **kwargs)
        EzPickle.__init__(self, **kwargs)
        set_up(self, "HumanoidDirection", [0.0])

    def _get_obs(self):
        data = self.data
        # PAPER: R^376, of which Gym's last 84 are contact forces. CODE: zeros, as above; the real ones reach 4,000 and
        # would swamp a network that reads raw observations. (The world's rows of cinert and cvel are zeros anyway.)
        parts = [data.qpos[2:], data.qvel, data.cinert.ravel(), data.cvel.ravel(), data.qfrc_actuator, np.zeros(84)]
        return np.concatenate(parts).astype(np.float32)

    def step(self, action):
        # The motors take +-.4, and the control cost is charged on that scale.
        obs, reward, terminated, truncated, info = super().step(clip(action) * self.model.actuator_ctrlrange[:, 1])
        velocity = np.array([info["x_velocity"], info["y_velocity"]])  # of the centre of mass
        info["reward_forward"], info["reward_survive"] = 1.25 * velocity @ self.direction, 5.0
        return obs, float(reward + info["reward_forward"] + 5.0), terminated, truncated, info


# ----- Point Direction: not in the paper; it shows the paper's effect in a minute or two


class PointDirection(Direction, gym.Env):
    """A point mass on a plane. Observation (4,): x, y, vx, vy. Reward: velocity . direction. Never terminates."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.state = np.zeros(4)
        set_up(self, "PointDirection", [0.0])

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


for _env_id, _spec in SPECS.items():
    gym.register(
        f"smac/{_env_id}-v0",
        entry_point=f"{__name__}:{_env_id}",
        max_episode_steps=_spec.horizon,
        disable_env_checker=True,  # it would check every step
    )
