"""An offline dataset to the folders that FOCAL and CSRO read, and back.

    python examples/peers_dataset.py PointDirection export FOLDER datasets/PointDirection.npz
    python examples/peers_dataset.py PointDirection import FOLDER new.npz --i-trust-these-files

    FOLDER/goal_idx{N}/trj_evalsample{i}_step{j}.npy  trajectory i of task N, by a policy of age j
    FOLDER/{train,test}_tasks.npy                     (N, k) and (M, k), numbers that describe tasks

A trajectory is an array (L, 4) of objects: obs, action, reward, next_obs. It says neither what its
task is nor whether it ended by itself. So export adds the files of tasks, and a fifth column for
the terminals, which the others' code does not read. For folders of theirs write the files of tasks
yourself, by `numpy.save`; of four columns a trajectory shorter than the horizon ended by itself.
"""

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs

WARNING = "its files are pickled: loading them runs any code in them. If you trust them, add"


def write_folder(folder, entries):
    """Write (task number, trajectory) pairs, the trajectories of each task numbered from 0."""
    for task, path in entries:
        rows = np.empty((len(path["actions"]), 5), object)
        for t in range(len(rows)):
            rows[t, 0] = path["obs"][t]
            rows[t, 1] = path["actions"][t]
            rows[t, 2] = path["rewards"][t]
            rows[t, 3] = path["obs"][t + 1]
            rows[t, 4] = path["terminals"][t]
        goal = folder / f"goal_idx{task}"
        goal.mkdir(parents=True, exist_ok=True)
        number = len(list(goal.iterdir()))
        np.save(goal / f"trj_evalsample{number}_step0.npy", rows)


def read_folder(folder, num_tasks, horizon):
    """Unpickle such files, which runs code: (task number, trajectory) pairs in order of time."""
    entries = []
    for task in range(num_tasks):
        files = {}
        for file in (folder / f"goal_idx{task}").glob("trj_evalsample*_step*.npy"):
            i, j = file.stem.removeprefix("trj_evalsample").split("_step")
            files[int(j), int(i)] = file
        for _, file in sorted(files.items()):
            rows = np.load(file, allow_pickle=True)
            if rows.ndim != 2 or rows.shape[1] not in (4, 5):
                raise buffers.InputError(f"{file} is an array {rows.shape}, expected (L, 4)")
            obs = np.stack(rows[:, 0])
            next_obs = np.stack(rows[:, 3])
            if not np.array_equal(obs[1:], next_obs[:-1]):
                raise buffers.InputError(f"{file}: a step does not start where the last one ended")
            terminals = np.zeros(len(rows), bool)
            terminals[-1] = len(rows) < horizon
            if rows.shape[1] == 5:
                terminals = rows[:, 4].astype(bool)
            path = {"obs": np.concatenate([obs, next_obs[-1:]]), "terminals": terminals}
            path["actions"] = np.stack(rows[:, 1])
            path["rewards"] = np.stack(rows[:, 2]).reshape(-1)
            entries.append((task, path))
    return entries


def to_folder(dataset, folder):
    """Write what `buffers.load_dataset` returned. An encoder part goes to FOLDER/encoder."""
    if folder.exists():
        raise buffers.InputError(f"{folder} exists")
    write_folder(folder, dataset["rl"])
    write_folder(folder / "encoder", dataset["encoder"])
    for split in ("train_tasks", "test_tasks"):
        np.save(folder / f"{split}.npy", dataset[split])


def from_folder(folder, env_id, file, trusted=False):
    """Write a folder to an .npz file. Raises InputError unless its author is trusted."""
    if not trusted:
        raise buffers.InputError(f"{folder}: {WARNING} --i-trust-these-files")
    train_tasks, test_tasks = (
        np.load(folder / f"{split}_tasks.npy") for split in ("train", "test")
    )
    horizon = envs.lookup(env_id).horizon
    rl = read_folder(folder, len(train_tasks), horizon)
    encoder = read_folder(folder / "encoder", len(train_tasks), horizon)
    command = f"python examples/peers_dataset.py {env_id} import {folder}"
    buffers.save_dataset(file, env_id, train_tasks, test_tasks, rl, encoder, command)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("env_id")
    parser.add_argument("direction", choices=["export", "import"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", help="the .npz file to read or to write")
    parser.add_argument("--i-trust-these-files", action="store_true")
    args = parser.parse_args()
    try:
        if args.direction == "export":
            to_folder(buffers.load_dataset(args.env_id, args.file), args.folder)
        else:
            from_folder(args.folder, args.env_id, args.file, args.i_trust_these_files)
    except (
        ValueError,
        OSError,
        EOFError,
        ImportError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        parser.exit(2, f"error: {error}\n")
