"""envs.py against formulas written out here a second time.

They start from the raw simulation state before and after each step.
"""

import copy
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import envs

sys.path.insert(1, str(Path(envs.__file__).parent / "datasets"))
from make_ant import CYCLES, trot

needs_pybullet = pytest.mark.skipif(
    importlib.util.find_spec("pybullet") is None,
    reason="PyBullet is missing, which is ready to install for Python 3.11 only",
)
ALL = [
    pytest.param(env_id, marks=needs_pybullet) if env_id.startswith("Sawyer") else env_id
    for env_id in envs.SHIPPED
]
# With eight behaviours the tasks are others, the simulation is the same.
SIMULATED = [param for param in ALL if "SawyerManipulation8" not in getattr(param, "values", ())]
PARAM = ["HopperParam", "WalkerParam"]
ROOT = Path(envs.__file__).resolve().parent
CHEETAH_FIRST = [0.7860740250467451, 0.47605191646339684, 0.8343795584830792]  # m/s
ANT_FIRST_DEGREES = [94.32888300560941, 57.12622997560762, 100.12554701796951]


# ----- Rewards, observations and terminations, once more
# `old` and `new` are snapshots of the simulation.


def snapshot(env):
    m, d = env.model, env.data
    com = (m.body_mass[:, None] * d.xipos).sum(0) / m.body_mass.sum()
    return dict(
        qpos=d.qpos.copy(),
        qvel=d.qvel.copy(),
        torso=d.xpos[1].copy(),
        com=com,
        cfrc=d.cfrc_ext.copy(),
    )


def cheetah(env, task, action, old, new):
    reward = -abs((new["qpos"][0] - old["qpos"][0]) / 0.05 - task[0]) - 0.05 * (action**2).sum()
    return np.concatenate([new["qpos"][1:], new["qvel"], new["torso"]]), reward, False


def ant(env, task, action, old, new):
    vx, vy = (new["torso"] - old["torso"])[:2] / 0.05
    cost = 0.5 * (action**2).sum() + 5e-4 * (np.clip(new["cfrc"], -1, 1) ** 2).sum()
    done = not 0.2 <= new["qpos"][2] <= 1.0
    return (
        np.concatenate([new["qpos"][2:], new["qvel"]]),
        vx * np.cos(task[0]) + vy * np.sin(task[0]) + 1 - cost,
        done,
    )


def humanoid(env, task, action, old, new):
    vx, vy = (new["com"] - old["com"])[:2] / 0.015
    reward = (
        1.25 * (vx * np.cos(task[0]) + vy * np.sin(task[0])) - 0.1 * ((0.4 * action) ** 2).sum() + 5
    )
    d = env.data
    parts = [
        new["qpos"][2:],
        new["qvel"],
        d.cinert.flatten(),
        d.cvel.flatten(),
        d.qfrc_actuator,
        [0.0] * 84,
    ]
    return np.concatenate(parts), reward, not 1.0 < new["qpos"][2] < 2.0


def hopper(env, task, action, old, new):
    reward = (new["qpos"][0] - old["qpos"][0]) / 0.016 + 1 - 1e-3 * (action**2).sum()
    state = np.concatenate([new["qpos"], new["qvel"]])
    done = not ((abs(state[2:]) < 100).all() and state[1] > 0.7 and abs(state[2]) < 0.2)
    return np.concatenate([new["qpos"][1:], np.clip(new["qvel"], -10, 10)]), reward, done


def walker(env, task, action, old, new):
    reward = (new["qpos"][0] - old["qpos"][0]) / 0.016 + 1 - 1e-3 * (action**2).sum()
    done = not (0.8 < new["qpos"][1] < 2.0 and abs(new["qpos"][2]) < 1.0)
    return np.concatenate([new["qpos"][1:], np.clip(new["qvel"], -10, 10)]), reward, done


