"""Multi-task replay buffer, offline dataset file and the files of a run, shared by every algorithm script.

The buffer is the paper's D = {D_i} (Section 3), one D_i for each task. All transitions lie in one preallocated tensor a
field; for each task two index tables say which of them belong to the RL buffer (for critic and actor) and which to the
encoder buffer (the histories h that become z, Appendix C.2). A transition that belongs to both is stored once.
"""

import contextlib
import csv
import difflib
import importlib.metadata
import json
import math
import os
import pickletools
import re
import shutil
import threading
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

FORMAT_VERSION = 1
PATH_FIELDS = {"obs": np.float32, "actions": np.float32, "rewards": np.float32, "terminals": np.bool_}
MAX_BYTES, MAX_RATIO = 8 << 30, 20  # a dataset file that declares more, or more times its own size, is refused


class InputError(Exception):
    """A flag or a file that can not be used. Scripts print its one sentence and exit with code 2."""

    def __init__(self, sentence):
        super().__init__(" ".join(str(sentence)[:500].split()))  # what it quotes from a file may be long or have lines


def check(name, found, like):
    """Raise an InputError unless dicts, arrays and numbers have the keys, types, shapes of `like` and are finite."""
    kinds = [f"{x.dtype} {tuple(x.shape)}" if hasattr(x, "dtype") else type(x).__name__ for x in (found, like)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{name} is {kinds[0]}, expected {kinds[1]}".replace("NoneType", "missing"))
    if isinstance(like, dict):
        for key in like | found:
            check(f"{name}.{key}", found.get(key), like.get(key))
    elif hasattr(found, "dtype") and not (abs(found) < float("inf")).all():
        raise InputError(f"{name} is NaN or infinite, expected finite numbers")


# ===== Replay buffer


class ReplayBuffer:
    """Transitions of all tasks, with an "rl" and a "context" index table for each task.

    Args:
        num_tasks: number N of tasks.
        obs_dim, action_dim: sizes o and a of an observation and of an action.
        capacity: transitions that fit in, all tasks together. Memory: 4 * (2o + a + 2 + 2N) bytes each.
        device: where the tensors live.
    """

    def __init__(self, num_tasks: int, obs_dim: int, action_dim: int, capacity: int, device="cpu"):
        dims = {"obs": obs_dim, "actions": action_dim, "rewards": 1, "next_obs": obs_dim, "terminals": 1}
        try:
            self.fields = {name: torch.empty(capacity, dim, device=device) for name, dim in dims.items()}
            self.tables = {
                name: torch.zeros(num_tasks, capacity, dtype=torch.int32, device=device) for name in ("rl", "context")
            }
        except (RuntimeError, TypeError):  # can't allocate memory; a number of more than 64 bits
            raise InputError(f"a replay buffer for {capacity} transitions does not fit into memory") from None
        self.sizes = {
            name: torch.zeros(num_tasks, dtype=torch.int64, device=device) for name in ("rl", "context", "offline")
        }
        self.used, self.capacity = 0, capacity

    def add(self, task: int, path: dict, rl: bool = True, context: bool = True) -> None:
        """Append one trajectory to D_task.

        Args:
            path: obs (T+1, o), actions (T, a), rewards (T,), terminals (T,).
            rl, context: which of the two index tables the transitions enter.
        Raises:
            IndexError: the buffer is full.
        """
        length, start = len(path["actions"]), self.used
        if start + length > self.capacity:
            raise IndexError(f"the replay buffer holds {self.capacity} transitions and is full")
        obs = torch.as_tensor(path["obs"])
        values = {"obs": obs[:-1], "next_obs": obs[1:]} | {
            k: torch.as_tensor(path[k]) for k in ("actions", "rewards", "terminals")
        }
        for name, field in self.fields.items():
            field[start : start + length] = values[name].reshape(length, -1)
        for name, wanted in (("rl", rl), ("context", context)):
            if wanted:
                size = int(self.sizes[name][task])
                self.tables[name][task, size : size + length] = torch.arange(start, start + length)
                self.sizes[name][task] += length
        self.used += length

    def mark_offline(self) -> None:
        """Remember that what the encoder buffers hold now is h_offline, the reward-labelled data of Eq. 4."""
        self.sizes["offline"].copy_(self.sizes["context"])

    def clear_context(self, task: int) -> None:
        """Empty the encoder buffer of one task; the RL buffer keeps its transitions."""
        self.sizes["context"][task] = 0

    def sample(self, tasks: torch.Tensor, n: int, generator: torch.Generator, source: str = "rl") -> dict:
        """Draw n transitions for each task, uniformly with replacement.

        Args:
            tasks: (T,) task numbers.
            source: "rl", "context", or "offline" (the part of "context" that was there at `mark_offline`).
        Returns:
            obs (T, n, o), actions (T, n, a), rewards (T, n, 1), next_obs (T, n, o), terminals (T, n, 1).
        """
        sizes, table = self.sizes[source], self.tables["rl" if source == "rl" else "context"]
        uniform = torch.rand(len(tasks), n, generator=generator, device=sizes.device)
        index = table[tasks[:, None], (uniform * sizes[tasks][:, None]).long()]  # (T, n)
        return {name: field[index] for name, field in self.fields.items()}

    def paths(self, task: int, where: str, n: int, source: str = "rl") -> list:
        """The "first" or "last" n transitions of one task in time order, as trajectories (what `add` takes)."""
        index = self.tables[source][task, : int(self.sizes[source][task])]
        index = index[:n] if where == "first" else index[max(0, len(index) - n) :]
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
        """Everything, cut to what is used; made of tensors and integers only."""
        width = {name: int(self.sizes[name].max()) for name in self.tables}
        return {
            "fields": {name: field[: self.used].clone() for name, field in self.fields.items()},
            "tables": {name: table[:, : width[name]].clone() for name, table in self.tables.items()},
            "sizes": {name: size.clone() for name, size in self.sizes.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`, of a buffer that began with what this one holds now. Raises InputError."""
        used, tables = len(state["fields"]["obs"]), state["tables"]
        like = {"fields": {name: field[:used] for name, field in self.fields.items()}, "sizes": self.sizes}
        like["tables"] = {name: table[:, : tables[name].shape[1]] for name, table in self.tables.items()}
        check("checkpoint.buffer", state, like)
        for name, size in state["sizes"].items():
            table = tables["rl" if name == "rl" else "context"]
            if ((size < 0) | (size > table.shape[1])).any() or ((table < 0) | (table >= used)).any():
                raise InputError(f"checkpoint.buffer.sizes.{name}, or its table, points outside of {used} transitions")
        for name, field in self.fields.items():
            if not torch.equal(field[: self.used].cpu(), state["fields"][name][: self.used]):
                raise InputError(f"checkpoint.buffer.fields.{name} begins with other transitions than the dataset")
        self.used = used
        for name, field in self.fields.items():
            field[: self.used] = state["fields"][name]
        for name, table in self.tables.items():
            table[:, : state["tables"][name].shape[1]] = state["tables"][name]
        for name, size in self.sizes.items():
            size.copy_(state["sizes"][name])


# ===== Offline dataset: one .npz file for each environment
#
#   format_version ()              env_id ()                   command ()  the command that made it
#   train_tasks (N, k)             test_tasks (M, k)           k numbers describe one task
#   {rl,encoder}_tasks (P,)        task number of each trajectory, in time order within a task
#   {rl,encoder}_lengths (P,)      its number of transitions T
#   {rl,encoder}_obs (sum(T+1), o), _actions (sum(T), a), _rewards (sum(T),), _terminals (sum(T),)
#
# With no encoder trajectories (P = 0) the RL trajectories serve as both buffers.


def save_dataset(path, env_id: str, train_tasks, test_tasks, rl: list, encoder: list, command: str) -> None:
    """Write an offline dataset.

    Args:
        train_tasks, test_tasks: (N, k) and (M, k) task descriptions, from `envs.sample_tasks`.
        rl, encoder: lists of (task number, trajectory), a trajectory as in `ReplayBuffer.add`.
        command: the command line that made the data, kept in the file.
    """
    arrays = {
        "format_version": np.array(FORMAT_VERSION),
        "env_id": np.array(env_id),
        "command": np.array(command),
        "train_tasks": np.asarray(train_tasks, np.float64),
        "test_tasks": np.asarray(test_tasks, np.float64),
    }
    for part, entries in (("rl", rl), ("encoder", encoder)):
        arrays[f"{part}_tasks"] = np.array([task for task, _ in entries], np.int32)
        arrays[f"{part}_lengths"] = np.array([len(p["actions"]) for _, p in entries], np.int32)
        for name, dtype in PATH_FIELDS.items():
            like = rl[0][1][name]  # gives an empty encoder part its number of columns
            arrays[f"{part}_{name}"] = np.concatenate([p[name] for _, p in entries] or [like[:0]]).astype(dtype)
    temporary = Path(path).with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


def load_dataset(path, env_id: str, spec, set_task=None) -> dict:
    """Read an offline dataset and check all of it.

    Args:
        env_id, spec: the environment the data must belong to, and its `envs.SPECS` entry.
        set_task: an environment's, to try every task on: it raises ValueError if there is no such task.
    Returns:
        train_tasks (N, k), test_tasks (M, k), command, and rl, encoder: lists of (task number, trajectory).
    Raises:
        InputError: one sentence that names the file, the field, what was found and what was expected.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no dataset at {path}: pass --dataset, or make one (see datasets/README.md)")
    try:
        with zipfile.ZipFile(path) as archive:  # look at the declared sizes before unpacking anything
            declared = sum(member.file_size for member in archive.infolist())
        allowed = min(MAX_BYTES, MAX_RATIO * os.path.getsize(path))
        if declared > allowed:
            raise ValueError(f"it declares {declared} bytes, more than the {allowed} allowed")
        with np.load(path, allow_pickle=False) as file:  # allow_pickle=False: a data file can not run code
            data = {name: np.asarray(array) for name, array in file.items()}
    except Exception as error:  # whatever a damaged or hostile file makes the two readers raise
        raise InputError(f"{path} can not be read as a dataset: {str(error) or type(error).__name__}") from None

    def compare(like):
        check(f"{path}: dataset", {name: data.get(name) for name in like}, like)

    def array(dtype, *shape):
        return np.broadcast_to(np.zeros((), dtype), shape)  # takes no memory

    for name, wanted in (("format_version", FORMAT_VERSION), ("env_id", env_id)):
        found = data[name].tolist() if name in data else "missing"
        if found != wanted:
            raise InputError(f"{path}: {name} is {found}, expected {wanted}")
    for name in ("train_tasks", "test_tasks"):
        compare({name: array(np.float64, max(1, len(np.atleast_1d(data.get(name)))), spec.task_dim)})
        if data[name].min() < spec.task_range[0] or data[name].max() > spec.task_range[1]:
            raise InputError(f"{path}: {name} must lie in {list(spec.task_range)}")
        try:
            for task in data[name] if set_task else ():
                set_task(task)
        except ValueError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    num_tasks, result = len(data["train_tasks"]), {"train_tasks": data["train_tasks"], "test_tasks": data["test_tasks"]}
    for part in ("rl", "encoder"):
        tasks, lengths = data.get(f"{part}_tasks"), data.get(f"{part}_lengths")
        compare({f"{part}_{name}": array(np.int32, np.size(lengths)) for name in ("tasks", "lengths")})
        if lengths.size and (lengths.min() < 1 or tasks.min() < 0 or tasks.max() >= num_tasks):
            raise InputError(f"{path}: {part}_lengths must be at least 1 and {part}_tasks within 0..{num_tasks - 1}")
        total = int(lengths.sum(dtype=np.int64))
        shapes = {"obs": (total + lengths.size, spec.obs_dim), "actions": (total, spec.action_dim)}
        compare({f"{part}_{k}": array(dtype, *shapes.get(k, (total,))) for k, dtype in PATH_FIELDS.items()})
        if np.abs(data[f"{part}_actions"]).max(initial=0) > 1:
            raise InputError(f"{path}: {part}_actions must lie in [-1, 1]")
        if part == "rl" or lengths.size:
            missing = np.setdiff1d(np.arange(num_tasks), tasks)
            if missing.size:
                raise InputError(f"{path}: {part} has no transition of task {missing[0]}, and every one needs some")
        cuts, obs_cuts = np.cumsum(lengths)[:-1], np.cumsum(lengths + 1)[:-1]
        columns = {name: np.split(data[f"{part}_{name}"], obs_cuts if name == "obs" else cuts) for name in PATH_FIELDS}
        result[part] = [(int(tasks[i]), {name: columns[name][i] for name in PATH_FIELDS}) for i in range(lengths.size)]
    return result | {"command": str(data.get("command"))}


def fill_from_dataset(buffer: ReplayBuffer, dataset: dict) -> None:
    """Put a dataset into the RL and encoder buffers; without encoder trajectories the RL trajectories fill both."""
    shared = not dataset["encoder"]
    for task, path in dataset["rl"]:
        buffer.add(task, path, rl=True, context=shared)
    for task, path in dataset["encoder"]:
        buffer.add(task, path, rl=False, context=True)
    buffer.mark_offline()


# ===== Files of a run: checkpoint.pt and eval.csv


CSV_COLUMNS = ["gradient_step", "env_steps", "split", "context", "task", "return", "exploration_return"]
# All that a checkpoint's pickle may name: weights_only=True alone allows types that take any amount of memory.
PICKLED = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch (Byte|Float|Int|Long)Storage"


def check_flags(args, defaults, env_ids, may_be_zero, at_most, free) -> None:
    """Raise an InputError for the first flag that can not be used.

    Args:
        args, defaults: all flags, and what they are if not given; with --resume those of the run.
        may_be_zero, at_most: flags with other bounds than "above 0".
        free: flags that may change when a run is resumed.
    """
    if args.env_id not in env_ids:
        near = difflib.get_close_matches(args.env_id, env_ids, n=3, cutoff=0)
        raise InputError(f"--env-id {args.env_id}: there is no such environment, the nearest are {', '.join(near)}")
    for name, value in vars(args).items():
        flag, old = "--" + name.replace("_", "-"), getattr(defaults, name)
        if args.resume and value != old and name not in free:
            raise InputError(f"{flag} is {old} in the run to resume and can not become {value}")
        values = (*value, sum(value) or 1) if isinstance(value, tuple) else (value,)
        low, high = "at least" if name in may_be_zero else "above", at_most.get(name, math.inf)
        for n in (n for n in values if type(n) in (int, float)):
            if not ((0 < n or n == 0 and name in may_be_zero) and n <= high and math.isfinite(n)):
                bound = f" and at most {high}{' in all' * isinstance(value, tuple)}" if name in at_most else ""
                raise InputError(f"{flag} is {value}, it must be {low} 0{bound}")
    if args.eval_only and not args.resume:
        raise InputError("--eval-only looks at a run: name its folder with --resume")
    if args.compile and not shutil.which("g++"):
        raise InputError("--compile needs a C++ compiler, and there is no g++ here")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here")


def claim(run, args):
    """Make the folder RUN with args.json and, for a new run, an eval.csv without rows. Raises InputError.

    Returns args.json, open: until it is closed or the process ends, no other process can claim RUN.
    """
    if not args.resume and (run / "checkpoint.pt").exists():
        raise InputError(f"{run} holds a run: continue it with --resume {run}, or choose another --run-dir or --seed")
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / "args.json", "a")
    if os.name == "posix":  # Windows has no such lock
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process writes to {run}") from None
    file.truncate(0)
    packages = ("torch", "numpy", "gymnasium", "mujoco", "pybullet")
    versions = {name: importlib.metadata.version(name) for name in packages}
    file.write(json.dumps(vars(args) | {"versions": versions}, indent=1))
    file.flush()
    if not args.resume:
        (run / "eval.csv").write_bytes((",".join(CSV_COLUMNS) + "\r\n").encode())
    # On a full disk TensorBoard's thread would print a traceback; the next call to the writer raises the same error.
    threading.excepthook = lambda hook: None
    return file


@contextlib.contextmanager
def writing_to(run):
    """Turn a full disk, or a folder that can not be written any more, into one sentence."""
    try:
        yield
    except OSError as error:
        saved = f"continue with --resume {run}" if (run / "checkpoint.pt").exists() else "there is no checkpoint yet"
        raise InputError(f"can not write to {error.filename or run}: {error.strerror or error}; {saved}") from None


def save_checkpoint(run, args, step, env_steps, parts, generators):
    """Write RUN/checkpoint.pt whole or not at all: to another file first, which is then renamed.

    Raises InputError (a number is NaN or infinite) or OSError (it can not be written); the checkpoint before stays.
    """
    # eval.csv goes in too: on disk it may end in half a line, or in lines of later steps.
    state = {"step": step, "env_steps": env_steps, "eval_csv": (run / "eval.csv").read_bytes().decode()}
    state |= {name: part.state_dict() for name, part in parts.items()}
    state |= {name: generator.get_state() for name, generator in generators.items()}
    check(f"no checkpoint after step {step}, the one before stays in {run}: checkpoint", state, state)
    temporary = run / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state | {"args": vars(args) | {"resume": None}}, file)
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave an empty file under the new name
        os.replace(temporary, run / "checkpoint.pt")
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else error.__context__ or error  # torch hides the OSError


def is_flag(value, kind):
    """Whether a value is of a flag's type: plain, Optional, Literal or tuple[int, ...]."""
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and {type(n) for n in value} <= {int}
    if typing.get_origin(kind) is typing.Union:
        return any(is_flag(value, one) for one in typing.get_args(kind))
    kinds = (float, int) if kind is float else (kind, *typing.get_args(kind))
    return type(value) in kinds or type(value) in (str, int) and value in kinds


def load_checkpoint(run, args_class):
    """Read RUN/checkpoint.pt, its "args" as an args_class; it can not run code.

    Raises:
        InputError: it is missing or damaged, or another script wrote it.
    """
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            # torch.load verifies no checksum, and takes all the memory that a file asks for: look first.
            members = archive.infolist()
            stored = [m.file_size for m in members if m.compress_type == zipfile.ZIP_STORED]
            too_large = len(stored) < len(members) or sum(stored) > path.stat().st_size
            if too_large or members[0].header_offset or archive.testzip():
                raise ValueError("a size or a checksum in it is wrong")
            (pickled,) = (m for m in members if m.filename.lower().endswith("data.pkl"))
            for opcode, name, _ in pickletools.genops(archive.read(pickled)):
                if opcode.name == "GLOBAL" and not re.fullmatch(PICKLED, name):
                    raise ValueError(f"it holds {name}")
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        flags, kinds = checkpoint["args"], typing.get_type_hints(args_class)
        for name in flags | kinds:
            if name not in flags or not is_flag(flags[name], kinds.get(name)):
                raise ValueError(f"flag {name} is missing, unknown or not of its type")
        return checkpoint | {"args": args_class(**flags), "path": path}
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        reason = error if isinstance(error, (ValueError, zipfile.BadZipFile)) else type(error).__name__
        raise InputError(f"{path} can not be read as a checkpoint of this script: {reason}") from None


def restore(checkpoint, parts, generators):
    """Put a checkpoint into networks, optimizer, buffer, generators and eval.csv; returns step, env_steps.

    Without generators, to look at a run and not go on with it, eval.csv stays as it is.

    Raises:
        InputError: one sentence that names the file, the field, what was found and what was expected.
    """
    path, optimizer = checkpoint["path"], parts["optimizer"]
    try:
        trained = enumerate(p for group in optimizer.param_groups for p in group["params"])
        moments = checkpoint["optimizer"]["state"]
        for name, generator in generators.items():  # a GPU's generator has another state than a CPU's
            if torch.is_tensor(checkpoint.get(name)) and checkpoint[name].shape != generator.get_state().shape:
                raise InputError("it is of the other kind of device, GPU or CPU; here only --eval-only works")
        like = {"step": 0, "env_steps": 0, "eval_csv": "", "agent": parts["agent"].state_dict()}
        like |= {name: generator.get_state() for name, generator in generators.items()}
        check("checkpoint", {name: checkpoint.get(name) for name in like}, like)
        # The optimizer holds nothing of a network that was never trained.
        like = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in trained if i in moments}
        check("checkpoint.optimizer.state", moments, like)
        if not 0 <= checkpoint["step"] < 1 << 60:
            raise InputError(f"checkpoint.step is {checkpoint['step']}, expected 0 or more")
        header, *rows = csv.reader(checkpoint["eval_csv"].splitlines())
        if header != CSV_COLUMNS or any(len([float(n) for n in row[:2] + row[4:]]) != 5 for row in rows):
            raise InputError("checkpoint.eval_csv is no table of evaluations")
        if "buffer" in parts:
            parts["buffer"].load_state_dict(checkpoint["buffer"])
        parts["agent"].load_state_dict(checkpoint["agent"])
        moments = {i: {name: value.detach().clone() for name, value in state.items()} for i, state in moments.items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        for name, generator in generators.items():
            generator.set_state(checkpoint[name])
    except Exception as error:  # whatever missing and strange fields make the lines above raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{path} does not fit this run: {reason}") from None
    if generators:
        (path.parent / "eval.csv").write_bytes(checkpoint["eval_csv"].encode())
    return checkpoint["step"], checkpoint["env_steps"]


def task_means(rows):
    """Of the rows that `evaluate` returns, a line for each task: split, context, task, mean of each column."""
    for split, context, tasks, *columns in rows:
        for task in dict.fromkeys(tasks):  # in order
            yield [split, context, task, *(column[np.equal(tasks, task)].mean().round(4) for column in columns)]


def log_evaluation(run, writer, step, env_steps, rows, scalars, arrays) -> str:
    """Write what `evaluate` returns to eval.csv and TensorBoard; returns the mean returns in words.

    Args:
        rows: (split, context, task numbers, returns, exploration returns), each of the last three (E,).
        arrays: KL values "kl_..." (E,) and, if any, paths over ground to draw (., L+1, 2).
    """
    with open(run / "eval.csv", "a", newline="") as file:
        csv.writer(file).writerows([step, env_steps, *line] for line in task_means(rows))
    for split, context, _, returns, explored in rows:
        writer.add_scalar(f"eval/{split}/{context}_context_return", returns.mean(), step)
        if context == "online":
            writer.add_scalar(f"eval/{split}/exploration_return", explored.mean(), step)
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)
    for name in (name for name in arrays if name.startswith("kl_")):
        writer.add_scalar(f"eval/{name}", arrays[name].mean(), step)
        writer.add_histogram(f"eval/{name}", arrays[name], step)
    if "exploration" in arrays:
        figure = Figure()
        draw_paths(figure.subplots(), arrays)
        writer.add_figure("eval/paths", figure, step)
    return ", ".join(f"{split} ({context} context) {returns.mean():.1f}" for split, context, _, returns, _ in rows)


def draw_paths(axes, ground: dict) -> None:
    """Draw {label: paths (., L+1, 2) in metres} on matplotlib axes, from above, in the colours of Figures 6 and 8."""
    colours = {"offline data": "red", "exploration": "green", "offline context": "blue", "online context": "orange"}
    for label in (label for label in colours if label in ground):
        lines = axes.plot(*ground[label].T, color=f"tab:{colours[label]}", linewidth=0.6)  # x and y: (L+1, .) each
        lines[0].set_label(label)
    axes.set(aspect="equal", xlabel="x (m)", ylabel="y (m)")
    axes.legend(fontsize=7)


def print_rows(rows) -> None:
    """The return on each task, of the rows that `evaluate` returns."""
    print(f"{'split':>8}{'context':>10}{'task':>6}{'return':>12}{'exploration':>14}")
    for split, context, task, mean, explored in task_means(rows):
        print(f"{split:>8}{context:>10}{task:>6}{mean:>12.1f}{explored:>14.1f}")


def print_csv(path):
    """The table at the end of a run: every evaluation, mean over tasks."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    groups = list(dict.fromkeys((row["split"], row["context"]) for row in rows))
    print("\nPost-adaptation return, mean over tasks")
    print(f"{'gradient step':>14}{'transitions':>13}" + "".join(f"{f'{s}, {c} context':>24}" for s, c in groups))
    for at in dict.fromkeys((row["gradient_step"], row["env_steps"]) for row in rows):
        here = [row for row in rows if (row["gradient_step"], row["env_steps"]) == at]
        values = [[float(row["return"]) for row in here if (row["split"], row["context"]) == g] for g in groups]
        print(f"{at[0]:>14}{at[1]:>13}" + "".join(f"{np.mean(v):>24.1f}" for v in values))
