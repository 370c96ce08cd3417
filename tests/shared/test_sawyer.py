"""Sawyer Manipulation: scenes, rewards, the script of the offline data, PyBullet's simulations."""

import copy
import gc
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pybullet = pytest.importorskip(
    "pybullet", reason="PyBullet is missing, which is ready to install for Python 3.11 only"
)

import buffers
import envs
import sawyer

sys.path.insert(1, str(Path(envs.__file__).parent / "datasets"))
from sawyer_policy import SawyerPolicy

PAPER, EIGHT = "SawyerManipulation", "SawyerManipulation8"
FIRST = dict(
    hand=[0.6, -0.15, -0.2], gripper=0.0475, brick=[0.59, 0.125, -0.355]
)  # side 1, as in the authors' code
ROOT = Path(envs.__file__).parent


def make_task(behaviour="move_hand", **fields):
    """A task with everything in the scene, at side 1, drawers closed, but for `fields`."""
    task = dict.fromkeys(sawyer.TASK_COLUMNS, 0) | dict(
        side=1, bottom_drawer=1, top_drawer=1, button=1, object=2
    )
    return list((task | fields | {"behaviour": sawyer.BEHAVIOURS.index(behaviour)}).values())


@pytest.fixture(params=[PAPER])
def env(request):
    env = envs.make(request.param).unwrapped
    yield env
    env.close()


def start(env, seed=0, **fields):
    """The first state, in metres."""
    env.set_task(make_task(**fields))
    env.reset(seed=seed)
    return env.measure()


def step(env, action):
    """The state after a step, in metres."""
    env.step(action)
    return env.measure()


def perform(env, job, seed=0, steps=75, **scene):
    """Let the script begin with a job, the last one of that name.

    Returns states (steps + 1, 13), rewards (steps,), and the step at which the job was done (None:
    not at all).
    """
    state, policy = start(env, seed, **scene), SawyerPolicy(env, np.random.default_rng(seed))
    names = [act.__name__ for act, *args in policy.jobs]
    policy.job = max(i for i, name in enumerate(names) if name == job)
    number, trace, rewards, done = len(names), [state], [], None
    for t in range(steps):
        rewards.append(env.step(policy())[1])
        trace.append(env.measure())
        done = t if done is None and len(policy.jobs) < number else done
    return np.array(trace), np.array(rewards), done


# ----- Scenes


@pytest.mark.parametrize("side", [1, -1])
def test_first_state(env, side):
    mirror = [1, side, 1]
    state = start(env, side=side)
    np.testing.assert_allclose(state[:3], np.array(FIRST["hand"]) * mirror, atol=1e-3)
    assert state[3] == pytest.approx(FIRST["gripper"], abs=1e-3)
    np.testing.assert_allclose(state[4:6], [0.79, -0.12 * side], atol=1e-6)
    np.testing.assert_allclose(state[7:10], np.array(FIRST["brick"]) * mirror, atol=1e-3)
    np.testing.assert_allclose(state[10:], [0.6, -0.0125 * side, -0.14], atol=1e-3)
    assert start(env, side=side, bottom_open=1)[10] == pytest.approx(0.756, abs=1e-3)
    np.testing.assert_allclose(
        step(env, np.zeros(4))[:3], state[:3], atol=1e-3
    )  # nothing moves by itself


def test_the_scene_rests(env):
    for number in range(5):
        start(env, seed=number, bottom_open=number % 2)
        before = env.measure()
        for _ in range(20):
            state = step(env, [0, 0, 0, -1])
        np.testing.assert_allclose(state[4:], before[4:], atol=2e-3)


@pytest.mark.parametrize(
    "gone, zero, button_z",
    [
        (dict(bottom_drawer=0, tray=-1), [7, 8, 9, 10], -0.25),
        (dict(top_drawer=0), [11], -0.25),
        (dict(button=0), [12], 0),
        (dict(bottom_drawer=0, top_drawer=0, tray=-1), [7, 8, 9, 10, 11], -0.34),
        (dict(object=-1), [4, 5, 6], -0.14),
    ],
)
def test_what_is_absent_is_zero(env, gone, zero, button_z):
    state = start(env, **gone)
    np.testing.assert_array_equal(np.flatnonzero(state == 0), zero)
    assert state[12] == pytest.approx(button_z, abs=1e-6)


