"""A run is never lost, and no input does harm: killed runs, full disks, damaged and hostile files."""

import functools
import io
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import envs
import smac_offline_online as smac
from buffers import InputError

ROOT = Path(smac.__file__).parent
SPEC = envs.SPECS["PointDirection"]
SMALL = "--env-id PointDirection --q-hidden 16 --policy-hidden 16 --encoder-hidden 16 --decoder-hidden 8 --rl-batch 16"
SMALL += " --context-batch 8 --latent-dim 3 --eval-every 10 --checkpoint-every 10 --device cpu --offline-steps 14"
SMALL += " --online-iterations 2 --updates-per-iteration 8 --prior-steps 50 --posterior-steps 50"
FUZZ = 150  # cases a kind


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Random numbers: 4 training tasks with two trajectories each, 2 test tasks."""
    rng, entries = np.random.default_rng(0), []
    for task in np.repeat(range(4), 2):
        path = {"obs": rng.normal(size=(9, 4)), "actions": rng.uniform(-1, 1, (8, 2)), "rewards": rng.normal(size=8)}
        entries.append((task, path | {"terminals": np.zeros(8)}))
    tasks, file = envs.sample_tasks("PointDirection", 6), tmp_path_factory.mktemp("data") / "small.npz"
    buffers.save_dataset(file, "PointDirection", tasks[:4], tasks[4:], entries, entries[::2], "python test")
    return file


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in (("EVAL_REPEATS", 1), ("TRAIN_EVAL_TASKS", 2), ("LOG_EVERY", 5)):
        monkeypatch.setattr(smac, name, value)


def start(dataset, folder, *flags):
    """A small run in `folder`: its directory."""
    smac.main(smac.parse_args([*SMALL.split(), "--dataset", str(dataset), "--run-dir", str(folder), *flags]))
    return Path(folder) / "PointDirection__smac_offline_online__1"


def resume(run, *flags):
    return smac.main(smac.parse_args(["--resume", str(run), *flags]))


def read(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_equal_runs(one, other):
    a, b = read(one), read(other)
    for name in a.keys() - {"args"}:
        assert same(a[name], b[name]), name
    assert (one / "eval.csv").read_bytes() == (other / "eval.csv").read_bytes()


def refusal(function, *args):
    """The sentence with which a file is refused; None if it is taken."""
    try:
        function(*args)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) <= 500
        return str(error)


def forked(function):
    """What a function raised in a process of its own, which then ends; its output goes nowhere."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            function()
            text = "nothing"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    with os.fdopen(read_end) as file:
        return file.read()


# ----- Stopped at any moment


def test_killed_runs_end_like_runs_that_were_never_killed(tmp_path):
    """SIGKILL at seeded random moments, some within the write of a checkpoint; all three scripts."""
    flags = ["--kills", "4", "1", "1", "--seed", "3", "--out", str(tmp_path / "kill.md")]
    command = [sys.executable, str(ROOT / "benchmark" / "kill.py"), *flags]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    rows = [line for line in (tmp_path / "kill.md").read_text().splitlines() if line.startswith("|") and ".py" in line]
    assert sum(int(row.split("|")[-2]) for row in rows) == 6
    assert any("within the write of a checkpoint" in row for row in rows)


def test_eval_csv_comes_back_whole(dataset, tmp_path):
    run = start(dataset, tmp_path)
    file, text = run / "eval.csv", (run / "eval.csv").read_bytes()
    for damaged in (text + b"2", text[:-20], text.replace(b"0", b"1"), b"", None):
        file.write_bytes(damaged) if damaged is not None else file.unlink()
        resume(run)
        assert file.read_bytes() == text


def test_only_one_process_at_a_time_writes_to_a_run(tmp_path):
    args = smac.Args(resume=None)
    lock = buffers.claim(tmp_path / "run", args)
    assert forked(lambda: buffers.claim(tmp_path / "run", args)).startswith("InputError: another process writes to")
    lock.close()
    assert forked(lambda: buffers.claim(tmp_path / "run", args)) == "nothing"
    assert forked(lambda: buffers.claim(tmp_path / "run", args)) == "nothing"  # the last one ended without a close


