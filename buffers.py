"""Multi-task replay buffer; .npz files of datasets and checkpoints; the run: folder, log, checkpoint, command line.

The buffer is the paper's D = {D_i} (Section 3), one D_i for each task. All transitions lie in one preallocated tensor a
field; for each task two lists of indices say which of them belong to the RL buffer (for critic and actor) and which to
the encoder buffer (the histories h that become z, Appendix C.2). A transition that belongs to both is stored once.

The three parts can be read one by one; the first needs nothing of the others.
"""

import contextlib
import csv
import ctypes
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from envs import InputError

# ===== Replay buffer


def join(paths: list, device="cpu") -> dict:
    """All transitions of some trajectories, as `ReplayBuffer.sample` gives them: obs (L, o), ..., rewards (L, 1)."""
    rows = {"obs": ("obs", slice(-1)), "next_obs": ("obs", slice(1, None))}
    rows |= {name: (name, slice(None)) for name in ("actions", "rewards", "terminals") if name in paths[0]}
    columns = {name: [path[key][part] for path in paths] for name, (key, part) in rows.items()}
    for name, parts in columns.items():
        tensors = torch.is_tensor(parts[0])  # else arrays, which are joined faster
        columns[name] = torch.cat(parts) if tensors else torch.from_numpy(np.concatenate(parts))
    return {name: column.reshape(len(column), -1).to(device, torch.float32) for name, column in columns.items()}


