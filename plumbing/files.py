"""Reading and writing .npz files without pickle; the arrays of an offline dataset; eval.csv.

A dataset is one .npz file for each environment:

    format_version ()              env_id ()                   command ()  the command that made it
    train_tasks (N, k)             test_tasks (M, k)           k numbers describe one task
    {rl,encoder}_tasks (P,)        task number of each trajectory, in time order within a task
    {rl,encoder}_lengths (P,)      its number of transitions L
    {rl,encoder}_obs (sum(L+1), o), _actions (sum(L), a), _rewards (sum(L),), _terminals (sum(L),)

With no encoder trajectories (P = 0) the RL trajectories serve as both buffers.
"""

import hashlib
import math
import os
import re
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

import envs
from plumbing.errors import InputError

# Bytes that all compressed arrays of a file may have together. What is stored plain is no larger
# than the file.
MAX_UNPACKED = 1 << 26
MAX_TABLE = 1 << 18  # bytes of the table of contents
HEADER = (
    re.compile(  # of an array as numpy.savez writes it: type, whether it lies by columns, shape
        rb"\x93NUMPY\x01\x00..{'descr': '(<[fi][48]|\|[ub]1|<U[1-9]\d{0,7})', "
        rb"'fortran_order': (True|False), "
        rb"'shape': \((|\d{1,15},|\d{1,15}(?:, \d{1,15}){1,3})\), } *\n",
        re.DOTALL,
    )
)
# The three records at the end of a zip archive; the first two only where it is large.
# signature, size, version made by, needed, disk, disk of the table, members here, members, size of
# the table, its place
END64 = struct.Struct("<4sQ2H2L4Q")
# signature, disk, place of the record above, disks
LOCATOR = struct.Struct("<4sLQL")
# signature, disk, disk of the table, members here, members, size of the table, its place, length of
# the comment
END = struct.Struct("<4s4H2LH")


# ----- Reading


def read_npz(path, accept) -> dict:
    """Some arrays of an .npz file, in one pass.

    It cannot run code, nor take much more memory than its own size.

    Args:
        accept: accept(name, dtype, shape) says whether to read an array, before it is read. It may
            raise InputError.
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
                    dtype, shape, order = read_header(stream, name, member.file_size)
                    if accept(name, dtype, shape):
                        arrays[name] = read_array(stream, dtype, shape, order)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes zipfile and numpy raise
        told = isinstance(error, (ValueError, OSError, zipfile.BadZipFile))
        reason = error if told else type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}") from None
    return arrays


def read_header(stream, name, file_size):
    """The type, shape and order ("C" or "F") of the array in a stream. Raises ValueError."""
    head = stream.read(10)
    length = int.from_bytes(head[8:], "little")
    header = HEADER.fullmatch(head + stream.read(length))
    if not header:
        raise ValueError(f"{name} is no plain array")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(digits) for digits in re.findall(rb"\d+", header[3]))
    if stream.tell() + math.prod(shape) * dtype.itemsize != file_size:
        raise ValueError(f"{name} has another size than it says")
    return dtype, shape, "F" if header[2] == b"True" else "C"


def read_array(stream, dtype, shape, order):
    """The rest of a stream as an array, or as a str."""
    data = bytearray()
    while chunk := stream.read(1 << 20):
        data += chunk
    if dtype.kind == "U":
        return data.decode("utf-32-le").rstrip("\0")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def open_zip(file):
    """A zip archive with one table of contents, small and at the end of the file.

    So all readers find the same one. Raises ValueError, zipfile.BadZipFile.
    """
    length = file.seek(0, os.SEEK_END)
    room = END64.size + LOCATOR.size + END.size
    file.seek(-min(room, length), os.SEEK_END)
    last = file.read().rjust(room, b"\0")
    end64 = END64.unpack_from(last)
    locator = LOCATOR.unpack_from(last, END64.size)
    end = END.unpack_from(last, END64.size + LOCATOR.size)

    # A comment could hold a second table.
    alone = end[0] == b"PK\5\6" and end[-1] == 0
    table_size = end[-3]
    if locator[0] == b"PK\6\7":  # a file of more than 4 GB has its numbers in another record
        alone = alone and end64[0] == b"PK\6\6" and locator[2] == length - room
        table_size = end64[-2]
    if not alone or table_size > MAX_TABLE:
        raise ValueError("it is no .npz file, or damaged")

    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    kinds = {member.compress_type for member in members}
    if kinds - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("it is compressed in a way that numpy does not use")
    names = {member.filename.removesuffix(".npy") for member in members}
    packed = [member for member in members if member.compress_type == zipfile.ZIP_DEFLATED]
    too_large = sum(member.file_size for member in packed) > MAX_UNPACKED
    overlap = sum(member.compress_size for member in members) > length
    if too_large or overlap or len(names) < len(members):
        raise ValueError("its arrays are too large, overlap, or two have one name")
    return archive


# ----- Writing


KINDS = {  # of what may have a file's name and is no file
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_replaceable(path) -> None:
    """Raise an InputError if something has this name that is not a regular file.

    Renaming a file over a device or a link would replace it, and reading one may never end.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # there is nothing, or what tries to write says why it cannot
        return
    except ValueError:  # a null character
        raise InputError(f"{str(path)!r} is no path") from None
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no file")
        raise InputError(f"{path} is {kind}, and only a regular file is replaced")


