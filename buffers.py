"""Multi-task replay buffer, and offline datasets.

The buffer is the paper's D = {D_i} (Section 4), one D_i for each task. All transitions lie in one
preallocated tensor a field. For each task two lists of indices say which of them belong to the RL
buffer (for critic and actor) and which to the encoder buffer (the histories h that become z,
Appendix C.2). A transition that belongs to both is stored once.

What is unrelated to the algorithm and its data, like the command line or checkpoints, is in
plumbing/. What the scripts need of it can be imported from here.
"""

import os
from pathlib import Path

import numpy as np
import torch

import envs
from plumbing import files
from plumbing.cores import on_cores
from plumbing.errors import InputError
from plumbing.evaluation import Evaluation
from plumbing.files import PATH_FIELDS, check_array, check_dataset, read_npz, write_file
from plumbing.flags import command_line, launch, print_safely, train
from plumbing.machine import choose_device
from plumbing.provenance import describe_dataset, write_description
from plumbing.run import Run

__all__ = [
    "Evaluation",
    "InputError",
    "ReplayBuffer",
    "Run",
    "choose_device",
    "command_line",
    "from_dataset",
    "join",
    "launch",
    "load_dataset",
    "on_cores",
    "save_dataset",
    "train",
]

# ===== Replay buffer


def join(paths: list, device="cpu") -> dict:
    """All transitions of some trajectories, as `ReplayBuffer.sample` gives them.

    Returns obs, next_obs (L, o), actions (L, a), and rewards, terminals (L, 1) if the paths have
    them; L is the number of transitions of all trajectories together.
    """
    columns = {
        "obs": [path["obs"][:-1] for path in paths],
        "next_obs": [path["obs"][1:] for path in paths],
    }
    for name in ("actions", "rewards", "terminals"):
        if name in paths[0]:
            columns[name] = [path[name] for path in paths]

    joined = {}
    for name, parts in columns.items():
        if torch.is_tensor(parts[0]):
            column = torch.cat(parts)
        else:  # NumPy joins arrays faster
            column = torch.from_numpy(np.concatenate(parts))
        joined[name] = column.reshape(len(column), -1).to(device, torch.float32)
    return joined


