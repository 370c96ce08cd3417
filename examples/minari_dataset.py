"""An offline dataset to Minari and back, without loss.

    python examples/minari_dataset.py PointDirection export PointDirection/scripted-v0 FILE.npz
    python examples/minari_dataset.py PointDirection import PointDirection/scripted-v0 NEW.npz

The options of an episode hold its task: `task` (k numbers), `task_number`, and `part` ("rl" or
"encoder"). The description of the dataset is JSON and holds all tasks, those for testing too.
"""

import argparse
import json
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs


def to_minari(dataset, env_id, minari_id):
    """Write what `buffers.load_dataset` returned as the Minari dataset `minari_id`."""
    spec = envs.lookup(env_id)
    episodes = []
    for part in ("rl", "encoder"):
        for number, path in dataset[part]:
            task = dataset["train_tasks"][number]
            terminations = path["terminals"].astype(bool)
            truncations = np.zeros(len(terminations), bool)
            truncations[-1] = not terminations[-1]
            episode = EpisodeBuffer(
                options={"task": task, "task_number": number, "part": part},
                observations=path["obs"],
                actions=path["actions"],
                rewards=path["rewards"],
                terminations=terminations,
                truncations=truncations,
            )
            episodes.append(episode)
    description = {"env_id": envs.short_name(env_id), "command": dataset["command"]}
    for split in ("train_tasks", "test_tasks"):
        description[split] = dataset[split].tolist()
    return minari.create_dataset_from_buffers(
        minari_id,
        episodes,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (spec.obs_dim,), np.float32),
        action_space=gym.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32),
        description=json.dumps(description),
    )


def from_minari(minari_id, env_id, file):
    """Write the Minari dataset `minari_id`, one that `to_minari` made, to an .npz file."""
    data = minari.load_dataset(minari_id)
    try:
        description = json.loads(data.storage.metadata["description"])
        tasks = [description["train_tasks"], description["test_tasks"]]
    except (KeyError, TypeError, ValueError):
        raise buffers.InputError(f"{minari_id} does not describe its tasks") from None
    if description.get("env_id") != envs.short_name(env_id):
        raise buffers.InputError(f"{minari_id} is of {description.get('env_id')}, not of {env_id}")
    parts = {"rl": [], "encoder": []}
    for episode in data:
        (metadata,) = data.storage.get_episode_metadata([episode.id])
        options = metadata.get("options") or {}
        if not {"part", "task_number"} <= options.keys():
            raise buffers.InputError(f"{minari_id}: an episode does not say its task")
        path = {"obs": episode.observations, "actions": episode.actions}
        path |= {"rewards": episode.rewards, "terminals": episode.terminations}
        parts[options["part"]].append((int(options["task_number"]), path))
    buffers.save_dataset(
        file, env_id, *tasks, parts["rl"], parts["encoder"], description["command"]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("env_id")
    parser.add_argument("direction", choices=["export", "import"])
    parser.add_argument("minari_id", help="such as smac/PointDirection/scripted-v0")
    parser.add_argument("file", help="the .npz file to read or to write")
    args = parser.parse_args()
    try:
        if args.direction == "export":
            to_minari(buffers.load_dataset(args.env_id, args.file), args.env_id, args.minari_id)
        else:
            from_minari(args.minari_id, args.env_id, args.file)
    except (ValueError, OSError) as error:  # Minari raises these too
        parser.exit(2, f"error: {error}\n")