def test_a_run_closes_its_files_and_threads(dataset, tmp_path):
    counts = []
    for i in range(3):
        start(dataset, tmp_path / str(i))
        counts.append((len(os.listdir("/dev/fd")), threading.active_count()))
    assert counts[1] == counts[2]


# ----- What can not be written, or is not worth it


@pytest.mark.parametrize("limit", [1, 20_000])  # bytes a file: nothing can be written; all but the checkpoint
def test_a_full_disk_keeps_the_checkpoint(dataset, tmp_path, monkeypatch, limit):
    whole, update, calls = start(dataset, tmp_path / "whole"), smac.update, []
    run = tmp_path / "part" / whole.name

    def fill(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return update(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(smac, "update", fill)
        message = forked(lambda: start(dataset, tmp_path / "part"))
    place = f"{run}: " if limit == 20_000 else ""
    assert message.startswith(f"InputError: can not write to {place}") and message.count("\n") == 0
    assert message.endswith(f": File too large; continue with --resume {run}")
    assert read(run)["step"] == 10 and not (run / "checkpoint.tmp").exists()
    resume(run)
    assert_equal_runs(whole, run)


def test_a_run_directory_that_can_not_be_written(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory|File exists"):  # one line, exit code 2: the last test below
        start(dataset, tmp_path / "file")


def test_a_checkpoint_never_holds_nan(dataset, tmp_path, monkeypatch):
    """The losses of the step were finite, the parameters after it are not."""
    update, calls = smac.update, []

    def poison(agent, *args, **kwargs):
        info = update(agent, *args, **kwargs)
        calls.append(1)
        if len(calls) == 14:
            agent.decoder.net[0].bias.data[3] = float("nan")
        return info

    monkeypatch.setattr(smac, "update", poison)
    message = refusal(start, dataset, tmp_path)
    assert "after step 14" in message and "checkpoint.agent.decoder.net.0.bias is NaN or infinite" in message
    assert read(tmp_path / "PointDirection__smac_offline_online__1")["step"] == 10


@pytest.mark.parametrize("flags, words", [
    ("--q-hidden 9000 9000", "--q-hidden is (9000, 9000), it must be above 0 and at most 10000 in all"),
    ("--rl-batch 1000000000", "--rl-batch is 1000000000, it must be above 0 and at most 10000"),
    ("--online-iterations 1000000000000", "transitions does not fit into memory"),
    ("--online-iterations 1000000000000000000000", "transitions does not fit into memory"),
])  # fmt: skip
def test_flags_that_would_take_all_memory(dataset, tmp_path, flags, words):
    assert words in refusal(start, dataset, tmp_path, *flags.split())
    assert list(tmp_path.iterdir()) == []


# ----- Checkpoints: fuzz


@pytest.fixture(scope="module")
def good(dataset, tmp_path_factory):
    """A run of 22 steps: its bytes, its content, and what takes a checkpoint as `main` does."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("EVAL_REPEATS", 1), ("TRAIN_EVAL_TASKS", 2)):
            patch.setattr(smac, name, value)
        run = start(dataset, tmp_path_factory.mktemp("good"), "--online-iterations", "1")
    args = smac.parse_args(["--resume", str(run)])
    agent = smac.Agent(SPEC.obs_dim, SPEC.action_dim, args)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=args.lr, fused=True)
    buffer = buffers.ReplayBuffer(4, SPEC.obs_dim, SPEC.action_dim, 1000)
    buffers.fill_from_dataset(buffer, buffers.load_dataset(dataset, "PointDirection", SPEC))
    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer}
    generators = {"act_rng": torch.Generator(), "rng": torch.Generator()}
    sizes, used = {name: size.clone() for name, size in buffer.sizes.items()}, buffer.used

    def take(folder):
        buffer.used = used  # the dataset is there, and nothing else
        for name, size in buffer.sizes.items():
            size.copy_(sizes[name])
        return buffers.restore(buffers.load_checkpoint(folder, smac.Args), parts, generators)

    assert take(run) == (22, 500)
    return (run / "checkpoint.pt").read_bytes(), read(run), take, parts


def damage(good, rng):
    """Flipped bits, overwritten bytes, zeros, a cut, a piece moved: what disks, networks and editors do."""
    bad, kind = bytearray(good), rng.integers(5)
    at = int(rng.integers(len(bad)))
    if kind == 0:
        for i in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[i] ^= 1 << rng.integers(8)
    elif kind == 1:
        bad[at] = rng.integers(256)
    elif kind == 2:
        bad[at : at + 64] = bytes(len(bad[at : at + 64]))
    elif kind == 3:
        del bad[at:]
    else:
        bad[at:at] = bad[at // 2 : at // 2 + rng.integers(1, 100)]
    return bytes(bad)


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_checkpoint_is_refused_or_as_good_as_before(good, tmp_path, seed):
    content, state, take, parts = good
    rng, refused = np.random.default_rng(seed), 0
    for case in range(FUZZ):
        (tmp_path / "checkpoint.pt").write_bytes(damage(content, rng))
        sentence = refusal(take, tmp_path)
        refused += sentence is not None
        if sentence:
            assert "checkpoint.pt" in sentence
        else:  # the damage hit a date in the archive's directory, or the space between two parts
            assert same(parts["agent"].state_dict(), state["agent"]), case
            assert same(parts["optimizer"].state_dict()["state"], state["optimizer"]["state"]), case
            assert same(parts["buffer"].state_dict()["fields"], state["buffer"]["fields"]), case
    assert refused > 0.8 * FUZZ


def leaves(tree, path=()):
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def spoil(value, rng):
    """Another value, whatever it was: of another type, dtype, shape or range."""
    others = [None, "x", 1.5, [1, 2], {"a": 1}, torch.zeros(0), torch.zeros(2, 3, 4), torch.zeros(1).expand(10**12)]
    if torch.is_tensor(value) and value.numel():
        spoiled, at = value.clone().flatten(), rng.integers(value.numel())
        spoiled[at] = float(rng.choice([np.nan, np.inf, -np.inf])) if value.is_floating_point() else 1000
        changes = [value.to(torch.float16), value.double(), value.long().int().bool(), value[None], value.to_sparse()]
        return [*others, *changes, *[spoiled.reshape(value.shape)] * 3][rng.integers(16)]
    return others[rng.integers(len(others))]


def test_a_checkpoint_with_other_fields_is_refused(good, tmp_path):
    """Whole archives, as another program would write them: fields that are gone, new or spoiled."""
    content, state, take, _ = good
    rng = np.random.default_rng(0)
    # Of the optimizer only "state" is read; a generator takes any numbers, but not any number of them.
    skipped = {"args", "rng", "act_rng", "param_groups"}
    paths = [path for path, _ in leaves(state) if not skipped & {path[0], path[-1]}]
    for _ in range(FUZZ):
        state = torch.load(io.BytesIO(content), weights_only=True)
        path = paths[rng.integers(len(paths))]
        *parents, last = path
        inside = functools.reduce(dict.__getitem__, parents, state)
        if rng.random() < 0.1:
            del inside[last]
        elif rng.random() < 0.1 and parents:
            inside["more"] = torch.zeros(1)
        else:
            inside[last] = spoil(inside[last], rng)
        torch.save(state, tmp_path / "checkpoint.pt")
        sentence = refusal(take, tmp_path)
        assert sentence and "checkpoint.pt" in sentence, path


@pytest.mark.parametrize("name, value", [
    ("q_hidden", (10**9,)), ("q_hidden", (16, -16)), ("q_hidden", [16]), ("q_hidden", ("16",)), ("seed", "1"),
    ("seed", -1), ("lr", float("nan")), ("lr", None), ("device", "tpu"), ("env_id", "Nowhere"), ("dataset", 3),
    ("latent_dim", True), ("meta_batch", 10**9), ("gamma", 2.0), ("more", 1), ("gamma", ...), ("offline_steps", 1e99),
    ("online_iterations", 10**15), ("tasks_per_iteration", 10**30), ("encoder_buffer", "none"), ("z_resample", 1),
    ("env_id", "HopperParam"), ("num_critics", 3), ("num_critics", True),
])  # fmt: skip
def test_flags_in_a_checkpoint_are_checked_like_flags(good, dataset, tmp_path, name, value):
    state = torch.load(io.BytesIO(good[0]), weights_only=True)
    state["args"][name] = value
    if value is ...:
        del state["args"][name]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert refusal(resume, tmp_path)


HEADER = ",".join(buffers.CSV_COLUMNS)


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update(step=-1), "checkpoint.step is -1, expected 0 or more"),
    (lambda state: state.update(step=10**30), "checkpoint.step is 1000000000000"),
    (lambda state: state.update(rng=torch.zeros(16, dtype=torch.uint8)), "it is of the other kind of device"),
    (lambda state: state.update(eval_csv="x"), "checkpoint.eval_csv is no table"),
    (lambda state: state.update(eval_csv=HEADER + "\n1,2\n"), "checkpoint.eval_csv is no table"),
    (lambda state: state.update(eval_csv=HEADER + "\n1,2,test,online,3,4,much\n"), "could not convert string to float"),
    (lambda state: state["buffer"]["fields"]["rewards"][95].add_(1), "rewards begins with other transitions than the"),
])  # fmt: skip
def test_numbers_that_no_run_of_this_dataset_writes(good, tmp_path, change, words):
    state = torch.load(io.BytesIO(good[0]), weights_only=True)
    change(state)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert words in refusal(good[2], tmp_path)


def test_tensors_of_a_checkpoint_are_copied(good, tmp_path):
    """They may require gradients, or be views in which many numbers share one place."""
    content, _, take, parts = good
    state = torch.load(io.BytesIO(content), weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"].requires_grad_()
        moments["exp_avg_sq"] = torch.ones(1).expand_as(moments["exp_avg_sq"])
    torch.save(state, tmp_path / "checkpoint.pt")
    take(tmp_path)
    for parameter in parts["optimizer"].param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    parts["optimizer"].step()


# ----- Checkpoints and datasets made to do harm


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def archive(file, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return file.read_bytes()


def declare(content, size):
    """The archive, with another size of its last member in the directory."""
    content, at = bytearray(content), content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = size.to_bytes(4, "little")
    return bytes(content)


def harmful_checkpoints(file, content, trap):
    """name: bytes. `file` is a name to use; `trap` is what code in them would create."""
    torch.save({"args": Hostile(trap)}, file)
    yield "code", file.read_bytes()
    for protocol in range(6):
        yield f"a bare pickle of protocol {protocol}", pickle.dumps({"args": Hostile(trap)}, protocol)
        yield f"plain values in protocol {protocol}", pickle.dumps({"args": {}}, protocol)
    with zipfile.ZipFile(io.BytesIO(content)) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (1 << 31).to_bytes(5, "little") + b"\x85R."
    yield "a bytearray of 2 GB", archive(file, members | {pickled: bomb})
    tensor = bomb.replace(b"builtins\nbytearray", b"torch\nFloatTensor")
    yield "a tensor of 8 GB", archive(file, members | {pickled: tensor})
    yield "two pickles", archive(file, members | {pickled.upper(): bomb})
    yield "a pickle in front", bomb + archive(file, members)
    yield "a pickle without an end", archive(file, members | {pickled: members[pickled][:-1]})
    yield "lists in lists", archive(file, members | {pickled: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."})
    yield "no pickle", archive(file, {name: data for name, data in members.items() if name != pickled})
    yield "a script module", archive(file, members | {pickled.replace("data", "constants"): members[pickled]})
    yield "a zip bomb", archive(file, members | {"archive/data/0": bytes(300 << 20)}, zipfile.ZIP_DEFLATED)
    yield "a part that declares 4 GB", declare(archive(file, members), 0xFFFFFFF0)
    yield "an empty archive", archive(file, {})
    yield "a link to itself", None


def test_a_harmful_checkpoint_is_refused_at_once(good, tmp_path):
    content, _, take, _ = good
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in harmful_checkpoints(tmp_path / "archive.pt", content, tmp_path / "created"):
        file = tmp_path / "checkpoint.pt"
        file.unlink(missing_ok=True)
        file.write_bytes(data) if data else file.symlink_to(file)
        began = time.time()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert refusal(take, tmp_path), name
        assert time.time() - began < 5 and warned == [], name
    assert not (tmp_path / "created").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10  # KiB; to make the bomb: 300 << 10


# ----- Datasets


def load(file):
    return buffers.load_dataset(file, "PointDirection", SPEC)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_damaged_dataset_is_refused_or_as_good_as_before(dataset, tmp_path, compressed):
    file, content, expected = tmp_path / "d.npz", dataset.read_bytes(), load(dataset)
    if not compressed:
        with np.load(dataset) as data:
            np.savez(file, **data)
        content = file.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for case in range(FUZZ):
        file.write_bytes(damage(content, rng))
        sentence = refusal(load, file)
        refused += sentence is not None
        assert "d.npz" in sentence if sentence else pickle.dumps(load(file)) == pickle.dumps(expected), case
    assert refused > 0.7 * FUZZ


def test_a_dataset_with_other_fields_is_refused(dataset, tmp_path):
    with np.load(dataset) as file:
        whole = dict(file)
    rng, names = np.random.default_rng(0), [name for name in whole if name not in ("command", "format_version")]
    for _ in range(FUZZ):
        name = names[rng.integers(len(names))]
        old = whole[name]
        changes = [old[None], old.astype("S"), np.array([None]), np.array("x"), np.zeros((0, 3)), np.zeros(1, "f4,f4")]
        if old.dtype.kind in "if":
            changes += [old.astype(dtype) for dtype in (">f8", complex, "f2", "M8[s]")]
        if old.dtype.kind == "f":
            at = np.arange(old.size).reshape(old.shape) == rng.integers(old.size)
            changes += [np.where(at, bad, old).astype(old.dtype) for bad in (np.nan, np.inf, -np.inf)]
        fields = whole | {name: changes[rng.integers(len(changes))]}
        if rng.random() < 0.1:
            del fields[name]
        np.savez(tmp_path / "d.npz", **fields)
        sentence = refusal(load, tmp_path / "d.npz")
        assert sentence and "d.npz" in sentence, (name, fields.get(name))


def test_a_harmful_dataset_is_refused_at_once(dataset, tmp_path):
    with zipfile.ZipFile(dataset) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    file, before = tmp_path / "d.npz", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,), }\n"
    for name in members:
        archive(file, members | {name: pickle.dumps(Hostile(tmp_path / "created"))})
        assert refusal(load, file) or name == "command.npy", name  # which is for people to read, and may be any text
        archive(file, members | {name: b"\x93NUMPY\x01\x00" + len(huge).to_bytes(2, "little") + huge})
        assert refusal(load, file), name
    archive(file, members | {"rl_obs.npy": bytes(300 << 20)}, zipfile.ZIP_DEFLATED)
    assert "more than the" in refusal(load, file)
    file.write_bytes(declare(archive(file, members), 0xFFFFFFF0))
    assert refusal(load, file)
    assert not (tmp_path / "created").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10


# ----- Real processes


def test_real_processes_say_one_sentence(dataset, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(pickle.dumps({"args": 1}, 4))
    (tmp_path / "file").write_text("")
    (tmp_path / "d.npz").write_bytes(dataset.read_bytes().replace(b"rl_obs", b"rl_abs"))
    for command in (
        ("smac_offline_online.py", "--resume", tmp_path),
        ("pearl_online_oracle.py", "--env-id", "PointDirection", "--run-dir", tmp_path / "file"),
        ("meta_bc.py", "--env-id", "PointDirection", "--dataset", tmp_path / "d.npz"),
    ):
        command = [sys.executable, *map(str, command)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert process.returncode == 2 and process.stdout == "", command
        assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