def write_file(path, write) -> None:
    """Write a file whole or not at all: `write(file)` to another one, which is then renamed.

    Raises InputError: there is something of this name that is no regular file; OSError.
    """
    check_replaceable(path)
    temporary = Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            write(file)
            file.flush()
            # or a power failure could leave an empty file under the new name
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ----- Offline dataset


FORMAT_VERSION = 1
MAX_TASKS = 10_000
MAX_PATHS = 50_000  # trajectories
MAX_LENGTH = 1_200  # transitions of a trajectory, if no episode of the family is longer
MAX_TEXT = 10_000  # characters
PATH_FIELDS = {
    "obs": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "terminals": np.bool_,
}


def dataset_rules(spec):
    """{array of a dataset: its type, shape, and how long it may be where the shape is open}."""
    rules = {
        "env_id": ("U", (), MAX_TEXT),
        "command": ("U", (), MAX_TEXT),
        "format_version": ("i8", (), 0),
        "train_tasks": ("f8", (None, spec.task_dim), MAX_TASKS),
        "test_tasks": ("f8", (None, spec.task_dim), MAX_TASKS),
    }
    for part in ("rl", "encoder"):
        rules |= {
            f"{part}_tasks": ("i4", (None,), MAX_PATHS),
            f"{part}_lengths": ("i4", (None,), MAX_PATHS),
            f"{part}_obs": ("f4", (None, spec.obs_dim), math.inf),
            f"{part}_actions": ("f4", (None, spec.action_dim), math.inf),
            f"{part}_rewards": ("f4", (None,), math.inf),
            f"{part}_terminals": ("b1", (None,), math.inf),
        }
    return rules


def check_array(what, dtype, shape, kind, wanted, longest=math.inf) -> bool:
    """Raise an InputError unless an array has this kind and shape. Returns True.

    Args:
        kind: as in dtype.str, "f4"; "U" is text of any length.
        wanted: the shape, in which None is any length up to `longest`.
    """
    is_kind = dtype.kind == kind if kind == "U" else dtype.str[1:] == kind
    pairs = zip(shape, wanted)
    is_shape = len(shape) == len(wanted) and all(n == w for n, w in pairs if w is not None)
    if not is_kind or not is_shape:
        type_name = "text" if kind == "U" else np.dtype(kind)
        expected = f"{type_name} {wanted}".replace("None", "any number")
        raise InputError(f"{what} is {dtype} {shape}, expected {expected}")
    entries = shape[0] if None in wanted else 0
    if kind == "U":
        entries = dtype.itemsize // 4  # characters
    if entries > longest:
        raise InputError(f"{what} has {entries} entries, expected at most {longest}")
    return True


def check_dataset(path, env_id, data) -> None:
    """Raise an InputError for the first thing that is wrong with the arrays of a dataset."""
    spec = envs.lookup(env_id)
    for name, rule in dataset_rules(spec).items():
        if name not in data:
            raise InputError(f"{path}: {name} is missing")
        array = data[name]
        if isinstance(array, str):
            continue
        check_array(f"{path}: {name}", array.dtype, array.shape, *rule)
        if array.size and not np.isfinite(array).all():
            raise InputError(f"{path}: {name} is NaN or infinite, expected finite numbers")
    for name, wanted in (("format_version", FORMAT_VERSION), ("env_id", envs.short_name(env_id))):
        if data[name] != wanted:
            raise InputError(f"{path}: {name} is {data[name]}, expected {wanted}")
    check_tasks(path, env_id, spec, data)
    for part in ("rl", "encoder"):
        check_part(path, spec, part, data)


def check_tasks(path, env_id, spec, data):
    """Raise an InputError unless the environment takes all tasks of a dataset."""
    env = envs.make(env_id)
    low, high = spec.task_range
    for name in ("train_tasks", "test_tasks"):
        tasks = data[name]
        if not len(tasks) or tasks.min() < low or tasks.max() > high:
            numbers = f"numbers in {[low, high]}"
            raise InputError(f"{path}: {name} must hold a task at least, and {numbers}")
        try:
            for task in tasks:
                env.unwrapped.set_task(task)
        except ValueError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    env.close()


def seen_test_tasks(data) -> int:
    """How many test tasks of a dataset are training tasks, too."""
    train_tasks = set(map(tuple, data["train_tasks"]))
    return sum(tuple(task) in train_tasks for task in data["test_tasks"])


