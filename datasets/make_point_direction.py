"""Make the two PointDirection datasets: python datasets/make_point_direction.py

A scripted policy heads for a direction near the task's, at a random speed and with noise. Two kinds of data (README.md,
"When it helps"): the direction is off by N(0, 2^2) rad, hence almost any (`PointDirection.npz`, like the data of an
early PEARL run), or by N(0, 0.6^2) rad, hence the task shows in the actions alone (`PointDirectionGoal.npz`).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs

EPISODES, ACTION_NOISE = 6, 0.5

for name, direction_error in (("PointDirection", 2.0), ("PointDirectionGoal", 0.6)):
    rng, env, spec = (
        np.random.default_rng(0),
        envs.make("PointDirection"),
        envs.SPECS["PointDirection"],
    )
    tasks = envs.sample_tasks("PointDirection", spec.num_train_tasks + spec.num_test_tasks)
    train_tasks, test_tasks = np.split(tasks, [spec.num_train_tasks])
    entries, returns = [], []
    for task, (angle,) in enumerate(train_tasks):
        env.unwrapped.set_task([angle])
        for episode in range(EPISODES):
            heading, speed = angle + rng.normal(0, direction_error), rng.uniform(0.1, 0.8)
            path = {
                "obs": [env.reset(seed=EPISODES * task + episode)[0]],
                "actions": [],
                "rewards": [],
                "terminals": [],
            }
            for _ in range(spec.horizon):
                action = speed * np.array([np.cos(heading), np.sin(heading)]) + rng.normal(
                    0, ACTION_NOISE, 2
                )
                path["actions"].append(np.clip(action, -1, 1).astype(np.float32))
                obs, reward, terminated, _, _ = env.step(path["actions"][-1])
                for key, value in (("obs", obs), ("rewards", reward), ("terminals", terminated)):
                    path[key].append(value)
            returns.append(sum(path["rewards"]))
            entries.append((task, {key: np.array(values) for key, values in path.items()}))
    file = Path(__file__).parent / f"{name}.npz"
    buffers.save_dataset(
        file,
        "PointDirection",
        train_tasks,
        test_tasks,
        entries,
        [],
        "python datasets/make_point_direction.py",
    )
    print(f"{file.name}: {len(entries)} trajectories, mean return {np.mean(returns):.1f}")
