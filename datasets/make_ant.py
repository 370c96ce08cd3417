"""Make the AntDirection dataset: python datasets/make_ant.py

PAPER: the replay buffer of PEARL's iteration 100. CODE: a scripted trot (`trot`), since PEARL did not learn to walk. As
in PEARL's replay buffer, where 400 of 1000 transitions are collected with z from the prior, 40 % of the trajectories go
in any direction; the others head for one near the task's. Speed is random, and so is the size of the noise on the
actions, up to one that makes the Ant fall: critic and decoder must learn what actions cost that the trot does not take
(README.md).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs

TRANSITIONS, DIRECTION_ERROR, ANY_DIRECTION, MOST_NOISE = 1200, 0.5, 0.4, 0.4
CYCLES = 1.6  # of the trot, a second
LEG = np.deg2rad([45, 135, 225, 315])  # where the legs stand, seen from the torso
BENDS = np.array([1, -1, -1, 1])  # the sign in which an ankle turns its foot down
MOTORS = [3, 0, 1, 2]  # the first two motors are those of leg 3, and so on


def trot(obs, heading, stride, phase):
    """Torques that follow the joint angles of a trot, in which legs that face each other across step together.

    Args:
        obs: (27,) of AntDirection.
        heading: rad, direction over ground.
        stride: of 0 (step on the spot, .1 m/s) to 1 (1.6 m/s).
        phase: rad, of CYCLES a second.

    Returns (8,), which may exceed 1. The numbers are rounded from what the cross-entropy method found in four minutes.
    """
    w, x, y, z = obs[1:5]
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))
    angles, rates = obs[5:13].reshape(4, 2), obs[19:27].reshape(4, 2)  # of hip and ankle
    phase, lead = phase + np.array([0, np.pi, 0, np.pi]), LEG - (heading - yaw)
    hip = 0.5 * stride * np.sin(lead) * np.sin(phase)  # backward while the foot is down
    lift = 0.3 * np.maximum(0, -np.cos(phase - 0.9))
    ankle = 0.8 - lift + 0.2 * stride * np.cos(lead) * np.sin(phase)
    wanted = np.stack([hip, BENDS * ankle], 1)
    return (np.array([0.7, 0.6]) * (wanted - angles) - 0.025 * rates)[MOTORS].ravel()


if __name__ == "__main__":
    rng, env, spec = np.random.default_rng(0), envs.make("AntDirection"), envs.SPECS["AntDirection"]
    tasks = envs.sample_tasks("AntDirection", spec.num_train_tasks + spec.num_test_tasks)
    train_tasks, test_tasks = np.split(tasks, [spec.num_train_tasks])
    entries, returns = [], []
    for task, (angle,) in enumerate(train_tasks):
        env.unwrapped.set_task([angle])
        steps = 0
        while steps < TRANSITIONS:
            heading = (
                rng.uniform(-np.pi, np.pi)
                if rng.random() < ANY_DIRECTION
                else rng.normal(angle, DIRECTION_ERROR)
            )
            stride, phase, noise = (
                rng.uniform(0.1, 1),
                rng.uniform(-np.pi, np.pi),
                rng.uniform(0, MOST_NOISE),
            )
            path = {
                "obs": [env.reset(seed=len(entries))[0]],
                "actions": [],
                "rewards": [],
                "terminals": [],
            }
            done = False
            while not done and steps < TRANSITIONS:
                action = trot(path["obs"][-1], heading, stride, phase) + rng.normal(
                    0, noise, spec.action_dim
                )
                path["actions"].append(np.clip(action, -1, 1).astype(np.float32))
                obs, reward, terminated, truncated, _ = env.step(path["actions"][-1])
                for key, value in (("obs", obs), ("rewards", reward), ("terminals", terminated)):
                    path[key].append(value)
                phase += 2 * np.pi * CYCLES * envs.AntDirection.ground_velocity[1]
                done, steps = terminated or truncated, steps + 1
            returns.append(sum(path["rewards"]))
            entries.append((task, {key: np.array(values) for key, values in path.items()}))
    file = Path(__file__).parent / "AntDirection.npz"
    buffers.save_dataset(
        file, "AntDirection", train_tasks, test_tasks, entries, [], "python datasets/make_ant.py"
    )
    print(f"{file.name}: {len(entries)} trajectories, mean return {np.mean(returns):.1f}")