FAMILIES = {
    "HopperParam": (hopper, 800),
    "WalkerParam": (walker, 800),
    "CheetahVelocity": (cheetah, 500),
    "AntDirection": (ant, 1500),
    "HumanoidDirection": (humanoid, 400),
}


@pytest.mark.parametrize("env_id", FAMILIES)
def test_reward_observation_termination(env_id):
    formula, steps = FAMILIES[env_id]
    env, rng, over = envs.make(env_id), np.random.default_rng(0), True
    inner, falls, ends = env.unwrapped, 0, 0
    tasks = envs.sample_tasks(env_id, 20)
    for step in range(steps):
        if over:
            task = tasks[ends % 20]
            inner.set_task(task)
            env.reset(seed=step)
        action = rng.uniform(-1.5, 1.5, env.action_space.shape).astype(
            np.float32
        )  # beyond the bounds: must be clipped
        old = snapshot(inner)
        obs, reward, terminated, truncated, _ = env.step(action)
        expected = formula(
            inner, task, np.clip(action.astype(np.float64), -1, 1), old, snapshot(inner)
        )
        np.testing.assert_array_equal(obs, expected[0].astype(np.float32))
        assert obs.dtype == np.float32 and obs.shape == (envs.SPECS[env_id].obs_dim,)
        assert reward == pytest.approx(expected[1], abs=1e-9)
        assert terminated == expected[2]
        over = terminated or truncated
        falls, ends = falls + terminated, ends + over
    assert falls == 0 if env_id == "CheetahVelocity" else falls >= 3


def test_point():
    env, rng = envs.make("PointDirection"), np.random.default_rng(0)
    env.unwrapped.set_task([2.0])
    obs, _ = env.reset(seed=0)
    assert abs(obs[:2]).max() < 0.1 and (obs[2:] == 0).all()
    x, v = env.unwrapped.state[:2], np.zeros(2)
    for step in range(50):
        action = rng.uniform(-1.5, 1.5, 2)
        v = 0.8 * v + 0.2 * np.clip(action, -1, 1)
        x = x + 0.1 * v
        obs, reward, terminated, truncated, _ = env.step(action)
        np.testing.assert_allclose(obs, [*x, *v], rtol=1e-6)
        assert reward == pytest.approx(v[0] * np.cos(2.0) + v[1] * np.sin(2.0))
        assert not terminated and truncated == (step == 49)


@pytest.mark.parametrize("env_id", SIMULATED)
def test_sizes_and_horizon(env_id):
    env, spec = envs.make(env_id), envs.SPECS[env_id]
    assert (
        env.observation_space.shape == (spec.obs_dim,) and env.observation_space.dtype == np.float32
    )
    assert (
        env.action_space
        == env.unwrapped.action_space
        == gym.spaces.Box(-1, 1, (spec.action_dim,), np.float32)
    )
    assert env.spec.max_episode_steps == spec.horizon
    assert env.unwrapped.task.shape == (spec.task_dim,)
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32


def test_cheetah_is_truncated_at_200():
    env = envs.make("CheetahVelocity")
    env.reset(seed=0)
    assert [env.step(np.zeros(6))[3] for _ in range(200)] == [False] * 199 + [True]


def test_humanoid_rescales_and_clips_actions():
    env = envs.make("HumanoidDirection").unwrapped
    after = []
    for scale in (1.0, 1.5):
        env.reset(seed=0)
        after.append(env.step(scale * np.ones(17, np.float32)))
        np.testing.assert_allclose(env.data.ctrl, 0.4)
    np.testing.assert_array_equal(after[0][0], after[1][0])
    assert after[0][1] == after[1][1]


# ----- Tasks


def test_task_lists_are_the_released_ones():
    cheetah_tasks, ant_tasks = (
        envs.sample_tasks("CheetahVelocity", 130),
        envs.sample_tasks("AntDirection", 120),
    )
    np.testing.assert_allclose(cheetah_tasks[:3, 0], CHEETAH_FIRST, rtol=1e-9)
    np.testing.assert_allclose(np.rad2deg(ant_tasks[:3, 0]), ANT_FIRST_DEGREES, rtol=1e-9)
    np.testing.assert_array_equal(
        cheetah_tasks, np.random.RandomState(1337).uniform(0, 3, 130)[:, None]
    )
    np.testing.assert_allclose(
        np.rad2deg(ant_tasks[:, 0]), np.random.RandomState(1337).uniform(0, 360, 120)
    )


