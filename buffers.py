"""Multi-task replay buffer, offline dataset file and the files of a run, shared by every algorithm script.

The buffer is the paper's D = {D_i} (Section 3), one D_i for each task. All transitions lie in one preallocated tensor a
field; for each task two index tables say which of them belong to the RL buffer (for critic and actor) and which to the
encoder buffer (the histories h that become z, Appendix C.2). A transition that belongs to both is stored once.
"""

import csv
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

FORMAT_VERSION = 1
PATH_FIELDS = {"obs": np.float32, "actions": np.float32, "rewards": np.float32, "terminals": np.bool_}
MAX_BYTES = 8 << 30  # a dataset file that declares more than this is refused before it is unpacked


class InputError(Exception):
    """A flag or a file that can not be used. Scripts print its one sentence and exit with code 2."""


# ===== Replay buffer


class ReplayBuffer:
    """Transitions of all tasks, with an "rl" and a "context" index table for each task.

    Args:
        num_tasks: number N of tasks.
        obs_dim, action_dim: sizes o and a of an observation and of an action.
        capacity: transitions that fit in, all tasks together. Memory: 4 * (2o + a + 2) bytes each.
        device: where the tensors live.
    """

    def __init__(self, num_tasks: int, obs_dim: int, action_dim: int, capacity: int, device="cpu"):
        dims = {"obs": obs_dim, "actions": action_dim, "rewards": 1, "next_obs": obs_dim, "terminals": 1}
        self.fields = {name: torch.empty(capacity, dim, device=device) for name, dim in dims.items()}
        self.tables = {
            name: torch.zeros(num_tasks, capacity, dtype=torch.int32, device=device) for name in ("rl", "context")
        }
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
        """Inverse of `state_dict`, into a buffer of the same sizes."""
        self.used = len(state["fields"]["obs"])
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


