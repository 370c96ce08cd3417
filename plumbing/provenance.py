"""Where a dataset comes from: {name}.json beside {name}.npz."""

import datetime
import json
import os

import numpy as np

import envs
from plumbing.files import dataset_rules, digest, write_file
from plumbing.machine import versions

VERSIONS = ("python", "torch", "numpy", "gymnasium", "mujoco", "pybullet")


def description_file(path) -> str:
    """The file that describes a dataset: datasets/HopperParam.npz -> datasets/HopperParam.json."""
    return os.path.expanduser(path).removesuffix(".npz") + ".json"


def returns_by_task(data, horizon) -> np.ndarray:
    """The mean return of each training task's trajectories in the RL part, up to the horizon: (N,).

    Sawyer's go on beyond it.
    """
    lengths = data["rl_lengths"].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    times = np.arange(len(data["rl_rewards"])) - np.repeat(starts, lengths)
    rewards = np.where(times < horizon, data["rl_rewards"], 0)
    returns = np.add.reduceat(rewards.astype(np.float64), starts)  # (P,)
    sums = np.bincount(data["rl_tasks"], returns)  # (N,)
    return sums / np.bincount(data["rl_tasks"])


def describe_dataset(path, env_id, data, with_versions=True) -> dict:
    """What {name}.json says of a dataset.

    Args:
        path: the dataset's file.
        env_id: its family, also as "module:key".
        data: its arrays, {name: array}, as `check_dataset` takes them.
        with_versions: the data were made just now, here; otherwise date, versions and processor
            are None, which means unknown.
    """
    found = versions() if with_versions else {}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    spec = envs.lookup(env_id)
    means = returns_by_task(data, spec.horizon)
    return {
        "file": os.path.basename(path),
        "env_id": str(data["env_id"]),
        "command": str(data["command"]),
        "date": now if with_versions else None,
        # of packages that are installed; None is unknown, or not installed
        "versions": {name: found.get(name) for name in VERSIONS},
        "cpu": found.get("cpu"),
        "sha256_of_contents": digest(data, dataset_rules(spec)),
        # a mean over tasks of the mean return of a task's trajectories, up to the horizon
        "mean_return": round(float(means.mean()), 3),
        "mean_return_by_task": [round(float(mean), 3) for mean in means],
        "reference": None,  # what SMAC reaches with these data, where that has been measured
    }


def write_description(path, description) -> None:
    """Write {name}.json beside a dataset. Raises InputError, OSError."""
    text = json.dumps(description, indent=1) + "\n"
    write_file(description_file(path), lambda file: file.write(text.encode()))