@pytest.mark.parametrize("env_id", ALL)
def test_sample_tasks(env_id):
    np.random.seed(0)
    global_state = np.random.get_state()[1].copy()
    tasks = envs.sample_tasks(env_id, 30)
    assert tasks.shape == (30, envs.SPECS[env_id].task_dim) and tasks.dtype == np.float64
    np.testing.assert_array_equal(tasks[:10], envs.sample_tasks(env_id, 10))
    different = tasks != envs.sample_tasks(env_id, 30, seed=7)
    assert different.any() if "Sawyer" in env_id else different.all()
    np.testing.assert_array_equal(global_state, np.random.get_state()[1])
    if "Direction" in env_id:
        assert (0 <= tasks).all() and (tasks < 2 * np.pi).all() and np.ptp(tasks) > 5


@pytest.mark.parametrize("env_id", PARAM)
def test_multipliers_are_log_uniform(env_id):
    m = envs.make(env_id).unwrapped.model
    assert envs.SPECS[env_id].task_dim == 4 * m.nbody + m.nv + 3 * m.ngeom
    damping = slice(4 * m.nbody, 4 * m.nbody + m.nv)
    exponents = np.log(envs.sample_tasks(env_id, 2000)) / np.log(1.5)
    exponents[:, damping] *= np.log(1.5) / np.log(1.3)
    assert abs(exponents).max() <= 3 + 1e-9
    np.testing.assert_allclose(exponents.min(0), -3, atol=0.05)
    np.testing.assert_allclose(exponents.max(0), 3, atol=0.05)
    np.testing.assert_allclose(exponents.std(0), np.sqrt(3), rtol=0.08)  # that of U(-3, 3)


def arrays(model):
    """Every numeric array of a compiled model, copied."""
    names = [name for name in dir(model) if not name.startswith("_")]
    values = {name: getattr(model, name) for name in names}
    return {name: value.copy() for name, value in values.items() if isinstance(value, np.ndarray)}


@pytest.mark.parametrize("env_id", PARAM)
def test_set_task_scales_the_nominal_model(env_id):
    env, fresh = envs.make(env_id).unwrapped, envs.make(env_id).unwrapped
    xml = {"HopperParam": "hopper.xml", "WalkerParam": "walker2d.xml"}[env_id]
    stock = mujoco.MjModel.from_xml_path(
        str(Path(gym.__file__).parent / "envs" / "mujoco" / "assets" / xml)
    )
    tasks = envs.sample_tasks(env_id, 30)
    env.reset(seed=0)
    state = (
        env.data.qpos.copy(),
        env.data.qvel.copy(),
        env.data.qacc.copy(),
        env.data.xpos.copy(),
        env.data.time,
    )
    for task in [*tasks, tasks[-1]]:  # many, and the last one twice: nothing compounds
        env.set_task(task)
    for before, after in zip(
        state, (env.data.qpos, env.data.qvel, env.data.qacc, env.data.xpos, env.data.time)
    ):
        np.testing.assert_array_equal(before, after)
    b, v, g = stock.nbody, stock.nv, stock.ngeom
    mass, inertia, damping, friction = np.split(tasks[-1], [b, 4 * b, 4 * b + v])
    np.testing.assert_array_equal(env.model.body_mass, stock.body_mass * mass)
    np.testing.assert_array_equal(
        env.model.body_inertia, stock.body_inertia * inertia.reshape(b, 3)
    )
    np.testing.assert_array_equal(env.model.dof_damping, stock.dof_damping * damping)
    np.testing.assert_array_equal(
        env.model.geom_friction, stock.geom_friction * friction.reshape(g, 3)
    )
    assert env.model.body_subtreemass[1] == pytest.approx(
        env.model.body_mass.sum()
    )  # derived constants follow
    assert (env.model.body_invweight0[1:] != fresh.model.body_invweight0[1:]).all()
    assert (env.model.dof_invweight0 != fresh.model.dof_invweight0).all()
    fresh.set_task(tasks[-1])
    after_many, after_one = arrays(env.model), arrays(fresh.model)
    env.set_task(np.ones(len(tasks[0])))
    nominal, expected = arrays(env.model), arrays(stock)
    for name in expected:
        np.testing.assert_array_equal(after_many[name], after_one[name], err_msg=name)
        np.testing.assert_allclose(
            nominal[name], expected[name], rtol=1e-12, atol=1e-14, err_msg=name
        )