def load_dataset(path, env_id: str, spec) -> dict:
    """Read an offline dataset and check all of it.

    Args:
        env_id, spec: the environment the data must belong to, and its `envs.SPECS` entry.
    Returns:
        train_tasks (N, k), test_tasks (M, k), command, and rl, encoder: lists of (task number, trajectory).
    Raises:
        InputError: one sentence that names the file, the field, what was found and what was expected.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no dataset at {path}: pass --dataset, or make one (see datasets/README.md)")
    names = ["format_version", "env_id", "command", "train_tasks", "test_tasks"]
    names += [f"{part}_{name}" for part in ("rl", "encoder") for name in ("tasks", "lengths", *PATH_FIELDS)]
    try:
        with zipfile.ZipFile(path) as archive:  # look at the declared sizes before unpacking anything
            declared = sum(member.file_size for member in archive.infolist())
        if declared > MAX_BYTES:
            raise ValueError(f"it declares {declared} bytes, more than the {MAX_BYTES} allowed")
        with np.load(path, allow_pickle=False) as file:  # allow_pickle=False: a data file can not run code
            data = {name: file[name] for name in names if name in file.files}
    except Exception as error:  # whatever a damaged or hostile file makes the two readers raise
        raise InputError(
            f"{path} can not be read as a dataset: {str(error) or type(error).__name__}".splitlines()[0]
        ) from None

    def expect(name, found, wanted):
        if found != wanted:
            raise InputError(" ".join(f"{path}: {name} is {found}, expected {wanted}".split()))

    for name in names:
        expect(f"field {name}", "present" if name in data else "missing", "present")
    for name in ("format_version", "env_id", "command"):
        expect(f"shape of {name}", data[name].shape, ())
    expect("format_version", data["format_version"].item(), FORMAT_VERSION)
    expect("env_id", data["env_id"].item(), env_id)
    for name in ("train_tasks", "test_tasks"):
        expect(f"dtype of {name}", str(data[name].dtype), "float64")
        expect(f"shape of {name}", data[name].shape, (max(1, len(data[name])) if data[name].ndim else 1, spec.task_dim))
        expect(f"{name}", "finite" if np.isfinite(data[name]).all() else "not finite", "finite")
    num_tasks, result = len(data["train_tasks"]), {"train_tasks": data["train_tasks"], "test_tasks": data["test_tasks"]}
    for part in ("rl", "encoder"):
        tasks, lengths = data[f"{part}_tasks"], data[f"{part}_lengths"]
        for name, array in (("tasks", tasks), ("lengths", lengths)):
            expect(f"dtype of {part}_{name}", str(array.dtype), "int32")
            expect(f"shape of {part}_{name}", array.shape, (lengths.size,))
        if lengths.size and (lengths.min() < 1 or tasks.min() < 0 or tasks.max() >= num_tasks):
            raise InputError(f"{path}: {part}_lengths must be at least 1 and {part}_tasks within 0..{num_tasks - 1}")
        total = int(lengths.sum(dtype=np.int64))
        wanted = {
            "obs": (total + lengths.size, spec.obs_dim),
            "actions": (total, spec.action_dim),
            "rewards": (total,),
            "terminals": (total,),
        }
        for name, dtype in PATH_FIELDS.items():
            array = data[f"{part}_{name}"]
            expect(f"dtype of {part}_{name}", str(array.dtype), np.dtype(dtype).name)
            expect(f"shape of {part}_{name}", array.shape, wanted[name])
            expect(f"{part}_{name}", "finite" if np.isfinite(array).all() else "not finite", "finite")
        if np.abs(data[f"{part}_actions"]).max(initial=0) > 1:
            raise InputError(f"{path}: {part}_actions must lie in [-1, 1]")
        if part == "rl" or lengths.size:
            missing = np.setdiff1d(np.arange(num_tasks), tasks)
            if missing.size:
                raise InputError(
                    f"{path}: {part} has no transition of task {missing[0]}, and every training task needs some"
                )
        cuts, obs_cuts = np.cumsum(lengths)[:-1], np.cumsum(lengths + 1)[:-1]
        columns = {name: np.split(data[f"{part}_{name}"], obs_cuts if name == "obs" else cuts) for name in PATH_FIELDS}
        result[part] = [(int(tasks[i]), {name: columns[name][i] for name in PATH_FIELDS}) for i in range(lengths.size)]
    return result | {"command": data["command"].item()}


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


def save_checkpoint(run, args, step, env_steps, parts, generators):
    """Write RUN/checkpoint.pt whole or not at all: to another file first, which is then renamed."""
    state = {"args": vars(args) | {"resume": None}, "step": step, "env_steps": env_steps}
    state |= {name: part.state_dict() for name, part in parts.items()}
    state |= {name: generator.get_state() for name, generator in generators.items()}
    torch.save(state, run / "checkpoint.tmp")
    os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")


def load_checkpoint(run, args_class):
    """Read RUN/checkpoint.pt, its "args" as an args_class; it can not run code.

    Raises:
        InputError: it is missing or damaged, or another script wrote it.
    """
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint | {"args": args_class(**checkpoint["args"])}
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        raise InputError(f"{path} can not be read as a checkpoint of this script ({type(error).__name__})") from None


def restore(checkpoint, parts, generators):
    """Put a checkpoint into networks, optimizer, buffer, generators; returns step, env_steps. Raises InputError."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        for name, generator in generators.items():
            generator.set_state(checkpoint[name])
        return int(checkpoint["step"]), int(checkpoint["env_steps"])
    except Exception as error:  # missing keys, other shapes or types
        raise InputError(f"the checkpoint does not fit this run ({type(error).__name__})") from None


def start_csv(path, step):
    """Write eval.csv with its header and, of a run to resume, the rows up to `step`: the later ones come again."""
    rows = []
    if step and path.exists():
        with open(path, newline="") as file:
            rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([CSV_COLUMNS, *rows])


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
