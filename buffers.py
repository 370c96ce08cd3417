"""Multi-task replay buffer; offline datasets; the run: its folder, log and checkpoint.

The buffer is the paper's D = {D_i} (Section 3), one D_i for each task. All transitions lie in one preallocated tensor a
field; for each task two lists of indices say which of them belong to the RL buffer (for critic and actor) and which to
the encoder buffer (the histories h that become z, Appendix C.2). A transition that belongs to both is stored once.

The three parts can be read one by one; the first needs nothing of the others. What has nothing to do with the algorithm
or its data, like the command line, is in plumbing/; what of it scripts need has its name here as well.
"""

import contextlib
import csv
import errno
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from envs import InputError
from plumbing import files
from plumbing.cores import on_cores
from plumbing.files import (
    CSV,
    CSV_COLUMNS,
    PATH_FIELDS,
    check_array,
    check_dataset,
    flatten,
    read_npz,
    write_file,
)
from plumbing.flags import PATHS, Screen, check_flags, command_line, launch, print_safely, train
from plumbing.machine import (
    choose_device,
    commit,
    cuda_graph,
    keep_freed_memory,
    matmul_precision,
    versions,
)
from plumbing.pictures import draw_paths, draw_summary, table
from plumbing.provenance import describe_dataset, write_description

__all__ = [
    "InputError", "ReplayBuffer", "Run", "choose_device", "command_line", "from_dataset", "join", "launch",
    "load_dataset", "on_cores", "save_dataset", "train",
]  # fmt: skip

# ===== Replay buffer


def join(paths: list, device="cpu") -> dict:
    """All transitions of some trajectories, as `ReplayBuffer.sample` gives them: obs (L, o), ..., rewards (L, 1)."""
    rows = {"obs": ("obs", slice(-1)), "next_obs": ("obs", slice(1, None))}
    rows |= {
        name: (name, slice(None))
        for name in ("actions", "rewards", "terminals")
        if name in paths[0]
    }
    columns = {name: [path[key][part] for path in paths] for name, (key, part) in rows.items()}
    for name, parts in columns.items():
        tensors = torch.is_tensor(parts[0])  # else arrays, which are joined faster
        columns[name] = torch.cat(parts) if tensors else torch.from_numpy(np.concatenate(parts))
    return {
        name: column.reshape(len(column), -1).to(device, torch.float32)
        for name, column in columns.items()
    }