def test_a_task_is_copied():
    env, task = envs.make("CheetahVelocity").unwrapped, np.array([2.0])
    env.set_task(task)
    task[0] = 0.0
    assert env.task[0] == 2.0


# ----- Determinism


def rollout(env, task, seed, steps=60):
    env.unwrapped.set_task(task)
    trace = [env.reset(seed=seed)[0]]
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape))
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        trace.append(np.append(obs, reward))
        if terminated or truncated:
            break
    return np.concatenate(trace)


@pytest.mark.parametrize("env_id", SIMULATED)
def test_deterministic(env_id):
    tasks = envs.sample_tasks(env_id, 3)
    env, other = envs.make(env_id), envs.make(env_id)
    first = rollout(env, tasks[0], seed=3)
    different = rollout(env, tasks[1], seed=3)  # a different task and back
    np.testing.assert_array_equal(first, rollout(env, tasks[0], seed=3))
    assert first.shape != different.shape or (first != different).any()
    # Two environments in turn, step by step, do not disturb each other.
    actions = np.random.default_rng(3).uniform(-1, 1, (60, *env.action_space.shape))
    traces = []
    for e, task in ((env, tasks[0]), (other, tasks[2])):
        e.unwrapped.set_task(task)
        traces.append([e.reset(seed=3)[0]])
    stopped = [False, False]
    for action in actions:
        for i, e in enumerate((env, other)):
            if not stopped[i]:
                obs, reward, terminated, truncated, _ = e.step(action)
                traces[i].append(np.append(obs, reward))
                stopped[i] = terminated or truncated
    np.testing.assert_array_equal(np.concatenate(traces[0]), first)
    np.testing.assert_array_equal(
        np.concatenate(traces[1]), rollout(envs.make(env_id), tasks[2], seed=3)
    )


# ----- Copies


def copies(env):
    """The ways to copy an environment."""
    return [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]


@pytest.mark.parametrize("env_id", SIMULATED)
@pytest.mark.parametrize("wrapped", [True, False])
def test_copies_keep_the_task(env_id, wrapped):
    """Before a first reset, and then the same episodes follow."""
    task = envs.sample_tasks(env_id, 3)[2]
    env = envs.make(env_id) if wrapped else envs.make(env_id).unwrapped
    env.unwrapped.set_task(task)
    expected = rollout(env, task, seed=3)
    for other in copies(env):
        np.testing.assert_array_equal(other.unwrapped.task, task)
        assert type(other) is type(env) and other.unwrapped is not env.unwrapped
        other.unwrapped.set_task = lambda task: None  # `rollout` shall find the task in place
        np.testing.assert_array_equal(rollout(other, task, seed=3), expected)


MUJOCO = [env_id for env_id in envs.SHIPPED if not env_id.startswith("Sawyer")]


