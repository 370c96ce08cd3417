"""Make the AntDirection dataset: python datasets/make_ant.py

PAPER: the replay buffer of PEARL's iteration 100. CODE: a scripted trot, since PEARL did not learn
to walk. As in PEARL's replay buffer, where 400 of 1000 transitions are collected with z from the
prior, 40 % of the trajectories go in any direction; the others head for one near the task's. Speed
is random, and so is the size of the noise on the actions, up to one that makes the Ant fall: critic
and decoder must learn what actions cost that the trot does not take (README.md).

With --own-share 0 no trajectory knows its task, with 1 all do: the two other datasets of the study
of when the self-supervised phase helps. They are not kept in the repository:

    python datasets/make_ant.py --own-share 0 --out runs/AntDirection0.npz
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs
from plumbing.flags import launch_tool

TRANSITIONS = 1200  # of each task
DIRECTION_ERROR = 0.5  # rad, standard deviation of a heading around the task's
MOST_NOISE = 0.4  # the largest standard deviation of the noise on a trajectory's actions
CYCLES = 1.6  # of the trot, a second
LEG = np.deg2rad([45, 135, 225, 315])  # where the legs stand, seen from the torso
BENDS = np.array([1, -1, -1, 1])  # the sign in which an ankle turns its foot down
MOTORS = [3, 0, 1, 2]  # the first two motors are those of leg 3, and so on


@dataclasses.dataclass
class Args:
    own_share: float = 0.6  # share of the trajectories that head for their own task
    out: Path = Path(__file__).parent / "AntDirection.npz"  # the file to write


def trot(obs, heading, stride, phase):
    """Torques that follow the joint angles of a trot.

    Legs that face each other across the torso step together. The numbers are rounded from what the
    cross-entropy method found in four minutes.

    Args:
        obs: (27,) of AntDirection.
        heading: rad, direction over ground.
        stride: of 0 (step on the spot, .1 m/s) to 1 (1.6 m/s).
        phase: rad, of CYCLES a second.

    Returns (8,), which may exceed 1.
    """
    w, x, y, z = obs[1:5]
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))
    angles = obs[5:13].reshape(4, 2)  # of hip and ankle
    rates = obs[19:27].reshape(4, 2)
    phase = phase + np.array([0, np.pi, 0, np.pi])
    lead = LEG - (heading - yaw)
    hip = 0.5 * stride * np.sin(lead) * np.sin(phase)  # backward while the foot is down
    lift = 0.3 * np.maximum(0, -np.cos(phase - 0.9))
    ankle = 0.8 - lift + 0.2 * stride * np.cos(lead) * np.sin(phase)
    wanted = np.stack([hip, BENDS * ankle], 1)
    torques = np.array([0.7, 0.6]) * (wanted - angles) - 0.025 * rates
    return torques[MOTORS].ravel()


def play(env, heading, stride, phase, noise, seed, most_steps, rng):
    """One trajectory of the trot, of at most `most_steps` steps, as `ReplayBuffer.add` takes it."""
    seconds_a_step = envs.AntDirection.ground_velocity[1]
    path = {"obs": [env.reset(seed=seed)[0]], "actions": [], "rewards": [], "terminals": []}
    done = False
    while not done and len(path["actions"]) < most_steps:
        action = trot(path["obs"][-1], heading, stride, phase)
        action = action + rng.normal(0, noise, len(action))
        action = np.clip(action, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        path["actions"].append(action)
        path["obs"].append(obs)
        path["rewards"].append(reward)
        path["terminals"].append(terminated)
        phase += 2 * np.pi * CYCLES * seconds_a_step
        done = terminated or truncated
    return {key: np.array(values) for key, values in path.items()}


def main(args):
    """Write the dataset. Raises InputError."""
    if not 0 <= args.own_share <= 1:
        raise buffers.InputError(f"--own-share is {args.own_share}, expected 0 to 1")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    env = envs.make("AntDirection")
    spec = envs.lookup("AntDirection")
    tasks = envs.sample_tasks("AntDirection", spec.num_train_tasks + spec.num_test_tasks)
    train_tasks = tasks[: spec.num_train_tasks]
    test_tasks = tasks[spec.num_train_tasks :]
    entries = []
    for task, (angle,) in enumerate(train_tasks):
        env.unwrapped.set_task([angle])
        steps = 0
        while steps < TRANSITIONS:
            in_any_direction = rng.random() < 1 - args.own_share
            if in_any_direction:
                heading = rng.uniform(-np.pi, np.pi)
            else:
                heading = rng.normal(angle, DIRECTION_ERROR)
            stride = rng.uniform(0.1, 1)
            phase = rng.uniform(-np.pi, np.pi)
            noise = rng.uniform(0, MOST_NOISE)
            seed, left = len(entries), TRANSITIONS - steps
            path = play(env, heading, stride, phase, noise, seed, left, rng)
            entries.append((task, path))
            steps += len(path["actions"])
    command = "python datasets/make_ant.py"
    if args.own_share != Args.own_share:
        command += f" --own-share {args.own_share}"
    buffers.save_dataset(args.out, "AntDirection", train_tasks, test_tasks, entries, [], command)
    returns = [path["rewards"].sum() for _, path in entries]
    print(f"{args.out.name}: {len(entries)} trajectories, mean return {np.mean(returns):.1f}")


if __name__ == "__main__":
    launch_tool(main, Args)
