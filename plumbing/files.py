"""Reading and writing .npz files without pickle, and what the arrays of an offline dataset must be; eval.csv.

A dataset is one .npz file for each environment:

    format_version ()              env_id ()                   command ()  the command that made it
    train_tasks (N, k)             test_tasks (M, k)           k numbers describe one task
    {rl,encoder}_tasks (P,)        task number of each trajectory, in time order within a task
    {rl,encoder}_lengths (P,)      its number of transitions T
    {rl,encoder}_obs (sum(T+1), o), _actions (sum(T), a), _rewards (sum(T),), _terminals (sum(T),)

With no encoder trajectories (P = 0) the RL trajectories serve as both buffers.
"""

import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

import envs
from envs import InputError

MAX_UNPACKED = (
    1 << 26
)  # bytes that all compressed arrays of a file may have together; what is stored plain is no more
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
                    header = HEADER.fullmatch(
                        head + stream.read(int.from_bytes(head[8:], "little"))
                    )
                    if not header:
                        raise ValueError(f"{name} is no plain array")
                    dtype, shape = (
                        np.dtype(header[1].decode()),
                        tuple(map(int, re.findall(rb"\d+", header[3]))),
                    )
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
        reason = (
            error
            if isinstance(error, (ValueError, OSError, zipfile.BadZipFile))
            else type(error).__name__
        )
        raise InputError(f"{path} can not be read: {reason}") from None
    return arrays


def open_zip(file):
    """A zip archive with one table of contents, small and at the end of the file, so that all readers find the same."""
    length = file.seek(0, os.SEEK_END)
    file.seek(-min(98, length), os.SEEK_END)
    end = file.read().rjust(98, b"\0")
    size, alone = end[-10:-6], True
    if end[-42:-38] == b"PK\6\7":  # a file of more than 4 GB: another record, just before
        size, alone = (
            end[-58:-50],
            end[-98:-94] + end[-34:-26] == b"PK\6\6" + (length - 98).to_bytes(8, "little"),
        )
    alone = (
        alone and end[-22:-18] == b"PK\5\6" and end[-2:] == b"\0\0"
    )  # no comment, which could hold a second one
    if not alone or int.from_bytes(size, "little") > MAX_TABLE:
        raise ValueError("it is no .npz file, or damaged")
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("it is compressed in a way that numpy does not use")
    names = {member.filename.removesuffix(".npy") for member in members}
    unpacked = sum(
        member.file_size for member in members if member.compress_type == zipfile.ZIP_DEFLATED
    )
    if (
        len(names) < len(members)
        or sum(m.compress_size for m in members) > length
        or unpacked > MAX_UNPACKED
    ):
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
            os.fsync(
                file.fileno()
            )  # or a power failure could leave an empty file under the new name
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ----- Offline dataset


FORMAT_VERSION, MAX_TASKS, MAX_PATHS, MAX_LENGTH, MAX_TEXT = 1, 10_000, 50_000, 1_200, 10_000
PATH_FIELDS = {
    "obs": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "terminals": np.bool_,
}


def dataset_rules(spec):
    """{array of a dataset: its type, shape, and how long it may be where the shape is open (None)}."""
    rules = dict.fromkeys(("env_id", "command"), ("U", (), MAX_TEXT)) | {
        "format_version": ("i8", (), 0)
    }
    rules |= {
        name: ("f8", (None, spec.task_dim), MAX_TASKS) for name in ("train_tasks", "test_tasks")
    }
    for part in ("rl", "encoder"):
        rules |= {f"{part}_{name}": ("i4", (None,), MAX_PATHS) for name in ("tasks", "lengths")}
        rules[f"{part}_obs"] = "f4", (None, spec.obs_dim), math.inf
        rules[f"{part}_actions"] = "f4", (None, spec.action_dim), math.inf
        rules |= {
            f"{part}_rewards": ("f4", (None,), math.inf),
            f"{part}_terminals": ("b1", (None,), math.inf),
        }
    return rules


def check_array(what, dtype, shape, kind, wanted, longest=math.inf) -> bool:
    """Raise an InputError unless an array has this kind and shape (None: any length up to `longest`). Returns True."""
    fits = dtype.kind == kind if kind == "U" else dtype.str[1:] == kind
    if (
        not fits
        or len(shape) != len(wanted)
        or any(n != w for n, w in zip(shape, wanted) if w is not None)
    ):
        expected = f"{'text' if kind == 'U' else np.dtype(kind)} {wanted}".replace(
            "None", "any number"
        )
        raise InputError(f"{what} is {dtype} {shape}, expected {expected}")
    if kind == "U" and dtype.itemsize > 4 * longest or None in wanted and shape[0] > longest:
        raise InputError(
            f"{what} has {max(shape, default=dtype.itemsize // 4)} entries, expected at most {longest}"
        )
    return True