@pytest.mark.parametrize("env_id", MUJOCO)
def test_a_copy_within_an_episode_goes_on_like_the_original(env_id):
    """All but Sawyer's: the simulation, the random numbers of later resets, and the steps left."""
    env = envs.make(env_id)
    horizon = envs.SPECS[env_id].horizon
    env.unwrapped.set_task(envs.sample_tasks(env_id, 3)[2])
    env.reset(seed=5)
    rng = np.random.default_rng(5)
    actions = rng.uniform(-1, 1, (horizon + 1, *env.action_space.shape))
    for action in actions[:4]:
        env.step(action)
    both = [env, pickle.loads(pickle.dumps(env))]
    for action in actions[4:]:
        (obs, *rest), (other_obs, *other_rest) = (e.step(action) for e in both)
        np.testing.assert_array_equal(obs, other_obs)
        assert rest[:3] == other_rest[:3]
        if rest[1] or rest[2]:
            break
    assert rest[1] or rest[2]  # it fell, or came to the horizon
    first, second = (e.reset()[0] for e in both)
    np.testing.assert_array_equal(first, second)


def test_a_copy_has_a_simulation_of_its_own():
    env = envs.make("HopperParam").unwrapped
    env.reset(seed=0)
    other = copy.deepcopy(env)
    before = env.data.qpos.copy(), env.model.body_mass.copy()
    other.set_task(envs.sample_tasks("HopperParam", 1)[0])
    other.step(np.ones(3))
    np.testing.assert_array_equal(env.data.qpos, before[0])
    np.testing.assert_array_equal(env.model.body_mass, before[1])
    other.set_task(np.ones(41))  # the nominal robot is known to the copy, too
    np.testing.assert_array_equal(other.model.body_mass, env.model.body_mass)


def test_environments_in_processes_keep_their_tasks():
    """Gymnasium sends them there by pickle."""
    env = envs.make("HopperParam")
    tasks = envs.sample_tasks("HopperParam", 2)
    env_list = []
    for task in tasks:
        env.unwrapped.set_task(task)
        env_list.append(copy.deepcopy(env))
    functions = [lambda env=env: env for env in env_list]
    vector = gym.vector.AsyncVectorEnv(functions, context="spawn")
    np.testing.assert_array_equal(vector.get_attr("task"), tasks)
    vector.close()


# ----- Gymnasium


@pytest.mark.parametrize("env_id", SIMULATED)
@pytest.mark.filterwarnings("ignore:.*A Box observation space (minimum|maximum) value is.*infinity")
@pytest.mark.filterwarnings("error")
def test_gymnasium_interface(env_id):
    env = gym.make(f"smac/{env_id}-v0")
    assert type(env.unwrapped).__name__ == env_id
    check_env(env.unwrapped, skip_render_check=True)


def run_python(code, folder, **variables):
    """Run code in another process, in a folder: what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_quiet_and_leaves_no_file(tmp_path):
    code = """
import importlib.util
import envs
for env_id in envs.SHIPPED:
    if env_id.startswith("Sawyer") and importlib.util.find_spec("pybullet") is None:
        continue
    env = envs.make(env_id)
    env.reset(seed=0)
    env.step(env.action_space.sample())
"""
    assert run_python(code, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


# ----- Imports: PyBullet for Sawyer alone, and MuJoCo whatever MUJOCO_GL names


def test_without_sawyer_py_the_other_families_work(tmp_path):
    """Somebody copies envs.py without it."""
    shutil.copy(ROOT / "envs.py", tmp_path)
    shutil.copytree(ROOT / "plumbing", tmp_path / "plumbing")
    code = """
import sys, envs
env = envs.make("PointDirection")
assert len(envs.SPECS) == 8 and envs.SPECS["SawyerManipulation"].horizon == 50
assert "sawyer" not in sys.modules and "pybullet" not in sys.modules
try:
    envs.make("SawyerManipulation")
except envs.InputError as error:
    print(error)
"""
    said = run_python(code, tmp_path, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert said == (
        "SawyerManipulation: importing sawyer failed, "
        "ModuleNotFoundError: No module named 'sawyer'\n"
    )


def test_the_class_of_a_row_is_imported_when_it_is_asked_for(tmp_path):
    code = """