def test_observation():
    env = envs.make(PAPER).unwrapped
    start(env, button=0)
    env.reset(seed=0)
    obs, state = env.step(np.ones(4))[0], env.measure()
    assert obs.dtype == np.float32 and obs[12] == sawyer.ABSENT
    np.testing.assert_allclose(
        obs[:12] * sawyer.OBS_SCALE[:12] + sawyer.OBS_CENTRE[:12], state[:12], atol=1e-6
    )
    data = buffers.load_dataset(PAPER)
    seen = np.concatenate([path["obs"] for _, path in data["rl"]])
    assert abs(seen).max() < 10 and (seen == sawyer.ABSENT).mean(0)[:4].max() == 0
    present = np.where(seen == sawyer.ABSENT, np.nan, seen)
    assert (abs(np.nanmean(present, 0)) < 1).all() and (0.4 < np.nanstd(present, 0)).all()
    assert (np.nanstd(present, 0) < 1.6).all()
    env.close()


def test_the_object_changes_with_the_seed(env):
    sizes = set()
    for seed in range(30):
        start(env, seed=seed)
        sizes.add(env.bullet.getCollisionShapeData(env.bodies["object"], -1)[0][3])
    assert {tuple(np.round(size, 6)) for size in sizes} == set(sawyer.OBJECT_SIZES)
    inside = 2 * sawyer.TRAY_HALF - 0.00875
    assert all(
        y < 0.06 and max(x, y) < inside for x, y, z in sawyer.OBJECT_SIZES
    )  # fingers are .0715 apart, the tray


def test_motion(env):
    start(env, button=0, object=-1, top_drawer=0)
    for direction in ([1, 0, 0], [0, 1, 0], [0, 0, -1], [-1, 0, 0]):
        before = np.array(env.hand())
        for _ in range(3):
            env.step([*direction, -1])
        moved = (np.array(env.hand()) - before) @ direction
        assert 0.06 < moved < 0.11  # .02 to .035 a step
    for _ in range(40):  # into a corner of the hand's limits
        state = step(env, [5, 5, 5, 1])
    np.testing.assert_allclose(state[:3], sawyer.HAND_LIMITS[1], atol=0.01)
    assert state[3] < -0.01  # closed
    for _ in range(5):
        state = step(env, [0, 0, 0, -1])
    assert state[3] > 0.05  # open


# ----- Rewards


def test_rewards_of_hand_set_states():
    env = envs.make(EIGHT).unwrapped
    start(env, tray=0)
    goal, tray = [0.675, 0, -0.11], [0.6, -0.15, -0.345]
    first = env.measure()

    def achieved(behaviour, at, value):
        start(env, behaviour=behaviour, tray=0)
        state = first.copy()
        state[at] = value
        return bool(env.achieved(state))

    for behaviour, at, yes, no in (
        (
            "move_hand",
            slice(0, 3),
            np.add(goal, [0.05, 0.05, 0.03]),
            np.add(goal, [0.05, 0.05, 0.05]),
        ),
        ("move_object", slice(4, 7), np.add(goal, [0, 0, -0.079]), np.add(goal, [0, 0, -0.081])),
        ("open_top_drawer", 11, -0.0125 - 0.086, -0.0125 - 0.084),
        ("close_top_drawer", 11, -0.0125 - 0.064, -0.0125 - 0.066),
        ("open_bottom_drawer", 10, 0.686, 0.684),
        ("close_bottom_drawer", 10, 0.664, 0.666),
        ("press_button", 12, -0.151, -0.149),
        ("object_in_tray", slice(4, 7), np.add(tray, [0.07, -0.07, 0]), np.add(tray, [0.08, 0, 0])),
        ("object_in_tray", slice(4, 7), tray, np.add(tray, [0, 0, 0.05])),
    ):
        assert (achieved(behaviour, at, yes), achieved(behaviour, at, no)) == (True, False), (
            behaviour
        )
    env.close()