class ReplayBuffer:
    """Transitions of all tasks, with an "rl" and a "context" list of indices for each task.

    Args:
        num_tasks: number N of tasks.
        obs_dim, action_dim: sizes o and a of an observation and of an action.
        capacity: transitions that fit in, all tasks together. Memory: 4 * (2o + a + 2) bytes each, and 32 for indices.
        device: where the tensors live.
    """

    def __init__(self, num_tasks: int, obs_dim: int, action_dim: int, capacity: int, device="cpu"):
        dims = {"obs": obs_dim, "actions": action_dim, "rewards": 1, "next_obs": obs_dim, "terminals": 1}
        lists = ("rl", "context")
        try:
            self.fields = {name: torch.empty(capacity, dim, device=device) for name, dim in dims.items()}
            # A task's indices stand in a row, from `starts` on. When its room is full they move to the end, where they
            # have twice as much: all rooms together are less than 4 times the transitions, however many tasks.
            self.index = {name: torch.zeros(4 * capacity, dtype=torch.int32, device=device) for name in lists}
        except (RuntimeError, TypeError):  # can't allocate memory; a number of more than 64 bits
            raise InputError(f"a replay buffer for {capacity} transitions does not fit into memory") from None
        self.starts = {name: torch.zeros(num_tasks, dtype=torch.int64, device=device) for name in lists}
        self.sizes = {name: torch.zeros(num_tasks, dtype=torch.int64, device=device) for name in (*lists, "offline")}
        self.rooms, self.ends = {name: [0] * num_tasks for name in lists}, dict.fromkeys(lists, 0)
        self.used, self.capacity, self.device = 0, capacity, torch.device(device)

    def add(self, task: int, path: dict, rl: bool = True, context: bool = True) -> None:
        """Append one trajectory to D_task: obs (T+1, o), actions (T, a), rewards (T,), terminals (T,).

        rl, context: which of the two lists its transitions enter. Raises IndexError: the buffer is full.
        """
        self.extend([(task, path)], rl, context)

    def extend(self, entries: list, rl: bool = True, context: bool = True) -> None:
        """`add` for a list of (task, path)."""
        columns, start = join([path for _, path in entries], self.device), self.used
        end = start + len(columns["obs"])
        if end > self.capacity:
            raise IndexError(f"the replay buffer holds {self.capacity} transitions and is full")
        for name, field in self.fields.items():
            field[start:end] = columns[name]
        self.used = end
        tasks = np.repeat([task for task, _ in entries], [len(path["actions"]) for _, path in entries])
        order = np.argsort(tasks, kind="stable")
        found, firsts = np.unique(tasks[order], return_index=True)
        for task, index in zip(found.tolist(), np.split(start + order, firsts[1:])):
            for name in ["rl"] * rl + ["context"] * context:
                self.append_index(name, task, torch.from_numpy(index))

    def append_index(self, name, task, index):
        """Append to the list of indices `name` of one task."""
        size, first = int(self.sizes[name][task]), int(self.starts[name][task])
        if size + len(index) > self.rooms[name][task]:
            self.rooms[name][task] = max(2 * self.rooms[name][task], size + len(index))
            old, first = first, self.ends[name]
            self.index[name][first : first + size] = self.index[name][old : old + size]
            self.starts[name][task] = first
            self.ends[name] += self.rooms[name][task]
        self.index[name][first + size : first + size + len(index)] = index
        self.sizes[name][task] += len(index)

    def mark_offline(self) -> None:
        """Remember that what the encoder buffers hold now is h_offline, the reward-labelled data of Eq. 4."""
        self.sizes["offline"].copy_(self.sizes["context"])

    def clear_context(self, task: int) -> None:
        """Empty the encoder buffer of one task; the RL buffer keeps its transitions."""
        self.sizes["context"][task] = 0

    def sample(self, tasks, n: int, generator: torch.Generator, source: str = "rl") -> dict:
        """Draw n transitions for each task, uniformly with replacement.

        Args:
            tasks: (T,) task numbers.
            source: "rl", "context", or "offline" (the part of "context" that was there at `mark_offline`).
        Returns:
            obs (T, n, o), actions (T, n, a), rewards (T, n, 1), next_obs (T, n, o), terminals (T, n, 1).
        """
        name, sizes = "rl" if source == "rl" else "context", self.sizes[source]
        uniform = torch.rand(len(tasks), n, generator=generator, device=self.device)
        place = self.starts[name][tasks][:, None] + (uniform * sizes[tasks][:, None]).long()  # (T, n)
        index = self.index[name][place]
        return {name: field[index] for name, field in self.fields.items()}

    def paths(self, task: int, where: str, n: int, source: str = "rl") -> list:
        """The "first" or "last" n transitions of one task in time order, as trajectories (what `add` takes)."""
        start, size = int(self.starts[source][task]), int(self.sizes[source][task])
        index = self.index[source][start : start + size]
        index = index[:n] if where == "first" else index[max(0, size - n) :]
        data = {name: field[index].cpu().numpy() for name, field in self.fields.items()}
        # A trajectory goes on while one transition starts where the one before it ended.
        breaks = np.flatnonzero((data["obs"][1:] != data["next_obs"][:-1]).any(1)) + 1
        return [
            {
                "obs": np.concatenate([data["obs"][part], data["next_obs"][part[-1:]]]),
                "actions": data["actions"][part],
                "rewards": data["rewards"][part, 0],
                "terminals": data["terminals"][part, 0] > 0,
            }
            for part in np.split(np.arange(len(index)), breaks)
            if len(part)
        ]

    def offline_paths(self, task: int) -> list:
        """The trajectories of h_offline of one task."""
        return self.paths(task, "first", int(self.sizes["offline"][task]), "context")

    def state_dict(self) -> dict:
        """Everything, cut to what is used; made of tensors only."""
        index = {}
        for name, starts in self.starts.items():
            spans = zip(starts.tolist(), self.sizes[name].tolist())
            index[name] = torch.cat([self.index[name][start : start + size] for start, size in spans])
        fields = {name: field[: self.used] for name, field in self.fields.items()}
        return {"fields": fields, "index": index, "sizes": dict(self.sizes)}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`, for tensors of the right types and sizes. Raises InputError.

        What the buffer holds already, the dataset's transitions, must be the first of those in the state.
        """
        used = {len(field) for field in state["fields"].values()}
        if len(used) != 1 or not self.used <= max(used) <= self.capacity:
            raise InputError(f"its replay buffer has {sorted(used)} transitions, expected at most {self.capacity}")
        for name, field in self.fields.items():
            if not torch.equal(state["fields"][name][: self.used].to(self.device), field[: self.used]):
                raise InputError(f"its replay buffer begins with other {name} than the dataset")
        for name, size in state["sizes"].items():
            listed, context = state["index"]["rl" if name == "rl" else "context"], state["sizes"]["context"]
            fits = (size <= context).all() if name == "offline" else size.sum() == len(listed) <= max(used)
            fits = fits and (size <= max(used)).all()  # else their sum may not be a sum
            if not fits or (size < self.sizes[name].cpu()).any() or ((listed < 0) | (listed >= max(used))).any():
                raise InputError(f"its buffer's sizes.{name}, or its index, points outside of {used} transitions")
        self.used = max(used)
        for name, field in self.fields.items():
            field[: self.used] = state["fields"][name]
        for name, size in self.sizes.items():
            size.copy_(state["sizes"][name])
        for name, listed in state["index"].items():
            self.rooms[name], self.ends[name] = self.sizes[name].tolist(), len(listed)
            self.index[name][: len(listed)] = listed
            self.starts[name].copy_(self.sizes[name].cumsum(0) - self.sizes[name])


# ===== Files: .npz without pickle


MAX_UNPACKED = 1 << 26  # bytes that all compressed arrays of a file may have together; what is stored plain is no more
MAX_TABLE = 1 << 18  # bytes of the table of contents
HEADER = re.compile(  # of an array as numpy.savez writes it: type, whether it lies by columns, shape
    rb"\x93NUMPY\x01\x00..{'descr': '(<[fi][48]|\|[ub]1|<U[1-9]\d{0,7})', 'fortran_order': (True|False), "
    rb"'shape': \((|\d{1,15},|\d{1,15}(?:, \d{1,15}){1,3})\), } *\n",
    re.DOTALL,
)


def read_npz(path, accept) -> dict:
    """Some arrays of an .npz file, in one pass; it can not run code, nor take much more memory than its own size.

    Args:
        accept: accept(name, dtype, shape) says whether to read an array, before it is read. It may raise InputError.
    Returns:
        {name: array}, strings as str.
    Raises:
        InputError: there is no such file, or it is damaged, or holds anything but plain arrays.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    arrays = {}
    try:
        with open(path, "rb") as file, open_zip(file) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    head = stream.read(10)
                    header = HEADER.fullmatch(head + stream.read(int.from_bytes(head[8:], "little")))
                    if not header:
                        raise ValueError(f"{name} is no plain array")
                    dtype, shape = np.dtype(header[1].decode()), tuple(map(int, re.findall(rb"\d+", header[3])))
                    if stream.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                        raise ValueError(f"{name} has another size than it says")
                    if accept(name, dtype, shape):
                        data = bytearray()
                        while chunk := stream.read(1 << 20):
                            data += chunk
                        if dtype.kind == "U":
                            arrays[name] = data.decode("utf-32-le").rstrip("\0")
                        else:
                            order = "F" if header[2] == b"True" else "C"
                            arrays[name] = np.frombuffer(data, dtype).reshape(shape, order=order)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes zipfile and numpy raise
        reason = error if isinstance(error, (ValueError, OSError, zipfile.BadZipFile)) else type(error).__name__
        raise InputError(f"{path} can not be read: {reason}") from None
    return arrays


def open_zip(file):
    """A zip archive with one table of contents, small and at the end of the file, so that all readers find the same."""
    length = file.seek(0, os.SEEK_END)
    file.seek(-min(98, length), os.SEEK_END)
    end = file.read().rjust(98, b"\0")
    size, alone = end[-10:-6], True
    if end[-42:-38] == b"PK\6\7":  # a file of more than 4 GB: another record, just before
        size, alone = end[-58:-50], end[-98:-94] + end[-34:-26] == b"PK\6\6" + (length - 98).to_bytes(8, "little")
    alone = alone and end[-22:-18] == b"PK\5\6" and end[-2:] == b"\0\0"  # no comment, which could hold a second one
    if not alone or int.from_bytes(size, "little") > MAX_TABLE:
        raise ValueError("it is no .npz file, or damaged")
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("it is compressed in a way that numpy does not use")
    names = {member.filename.removesuffix(".npy") for member in members}
    unpacked = sum(member.file_size for member in members if member.compress_type == zipfile.ZIP_DEFLATED)
    if len(names) < len(members) or sum(m.compress_size for m in members) > length or unpacked > MAX_UNPACKED:
        raise ValueError("its arrays are too large, overlap, or two have one name")
    return archive


def write_file(path, write) -> None:
    """Write a file whole or not at all: `write(file)` to another one first, which is then renamed. Raises OSError."""
    temporary = Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave an empty file under the new name
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ----- Offline dataset: one .npz file for each environment
#
#   format_version ()              env_id ()                   command ()  the command that made it
#   train_tasks (N, k)             test_tasks (M, k)           k numbers describe one task
#   {rl,encoder}_tasks (P,)        task number of each trajectory, in time order within a task
#   {rl,encoder}_lengths (P,)      its number of transitions T
#   {rl,encoder}_obs (sum(T+1), o), _actions (sum(T), a), _rewards (sum(T),), _terminals (sum(T),)
#
# With no encoder trajectories (P = 0) the RL trajectories serve as both buffers.


FORMAT_VERSION, MAX_TASKS, MAX_PATHS, MAX_LENGTH, MAX_TEXT = 1, 10_000, 50_000, 1_200, 10_000
PATH_FIELDS = {"obs": np.float32, "actions": np.float32, "rewards": np.float32, "terminals": np.bool_}


def dataset_rules(spec):
    """{array of a dataset: its type, shape, and how long it may be where the shape is open (None)}."""
    rules = dict.fromkeys(("env_id", "command"), ("U", (), MAX_TEXT)) | {"format_version": ("i8", (), 0)}
    rules |= {name: ("f8", (None, spec.task_dim), MAX_TASKS) for name in ("train_tasks", "test_tasks")}
    for part in ("rl", "encoder"):
        rules |= {f"{part}_{name}": ("i4", (None,), MAX_PATHS) for name in ("tasks", "lengths")}
        rules[f"{part}_obs"] = "f4", (None, spec.obs_dim), math.inf
        rules[f"{part}_actions"] = "f4", (None, spec.action_dim), math.inf
        rules |= {f"{part}_rewards": ("f4", (None,), math.inf), f"{part}_terminals": ("b1", (None,), math.inf)}
    return rules


def save_dataset(path, env_id: str, train_tasks, test_tasks, rl: list, encoder: list, command: str) -> None:
    """Write an offline dataset.

    Args:
        train_tasks, test_tasks: (N, k) and (M, k) task descriptions, from `envs.sample_tasks`.
        rl, encoder: lists of (task number, trajectory), a trajectory as in `ReplayBuffer.add`.
        command: the command line that made the data, kept in the file.
    Raises:
        InputError: `load_dataset` would not take it.
    """
    data = {"format_version": np.array(FORMAT_VERSION), "env_id": envs.short_name(env_id), "command": command}
    data |= {"train_tasks": np.asarray(train_tasks, np.float64), "test_tasks": np.asarray(test_tasks, np.float64)}
    for part, entries in (("rl", rl), ("encoder", encoder)):
        data[f"{part}_tasks"] = np.array([task for task, _ in entries], np.int32)
        data[f"{part}_lengths"] = np.array([len(p["actions"]) for _, p in entries], np.int32)
        for name, dtype in PATH_FIELDS.items():
            like = np.asarray(rl[0][1][name])  # gives an empty encoder part its number of columns
            data[f"{part}_{name}"] = np.concatenate([p[name] for _, p in entries] or [like[:0]]).astype(dtype)
    check_dataset(path, env_id, data)
    large = sum(np.asarray(array).nbytes for array in data.values()) > MAX_UNPACKED  # `read_npz` would not unpack them
    save = np.savez if large else np.savez_compressed
    write_file(os.path.expanduser(path), lambda file: save(file, allow_pickle=False, **data))


def load_dataset(env_id: str, path=None) -> dict:
    """Read an offline dataset and check all of it.

    Args:
        env_id: the family the data must belong to.
        path: by default datasets/{env_id}.npz beside this file.
    Returns:
        train_tasks (N, k), test_tasks (M, k), command; rl, encoder: lists of (task number, trajectory); sha256.
    Raises:
        InputError: one sentence that names the file, the field, what was found and what was expected.
    """
    path = Path(os.path.expanduser(path or Path(__file__).parent / "datasets" / f"{envs.short_name(env_id)}.npz"))
    if not os.path.isfile(path):
        raise InputError(f"there is no dataset at {path}: pass --dataset, or make one (see datasets/README.md)")
    rules = dataset_rules(envs.lookup(env_id))
    data = read_npz(path, lambda name, *found: name in rules and check_array(f"{path}: {name}", *found, *rules[name]))
    check_dataset(path, env_id, data)
    digest, result = hashlib.sha256(), {name: data[name] for name in ("train_tasks", "test_tasks", "command")}
    for name in sorted(rules):
        array = np.asarray(data[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    for part in ("rl", "encoder"):
        tasks, lengths = data[f"{part}_tasks"].tolist(), data[f"{part}_lengths"].astype(np.int64)
        cuts, obs_cuts = np.cumsum(lengths)[:-1], np.cumsum(lengths + 1)[:-1]
        columns = {name: np.split(data[f"{part}_{name}"], obs_cuts if name == "obs" else cuts) for name in PATH_FIELDS}
        result[part] = [(task, {name: columns[name][i] for name in PATH_FIELDS}) for i, task in enumerate(tasks)]
    return result | {"sha256": digest.hexdigest()}


def check_array(what, dtype, shape, kind, wanted, longest=math.inf) -> bool:
    """Raise an InputError unless an array has this kind and shape (None: any length up to `longest`). Returns True."""
    fits = dtype.kind == kind if kind == "U" else dtype.str[1:] == kind
    if not fits or len(shape) != len(wanted) or any(n != w for n, w in zip(shape, wanted) if w is not None):
        expected = f"{'text' if kind == 'U' else np.dtype(kind)} {wanted}".replace("None", "any number")
        raise InputError(f"{what} is {dtype} {shape}, expected {expected}")
    if kind == "U" and dtype.itemsize > 4 * longest or None in wanted and shape[0] > longest:
        raise InputError(f"{what} has {max(shape, default=dtype.itemsize // 4)} entries, expected at most {longest}")
    return True


def check_dataset(path, env_id, data) -> None:
    """Raise an InputError for the first thing that is wrong with the arrays of a dataset."""
    spec = envs.lookup(env_id)
    for name, (kind, wanted, longest) in dataset_rules(spec).items():
        if name not in data:
            raise InputError(f"{path}: {name} is missing")
        if not isinstance(data[name], str):
            check_array(f"{path}: {name}", data[name].dtype, data[name].shape, kind, wanted, longest)
            if np.size(data[name]) and not np.isfinite(data[name]).all():
                raise InputError(f"{path}: {name} is NaN or infinite, expected finite numbers")
    for name, wanted in (("format_version", FORMAT_VERSION), ("env_id", envs.short_name(env_id))):
        if data[name] != wanted:
            raise InputError(f"{path}: {name} is {data[name]}, expected {wanted}")
    env = envs.make(env_id)
    for name in ("train_tasks", "test_tasks"):
        tasks, (low, high) = data[name], spec.task_range
        if not len(tasks) or tasks.min() < low or tasks.max() > high:
            raise InputError(f"{path}: {name} must hold a task at least, and numbers in {[low, high]}")
        try:
            for task in tasks:
                env.unwrapped.set_task(task)
        except ValueError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    env.close()
    for part in ("rl", "encoder"):
        tasks, lengths, num_tasks = data[f"{part}_tasks"], data[f"{part}_lengths"], len(data["train_tasks"])
        if lengths.size != tasks.size:
            raise InputError(f"{path}: {part}_tasks has {tasks.size} entries, {part}_lengths has {lengths.size}")
        most = max(MAX_LENGTH, spec.horizon)  # no slice of a PEARL run is longer, even if its episodes look like one
        for name, numbers, low, high in (("lengths", lengths, 1, most), ("tasks", tasks, 0, num_tasks - 1)):
            if numbers.size and (numbers.min() < low or numbers.max() > high):
                raise InputError(f"{path}: {part}_{name} must lie within {low}..{high}")
        total = int(lengths.sum(dtype=np.int64))
        for name in PATH_FIELDS:
            rows, found = total + lengths.size * (name == "obs"), len(data[f"{part}_{name}"])
            if found != rows:
                raise InputError(f"{path}: {part}_{name} has {found} rows, expected {rows} by {part}_lengths")
        if np.abs(data[f"{part}_actions"]).max(initial=0) > 1:
            raise InputError(f"{path}: {part}_actions must lie in [-1, 1]")
        missing = np.setdiff1d(np.arange(num_tasks), tasks)
        if missing.size and (part == "rl" or lengths.size):
            raise InputError(f"{path}: {part} has no transition of task {missing[0]}, and every one needs some")


def from_dataset(dataset: dict, env_id: str, device="cpu", more_tasks: int = 0, more: int = 0) -> ReplayBuffer:
    """A replay buffer with a dataset in it, and room for more tasks and transitions; without encoder trajectories the
    RL trajectories fill both buffers."""
    spec, num_tasks = envs.lookup(env_id), len(dataset["train_tasks"]) + more_tasks
    capacity = sum(len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"]) + more
    buffer = ReplayBuffer(num_tasks, spec.obs_dim, spec.action_dim, capacity, device)
    buffer.extend(dataset["rl"], rl=True, context=not dataset["encoder"])
    if dataset["encoder"]:
        buffer.extend(dataset["encoder"], rl=False, context=True)
    buffer.mark_offline()
    return buffer


# ===== The run. Flags of all scripts: what they may be, and which may change when a run is resumed


MAY_BE_ZERO = "seed task_seed offline_steps online_iterations lambda_pearl kl_coef posterior_steps policy_reg alpha"
AT_LEAST = {"rl_batch": 2, "context_batch": 2}  # a mean and a deviation are taken over them
AT_MOST = {"gamma": 1, "tau": 1, "tasks_per_iteration": 32, "seed": 2**32, "task_seed": 2**32 - 1}  # and see `bounds`
PRODUCTS = {  # for memory: a gradient step of the largest takes about 1 GB
    "meta_batch rl_batch": 2**15, "meta_batch context_batch": 2**15, "meta_batch rl_batch latent_dim": 2**24,
    "vae_tasks vae_trajectories": 2**7, "vae_tasks vae_trajectories elbo_terms elbo_terms": 2**20,
}  # fmt: skip
PATHS = ("dataset", "save_dataset", "run_dir", "resume")  # of the command line alone, never from a file
FREE = (*PATHS, "device", "online_iterations", "compile", "cuda_graph")
CSV_COLUMNS = ["gradient_step", "env_steps", "split", "context", "task", "return", "exploration_return"]
NUMBER = r"-?\d+(\.\d+)?(e[-+]\d+)?"
ROW = rf"\d{{1,16}},\d{{1,16}},(test|train),(online|offline),\d{{1,16}},{NUMBER},{NUMBER}\r\n"
CSV = rf"{','.join(CSV_COLUMNS)}\r\n({ROW})*"  # an eval.csv
LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves


def bounds(name):
    """The least and the most that the numbers of a flag may be."""
    most = 2048 if name.endswith("_hidden") else 10_000 if name.endswith("_batch") else 2**53
    most = 1000 if name.endswith("_dim") else most
    return AT_LEAST.get(name, 0 if name in MAY_BE_ZERO.split() else math.ulp(0)), AT_MOST.get(name, most)


def check_flags(args, before=None) -> None:
    """Raise an InputError for the first flag that can not be used, or that can not change; before: those of the run."""
    values = vars(args)
    for name, kind in typing.get_type_hints(type(args)).items():
        value, flag, (low, high) = values[name], "--" + name.replace("_", "-"), bounds(name)
        if not is_a(value, kind):
            raise InputError(f"{flag} is {value!r}, which is not of its type")
        if before and name not in FREE and value != getattr(before, name):
            raise InputError(f"{flag} is {getattr(before, name)} in the run to resume and can not become {value}")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(not low <= n <= high for n in numbers if type(n) in (int, float)) or not 0 < len(numbers) <= 10:
            least = "above 0" if low == math.ulp(0) else f"at least {low}"
            raise InputError(f"{flag} is {value}, it must be {least} and at most {high}")
        most = 2**18 if "value_hidden" in values else 2**22  # MACAW has weights for each task
        if name.endswith("_hidden") and sum(a * b for a, b in itertools.pairwise(value)) > most:
            raise InputError(f"{flag} is {value}, which makes more than {most} weights")
    for names, most in PRODUCTS.items():
        if all(name in values for name in names.split()) and math.prod(values[name] for name in names.split()) > most:
            raise InputError(f"{' x '.join(names.split())} must be at most {most} (PRODUCTS in buffers.py)")
    if values.get("save_dataset"):
        file = Path(os.path.expanduser(args.save_dataset)).absolute()
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise InputError(f"--save-dataset {file} is no file in a folder that can be written to")
    if args.compile and not shutil.which("g++"):
        raise InputError("--compile needs a C++ compiler, and there is no g++ here")


def is_a(value, kind) -> bool:
    """Whether a value is of a flag's type: plain, Optional, Literal or tuple[int, ...]."""
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and {type(n) for n in value} <= {int}
    if typing.get_origin(kind) is typing.Union:
        return any(is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return type(value) in (str, int) and value in typing.get_args(kind)
    return type(value) in ((float, int) if kind is float else (kind,))


def preset(args_class, presets, env_id, variant=""):
    """The flags of an environment: defaults, the row of --preset, that of the environment, that of both together."""
    name, script = envs.short_name(env_id), Path(sys.modules[args_class.__module__].__file__).stem
    row = presets.get(variant, {}) | presets.get(name, {}) | envs.lookup(env_id).presets.get(script, {})
    row |= presets.get(f"{name} {variant}", {})
    unknown = sorted(set(row) - set(vars(args_class())))
    if unknown:
        raise InputError(f"a preset of {env_id} names {unknown[0]}, and {script} has no such flag")
    return dataclasses.replace(args_class(), **{"env_id": env_id} | row)


def read_flags(args_class, presets, path):
    """The flags in a checkpoint or an agent file; one that it does not have takes its default. Raises InputError."""
    text = read_npz(path, lambda name, dtype, _: name == "flags" and dtype.itemsize < 4 * MAX_TEXT).get("flags", "")
    try:
        flags = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items() if k not in PATHS}
        module = ":" in flags["env_id"]  # a file must not run code, and importing a module does
        known = args_class() if module else preset(args_class, presets, flags["env_id"], flags.get("preset", ""))
        args = dataclasses.replace(known, **flags)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} does not fit this script: {error}") from None
    check_flags(args)
    return args


def command_line(args, script, presets) -> str:
    """The command that starts a run with these flags, from the flags themselves: sys.argv has none of a resumed run."""
    default = vars(preset(type(args), presets, args.env_id))
    words = ["python", Path(script).name, "--env-id", args.env_id]
    for name, value in vars(args).items():
        if value != default[name] and name != "resume":
            said = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            words += [f"--{'no-' if value is False else ''}{name.replace('_', '-')}", *map(str, said)]
    return shlex.join(words)


def parse_args(args_class, presets, argv=None, description=None):
    """Flags over the presets of the environment, or over those of the run to resume. Raises InputError."""
    known, _ = tyro.cli(args_class, args=argv, return_unknown_args=True, add_help=False)
    default, before = defaults(args_class, presets, known)
    args = tyro.cli(args_class, args=argv, default=default, description=description)
    check_flags(args, before)
    return args


def defaults(args_class, presets, known):
    """What flags are where nothing says them, and those of the run to resume, or None; known: what was said. Raises
    InputError, also if the run's environment is of a module that --env-id does not name: a file must not run code."""
    if not known.resume:
        return preset(args_class, presets, known.env_id, getattr(known, "preset", "")), None
    before = read_flags(args_class, presets, Path(os.path.expanduser(known.resume), "checkpoint.npz"))
    if ":" in before.env_id and known.env_id != before.env_id:
        raise InputError(f"the run's environment is of a module: give --env-id {before.env_id} as well")
    envs.lookup(before.env_id)
    return before, before


def launch(main, args_class, presets):
    """What a script does when it is started: an input that can not be used gives one sentence and exit code 2."""
    try:
        main(parse_args(args_class, presets, description=sys.modules[main.__module__].__doc__))
    except (InputError, OSError) as error:
        sys.exit(say(f"error: {InputError(error)}", "stderr") or 2)
    except KeyboardInterrupt:
        sys.exit(say("stopped at once; what the last checkpoint does not have is lost", "stderr") or 130)
    finally:
        try:
            print(end="", flush=True)
        except (OSError, ValueError):  # whoever read it has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def train(script, **flags):
    """From Python: run a script with its presets and checks, `train(smac_offline_online, env_id="PointDirection")`.

    Returns what its `main` returns, the agent. Signals, hooks, threads and precision are then as they were.
    """
    unknown = sorted(set(flags) - set(vars(script.Args())))
    if unknown:
        raise InputError(f"{script.__name__} has no flag {unknown[0]}")
    default, before = defaults(script.Args, script.PRESETS, script.Args(**flags))
    args = dataclasses.replace(default, **flags)
    check_flags(args, before)
    return script.main(args)


def say(text, stream="stdout"):
    """Print a line; a closed terminal or pipe, or a word that it can not show, does not stop a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=getattr(sys, stream), flush=True)


class Screen:
    """sys.stderr for progress bars: as `say`."""

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def choose_device(args) -> torch.device:
    """The device of --device, tried. Raises InputError."""
    if args.device == "cpu" or args.device == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        return torch.ones(1, device="cuda").add(1).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: the GPU can not be used ({error}); --device cpu works") from None


def versions() -> dict:
    """What a result may depend on beside its flags."""
    found = {"python": platform.python_version(), "cpu": platform.processor() or platform.machine()}
    with contextlib.suppress(OSError, IndexError):
        found["cpu"] = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    for name in ("torch", "numpy", "gymnasium", "mujoco", "pybullet"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def flatten(tree, prefix=""):
    """Nested dicts -> {"a/b/c": value}; not an optimizer's flags, which are those of the command line."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif key != "param_groups":
            flat[f"{prefix}{key}"] = torch.as_tensor(value).detach().cpu().numpy()
    return flat


class Run:
    """One run: folder, lock, progress, log, checkpoints; stops at SIGINT, SIGTERM, SIGHUP; on leaving gives all back.

        with Run(args, __file__, dataset["sha256"], agent=agent, optimizer=optimizer, rng=rng) as run:
            for step in run.steps(1000, "offline"):
                run.log(learn(...))
                if run.evaluation_due:
                    run.write(*evaluate(...))

    Args:
        sha256: of the dataset; a run is resumed with the same data only, wherever the file is.
        parts: everything that a checkpoint must hold: modules, optimizer, buffer, generators. With --resume they get
            the state of the checkpoint.
    """

    def __init__(self, args, script, sha256="", **parts):
        name = f"{envs.short_name(args.env_id)}__{Path(script).stem}__{args.seed}"
        self.folder = Path(os.path.expanduser(args.resume or Path(args.run_dir, name)))
        self.args, self.script, self.sha256, self.parts = args, Path(script).resolve(), sha256, parts
        self.checkpoint, self.device = self.folder / "checkpoint.npz", choose_device(args)
        self.step, self.env_steps, self.totals, self.summed, self.end = 0, 0, {}, 0, 0
        self.stopping, self.evaluation_due, self.sentence = False, False, ""
        check_flags(args)
        if not str(self.folder).isprintable():  # TensorBoard takes no other paths
            raise InputError(f"the path of a run must be printable text in UTF-8, and {self.folder} is not")
        if not args.resume and self.checkpoint.exists():
            raise InputError(f"{self.folder} holds a run: --resume continues it, another --seed makes another")
        self.precision = matmul_precision(self.device, args.meta_batch * args.rl_batch, args.policy_hidden[0])
        eval_csv = self.restore() if args.resume else ",".join(CSV_COLUMNS) + "\r\n"  # nothing is written before this
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.file.write(json.dumps(vars(args) | {"precision": self.precision, "versions": versions()}, indent=1))
        self.file.flush()
        write_file(self.folder / "eval.csv", lambda file: file.write(eval_csv.encode()))

    def lock(self):
        """Open args.json, empty, so that nobody else writes to this run until it is closed."""
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # not what a link of this name points to
            self.file = open(os.open(self.folder / "args.json", flags, 0o666), "w+")
            if os.name == "posix":  # Windows has no such lock
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise InputError(f"another process writes to {self.folder}, or another run of this one") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                raise
            say(f"warning: {self.folder} can not be locked: start no second process with it", "stderr")
        self.file.truncate(0)

    def __enter__(self):
        self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        if not self.args.resume:
            flags = "\n".join(f"| {name} | {value} |" for name, value in vars(self.args).items())
            self.writer.add_text("flags", f"| flag | value |\n|---|---|\n{flags}")
        # On a full disk TensorBoard's thread would print a traceback; the next call to the writer raises the same.
        self.hook, self.handlers, self.monitor = threading.excepthook, {}, tqdm.monitor_interval
        threading.excepthook = lambda hook: None if issubclass(hook.exc_type, OSError) else self.hook(hook)
        tqdm.monitor_interval = 0  # no thread
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                    self.handlers[number] = signal.signal(number, self.stop)
        return self

    def stop(self, number, frame):
        """At the first signal stop after this gradient step, at the second at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    def __exit__(self, kind, error, traceback):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        try:
            with self.writing() if kind is None else contextlib.suppress(OSError):
                self.writer.close()
        finally:
            threading.excepthook, tqdm.monitor_interval = self.hook, self.monitor
            self.file.close()
        if kind is None:
            with self.writing():
                figure = draw_summary(self.folder)
                style = dict(format="png", dpi=100, bbox_inches="tight")  # without the room for what is not drawn
                write_file(self.folder / "summary.png", lambda file: figure.savefig(file, **style))
            say(table(self.folder / "eval.csv"))
            say(f"\n{self.folder / 'summary.png'}")

    @contextlib.contextmanager
    def writing(self):
        """Turn a full disk, or a folder that can not be written any more, into one sentence."""
        try:
            yield
        except OSError as error:
            file = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else self.folder
            reason = f"can not write to {file}: {error.strerror or error}"
            raise InputError(f"{reason}; {self.saved()}") from None

    def saved(self):
        """What is left of the run, in words."""
        return f"continue with: {self.command()}" if self.checkpoint.exists() else "there is no checkpoint yet"

    def command(self):
        """The command line that continues the run, from any folder."""
        words = ["python", self.script, "--resume", self.folder.resolve()]
        words += ["--env-id", self.args.env_id] * (":" in self.args.env_id)
        for name in ("dataset", "save_dataset"):
            if getattr(self.args, name, None):
                words += ["--" + name.replace("_", "-"), os.path.realpath(os.path.expanduser(getattr(self.args, name)))]
        there = f"cd {shlex.quote(os.getcwd())} && " * (":" in self.args.env_id)  # where its module is found
        return there + shlex.join(map(str, words))

    def steps(self, end, name):
        """Gradient steps up to number `end`: yields the number of steps made so far, then counts, saves and stops."""
        self.end, shown = end, time.time()
        self.since, terminal = shown, sys.stderr is not None and sys.stderr.isatty()
        with tqdm(total=end, initial=min(self.step, end), desc=name, file=Screen(), disable=not terminal) as self.bar:
            while self.step < end:
                if self.stopping:
                    raise SystemExit(f"stopped before step {self.step + 1}; {self.saved()}")
                self.evaluation_due = self.step + 1 == end or (self.step + 1) % self.args.eval_every == 0
                yield self.step
                self.step += 1
                self.bar.update()
                if self.evaluation_due or self.stopping:
                    self.save()
                if self.sentence:
                    self.bar.clear()
                    say(self.sentence)
                    self.sentence = ""
                if not terminal and time.time() - shown > 30:  # a line now and then where no bar can move
                    shown = time.time()
                    say(f"{name}: step {self.step} of {end}", "stderr")
                if self.stopping:
                    raise SystemExit(f"stopped after step {self.step}; {self.saved()}")

    def count(self, name, values):
        """Yields values of something that comes before the first gradient step, with a bar; stops as `steps`."""
        terminal = sys.stderr is not None and sys.stderr.isatty()
        for value in tqdm(values, desc=name, file=Screen(), disable=not terminal):
            if self.stopping:
                raise SystemExit(f"stopped before the first gradient step; {self.saved()}")
            yield value

    def log(self, info):
        """Add up the scalars of a gradient step, and write their means every LOG_EVERY steps. Raises InputError."""
        self.totals = {name: self.totals.get(name, 0) + value for name, value in info.items()}
        self.summed += 1
        if (self.step + 1) % LOG_EVERY == 0 or self.evaluation_due:
            means = {name: value.item() / self.summed for name, value in self.totals.items()}
            self.check(means, "before")
            with self.writing():
                self.scalars(means | {"train/SPS": self.summed / (time.time() - self.since)})
            self.totals, self.summed, self.since = {}, 0, time.time()

    def check(self, numbers, when):
        """Raise an InputError if one of the named numbers is NaN or infinite."""
        broken = ", ".join(name for name, value in numbers.items() if not np.isfinite(value).all())
        if broken:
            where = f"{when} step {self.step + 1} of {self.folder}"
            raise InputError(f"{broken} became NaN or infinite {where}; {self.saved()}")

    def scalars(self, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step + 1)

    def write(self, results, scalars, data=()):
        """Write an evaluation to eval.csv and TensorBoard; at the end of a phase also figures_ and agent_{step}.npz.

        Args:
            results: {(split, context): (task numbers (E,), E third trajectories, E pairs of exploration, KL (E,) or
                None)}; "train" comes last.
            scalars: diagnostics to log.
            data: trajectories of the dataset in the training tasks, to be drawn.
        Raises InputError: a return or KL is NaN or infinite.
        """
        arrays, lines, words, curves = {}, [], [], dict(scalars)
        sparse = getattr(envs.lookup(self.args.env_id).env_class, "sparse", False)
        for (split, context), (tasks, final, exploration, kl) in results.items():
            returns = np.array([path["rewards"].sum() for path in final])  # (E,)
            explored = np.array([[path["rewards"].sum() for path in pair] for pair in exploration]).mean(1)
            seen = (path[name] for path in itertools.chain(final, *exploration) for name in ("obs", "actions"))
            broken = not all(np.isfinite(array).all() for array in seen)
            found = {f"the {split} return": returns, "the exploration return": explored}
            found |= {"an observation or action": math.nan if broken else 0}
            self.check(found, "at the evaluation after")
            for task in dict.fromkeys(tasks):
                of = np.equal(tasks, task)
                means = returns[of].mean().round(4), explored[of].mean().round(4)
                lines.append([self.step + 1, self.env_steps, split, context, task, *means])
            # TensorBoard sorts by the alphabet: nothing is before "charts"
            curves[f"charts/{split}/{context}_context_return"] = returns.mean()
            curves[f"charts/{split}/exploration_return"] = explored.mean()
            if sparse:
                solved = [path["rewards"][-1] == 0 for path in final]
                curves[f"charts/{split}/{context}_context_success"] = np.mean(solved)
            if kl is not None:
                arrays[f"kl_{split}_{context}_context"] = kl = kl.cpu().numpy()
                large = np.where(kl > 1e19, np.inf, kl)  # which no histogram takes
                self.check({f"the KL of the {split} {context} context": large}, "at the evaluation after")
                curves[f"eval/kl_{split}_{context}_context"] = kl.mean()
            words.append(f"{split} ({context} context) {returns.mean():.1f}")
        if hasattr(envs.lookup(self.args.env_id).env_class, "ground_velocity"):
            groups = {"offline data": data[:500], "exploration": [path for pair in exploration for path in pair]}
            groups |= {f"{context} context": results["train", context][1] for _, context in results if _ == "train"}
            arrays |= {name: envs.ground_paths(self.args.env_id, paths) for name, paths in groups.items() if paths}
        with self.writing():
            self.scalars(curves)
            for name in (name for name in arrays if name.startswith("kl_")):
                # Not the scalar's name: TensorBoard would show neither. Its histograms end at 1e19.
                self.writer.add_histogram(f"eval/{name}/histogram", np.minimum(arrays[name], 1e19), self.step + 1)
            if "exploration" in arrays:
                figure = Figure(figsize=(5, 3.2), layout="constrained")
                draw_paths(figure.subplots(), arrays)
                self.writer.add_figure("eval/paths", figure, self.step + 1)
            with open(self.folder / "eval.csv", "a", newline="") as file:
                csv.writer(file).writerows(lines)
            if self.step + 1 == self.end:
                self.save_npz(f"figures_{self.end}.npz", arrays)
                flags = {"flags": self.flags(), "returns": json.dumps(words), "script": self.script.stem}
                self.save_npz(f"agent_{self.end}.npz", flatten(self.parts["agent"].state_dict()) | flags)
        transitions = f", {self.env_steps} new transitions" * (self.env_steps > 0)
        self.sentence, self.since = f"step {self.step + 1}{transitions} | return: {', '.join(words)}", time.time()

    def save_npz(self, name, arrays):
        write_file(self.folder / name, lambda file: np.savez(file, allow_pickle=False, **arrays))

    def flags(self):
        """The flags as JSON, but those that name files."""
        return json.dumps({name: value for name, value in vars(self.args).items() if name not in PATHS})

    def state(self):
        """Everything that a checkpoint holds, as {name: array}."""
        tree = {name: getattr(self, name) for name in ("step", "env_steps", "summed", "totals")}
        tree["torch_rng"] = torch.get_rng_state()
        for name, part in self.parts.items():
            tree[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        return flatten(tree)

    def save(self):
        """Write checkpoint.npz. eval.csv goes in too: on disk it may end in half a line, or in lines of later steps."""
        state, words = self.state(), {"flags": self.flags(), "sha256": self.sha256, "precision": self.precision}
        for name, array in state.items():
            if not np.isfinite(array).all():
                raise InputError(f"no checkpoint after step {self.step}, {name} is NaN or infinite; {self.saved()}")
        with self.writing():
            self.writer.flush()
            words["eval_csv"] = (self.folder / "eval.csv").read_bytes().decode()
            self.save_npz("checkpoint.npz", state | words)

    def restore(self):
        """Put the checkpoint into the parts, step, env_steps and averages; returns eval.csv. Raises InputError."""
        words, like, path = {"flags": "", "sha256": "", "precision": "", "eval_csv": ""}, self.state(), self.checkpoint
        rules = {name: (array.dtype.str[1:], array.shape) for name, array in like.items()}
        optimizer, moments = self.parts["optimizer"], {}
        for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            for name, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
                moments[f"optimizer/state/{i}/{name}"] = "f4", tuple(shape)

        def accept(name, dtype, shape):
            kind, wanted = (rules | moments).get(name, ("U", ()) if name in words else ("f4", ()))
            if name not in rules | moments | words and not name.startswith("totals/"):
                raise InputError(f"{path} does not fit this run: {name} is unknown")
            if name.startswith(("buffer/fields", "buffer/index")):
                wanted = (None, *wanted[1:])
            if isinstance(self.parts.get(name), torch.Generator) and shape != wanted:
                raise InputError(f"{path} is of the other kind of device, GPU or CPU; its agent can be watched")
            return check_array(f"{path}: {name}", dtype, shape, kind, wanted)

        sha256 = read_npz(path, lambda name, *has: name == "sha256" and accept(name, *has)).get("sha256", self.sha256)
        if sha256 != self.sha256:  # first: with other data nothing else may fit, and this is what to do about it
            raise InputError(f"the data of {self.folder} are others than in this dataset: name theirs with --dataset")
        found = read_npz(path, accept)
        for name in (*rules, *words):
            if name not in found:
                raise InputError(f"{path} does not fit this run: {name} is missing")
        known = found["precision"] in ("highest", "medium") and re.fullmatch(CSV, found["eval_csv"])
        if not known or any(not 0 <= found[name] <= 2**53 for name in ("step", "env_steps", "summed")):
            raise InputError(f"{path} does not fit this run: its step, table of evaluations or precision is none")
        tree, masks = {}, {f"agent/{name}" for name, _ in self.parts["agent"].named_buffers()}  # they may be -inf
        for name in rules | {name: moments[name] for name in found if name in moments}:
            *nodes, last = name.split("/")
            node = tree
            for part in nodes:
                node = node.setdefault(part, {})
            node[last] = torch.from_numpy(found[name])
            bad = np.isnan(found[name]) if name in masks else ~np.isfinite(found[name])
            if bad.any():
                raise InputError(f"{path}: {name} is NaN or infinite")
        try:
            torch.set_rng_state(tree["torch_rng"])  # nothing here draws from it, but dropout would
            for name, part in self.parts.items():
                if isinstance(part, torch.Generator):
                    part.set_state(tree[name])
                elif part is optimizer:
                    state = {int(i): moment for i, moment in tree.get(name, {}).get("state", {}).items()}
                    if any(len(moment) < 3 for moment in state.values()):
                        raise InputError("a state of the optimizer is not complete")
                    part.load_state_dict(part.state_dict() | {"state": state})
                else:
                    part.load_state_dict(tree[name])
        except (RuntimeError, KeyError, InputError) as error:
            raise InputError(f"{path} does not fit this run: {error}") from None
        self.step, self.env_steps, self.summed = (int(tree[name]) for name in ("step", "env_steps", "summed"))
        totals = {name.removeprefix("totals/"): torch.tensor(found[name]) for name in found if name[:7] == "totals/"}
        self.totals = {name: total.to(self.device) for name, total in totals.items()}
        self.precision = found["precision"]
        return found["eval_csv"]

    def fast(self, function, compiled=False):
        """`function`, in this run's precision; on a GPU recorded and replayed, see `record`."""
        function = torch.compile(function) if compiled else function

        def call(*arguments, **flags):
            # Only here: the faster products keep memory for every shape they meet, and trajectories are of any length.
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.precision)
            try:
                return function(*arguments, **flags)
            finally:
                torch.set_float32_matmul_precision(before)

        return record(call) if self.device.type == "cuda" and self.args.cuda_graph else call


# ===== Speed


@functools.cache
def matmul_precision(device, rows, width):
    """The precision of matrix products: "medium" where it is as exact as "highest" and faster, else "highest"."""
    # glibc gives large freed blocks back to the system: thousands of page faults in a step. Let it keep them.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, size in ((-3, 1 << 25), (-2, 1 << 26), (-1, (1 << 31) - 1)) if mallopt else ():
        mallopt(option, size)  # M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD
    generator, before, times = torch.Generator().manual_seed(0), torch.get_float32_matmul_precision(), {}
    x, w = (torch.randn(n, width, generator=generator).to(device) for n in (min(rows, 4096), width))
    exact = x.double() @ w.double()
    try:
        for precision in 8 * ["highest", "medium"]:
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            error = ((x @ w - exact).norm() / exact.norm()).item()
            times[precision] = min(time.perf_counter() - start, times.get(precision, math.inf))
            if error > 1e-5:
                return "highest"
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if times["medium"] < 0.9 * times["highest"] else "highest"  # not by chance where they are the same


def record(function):
    """On a GPU: `function` recorded on its fourth call and replayed, one launch in place of hundreds; a record for each
    set of keyword arguments. Raises InputError if that fails.

    What is recorded keeps the places of its tensors: arguments must be the same objects in every call, or what another
    recorded function returned; every call overwrites what the one before returned.
    """
    stream, calls, records = torch.cuda.Stream(), {}, {}

    def call(*arguments, **flags):
        key = tuple(flags.items())
        calls[key] = calls.get(key, 0) + 1
        if calls[key] <= 3:  # as it is, on a stream of its own, so that libraries allocate what they need
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function(*arguments, **flags)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if key not in records:
            graph = torch.cuda.CUDAGraph()
            try:
                for argument in arguments:
                    if isinstance(argument, torch.Generator):
                        graph.register_generator_state(argument)
                with torch.cuda.graph(graph):  # records, computes nothing
                    records[key] = graph, function(*arguments, **flags)
            except RuntimeError as error:
                raise InputError(f"no CUDA graph can be made ({error}): --no-cuda-graph goes without") from None
        records[key][0].replay()
        return records[key][1]

    return call


# ===== Pictures and tables of a run


COLOURS = {  # in every picture of a run, as in the paper's Figures 2, 6 and 8
    "offline data": "tab:red", "exploration": "tab:green",
    "offline context": "tab:blue", "online context": "tab:orange",
}  # fmt: skip


def draw_paths(axes, ground: dict) -> None:
    """Draw {label: paths (., L+1, 2) in metres} on matplotlib axes, from above."""
    for label in (label for label in COLOURS if label in ground):
        line = np.pad(ground[label], ((0, 0), (0, 1), (0, 0)), constant_values=np.nan).reshape(-1, 2)  # one for all
        axes.plot(*line.T, color=COLOURS[label], linewidth=0.6, label=label)
    axes.set(aspect="equal", xlabel="x (m)", ylabel="y (m)")
    for line in axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)).get_lines():  # beside the paths
        line.set_linewidth(2)


def draw_kls(axes, arrays: dict) -> None:
    """Figure 2: how far the posterior is from the prior on the training tasks, {kl_train_{context}_context: (E,)}."""
    kls = {f"{context} context": arrays.get(f"kl_train_{context}_context") for context in ("offline", "online")}
    kls = {context: kl for context, kl in kls.items() if kl is not None}
    axes.set_visible(bool(kls))  # MACAW has no posterior
    bins = np.linspace(0, max([1e-6, *(kl.max() for kl in kls.values())]), 25)  # rounding may take a KL below 0
    for context, kl in kls.items():
        label = f"{context}, mean {kl.mean():.1f}"
        axes.hist(kl, bins=bins, histtype="step", color=COLOURS[context], linewidth=1.5, label=label)
    axes.set(xlabel="KL of the posterior to the prior", ylabel="meta-episodes on training tasks")
    axes.margins(y=0.3)  # above the bars is room for the legend
    if kls:
        axes.legend(fontsize=8, loc="upper left")


def read_csv(path) -> dict:
    """eval.csv -> {(split, context): {(gradient step, new transitions): mean return over tasks}}."""
    cells = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            steps = cells.setdefault((row["split"], row["context"]), {})
            steps.setdefault((int(row["gradient_step"]), int(row["env_steps"])), []).append(float(row["return"]))
    return {group: {at: float(np.mean(values)) for at, values in steps.items()} for group, steps in cells.items()}


def table(path) -> str:
    """Every evaluation of an eval.csv, mean over tasks."""
    groups = read_csv(path)
    lines = ["", "Post-adaptation return, mean over tasks"]
    lines += [f"{'gradient step':>14}{'transitions':>13}" + "".join(f"{f'{s}, {c} context':>24}" for s, c in groups)]
    for at in dict.fromkeys(at for steps in groups.values() for at in steps):
        values = "".join(f"{steps[at]:>24.1f}" if at in steps else " " * 24 for steps in groups.values())
        lines.append(f"{at[0]:>14}{at[1]:>13}{values}")
    return "\n".join(lines)


def read_figures(folder, last=math.inf) -> dict:
    """The last ten figures_{step}.npz of a run up to a step: {step: {name: KLs (E,), or paths (., L+1, 2)}}. Raises
    InputError: they can not be read, or hold numbers that can not be drawn."""

    def accept(name, dtype, shape):
        wanted = len(shape) == 1 if name.startswith("kl_") else len(shape) == 3 and shape[2] == 2
        return wanted and dtype == np.float32 and 0 < math.prod(shape) <= 1 << 21

    files = [file for file in Path(folder).glob("figures_*.npz") if re.fullmatch(r"figures_\d{1,16}", file.stem)]
    files = {int(file.stem.split("_")[1]): file for file in files}
    steps = sorted(step for step in files if step <= last)[-10:]
    figures = {step: read_npz(files[step], accept) for step in steps}
    for step, arrays in figures.items():
        for name, array in arrays.items():
            if (np.abs(array) > 1e19).any() or name.startswith("kl_") and not (array > -1).all():
                raise InputError(f"{files[step]}: {name} can not be drawn")
    return figures


def draw_summary(folder) -> Figure:
    """The picture of a run: its returns, and for each phase the KLs of Figure 2 and the paths of Figures 6 and 8."""
    groups = read_csv(Path(folder) / "eval.csv")
    last = max((step for steps in groups.values() for step, _ in steps), default=0)
    figures = read_figures(folder, last)
    rows = max(1, len(figures))
    figure = Figure(figsize=(13, 3.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 3)
    axes = figure.add_subplot(grid[:, 0])
    for (split, context), steps in groups.items():
        points = np.array([[step, value] for (step, _), value in steps.items()])
        style = dict(color=COLOURS[f"{context} context"], linestyle="-" if split == "test" else "--")
        axes.plot(*points.T, **style, label=f"{split} tasks, {context} context")
    offline = [step for steps in groups.values() for step, transitions in steps if not transitions]
    if offline and max(offline) < last:
        axes.axvspan(max(offline), last, color="0.93", zorder=0, label="self-supervised phase")
    axes.set(xlabel="gradient step", ylabel="post-adaptation return")
    axes.set_title(Path(folder).resolve().name, parse_math=False)
    if groups:
        axes.legend(fontsize=8)
    for number, (step, arrays) in enumerate(figures.items()):
        ground = {name: array for name, array in arrays.items() if not name.startswith("kl_")}
        kls, paths = (figure.add_subplot(grid[number, column]) for column in (1, 2))
        draw_kls(kls, arrays)
        paths.set_visible(bool(ground))
        if ground:
            draw_paths(paths, ground)
        for axes in (kls, paths):
            axes.set_title(f"after {step} gradient steps")
    return figure