import sys, envs, gymnasium
tasks = envs.sample_tasks("PointDirection", 3)
assert "sawyer" not in sys.modules
assert envs.lookup("SawyerManipulation8").env_class.num_behaviours == 8
assert len(envs.sample_tasks("SawyerManipulation", 3)) == 3
assert "pybullet" not in sys.modules
"""
    run_python(code, tmp_path)


@needs_pybullet
def test_gymnasium_makes_sawyer_by_its_name_alone(tmp_path):
    code = """
import gymnasium, envs
env = gymnasium.make("smac/SawyerManipulation-v0")
print(type(env.unwrapped).__name__, env.spec.max_episode_steps)
"""
    assert run_python(code, tmp_path) == "SawyerManipulation 50\n"


@pytest.mark.parametrize("renderer", ["egl", "osmesa", "nonsense"])
def test_a_renderer_that_is_missing_does_not_matter_where_nothing_is_drawn(
    tmp_path, monkeypatch, renderer
):
    """The variable stays as it was, for whoever draws afterwards."""
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)  # a test that drew has left it
    code = """
import ctypes, os
load = ctypes.CDLL.__init__
def without_renderers(self, name, *arguments, **flags):
    if "EGL" in str(name) or "OSMesa" in str(name):
        raise OSError("no such library")
    load(self, name, *arguments, **flags)