class ReplayBuffer:
    """Transitions of all tasks, with an "rl" and an "encoder" list of indices for each task.

    Args:
        num_tasks: number N of tasks.
        obs_dim, action_dim: sizes o and a of an observation and of an action.
        capacity: transitions that fit in, all tasks together. Memory: 4 * (2o + a + 2) bytes
            each, and 32 for indices.
        device: where the tensors live.

    Raises InputError: it does not fit into memory.
    """

    def __init__(self, num_tasks: int, obs_dim: int, action_dim: int, capacity: int, device="cpu"):
        self.device = torch.device(device)
        self.capacity = capacity
        self.used = 0  # transitions that are stored
        dims = {"obs": obs_dim, "actions": action_dim, "rewards": 1}
        dims |= {"next_obs": obs_dim, "terminals": 1}
        self.fields = {}  # {field: (capacity, dim)}
        self.index = {}  # {list: its indices of all tasks, a slot for each task}
        self.starts = {}  # {list: (N,) where the slot of each task starts in `index`}
        self.sizes = {}  # {list: (N,) how many indices each task has}
        self.slot_sizes = {}  # {list: N numbers, how many fit into the slot}
        self.next_free = {}  # {list: the end of the last slot}
        try:
            for name, dim in dims.items():
                self.fields[name] = torch.empty(capacity, dim, device=device)
            # Each task owns a contiguous slot of `index`; a full slot moves to the end with twice
            # the size. All slots that there ever were have together less than 4 times the number
            # of transitions, however many tasks there are.
            for name in ("rl", "encoder"):
                self.index[name] = torch.zeros(4 * capacity, dtype=torch.int32, device=device)
        except (RuntimeError, TypeError):  # no such memory, or a number of more than 64 bits
            raise InputError(
                f"a replay buffer for {capacity} transitions does not fit into memory"
            ) from None
        for name in ("rl", "encoder"):
            self.starts[name] = torch.zeros(num_tasks, dtype=torch.int64, device=device)
            self.slot_sizes[name] = [0] * num_tasks
            self.next_free[name] = 0
        for name in ("rl", "encoder", "offline"):
            self.sizes[name] = torch.zeros(num_tasks, dtype=torch.int64, device=device)

    def add(self, task: int, path: dict, encoder: bool = True) -> None:
        """Append one trajectory to D_task.

        Args:
            path: obs (L+1, o), actions (L, a), rewards (L,), terminals (L,).
            encoder: whether its transitions enter the encoder buffer beside the RL buffer.

        Raises IndexError: the buffer is full.
        """
        self.extend([(task, path)], encoder=encoder)

    def extend(self, entries: list, rl: bool = True, encoder: bool = True) -> None:
        """`add` for a list of (task, path).

        rl, encoder: which of the two buffers their transitions enter.
        """
        paths = []
        owners = []  # the task of each transition
        for task, path in entries:
            paths.append(path)
            owners += [task] * len(path["actions"])
        columns = join(paths, self.device)
        start = self.used
        end = start + len(columns["obs"])
        if end > self.capacity:
            raise IndexError(f"the replay buffer holds {self.capacity} transitions and is full")
        for name, field in self.fields.items():
            field[start:end] = columns[name]
        self.used = end

        # --- Which of these transitions belong to which task, in time order
        owners = np.array(owners)
        order = np.argsort(owners, kind="stable")
        tasks, firsts = np.unique(owners[order], return_index=True)
        groups = np.split(start + order, firsts[1:])
        for task, group in zip(tasks.tolist(), groups):
            index = torch.from_numpy(group)
            if rl:
                self.append_index("rl", task, index)
            if encoder:
                self.append_index("encoder", task, index)

    def append_index(self, name, task, index):
        """Append to the list of indices `name` of one task."""
        first = int(self.starts[name][task])
        size = int(self.sizes[name][task])
        new_size = size + len(index)
        if new_size > self.slot_sizes[name][task]:
            # The slot is full: it moves to the end.
            old_first, first = first, self.next_free[name]
            self.index[name][first : first + size] = self.index[name][old_first : old_first + size]
            self.starts[name][task] = first
            self.slot_sizes[name][task] = max(2 * self.slot_sizes[name][task], new_size)
            self.next_free[name] += self.slot_sizes[name][task]
        self.index[name][first + size : first + new_size] = index
        self.sizes[name][task] += len(index)

    def mark_offline(self) -> None:
        """Remember what the encoder buffers hold now: h_offline, with true rewards (Eq. 4)."""
        self.sizes["offline"].copy_(self.sizes["encoder"])

    def clear_encoder(self, task: int) -> None:
        """Empty the encoder buffer of one task; the RL buffer keeps its transitions."""
        self.sizes["encoder"][task] = 0

    def sample(self, tasks, n: int, generator: torch.Generator, source: str = "rl") -> dict:
        """Draw n transitions for each task, uniformly with replacement.

        Args:
            tasks: (T,) task numbers. None may be empty: it would give another task's transitions.
            source: "rl" and "encoder" hold offline and new data. "offline" is what "encoder" held
                at `mark_offline`: on Cheetah the dataset's encoder part, not its RL part.

        Returns obs (T, n, o), actions (T, n, a), rewards (T, n, 1), next_obs (T, n, o),
        terminals (T, n, 1).
        """
        which = "rl" if source == "rl" else "encoder"
        uniform = torch.rand(len(tasks), n, generator=generator, device=self.device)
        offsets = (uniform * self.sizes[source][tasks][:, None]).long()  # (T, n)
        index = self.index[which][self.starts[which][tasks][:, None] + offsets]  # (T, n)
        return {name: field[index] for name, field in self.fields.items()}

    def paths(self, task: int, where: str, n: int, source: str = "rl") -> list:
        """The "first" or "last" n transitions of a task in time order, as trajectories."""
        start = int(self.starts[source][task])
        size = int(self.sizes[source][task])
        index = self.index[source][start : start + size]
        index = index[:n] if where == "first" else index[max(0, size - n) :]
        data = {name: field[index].cpu().numpy() for name, field in self.fields.items()}

        # A trajectory goes on while one transition starts where the one before it ended.
        is_elsewhere = (data["obs"][1:] != data["next_obs"][:-1]).any(1)
        has_fallen = data["terminals"][:-1, 0] > 0
        is_break = is_elsewhere | has_fallen
        parts = np.split(np.arange(len(index)), np.flatnonzero(is_break) + 1)
        trajectories = []
        for part in parts:
            if len(part) == 0:
                continue
            path = {
                "obs": np.concatenate([data["obs"][part], data["next_obs"][part[-1:]]]),
                "actions": data["actions"][part],
                "rewards": data["rewards"][part, 0],
                "terminals": data["terminals"][part, 0] > 0,
            }
            trajectories.append(path)
        return trajectories

    def offline_paths(self, task: int) -> list:
        """The trajectories of h_offline of one task."""
        return self.paths(task, "first", int(self.sizes["offline"][task]), "encoder")

    def state_dict(self) -> dict:
        """Everything, cut to what is used; made of tensors only."""
        fields = {name: field[: self.used] for name, field in self.fields.items()}
        index = {}
        for name, starts in self.starts.items():
            slots = zip(starts.tolist(), self.sizes[name].tolist())
            parts = [self.index[name][start : start + size] for start, size in slots]
            index[name] = torch.cat(parts)
        return {"fields": fields, "index": index, "sizes": dict(self.sizes)}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`, for tensors of the right types and sizes.

        What the buffer holds already, the dataset, must be the first part of the state.

        Raises InputError: the state is none of this buffer.
        """
        self.check_state(state)
        self.used = len(state["fields"]["obs"])
        for name, field in self.fields.items():
            field[: self.used] = state["fields"][name]
        for name, sizes in self.sizes.items():
            sizes.copy_(state["sizes"][name])
        for name, index in state["index"].items():
            # Slots without room to spare, one behind the other
            self.index[name][: len(index)] = index
            self.starts[name].copy_(self.sizes[name].cumsum(0) - self.sizes[name])
            self.slot_sizes[name] = self.sizes[name].tolist()
            self.next_free[name] = len(index)

    def check_state(self, state):
        """Raise an InputError unless `load_state_dict` can take this state."""
        lengths = {len(field) for field in state["fields"].values()}
        used = max(lengths)
        if len(lengths) != 1 or not self.used <= used <= self.capacity:
            raise InputError(
                f"its replay buffer has {sorted(lengths)} transitions, "
                f"expected at most {self.capacity}"
            )
        for name, field in self.fields.items():
            first_rows = state["fields"][name][: self.used].to(self.device)
            if not torch.equal(first_rows, field[: self.used]):
                raise InputError(f"its replay buffer begins with other {name} than the dataset")
        for name, sizes in state["sizes"].items():
            index = state["index"]["rl" if name == "rl" else "encoder"]
            if name == "offline":
                fits = (sizes <= state["sizes"]["encoder"]).all()
            else:
                fits = sizes.sum() == len(index) <= used
            fits = fits and (sizes <= used).all()  # else their sum may have overflowed
            fits = fits and (sizes >= self.sizes[name].cpu()).all()
            fits = fits and ((index >= 0) & (index < used)).all()
            if not fits:
                raise InputError(
                    f"its buffer's sizes.{name}, or its index, points outside of {used} transitions"
                )


# ===== Offline datasets, in the format that plumbing/files.py describes


def save_dataset(
    file, env_id: str, train_tasks, test_tasks, rl: list, encoder: list, command: str
) -> None:
    """Write an offline dataset, and {name}.json beside it, which describes it.

    Args:
        file: the file to write. It and the description replace what was there.
        env_id: the family, also as "module:key".
        train_tasks, test_tasks: (N, k) and (M, k) task descriptions, from `envs.sample_tasks`.
        rl, encoder: lists of (task number, trajectory), a trajectory as in `ReplayBuffer.add`.
        command: the command line that made the data, kept in the file.

    Raises InputError: `load_dataset` would not take it.
    """
    if not isinstance(command, str) or len(command) > files.MAX_TEXT:
        raise InputError(f"{file}: command must be text of at most {files.MAX_TEXT} characters")
    files.check_entries(file, env_id, rl, encoder)
    data = {
        "format_version": np.array(files.FORMAT_VERSION),
        "env_id": envs.short_name(env_id),
        "command": command,
        "train_tasks": np.asarray(train_tasks, np.float64),
        "test_tasks": np.asarray(test_tasks, np.float64),
    }
    for part, entries in (("rl", rl), ("encoder", encoder)):
        lengths = [len(path["actions"]) for _, path in entries]
        data[f"{part}_tasks"] = np.array([task for task, _ in entries], np.int32)
        data[f"{part}_lengths"] = np.array(lengths, np.int32)
        for name, dtype in PATH_FIELDS.items():
            columns = [path[name] for _, path in entries]
            if not columns:  # no trajectory, but the number of columns of the others
                columns = [np.asarray(rl[0][1][name])[:0]]
            data[f"{part}_{name}"] = np.concatenate(columns).astype(dtype)
    check_dataset(file, env_id, data)

    size = sum(np.asarray(array).nbytes for array in data.values())
    too_large_to_unpack = size > files.MAX_UNPACKED  # says `read_npz`
    save = np.savez if too_large_to_unpack else np.savez_compressed
    write_file(os.path.expanduser(file), lambda stream: save(stream, allow_pickle=False, **data))
    write_description(file, describe_dataset(file, env_id, data))


def load_dataset(env_id: str, file=None) -> dict:
    """Read an offline dataset and check all of it.

    Args:
        env_id: the family the data must belong to.
        file: by default datasets/{env_id}.npz beside this file.

    Returns train_tasks (N, k), test_tasks (M, k), command; rl, encoder: lists of (task number,
    trajectory); sha256 of the content.

    Warns of test tasks that are training tasks, too. Raises InputError: one sentence that names
    the file, the field, what was found and what was expected.
    """
    shipped = Path(__file__).parent / "datasets" / f"{envs.short_name(env_id)}.npz"
    file = Path(os.path.expanduser(file or shipped))
    if not os.path.isfile(file):
        raise InputError(
            f"there is no dataset at {file}: pass --dataset, or make one (see datasets/README.md)"
        )
    rules = files.dataset_rules(envs.lookup(env_id))

    def accept(name, dtype, shape):
        return name in rules and check_array(f"{file}: {name}", dtype, shape, *rules[name])

    data = read_npz(file, accept)
    check_dataset(file, env_id, data)
    if seen := files.seen_test_tasks(data):
        words = f"{seen} of {len(data['test_tasks'])} test tasks in {file} are training tasks, too"
        print_safely(f"warning: {words}", "stderr")
    dataset = {name: data[name] for name in ("train_tasks", "test_tasks", "command")}
    for part in ("rl", "encoder"):
        lengths = data[f"{part}_lengths"].astype(np.int64)
        cuts = np.cumsum(lengths)[:-1]
        obs_cuts = np.cumsum(lengths + 1)[:-1]
        columns = {}
        for name in PATH_FIELDS:
            where = obs_cuts if name == "obs" else cuts
            columns[name] = np.split(data[f"{part}_{name}"], where)
        dataset[part] = []
        for i, task in enumerate(data[f"{part}_tasks"].tolist()):
            path = {name: columns[name][i] for name in PATH_FIELDS}
            dataset[part].append((task, path))
    dataset["sha256"] = files.digest(data, rules)
    return dataset


def from_dataset(
    dataset: dict, env_id: str, device="cpu", more_tasks: int = 0, more_steps: int = 0
) -> ReplayBuffer:
    """A replay buffer with a dataset in it, and room for more tasks and transitions.

    Without encoder trajectories the RL trajectories fill both buffers.
    """
    spec = envs.lookup(env_id)
    num_tasks = len(dataset["train_tasks"]) + more_tasks
    num_transitions = sum(len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"])
    capacity = num_transitions + more_steps
    buffer = ReplayBuffer(num_tasks, spec.obs_dim, spec.action_dim, capacity, device)
    buffer.extend(dataset["rl"], rl=True, encoder=not dataset["encoder"])
    if dataset["encoder"]:
        buffer.extend(dataset["encoder"], rl=False, encoder=True)
    buffer.mark_offline()
    return buffer