def check_dataset(path, env_id, data) -> None:
    """Raise an InputError for the first thing that is wrong with the arrays of a dataset."""
    spec = envs.lookup(env_id)
    for name, (kind, wanted, longest) in dataset_rules(spec).items():
        if name not in data:
            raise InputError(f"{path}: {name} is missing")
        if not isinstance(data[name], str):
            check_array(
                f"{path}: {name}", data[name].dtype, data[name].shape, kind, wanted, longest
            )
            if np.size(data[name]) and not np.isfinite(data[name]).all():
                raise InputError(f"{path}: {name} is NaN or infinite, expected finite numbers")
    for name, wanted in (("format_version", FORMAT_VERSION), ("env_id", envs.short_name(env_id))):
        if data[name] != wanted:
            raise InputError(f"{path}: {name} is {data[name]}, expected {wanted}")
    env = envs.make(env_id)
    for name in ("train_tasks", "test_tasks"):
        tasks, (low, high) = data[name], spec.task_range
        if not len(tasks) or tasks.min() < low or tasks.max() > high:
            raise InputError(
                f"{path}: {name} must hold a task at least, and numbers in {[low, high]}"
            )
        try:
            for task in tasks:
                env.unwrapped.set_task(task)
        except ValueError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    env.close()
    for part in ("rl", "encoder"):
        tasks, lengths, num_tasks = (
            data[f"{part}_tasks"],
            data[f"{part}_lengths"],
            len(data["train_tasks"]),
        )
        if lengths.size != tasks.size:
            raise InputError(
                f"{path}: {part}_tasks has {tasks.size} entries, {part}_lengths has {lengths.size}"
            )
        most = max(
            MAX_LENGTH, spec.horizon
        )  # no slice of a PEARL run is longer, even if its episodes look like one
        for name, numbers, low, high in (
            ("lengths", lengths, 1, most),
            ("tasks", tasks, 0, num_tasks - 1),
        ):
            if numbers.size and (numbers.min() < low or numbers.max() > high):
                raise InputError(f"{path}: {part}_{name} must lie within {low}..{high}")
        total = int(lengths.sum(dtype=np.int64))
        for name in PATH_FIELDS:
            rows, found = total + lengths.size * (name == "obs"), len(data[f"{part}_{name}"])
            if found != rows:
                raise InputError(
                    f"{path}: {part}_{name} has {found} rows, expected {rows} by {part}_lengths"
                )
        if np.abs(data[f"{part}_actions"]).max(initial=0) > 1:
            raise InputError(f"{path}: {part}_actions must lie in [-1, 1]")
        missing = np.setdiff1d(np.arange(num_tasks), tasks)
        if missing.size and (part == "rl" or lengths.size):
            raise InputError(
                f"{path}: {part} has no transition of task {missing[0]}, and every one needs some"
            )


# ----- Results and checkpoints of a run


SPLITS = ("test", "train")
CONTEXTS = ("own", "offline")
# A row of a run's table of evaluations, in its checkpoint as seven float64 numbers, in eval.csv as
# text: split and context are their places in SPLITS and CONTEXTS.
CSV_COLUMNS = (
    "gradient_step",
    "env_steps",
    "split",
    "context",
    "task",
    "return",
    "exploration_return",
)


def check_table(table, last=2**53) -> None:
    """Raise an InputError unless (R, 7) numbers are a table of evaluations up to step `last`."""
    whole = table[:, :5]
    limits = np.array([last, 2**53, len(SPLITS) - 1, len(CONTEXTS) - 1, 2**53])
    is_valid = np.isfinite(table).all() and (whole == np.floor(whole)).all()
    is_valid = is_valid and (whole >= 0).all() and (whole <= limits).all()
    is_valid = is_valid and (np.diff(table[:, 0]) >= 0).all()
    is_valid = is_valid and (np.abs(table) <= np.finfo(np.float32).max).all()
    if not is_valid:
        raise InputError("its table of evaluations is none")


def table_text(table) -> str:
    """A table of evaluations as the text of eval.csv."""
    lines = [",".join(CSV_COLUMNS)]
    for step, env_steps, split, context, task, *returns in table.tolist():
        words = [int(step), int(env_steps), SPLITS[int(split)], CONTEXTS[int(context)], int(task)]
        words += [np.float32(number) for number in returns]  # as they were rounded
        lines.append(",".join(map(str, words)))
    return "\r\n".join(lines) + "\r\n"


def flatten(tree, prefix=""):
    """Nested dicts -> {"a/b/c": value}; not an optimizer's flags, which are those of the command line."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif key != "param_groups":
            flat[f"{prefix}{key}"] = torch.as_tensor(value).detach().cpu().numpy()
    return flat