ctypes.CDLL.__init__ = without_renderers
import envs
env = envs.make("HopperParam")
env.reset(seed=0)
env.step(env.action_space.sample())
print(os.environ["MUJOCO_GL"], os.environ.get("PYOPENGL_PLATFORM"))
"""
    assert run_python(code, tmp_path, MUJOCO_GL=renderer) == f"{renderer} None\n"


def test_cheetah_is_the_stock_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the stock loader writes its log here
    ours = envs.make("CheetahVelocity").unwrapped
    expected, actual = arrays(mujoco.MjModel.from_xml_path(ours.fullpath)), arrays(ours.model)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
    wide = gym.make("smac/CheetahVelocity-v0", width=1024).unwrapped.model  # as in the stock loader
    assert wide.vis.global_.offwidth == 1024


GROUND = [
    env_id for env_id, spec in envs.SHIPPED.items() if hasattr(spec.env_class, "ground_velocity")
]


def test_the_direction_families_are_the_ones_whose_paths_can_be_drawn():
    assert GROUND == ["AntDirection", "HumanoidDirection", "PointDirection"]


@pytest.mark.parametrize("env_id", GROUND)
def test_paths_over_ground(env_id):
    """Figures 6 and 8: the integral of the observed velocity is where the robot is.

    Only roughly, because the velocity is sampled once a step.
    """
    env, rng, paths, places = envs.make(env_id), np.random.default_rng(1), [], []
    base = env.unwrapped
    for episode in range(3):
        path, place = {"obs": [env.reset(seed=episode)[0]]}, []
        action, over = rng.uniform(-1, 1, env.action_space.shape), False
        while not over and len(place) < 30 * (episode + 1):
            obs, _, terminated, truncated, _ = env.step(action)
            path["obs"].append(obs)
            place.append((base.data.qpos[:2] if hasattr(base, "data") else base.state[:2]).copy())
            over = terminated or truncated
        paths.append({"obs": np.array(path["obs"])})
        places.append(np.array(place))
    ground = envs.ground_paths(env_id, paths)
    assert ground.shape == (3, max(len(place) for place in places) + 1, 2)
    longer = {
        "obs": np.resize(paths[0]["obs"], (1000, len(paths[0]["obs"][0])))
    }  # data may have longer episodes
    assert envs.ground_paths(env_id, [longer]).shape == (1, envs.SPECS[env_id].horizon + 1, 2)
    for line, place in zip(ground, places):
        assert np.isfinite(line[: len(place) + 1]).all() and np.isnan(line[len(place) + 1 :]).all()
        moved, observed = place[-1] - place[0], line[len(place)] - line[1]
        assert np.linalg.norm(observed - moved) < 0.15 * np.abs(np.diff(place, axis=0)).sum()


# ----- The script of the Ant's data


@pytest.mark.parametrize("heading", [-2.6, -1.0, 0.6, 2.2])
def test_the_trot_goes_where_it_shall(heading):
    env, way = envs.make("AntDirection"), np.array([np.cos(heading), np.sin(heading)])
    obs, _ = env.reset(seed=0)
    for step in range(100):
        action = trot(obs, heading, 1.0, 2 * np.pi * CYCLES * 0.05 * step)
        obs, _, terminated, _, _ = env.step(np.clip(action, -1, 1))
        assert not terminated
    moved = env.unwrapped.data.qpos[:2]
    assert (
        moved @ way > 4 and abs(moved[0] * way[1] - moved[1] * way[0]) < 1.5
    )  # metres in 5 s: ahead, and aside


# ----- Evaluation: its tasks, and episodes side by side


def test_an_evaluation_has_every_test_task_and_evenly_spaced_training_tasks():
    """Of twelve training tasks, ordered by their first number, it has numbers 2, 5, 8 and 11."""
    angles = np.array([5, 3, 8, 1, 11, 2, 9, 12, 4, 10, 7, 6]) / 10.0
    train, test = angles[:, None], np.array([[0.3], [0.1]])
    pairs = envs.make_evaluation(
        "PointDirection", train, test, num_train=4, num_test=100, repeats=2
    )
    assert list(pairs) == [
        "test",
        "train",
    ]  # "train" comes last: `evaluate` uses what is left of the loop
    expected = {"test": [0.3, 0.3, 0.1, 0.1], "train": [0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 1.1, 1.1]}
    for split, rows in (("test", test), ("train", train)):
        numbers, env_list = pairs[split]
        assert sorted(env.unwrapped.task[0] for env in env_list) == sorted(expected[split])
        assert [env.unwrapped.task[0] for env in env_list] == [
            rows[number, 0] for number in numbers
        ]
        assert numbers == sorted(numbers) and numbers[::2] == numbers[1::2]
        assert len({id(env.unwrapped) for env in env_list}) == len(
            env_list
        )  # each has a simulation of its own
    numbers, env_list = envs.make_evaluation("PointDirection", train, test, 10, 1, 3)["test"]
    assert len(set(numbers)) == 1 and len(env_list) == 3
    many = np.linspace(0, 1, 10_000)[
        :, None
    ]  # as in no dataset of the family: as many of them as its row says
    numbers, env_list = envs.make_evaluation("PointDirection", train, many, repeats=1)["test"]
    assert len(env_list) == 20 and numbers[0] < 500 and numbers[-1] >= 9500
    numbers, _ = envs.make_evaluation("PointDirection", test, test, num_train=10, repeats=1)[
        "train"
    ]
    assert numbers in ([0, 1], [1, 0])  # no more than there are


@pytest.mark.parametrize(
    "terminated, terminal",
    [(2, 1), (0.3, 1), (-1, 1), (np.array([2.0]), 1), ([False], 0), (None, 0), (np.int8(0), 0)],
)
def test_terminals_are_truth_values(terminated, terminal):
    """The losses use 1 - terminal. What ends an episode is what is noted as its end."""

    class Strange(Countdown):
        def step(self, action):
            obs, reward, _, truncated, info = super().step(action)
            return obs, reward, terminated if self.t == 2 else False, truncated, info

    episodes = envs.Episodes([Strange(5, False)], torch.Generator().manual_seed(0))
    while episodes.live:
        episodes.step(torch.zeros(1, 1))
    (path,) = episodes.paths()
    assert path["terminals"].tolist() == ([0, 1] if terminal else [0, 0, 0, 0, 0])


class Countdown(gym.Env):
    """Ends after `length` steps, by a fall or at a limit; pays 10 * length + step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length, falls):
        self.length, self.falls, self.seeds = length, falls, []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.t = 0
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        self.t += 1
        over = self.t == self.length
        reward = 10.0 * self.length + self.t
        return (
            np.array([self.length, action[0]]),
            reward,
            over and self.falls,
            over and not self.falls,
            {},
        )