@pytest.mark.parametrize("side", [1, -1])
def test_rewards_of_steps(env, side):
    for name in ("top_drawer", "bottom_drawer"):
        start(env, behaviour=f"open_{name}", side=side)
        assert env.step(np.zeros(4))[1] == -1
        env.bullet.resetJointState(env.bodies[name], 0, -0.1)
        _, reward, terminated, truncated, _ = env.step(np.zeros(4))
        assert (reward, terminated, truncated) == (0, False, False)
        state = env.measure()
        assert (
            abs(state[11] + side * (0.0125 + 0.1)) < 1e-3
            if name == "top_drawer"
            else abs(state[10] - 0.7) < 1e-2
        )
    start(env, behaviour="open_bottom_drawer", bottom_open=1, side=side)
    assert env.step(np.zeros(4))[1] == 0  # solved from the start
    assert start(env, behaviour="move_hand", side=side)[0] == pytest.approx(0.6, abs=1e-3)
    rewards = [
        env.step([*np.clip(20 * (sawyer.GOAL - env.hand()), -1, 1), -1])[1] for _ in range(20)
    ]
    assert rewards == sorted(rewards) and (rewards[0], rewards[-1]) == (-1, 0)


def test_an_object_out_of_reach_is_put_back(env):
    first = start(env, bottom_open=1)
    for name, columns in (("object", slice(4, 7)), ("brick", slice(7, 10))):
        env.bullet.resetBasePositionAndOrientation(env.bodies[name], (1.0, 0.5, -0.3), (0, 0, 0, 1))
        env.bullet.resetBaseVelocity(env.bodies[name], (3, 0, 0), (0, 20, 5))
        np.testing.assert_allclose(step(env, [0, 0, 0, -1])[columns], first[columns], atol=1e-3)
        np.testing.assert_allclose(
            step(env, [0, 0, 0, -1])[columns], first[columns], atol=1e-3
        )  # and lies still


# ----- The script


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("bottom_drawer", [1, 0])
def test_the_script_opens_the_top_drawer(env, side, bottom_drawer):
    tray = 0 if bottom_drawer else 2
    scene = dict(behaviour="open_top_drawer", side=side, bottom_drawer=bottom_drawer, tray=tray)
    trace, rewards, done = perform(env, "move_top_drawer", seed=1, **scene)
    assert done < 45 and (rewards[done:] == 0).all() and rewards[0] == -1
    assert 0.09 < -0.0125 - side * trace[done + 1, 11] < 0.157


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("bottom_open", [0, 1])
def test_the_script_presses_the_button_and_the_bottom_drawer_moves(env, side, bottom_open):
    scene = dict(behaviour="open_bottom_drawer", side=side, bottom_open=bottom_open)
    trace, rewards, done = perform(env, "press_button", seed=1, **scene)
    pressed = np.flatnonzero(trace[0, 12] - trace[:, 12] > sawyer.IS_PRESSED)[0]
    assert pressed <= done < 40
    drawer = (0.75625, 0.6) if bottom_open else (0.6, 0.75625)
    np.testing.assert_allclose(
        trace[[0, pressed - 1, pressed, -1], 10], np.repeat(drawer, 2), atol=2e-3
    )
    assert abs(trace[pressed, 7] - trace[pressed, 10]) < 0.06  # the brick rides along
    assert (rewards[: pressed - 1] == (0 if bottom_open else -1)).all()
    assert (rewards[pressed:] == (-1 if bottom_open else 0)).all()


