"""Files made to do harm: archives that are not what they seem, arrays whose headers lie, datasets, checkpoints."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def archive(members, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compression) as file:
        warnings.simplefilter("ignore")  # two of one name
        for name, data in members.items() if isinstance(members, dict) else members:
            file.writestr(name, data)
    return out.getvalue()


def npy(descr, shape, data=b"", version=1):
    """An array as a file of its own, whatever its header says."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + len(header).to_bytes(2 if version == 1 else 4, "little")
        + header
        + data
    )


def end_record(members, size, offset, comment=b""):
    return (
        struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, members, members, size, offset, len(comment))
        + comment
    )


def zip_tricks(members, name, room):
    """{what: bytes}: archives that are not what they seem. `name` is a member that is read; more than `room` bytes is
    too much to unpack."""
    whole = archive(members)
    at = whole.rindex(b"PK\5\6")
    table = whole[whole.index(b"PK\1\2") : at]
    bomb = archive({name: bytes(room + 1)}, zipfile.ZIP_DEFLATED)
    yield (
        "a comment",
        whole[:at] + end_record(len(members), len(table), at - len(table), b"comment"),
    )
    inner = table + end_record(len(members), len(table), at + 22)
    yield "a second table in the comment", whole[:at] + end_record(0, 0, at, inner)
    yield (
        "a second archive in the comment",
        whole[:-2] + len(bomb).to_bytes(4, "little")[:2] + bomb[: 1 << 16],
    )
    numbers = len(members), len(members), len(table), at - len(table)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
    for what, place in (("elsewhere", 0), ("nowhere", 1 << 60), ("behind the end", len(whole) + 1)):
        yield (
            f"a zip64 record {what}",
            whole[:at] + record + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1) + whole[at:],
        )
    huge = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 9, 9, 1 << 40, 0)
    yield (
        "a zip64 table of a terabyte",
        whole[:at] + huge + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1) + whole[at:],
    )
    yield "a zip bomb", bomb
    many = {f"totals/{i}.npy": npy("<f4", "()", bytes(4)) for i in range(20)}
    share = bytes(room // 4)
    yield (
        "a zip bomb in five parts",
        archive(many | {f"totals/{i}.npy": share for i in range(5)}, zipfile.ZIP_DEFLATED),
    )
    yield "lzma", archive(members, zipfile.ZIP_LZMA)
    yield "bzip2", archive(members, zipfile.ZIP_BZIP2)
    yield "two of one name", archive([*members.items(), (name, members[name])])
    yield (
        "two that are one without .npy",
        archive({**members, name.removesuffix(".npy"): members[name]}),
    )
    size, first = len(table), table.index(b"PK\1\2", 4)  # all entries once more, with other names
    more = b"".join(table.replace(b".npy", b".%dpy" % i) for i in range(5))
    yield (
        "members that overlap",
        whole[:at] + more + end_record(6 * len(members), 6 * size, at - size),
    )
    entry = bytearray(table[:first])
    entry[24:28] = (0xFFFFFFF0).to_bytes(4, "little")
    yield "a member that declares 4 GB", whole[: at - size] + entry + table[first:] + whole[at:]
    entry = bytearray(table[:first])
    entry[8] |= 1
    yield "an encrypted member", whole[: at - size] + entry + table[first:] + whole[at:]
    yield "6,000 empty members", archive({str(i): b"" for i in range(6000)})
    yield (
        "6,000 empty arrays",
        archive(members | {f"totals/{i}.npy": npy("<f4", "(0,)") for i in range(6000)}),
    )
    yield "an archive without an end", whole[:-1]
    yield "an empty archive", archive({})


def header_tricks(name, trap):
    """{what: bytes of the member `name`}."""
    yield "a pickle", pickle.dumps(Hostile(trap))
    array = io.BytesIO()
    np.lib.format.write_array(array, np.array([Hostile(trap)], object), allow_pickle=True)
    yield "an array of objects", array.getvalue()
    for descr in (
        "<U0",
        "|V0",
        "|S0",
        "|O",
        "|i1",
        ">f4",
        "<f2",
        "<c8",
        "<M8[s]",
        "<f4,<f4",
        "?",
        "<U999999999",
    ):
        for shape in (
            "(1000000000,)",
            "()",
            f"(600000, {'1, ' * 60})",
            "(-1,)",
            "(-1, -4)",
            "(99999999999999999999,)",
        ):
            yield f"{descr} {shape}", npy(descr, shape, bytes(16))
    for shape in (
        "(3L,)",
        "('\\d',)",
        "(" * 4000,
        "(1,) * 10**9",
        "(0, 10000000000000000)",
        "(1e9,)",
        "{}",
        "None",
    ):
        yield shape, npy("<f4", shape, bytes(12))
    for text in (b"\xff\xff\xff\x7f", b"\0\xd8\0\0", b"\x1b\0\0\0"):
        yield f"text {text}", npy("<U1", "()", text)
    yield "a header of 500 MB", npy("<f4", "()")[:6] + b"\2\0" + (500 << 20).to_bytes(4, "little")
    yield "version 2", npy("<f4", "(3,)", bytes(12), version=2)
    yield "nothing", b""


# ===== Files that a run reads: a function each, which gets the folder of the run


def dataset(train=3, test=2, lengths=(25,) * 6):
    """Arrays of a dataset of random numbers, with a trajectory of each of these lengths."""
    rng, lengths = np.random.default_rng(0), np.array(lengths, "i4")
    arrays = {
        "format_version": np.array(1),
        "env_id": np.array("PointDirection"),
        "command": np.array("attack.py"),
    }
    arrays |= {
        "train_tasks": rng.uniform(0, 6, (train, 1)),
        "test_tasks": rng.uniform(0, 6, (test, 1)),
    }
    for part, paths, steps in (("rl", len(lengths), lengths.sum()), ("encoder", 0, 0)):
        arrays |= {
            f"{part}_tasks": np.arange(paths, dtype="i4") % train,
            f"{part}_lengths": lengths[:paths],
        }
        shapes = {"obs": (steps + paths, 4), "actions": (steps, 2), "rewards": steps}
        arrays |= {
            f"{part}_{name}": rng.uniform(-1, 1, shape).astype("f4")
            for name, shape in shapes.items()
        }
        arrays[f"{part}_terminals"] = np.zeros(steps, bool)
    return arrays


def read(file):
    """{name: array} of a file."""
    with np.load(file) as arrays:
        return dict(arrays)


def write(file, arrays, save=np.savez):
    """Write a file of this name; numpy would append .npz."""
    with open(file, "wb") as out:
        save(out, **arrays)


def data(*sizes, save=np.savez, **new):
    """Write x.npz: a dataset with other arrays, each a function of it."""

    def make(run):
        arrays = dataset(*sizes)
        write("x.npz", arrays | {name: function(arrays) for name, function in new.items()}, save)

    return make


def replace(content, name, run):
    """Write a file of the run with these bytes, or x.npz."""
    Path(name if name == "x.npz" else run / name).write_bytes(content)


def member(name, array, run=None):
    """Write x.npz, or the checkpoint of a run, with these bytes as one of its arrays."""
    file = run / "checkpoint.npz" if run else "d.npz"
    with zipfile.ZipFile(file) as whole:
        found = {name: whole.read(name) for name in whole.namelist()}
    Path(file if run else "x.npz").write_bytes(archive(found | {f"{name}.npy": array}))


def checkpoint(function=lambda arrays: {}, **flags):
    """Change arrays of the checkpoint, {name: array}, by a function of them, and flags."""

    def make(run):
        arrays = read(run / "checkpoint.npz")
        changed = {"flags": np.array(json.dumps(json.loads(arrays["flags"].item()) | flags))}
        write(run / "checkpoint.npz", arrays | changed | function(arrays))

    return make


def agent(**new):
    """Write agent.npz, as benchmark/agents.py would of a run of meta-BC, with other arrays."""

    def make(run):
        found = read("whole/meta_bc/agent_6.npz")
        arrays = {
            f"6/{name}": x for name, x in found.items() if name.startswith(("policy.", "encoder."))
        }
        arrays |= {
            "flags": found["flags"],
            "script": np.array("meta_bc"),
            "test_tasks": np.ones((2, 1)),
        }
        write("agent.npz", arrays | new)

    return make


def link(name):
    """Put a link to the file "precious" in the place of a file of the run."""

    def make(run):
        Path("precious").write_bytes(b"precious")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(Path("precious").absolute())

    return make