def test_episodes_run_side_by_side_until_each_has_ended():
    env_list = [Countdown(3, True), Countdown(1, False), Countdown(2, True)]
    episodes, lives = envs.Episodes(env_list, torch.Generator().manual_seed(0)), []
    while episodes.live:
        lives.append(list(episodes.live))
        assert episodes.obs()[:, 0].tolist() == [[3, 1, 2][i] for i in episodes.live]
        episodes.step(torch.tensor([[0.1 * len(lives) + i] for i in episodes.live]))
        assert episodes.last("rewards", lives[-1]).tolist() == [
            [10 * [3, 1, 2][i] + len(lives)] for i in lives[-1]
        ]
    assert lives == [[0, 1, 2], [0, 2], [0]]
    for number, (path, length, terminals) in enumerate(
        zip(episodes.paths(), (3, 1, 2), ([0, 0, 1], [0], [0, 1]))
    ):
        actions = np.array([0.1 * (t + 1) + number for t in range(length)])
        np.testing.assert_allclose(path["actions"], actions[:, None], rtol=1e-6)
        np.testing.assert_allclose(path["obs"], [[length, a] for a in [0, *actions]], rtol=1e-6)
        assert path["rewards"].tolist() == [10 * length + t + 1 for t in range(length)]
        assert path["terminals"].tolist() == terminals
        assert {value.dtype for value in path.values()} == {np.dtype(np.float32)}
    seeds = [env.seeds[0] for env in env_list]
    assert (
        len(set(seeds)) == 3
        and seeds == torch.randint(2**31 - 1, (3,), generator=torch.manual_seed(0)).tolist()
    )


def test_rewards_may_be_dropped_unread():
    class Unreadable(Countdown):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, float("nan"), *rest

    episodes = envs.Episodes(
        [Unreadable(2, True)], torch.Generator().manual_seed(0), read_rewards=False
    )
    while episodes.live:
        episodes.step(torch.zeros(len(episodes.live), 1))
    (path,) = episodes.paths()
    assert path.keys() == {"obs", "actions", "terminals"} and len(path["actions"]) == 2


# ----- Errors


def test_unknown_environment():
    for call in (lambda: envs.make("HoperParam"), lambda: envs.sample_tasks("HoperParam", 3)):
        with pytest.raises(
            envs.InputError, match="no environment HoperParam, the nearest are HopperParam,"
        ):
            call()


@pytest.mark.parametrize("env_id", SIMULATED)
def test_bad_tasks(env_id):
    env, size = envs.make(env_id).unwrapped, envs.SPECS[env_id].task_dim
    before = env.task.copy()
    for wrong in (np.ones(size + 1), np.ones((1, size)), 1.0):
        with pytest.raises(ValueError, match=f"{env_id} has shape .{size},."):
            env.set_task(wrong)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            env.set_task([*np.ones(size - 1), bad])
    if env_id in PARAM:
        with pytest.raises(ValueError, match="positive"):
            env.set_task(np.zeros(size))
    np.testing.assert_array_equal(env.task, before)


def test_what_an_environment_changes_in_place_stays_as_it_was_seen():
    """An environment that returns its state itself, and halves the action that it gets."""

    class InPlace(gym.Env):
        action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            self.state = np.zeros(1, np.float32)
            return self.state, {}

        def step(self, action):
            action *= 0.5
            self.state += 1
            return self.state, 0.0, False, bool(self.state[0] == 3), {}

    episodes = envs.Episodes([InPlace()], torch.Generator().manual_seed(0))
    while episodes.live:
        episodes.step(torch.ones(1, 1))
    (path,) = episodes.paths()
    assert path["obs"][:, 0].tolist() == [0, 1, 2, 3] and path["actions"][:, 0].tolist() == [
        1,
        1,
        1,
    ]