def test_the_button_works_once_an_episode(env):
    start(env)
    for joint in (-0.012, 0.0, -0.012):
        env.bullet.resetJointState(env.bodies["button"], 0, joint)
        assert step(env, [0, 0, 0, -1])[10] == pytest.approx(0.75625, abs=2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_script_grasps_and_carries_the_object(env, seed):
    trace, _, done = perform(env, "carry", seed=seed, side=1 if seed % 2 else -1)
    assert done is not None and trace[:, 6].max() > -0.2  # lifted
    near = np.linalg.norm(trace[:, 4:7] - sawyer.GOAL, axis=1) < sawyer.NEAR
    assert near.any()
    assert trace[-1, 6] < -0.25  # dropped


def test_the_script_closes_the_top_drawer_and_fills_the_tray():
    env = envs.make(EIGHT).unwrapped
    scene = dict(bottom_drawer=0, top_open=1, tray=3)
    _, rewards, done = perform(env, "move_top_drawer", behaviour="close_top_drawer", **scene)
    assert rewards[0] == -1 and done < 30 and (rewards[done:] == 0).all()
    _, rewards, done = perform(env, "carry", behaviour="object_in_tray", tray=0)
    assert rewards[0] == -1 and (rewards[done + 10 :] == 0).any()
    env.close()


def test_the_script_does_not_see_the_behaviour(env):
    traces = [
        rollout(env, make_task(behaviour), seed=3)[:, :13] for behaviour in sawyer.BEHAVIOURS[:3]
    ]
    np.testing.assert_array_equal(traces[0], traces[1])
    np.testing.assert_array_equal(traces[0], traces[2])


# ----- Tasks


@pytest.mark.parametrize("env_id, number", [(PAPER, 3), (EIGHT, 8)])
def test_distribution_of_tasks(env_id, number):
    tasks = envs.sample_tasks(env_id, 3000)
    column = {name: tasks[:, i] for i, name in enumerate(sawyer.TASK_COLUMNS)}
    assert set(column["side"]) == {-1, 1} and set(column["behaviour"]) == set(range(number))
    bottom, top, button = (column[name] == 1 for name in ("bottom_drawer", "top_drawer", "button"))
    tray, thing = column["tray"] >= 0, column["object"] >= 0
    for present in (bottom, top, button, tray, thing):
        assert np.mean(present) == pytest.approx(0.75, abs=0.03)
    assert np.mean(column["bottom_open"][bottom]) == pytest.approx(0.5, abs=0.04)
    assert not column["bottom_open"][~bottom].any() and column["top_open"].any() == (number == 8)
    assert set(column["tray"]) == set(column["object"]) == {-1, 0, 1, 2, 3}
    needs = [True, top, bottom & button, top, bottom & button, button, thing, thing & tray]
    for behaviour, possible in enumerate(needs[:number]):
        assert np.all(possible | (column["behaviour"] != behaviour))
    env = envs.make(env_id).unwrapped
    for task in tasks[:50]:
        env.set_task(task)
        assert env.observation_space.contains(env.reset(seed=0)[0])
        before = env.measure()
        np.testing.assert_allclose(
            step(env, [0, 0, 0, -1]), before, atol=0.01
        )  # nothing stands inside something else
    env.close()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(side=0), "side of this SawyerManipulation task is 0, not one of"),
        (dict(button=0.5), "button .* is 0.5"),
        (dict(bottom_drawer=0, bottom_open=1, tray=2), "bottom_open .* is 1"),
        (dict(top_open=1), "top_open"),
        (dict(tray=1), "tray"),
        (dict(object=4), "object"),
        (dict(behaviour="open_bottom_drawer", button=0), r"behaviour .* is 2, not one of \[0, 1\]"),
        (dict(behaviour="press_button"), r"behaviour .* is 5, not one of \[0, 1, 2\]"),
    ],
)
def test_impossible_tasks(env, fields, message):
    before = env.task.copy()
    with pytest.raises(ValueError, match=message):
        env.set_task(make_task(**fields))
    np.testing.assert_array_equal(env.task, before)


# ----- Determinism


def rollout(env, task, seed, steps=40):
    """Observations and rewards of the script, as one array."""
    env.set_task(task)
    env.reset(seed=seed)
    policy, trace = SawyerPolicy(env, np.random.default_rng(seed)), []
    for _ in range(steps):
        obs, reward, *_ = env.step(policy())
        trace.append(np.append(obs, reward))
    return np.array(trace)


def test_deterministic_after_other_tasks_and_with_pictures(env):
    tasks = envs.sample_tasks(PAPER, 4)
    first = [rollout(env, task, seed) for seed, task in enumerate(tasks)]
    seen = envs.make(PAPER, render_mode="rgb_array").unwrapped
    for seed in (2, 0, 3, 1):
        np.testing.assert_array_equal(rollout(env, tasks[seed], seed), first[seed])
        np.testing.assert_array_equal(rollout(seen, tasks[seed], seed), first[seed])
    seen.close()