def check_part(path, spec, part, data):
    """Raise an InputError for what is wrong with the RL or the encoder part of a dataset."""
    tasks = data[f"{part}_tasks"]
    lengths = data[f"{part}_lengths"]
    num_tasks = len(data["train_tasks"])
    if lengths.size != tasks.size:
        sizes = f"{part}_tasks has {tasks.size} entries, {part}_lengths has {lengths.size}"
        raise InputError(f"{path}: {sizes}")
    # No slice of a PEARL run is longer than MAX_LENGTH, even if its episodes look like one.
    most = max(MAX_LENGTH, spec.horizon)
    for name, numbers, low, high in (
        ("lengths", lengths, 1, most),
        ("tasks", tasks, 0, num_tasks - 1),
    ):
        if numbers.size and (numbers.min() < low or numbers.max() > high):
            raise InputError(f"{path}: {part}_{name} must lie within {low}..{high}")
    total = int(lengths.sum(dtype=np.int64))
    for name in PATH_FIELDS:
        rows = len(data[f"{part}_{name}"])
        expected = total + lengths.size if name == "obs" else total
        if rows != expected:
            wanted = f"expected {expected} by {part}_lengths"
            raise InputError(f"{path}: {part}_{name} has {rows} rows, {wanted}")
    is_inside = np.ones(total, bool)  # not the last transition of a trajectory
    is_inside[np.cumsum(lengths, dtype=np.int64) - 1] = False
    if data[f"{part}_terminals"][is_inside].any():
        raise InputError(
            f"{path}: {part}_terminals is true inside of a trajectory, which is one episode"
        )
    if np.abs(data[f"{part}_actions"]).max(initial=0) > 1:
        raise InputError(f"{path}: {part}_actions must lie in [-1, 1]")
    missing = np.setdiff1d(np.arange(num_tasks), tasks)
    if missing.size and (part == "rl" or lengths.size):
        raise InputError(
            f"{path}: {part} has no transition of task {missing[0]}, and every one needs some"
        )


def check_entries(path, env_id, rl, encoder) -> None:
    """Raise an InputError for the first trajectory that no dataset can hold.

    Args:
        rl, encoder: lists of (task number, {"obs" (L+1, o), "actions" (L, a), "rewards" (L,),
            "terminals" (L,)}), as `save_dataset` takes them.
    """
    if not len(rl):
        raise InputError(f"{path}: rl has no trajectory, and every task needs some")
    spec = envs.lookup(env_id)
    for part, entries in (("rl", rl), ("encoder", encoder)):
        for number, entry in enumerate(entries):
            check_entry(f"{path}: {part}[{number}]", spec, entry)


def check_entry(what, spec, entry):
    """Raise an InputError unless this is a task number and a trajectory."""
    try:
        task, path = entry
        arrays = {name: np.asarray(path[name]) for name in PATH_FIELDS}
    except KeyError as error:
        raise InputError(f"{what} has no {error.args[0]}") from None
    except Exception as error:  # whatever numpy raises for rows of several lengths, and tensors
        raise InputError(f"{what} is no pair of task number and trajectory: {error}") from None
    if not isinstance(task, (int, np.integer)) or not 0 <= task < MAX_TASKS:
        raise InputError(f"{what} is of task {task!r}, expected a number from 0 on")
    steps = len(arrays["actions"]) if arrays["actions"].ndim else 0
    shapes = {
        "obs": (steps + 1, spec.obs_dim),
        "actions": (steps, spec.action_dim),
        "rewards": (steps,),
        "terminals": (steps,),
    }
    for name, shape in shapes.items():
        if arrays[name].dtype.kind not in "bifu":
            raise InputError(f"{what}: {name} is {arrays[name].dtype}, expected numbers")
        if arrays[name].shape != shape:
            found = arrays[name].shape
            raise InputError(f"{what}: {name} is {found}, expected {shape} by its actions")
    if not np.isin(arrays["terminals"], (0, 1)).all():
        raise InputError(f"{what}: terminals must be booleans, or 0 and 1")


def digest(data, rules) -> str:
    """The SHA-256 of a dataset's contents: equal for equal arrays, however a file packs them.

    Args:
        data: {name: array}.
        rules: of which the names of the arrays are taken, see `dataset_rules`.
    """
    sha256 = hashlib.sha256()
    for name in sorted(rules):
        array = np.asarray(data[name])
        sha256.update(f"{name} {array.dtype} {array.shape}".encode())
        sha256.update(np.ascontiguousarray(array).view(np.uint8))
    return sha256.hexdigest()


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
    """Nested dicts -> {"a/b/c": value}, but for an optimizer's flags: args.json has these."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif key != "param_groups":
            flat[f"{prefix}{key}"] = torch.as_tensor(value).detach().cpu().numpy()
    return flat