class ReplayBuffer:
    """Transitions of all tasks, with an "rl" and an "encoder" list of indices for each task.

    Args:
        num_tasks: number N of tasks.
        obs_dim, action_dim: sizes o and a of an observation and of an action.
        capacity: transitions that fit in, all tasks together. Memory: 4 * (2o + a + 2) bytes each, and 32 for indices.
        device: where the tensors live.
    """

    def __init__(self, num_tasks: int, obs_dim: int, action_dim: int, capacity: int, device="cpu"):
        dims = {
            "obs": obs_dim,
            "actions": action_dim,
            "rewards": 1,
            "next_obs": obs_dim,
            "terminals": 1,
        }
        lists = ("rl", "encoder")
        try:
            self.fields = {
                name: torch.empty(capacity, dim, device=device) for name, dim in dims.items()
            }
            # A task's indices stand in a row, from `starts` on. When its room is full they move to the end, where they
            # have twice as much: all rooms together are less than 4 times the transitions, however many tasks.
            self.index = {
                name: torch.zeros(4 * capacity, dtype=torch.int32, device=device) for name in lists
            }
        except (RuntimeError, TypeError):  # can't allocate memory; a number of more than 64 bits
            raise InputError(
                f"a replay buffer for {capacity} transitions does not fit into memory"
            ) from None
        self.starts = {
            name: torch.zeros(num_tasks, dtype=torch.int64, device=device) for name in lists
        }
        self.sizes = {
            name: torch.zeros(num_tasks, dtype=torch.int64, device=device)
            for name in (*lists, "offline")
        }
        self.rooms, self.ends = {name: [0] * num_tasks for name in lists}, dict.fromkeys(lists, 0)
        self.used, self.capacity, self.device = 0, capacity, torch.device(device)

    def add(self, task: int, path: dict, rl: bool = True, encoder: bool = True) -> None:
        """Append one trajectory to D_task: obs (T+1, o), actions (T, a), rewards (T,), terminals (T,).

        rl, encoder: which of the two lists its transitions enter. Raises IndexError: the buffer is full.
        """
        self.extend([(task, path)], rl, encoder)

    def extend(self, entries: list, rl: bool = True, encoder: bool = True) -> None:
        """`add` for a list of (task, path)."""
        columns, start = join([path for _, path in entries], self.device), self.used
        end = start + len(columns["obs"])
        if end > self.capacity:
            raise IndexError(f"the replay buffer holds {self.capacity} transitions and is full")
        for name, field in self.fields.items():
            field[start:end] = columns[name]
        self.used = end
        tasks = np.repeat(
            [task for task, _ in entries], [len(path["actions"]) for _, path in entries]
        )
        order = np.argsort(tasks, kind="stable")
        found, firsts = np.unique(tasks[order], return_index=True)
        for task, index in zip(found.tolist(), np.split(start + order, firsts[1:])):
            for name in ["rl"] * rl + ["encoder"] * encoder:
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
        self.sizes["offline"].copy_(self.sizes["encoder"])

    def clear_encoder(self, task: int) -> None:
        """Empty the encoder buffer of one task; the RL buffer keeps its transitions."""
        self.sizes["encoder"][task] = 0

    def sample(self, tasks, n: int, generator: torch.Generator, source: str = "rl") -> dict:
        """Draw n transitions for each task, uniformly with replacement.

        Args:
            tasks: (T,) task numbers.
            source: "rl", "encoder", or "offline" (the part of "encoder" that was there at `mark_offline`).
        Returns:
            obs (T, n, o), actions (T, n, a), rewards (T, n, 1), next_obs (T, n, o), terminals (T, n, 1).
        """
        name, sizes = "rl" if source == "rl" else "encoder", self.sizes[source]
        uniform = torch.rand(len(tasks), n, generator=generator, device=self.device)
        place = (
            self.starts[name][tasks][:, None] + (uniform * sizes[tasks][:, None]).long()
        )  # (T, n)
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
        return self.paths(task, "first", int(self.sizes["offline"][task]), "encoder")

    def state_dict(self) -> dict:
        """Everything, cut to what is used; made of tensors only."""
        index = {}
        for name, starts in self.starts.items():
            spans = zip(starts.tolist(), self.sizes[name].tolist())
            index[name] = torch.cat(
                [self.index[name][start : start + size] for start, size in spans]
            )
        fields = {name: field[: self.used] for name, field in self.fields.items()}
        return {"fields": fields, "index": index, "sizes": dict(self.sizes)}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`, for tensors of the right types and sizes. Raises InputError.

        What the buffer holds already, the dataset's transitions, must be the first of those in the state.
        """
        used = {len(field) for field in state["fields"].values()}
        if len(used) != 1 or not self.used <= max(used) <= self.capacity:
            raise InputError(
                f"its replay buffer has {sorted(used)} transitions, expected at most {self.capacity}"
            )
        for name, field in self.fields.items():
            if not torch.equal(
                state["fields"][name][: self.used].to(self.device), field[: self.used]
            ):
                raise InputError(f"its replay buffer begins with other {name} than the dataset")
        for name, size in state["sizes"].items():
            listed, encoder = (
                state["index"]["rl" if name == "rl" else "encoder"],
                state["sizes"]["encoder"],
            )
            fits = (
                (size <= encoder).all()
                if name == "offline"
                else size.sum() == len(listed) <= max(used)
            )
            fits = fits and (size <= max(used)).all()  # else their sum may not be a sum
            if (
                not fits
                or (size < self.sizes[name].cpu()).any()
                or ((listed < 0) | (listed >= max(used))).any()
            ):
                raise InputError(
                    f"its buffer's sizes.{name}, or its index, points outside of {used} transitions"
                )
        self.used = max(used)
        for name, field in self.fields.items():
            field[: self.used] = state["fields"][name]
        for name, size in self.sizes.items():
            size.copy_(state["sizes"][name])
        for name, listed in state["index"].items():
            self.rooms[name], self.ends[name] = self.sizes[name].tolist(), len(listed)
            self.index[name][: len(listed)] = listed
            self.starts[name].copy_(self.sizes[name].cumsum(0) - self.sizes[name])


# ===== Offline datasets, as plumbing/files.py describes them


def save_dataset(
    path, env_id: str, train_tasks, test_tasks, rl: list, encoder: list, command: str
) -> None:
    """Write an offline dataset.

    Args:
        path: the file to write.
        env_id: the family, also as "module:key".
        train_tasks, test_tasks: (N, k) and (M, k) task descriptions, from `envs.sample_tasks`.
        rl, encoder: lists of (task number, trajectory), a trajectory as in `ReplayBuffer.add`.
        command: the command line that made the data, kept in the file.
    Raises:
        InputError: `load_dataset` would not take it.
    """
    files.check_entries(path, env_id, rl, encoder)
    data = {
        "format_version": np.array(files.FORMAT_VERSION),
        "env_id": envs.short_name(env_id),
        "command": command,
    }
    data |= {
        "train_tasks": np.asarray(train_tasks, np.float64),
        "test_tasks": np.asarray(test_tasks, np.float64),
    }
    for part, entries in (("rl", rl), ("encoder", encoder)):
        data[f"{part}_tasks"] = np.array([task for task, _ in entries], np.int32)
        data[f"{part}_lengths"] = np.array([len(p["actions"]) for _, p in entries], np.int32)
        for name, dtype in PATH_FIELDS.items():
            like = np.asarray(rl[0][1][name])  # gives an empty encoder part its number of columns
            data[f"{part}_{name}"] = np.concatenate(
                [p[name] for _, p in entries] or [like[:0]]
            ).astype(dtype)
    check_dataset(path, env_id, data)
    size = sum(np.asarray(array).nbytes for array in data.values())
    save = (
        np.savez if size > files.MAX_UNPACKED else np.savez_compressed
    )  # `read_npz` would not unpack more
    write_file(os.path.expanduser(path), lambda file: save(file, allow_pickle=False, **data))
    write_description(path, describe_dataset(path, env_id, data))


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
    path = Path(
        os.path.expanduser(
            path or Path(__file__).parent / "datasets" / f"{envs.short_name(env_id)}.npz"
        )
    )
    if not os.path.isfile(path):
        raise InputError(
            f"there is no dataset at {path}: pass --dataset, or make one (see datasets/README.md)"
        )
    rules = files.dataset_rules(envs.lookup(env_id))
    data = read_npz(
        path,
        lambda name, *found: name in rules and check_array(f"{path}: {name}", *found, *rules[name]),
    )
    check_dataset(path, env_id, data)
    result = {name: data[name] for name in ("train_tasks", "test_tasks", "command")}
    for part in ("rl", "encoder"):
        tasks, lengths = data[f"{part}_tasks"].tolist(), data[f"{part}_lengths"].astype(np.int64)
        cuts, obs_cuts = np.cumsum(lengths)[:-1], np.cumsum(lengths + 1)[:-1]
        columns = {
            name: np.split(data[f"{part}_{name}"], obs_cuts if name == "obs" else cuts)
            for name in PATH_FIELDS
        }
        result[part] = [
            (task, {name: columns[name][i] for name in PATH_FIELDS}) for i, task in enumerate(tasks)
        ]
    return result | {"sha256": files.digest(data, rules)}


def from_dataset(
    dataset: dict, env_id: str, device="cpu", more_tasks: int = 0, more: int = 0
) -> ReplayBuffer:
    """A replay buffer with a dataset in it, and room for more tasks and transitions; without encoder trajectories the
    RL trajectories fill both buffers."""
    spec, num_tasks = envs.lookup(env_id), len(dataset["train_tasks"]) + more_tasks
    capacity = sum(len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"]) + more
    buffer = ReplayBuffer(num_tasks, spec.obs_dim, spec.action_dim, capacity, device)
    buffer.extend(dataset["rl"], rl=True, encoder=not dataset["encoder"])
    if dataset["encoder"]:
        buffer.extend(dataset["encoder"], rl=False, encoder=True)
    buffer.mark_offline()
    return buffer


# ===== The run


LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves


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
        self.args, self.script, self.sha256, self.parts = (
            args,
            Path(script).resolve(),
            sha256,
            parts,
        )
        self.checkpoint, self.device = self.folder / "checkpoint.npz", choose_device(args)
        self.step, self.env_steps, self.totals, self.summed, self.end = 0, 0, {}, 0, 0
        self.stopping, self.evaluation_due, self.sentence = False, False, ""
        check_flags(args)
        if not str(self.folder).isprintable():  # TensorBoard takes no other paths
            raise InputError(
                f"the path of a run must be printable text in UTF-8, and {self.folder} is not"
            )
        if not args.resume and self.checkpoint.exists():
            raise InputError(
                f"{self.folder} holds a run: --resume continues it, another --seed makes another"
            )
        keep_freed_memory()
        self.precision = matmul_precision(
            self.device, args.meta_batch * args.rl_batch, args.policy_hidden[0]
        )
        eval_csv = (
            self.restore() if args.resume else ",".join(CSV_COLUMNS) + "\r\n"
        )  # nothing is written before this
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock()
        found = {
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "versions": versions(self.device),
        }
        found |= {"dataset_sha256": sha256, "commit": commit()}
        self.file.write(json.dumps(vars(args) | found, indent=1))
        self.file.flush()
        write_file(self.folder / "eval.csv", lambda file: file.write(eval_csv.encode()))

    def lock(self):
        """Open args.json, empty, so that nobody else writes to this run until it is closed."""
        try:
            flags = (
                os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            )  # not what a link of this name points to
            self.file = open(os.open(self.folder / "args.json", flags, 0o666), "w+")
            if os.name == "posix":  # Windows has no such lock
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise InputError(
                f"another process writes to {self.folder}, or another run of this one"
            ) from None
        except (
            OSError,
            ImportError,
        ) as error:  # a file system without locks, a Python without fcntl
            if getattr(error, "errno", errno.ENOLCK) not in (
                errno.ENOLCK,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
            ):
                raise
            print_safely(
                f"warning: {self.folder} can not be locked: start no second process with it",
                "stderr",
            )
        self.file.truncate(0)

    def __enter__(self):
        self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        if not self.args.resume:
            flags = "\n".join(f"| {name} | {value} |" for name, value in vars(self.args).items())
            self.writer.add_text("flags", f"| flag | value |\n|---|---|\n{flags}")
        # On a full disk TensorBoard's thread would print a traceback; the next call to the writer raises the same.
        self.hook, self.handlers, self.monitor = threading.excepthook, {}, tqdm.monitor_interval
        threading.excepthook = lambda hook: (
            None if issubclass(hook.exc_type, OSError) else self.hook(hook)
        )
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
                style = dict(
                    format="png", dpi=100, bbox_inches="tight"
                )  # without the room for what is not drawn
                write_file(self.folder / "summary.png", lambda file: figure.savefig(file, **style))
            print_safely(table(self.folder / "eval.csv"))
            print_safely(f"\n{self.folder / 'summary.png'}")

    @contextlib.contextmanager
    def writing(self):
        """Turn a full disk, or a folder that can not be written any more, into one sentence."""
        try:
            yield
        except OSError as error:
            file = (
                os.fsdecode(error.filename)
                if isinstance(error.filename, (str, bytes))
                else self.folder
            )
            reason = f"can not write to {file}: {error.strerror or error}"
            raise InputError(f"{reason}; {self.saved()}") from None

    def saved(self):
        """What is left of the run, in words."""
        return (
            f"continue with: {self.command()}"
            if self.checkpoint.exists()
            else "there is no checkpoint yet"
        )

    def command(self):
        """The command line that continues the run, from any folder."""
        words = ["python", self.script, "--resume", self.folder.resolve()]
        words += ["--env-id", self.args.env_id] * (":" in self.args.env_id)
        for name in ("dataset", "save_dataset"):
            if getattr(self.args, name, None):
                words += [
                    "--" + name.replace("_", "-"),
                    os.path.realpath(os.path.expanduser(getattr(self.args, name))),
                ]
        there = f"cd {shlex.quote(os.getcwd())} && " * (
            ":" in self.args.env_id
        )  # where its module is found
        return there + shlex.join(map(str, words))

    def steps(self, end, name):
        """Gradient steps up to number `end`: yields the number of steps made so far, then counts, saves and stops."""
        self.end, shown = end, time.time()
        self.since, terminal = shown, sys.stderr is not None and sys.stderr.isatty()
        with tqdm(
            total=end, initial=min(self.step, end), desc=name, file=Screen(), disable=not terminal
        ) as self.bar:
            while self.step < end:
                if self.stopping:
                    raise SystemExit(f"stopped before step {self.step + 1}; {self.saved()}")
                self.evaluation_due = (
                    self.step + 1 == end or (self.step + 1) % self.args.eval_every == 0
                )
                yield self.step
                self.step += 1
                self.bar.update()
                if self.evaluation_due or self.stopping:
                    self.save()
                if self.sentence:
                    self.bar.clear()
                    print_safely(self.sentence)
                    self.sentence = ""
                if (
                    not terminal and time.time() - shown > 30
                ):  # a line now and then where no bar can move
                    shown = time.time()
                    print_safely(f"{name}: step {self.step} of {end}", "stderr")
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
            explored = np.array(
                [[path["rewards"].sum() for path in pair] for pair in exploration]
            ).mean(1)
            seen = (
                path[name]
                for path in itertools.chain(final, *exploration)
                for name in ("obs", "actions")
            )
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
                self.check(
                    {f"the KL of the {split} {context} context": large}, "at the evaluation after"
                )
                curves[f"eval/kl_{split}_{context}_context"] = kl.mean()
            words.append(f"{split} ({context} context) {returns.mean():.1f}")
        if hasattr(envs.lookup(self.args.env_id).env_class, "ground_velocity"):
            groups = {
                "offline data": data[:500],
                "exploration": [path for pair in exploration for path in pair],
            }
            groups |= {
                f"{context} context": results["train", context][1]
                for _, context in results
                if _ == "train"
            }
            arrays |= {
                name: envs.ground_paths(self.args.env_id, paths)
                for name, paths in groups.items()
                if paths
            }
        with self.writing():
            self.scalars(curves)
            for name in (name for name in arrays if name.startswith("kl_")):
                # Not the scalar's name: TensorBoard would show neither. Its histograms end at 1e19.
                self.writer.add_histogram(
                    f"eval/{name}/histogram", np.minimum(arrays[name], 1e19), self.step + 1
                )
            if "exploration" in arrays:
                figure = Figure(figsize=(5, 3.2), layout="constrained")
                draw_paths(figure.subplots(), arrays)
                self.writer.add_figure("eval/paths", figure, self.step + 1)
            with open(self.folder / "eval.csv", "a", newline="") as file:
                csv.writer(file).writerows(lines)
            if self.step + 1 == self.end:
                self.save_npz(f"figures_{self.end}.npz", arrays)
                flags = {
                    "flags": self.flags(),
                    "returns": json.dumps(words),
                    "script": self.script.stem,
                }
                self.save_npz(
                    f"agent_{self.end}.npz", flatten(self.parts["agent"].state_dict()) | flags
                )
        transitions = f", {self.env_steps} new transitions" * (self.env_steps > 0)
        self.sentence, self.since = (
            f"step {self.step + 1}{transitions} | return: {', '.join(words)}",
            time.time(),
        )

    def save_npz(self, name, arrays):
        write_file(self.folder / name, lambda file: np.savez(file, allow_pickle=False, **arrays))

    def flags(self):
        """The flags as JSON, but those that name files."""
        return json.dumps(
            {name: value for name, value in vars(self.args).items() if name not in PATHS}
        )

    def state(self):
        """Everything that a checkpoint holds, as {name: array}."""
        tree = {name: getattr(self, name) for name in ("step", "env_steps", "summed", "totals")}
        tree["torch_rng"] = torch.get_rng_state()
        for name, part in self.parts.items():
            tree[name] = (
                part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            )
        return flatten(tree)

    def broken(self, name, array):
        """Whether an array of a checkpoint holds NaN, or infinity where it is no mask, a buffer of the agent."""
        masks = {f"agent/{mask}" for mask, _ in self.parts["agent"].named_buffers()}
        return not np.isfinite(array).all() and (name not in masks or np.isnan(array).any())

    def save(self):
        """Write checkpoint.npz. eval.csv goes in too: on disk it may end in half a line, or in lines of later steps."""
        state, words = (
            self.state(),
            {"flags": self.flags(), "sha256": self.sha256, "precision": self.precision},
        )
        for name, array in state.items():
            if self.broken(name, array):
                raise InputError(
                    f"no checkpoint after step {self.step}, {name} is NaN or infinite; {self.saved()}"
                )
        with self.writing():
            self.writer.flush()
            words["eval_csv"] = (self.folder / "eval.csv").read_bytes().decode()
            self.save_npz("checkpoint.npz", state | words)

    def restore(self):
        """Put the checkpoint into the parts, step, env_steps and averages; returns eval.csv. Raises InputError."""
        words, like, path = (
            {"flags": "", "sha256": "", "precision": "", "eval_csv": ""},
            self.state(),
            self.checkpoint,
        )
        rules = {name: (array.dtype.str[1:], array.shape) for name, array in like.items()}
        optimizer, moments = self.parts["optimizer"], {}
        for i, parameter in enumerate(
            p for group in optimizer.param_groups for p in group["params"]
        ):
            for name, shape in (
                ("step", ()),
                ("exp_avg", parameter.shape),
                ("exp_avg_sq", parameter.shape),
            ):
                moments[f"optimizer/state/{i}/{name}"] = "f4", tuple(shape)

        def accept(name, dtype, shape):
            kind, wanted = (rules | moments).get(name, ("U", ()) if name in words else ("f4", ()))
            if name not in rules | moments | words and not name.startswith("totals/"):
                raise InputError(f"{path} does not fit this run: {name} is unknown")
            if name.startswith(("buffer/fields", "buffer/index")):
                wanted = (None, *wanted[1:])
            if isinstance(self.parts.get(name), torch.Generator) and shape != wanted:
                raise InputError(
                    f"{path} is of the other kind of device, GPU or CPU; its agent can be watched"
                )
            longest = files.MAX_CSV if name in words else math.inf
            return check_array(f"{path}: {name}", dtype, shape, kind, wanted, longest)

        sha256 = read_npz(path, lambda name, *has: name == "sha256" and accept(name, *has)).get(
            "sha256", self.sha256
        )
        if (
            sha256 != self.sha256
        ):  # first: with other data nothing else may fit, and this is what to do about it
            raise InputError(
                f"the data of {self.folder} are others than in this dataset: name theirs with --dataset"
            )
        found = read_npz(path, accept)
        for name in (*rules, *words):
            if name not in found:
                raise InputError(f"{path} does not fit this run: {name} is missing")
        known = found["precision"] in ("highest", "medium") and re.fullmatch(CSV, found["eval_csv"])
        if not known or any(
            not 0 <= found[name] <= 2**53 for name in ("step", "env_steps", "summed")
        ):
            raise InputError(
                f"{path} does not fit this run: its step, table of evaluations or precision is none"
            )
        tree = {}
        for name in rules | {name: moments[name] for name in found if name in moments}:
            *nodes, last = name.split("/")
            node = tree
            for part in nodes:
                node = node.setdefault(part, {})
            node[last] = torch.from_numpy(found[name])
            if self.broken(name, found[name]):
                raise InputError(f"{path}: {name} is NaN or infinite")
        try:
            torch.set_rng_state(tree["torch_rng"])  # nothing here draws from it, but dropout would
            for name, part in self.parts.items():
                if isinstance(part, torch.Generator):
                    part.set_state(tree[name])
                elif part is optimizer:
                    state = {
                        int(i): moment for i, moment in tree.get(name, {}).get("state", {}).items()
                    }
                    if any(len(moment) < 3 for moment in state.values()):
                        raise InputError("a state of the optimizer is not complete")
                    part.load_state_dict(part.state_dict() | {"state": state})
                else:
                    part.load_state_dict(tree[name])
        except (RuntimeError, KeyError, InputError) as error:
            raise InputError(f"{path} does not fit this run: {error}") from None
        self.step, self.env_steps, self.summed = (
            int(tree[name]) for name in ("step", "env_steps", "summed")
        )
        totals = {
            name.removeprefix("totals/"): torch.tensor(found[name])
            for name in found
            if name[:7] == "totals/"
        }
        self.totals = {name: total.to(self.device) for name, total in totals.items()}
        self.precision = found["precision"]
        return found["eval_csv"]

    def fast(self, function, compiled=False):
        """`function`, in this run's precision; on a GPU recorded and replayed, see `cuda_graph`."""
        function = torch.compile(function) if compiled else function

        def call(*arguments, **flags):
            # Only here: the faster products keep memory for every shape they meet, and trajectories are of any length.
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.precision)
            try:
                return function(*arguments, **flags)
            finally:
                torch.set_float32_matmul_precision(before)

        return cuda_graph(call) if self.device.type == "cuda" and self.args.cuda_graph else call