def test_deterministic_in_another_process(env):
    code = f"""
import sys, envs, numpy as np
sys.path.append("datasets")
from sawyer_policy import SawyerPolicy
{inspect.getsource(rollout)}
trace = rollout(envs.make({PAPER!r}).unwrapped, {make_task()}, seed=5)
sys.stdout.write(trace.tobytes().hex())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == rollout(env, make_task(), seed=5).tobytes().hex()


# ----- PyBullet


def simulations():
    return sum(pybullet.isConnected(client) for client in range(300))


def test_a_copy_has_a_simulation_of_its_own(env):
    start(env, side=-1)
    before = simulations()
    other = copy.deepcopy(env)
    assert simulations() == before + 1
    np.testing.assert_array_equal(other.task, env.task)
    state = env.measure()
    other.reset(seed=1)
    other.step(np.ones(4))
    np.testing.assert_array_equal(env.measure(), state)
    other.close()
    assert simulations() == before
    assert np.isfinite(step(env, np.ones(4))).all()


def test_no_simulation_is_left():
    gc.collect()
    before = simulations()
    env = envs.make(PAPER)
    assert simulations() == before + 1
    env.close()
    env.close()
    assert simulations() == before
    env = envs.make(PAPER)
    del env
    gc.collect()
    assert simulations() == before


def test_render():
    env = envs.make(PAPER, render_mode="rgb_array").unwrapped
    pictures = [
        start(env, **fields) is not None and env.render() for fields in (dict(), dict(top_drawer=0))
    ]
    for picture in pictures:
        assert picture.shape == (240, 320, 3) and picture.dtype == np.uint8 and picture.std() > 20
    assert (pictures[0] != pictures[1]).mean() > 0.01
    env.close()


# ----- The dataset


def test_dataset(env):
    data = buffers.load_dataset(PAPER)
    assert len(data["rl"]) == 50 * 50 and not data["encoder"]
    assert {len(path["actions"]) for _, path in data["rl"]} == {75}
    assert (
        0.44 < np.mean([path["rewards"] == 0 for _, path in data["rl"]]) < 0.48
    )  # the paper: 46 %
    for task, path in data["rl"][::97]:
        env.set_task(data["train_tasks"][task])
        np.testing.assert_allclose(path["obs"][0, :4], env.reset(seed=0)[0][:4], atol=1e-3)
        states = path["obs"][1:].astype(np.float64) * sawyer.OBS_SCALE + sawyer.OBS_CENTRE
        rewards = [0.0 if env.achieved(state) else -1.0 for state in states]
        assert (
            np.mean(rewards == path["rewards"]) > 0.98
        )  # a value at a threshold may round to the other side


def test_share_of_solved_steps_under_the_authors_rule():
    """Theirs is .46 (the paper). Ours is less for one reason: the goal of the top drawer.

    Theirs is hidden, is drawn anew at every reset from U(.05, .18) m, and counts when the drawer is
    within .065 m of it. For 1 reset in 9 it is there from the start.
    """
    data = buffers.load_dataset(PAPER)
    shares = {"ours": [], "theirs": []}
    for task, path in data["rl"]:
        side, behaviour = data["train_tasks"][task][[0, -1]]
        shares["ours"].append(np.mean(path["rewards"] == 0))
        shares["theirs"].append(shares["ours"][-1])
        if sawyer.BEHAVIOURS[int(behaviour)] == "open_top_drawer":
            handle = path["obs"][1:, 11] * sawyer.OBS_SCALE[11] + sawyer.OBS_CENTRE[11]
            pulled = -0.0125 - side * handle  # (75,)
            solved = (
                np.clip(
                    np.minimum(pulled + 0.065, 0.18) - np.maximum(pulled - 0.065, 0.05), 0, None
                )
                / 0.13
            )
            shares["theirs"][-1] = solved.mean()  # the probability of such a goal
    assert np.mean(shares["ours"]) == pytest.approx(0.4463, abs=5e-4)
    assert np.mean(shares["theirs"]) == pytest.approx(0.466, abs=1e-3)
