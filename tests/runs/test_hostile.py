"""No file does harm: damaged and hostile checkpoints and datasets."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small import (
    HUGE,
    SPEC,
    Unexpected,
    call_at,
    directory,
    forked,
    refusal,
    resume,
    send,
    start,
)

import buffers
import envs
import meta_bc
import smac_offline_online as smac
from benchmark.robustness.hostile import archive, header_tricks, write, zip_tricks
from plumbing.files import MAX_UNPACKED, flatten
from plumbing.flags import parse_args, read_flags

pytestmark = pytest.mark.usefixtures("small")


FUZZ = 100  # cases of a kind

# ----- Checkpoints: fuzz


@pytest.fixture(scope="module")
def good(dataset, tmp_path_factory):
    """A stopped run of 12 of 16 steps: its folder, its content, and what takes a checkpoint as `main` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            envs, "make_evaluation", functools.partial(envs.make_evaluation, num_train=2, repeats=1)
        )
        call_at(patch, "log", 11, functools.partial(send, signal.SIGTERM))
        folder = tmp_path_factory.mktemp("good")
        with pytest.raises(SystemExit):
            start(smac, dataset, folder)
        run = directory(smac, folder)
    data = buffers.load_dataset("PointDirection", dataset)
    args = parse_args(smac.Args, smac.PRESETS, ["--resume", str(run)])
    agent = smac.Agent(SPEC.obs_dim, SPEC.action_dim, args)
    buffer = buffers.from_dataset(data, "PointDirection", more_steps=1000)
    parts = {
        "agent": agent,
        "buffer": buffer,
        "act_rng": torch.Generator(),
        "rng": torch.Generator(),
    }
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    parts["optimizer"] = torch.optim.Adam(trained, lr=args.lr, fused=True)
    sizes, used = {name: size.clone() for name, size in buffer.sizes.items()}, buffer.used

    def take(folder):
        buffer.used = used  # the dataset is there, and nothing else
        parts["optimizer"].state.clear()
        for name, size in buffer.sizes.items():
            size.copy_(sizes[name])
        flags = read_flags(smac.Args, smac.PRESETS, folder / "checkpoint.npz")
        flags = dataclasses.replace(flags, resume=str(folder))
        buffers.Run(flags, smac.__file__, data["sha256"], **parts).file.close()

    with np.load(run / "checkpoint.npz") as file:
        arrays = {name: file[name] for name in file.files}
    take(shutil.copytree(run, tmp_path_factory.mktemp("taken") / "run"))
    assert buffer.used == used + 100
    return (run / "checkpoint.npz").read_bytes(), arrays, take, parts


def damage(good, rng):
    """Flipped bits, overwritten bytes, zeros, a cut, a piece moved: what disks, networks and editors do."""
    bad, kind = bytearray(good), rng.integers(5)
    at = int(rng.integers(len(bad)))
    if rng.random() < 0.3:
        at = len(bad) - 1 - int(rng.integers(1200))  # the table of contents, at the end
    if kind == 0:
        for i in [at, *rng.integers(0, len(bad), rng.integers(3))]:
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


def same_state(parts, arrays):
    """Whether networks, optimizer and buffer hold what a checkpoint says."""
    state = flatten({name: parts[name].state_dict() for name in ("agent", "optimizer", "buffer")})
    return len(state) > 50 and all(np.array_equal(state[name], arrays[name]) for name in state)


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_checkpoint_is_refused_or_as_good_as_before(good, tmp_path, seed):
    content, arrays, take, parts = good
    rng, refused = np.random.default_rng(seed), 0
    for case in range(FUZZ):
        (tmp_path / "checkpoint.npz").write_bytes(damage(content, rng))
        message = refusal(take, tmp_path)
        refused += message is not None
        if message:
            assert "checkpoint.npz" in message and os.listdir(tmp_path) == ["checkpoint.npz"]
        else:  # the damage hit a date in the archive's table, or the space between two parts
            assert same_state(parts, arrays), case
            (tmp_path / "args.json").unlink()
            (tmp_path / "eval.csv").unlink()
    assert refused > 0.7 * FUZZ


def spoil(array, rng):
    """Another array, whatever it was: of another type, shape or range."""
    others = [
        np.zeros(0, "f4"),
        np.zeros((2, 3, 4), "f4"),
        np.array("x"),
        np.array(1.5),
        np.zeros(3, complex),
    ]
    others += [np.array([None]), np.zeros(1, "f4,f4"), array[None]]
    if array.dtype.kind != "U":
        others += [array.astype("f8" if array.dtype == "f4" else "f4")]
    if array.dtype == np.float32 and array.size:
        at = np.arange(array.size).reshape(array.shape) == rng.integers(array.size)
        others += 3 * [np.where(at, rng.choice([np.nan, np.inf, -np.inf]), array).astype("f4")]
    if array.dtype == np.int64:
        others += [array - 1000, array + 2**60]
    if array.ndim:
        others += [array[:-1], array.repeat(2, axis=0)]
    return others[rng.integers(len(others))]


def test_a_checkpoint_with_other_fields_is_refused(good, tmp_path):
    """Whole archives, as another program would write them: arrays that are gone, new or spoiled."""
    _, arrays, take, _ = good
    rng = np.random.default_rng(0)
    # Of these any number is as good as another; the flags have a test of their own.
    free = {
        "flags",
        "env_steps",
        "summed",
        "buffer/sizes/offline",
        *(name for name in arrays if name[:7] == "totals/"),
    }
    names = [name for name in arrays if name not in free]
    for _ in range(FUZZ):
        name, spoiled = names[rng.integers(len(names))], dict(arrays)
        if rng.random() < 0.1:
            del spoiled[name]
        elif rng.random() < 0.1:
            spoiled[f"{name}/more"] = np.zeros(1)
        else:
            spoiled[name] = spoil(arrays[name], rng)
        write(tmp_path / "checkpoint.npz", spoiled)
        message = refusal(take, tmp_path)
        assert message and "checkpoint.npz" in message, name
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


@pytest.mark.parametrize("name, value", [
    ("q_hidden", [10**9]), ("q_hidden", [16, -16]), ("q_hidden", 16), ("q_hidden", ["16"]), ("q_hidden", [[16]]),
    ("seed", "1"), ("seed", -1), ("seed", HUGE), ("lr", float("nan")), ("lr", None), ("lr", HUGE), ("device", "tpu"),
    ("env_id", "Nowhere"), ("env_id", 3), ("env_id", ...), ("env_id", "os:path"), ("env_id", "HopperParam"),
    ("latent_dim", True), ("meta_batch", 10**9), ("gamma", 2.0), ("more", 1), ("offline_steps", 1e99),
    ("online_iterations", 10**15), ("tasks_per_iteration", 10**30), ("encoder_buffer", "none"), ("num_critics", 3),
    ("num_critics", True), ("meta_batch", 0), ("eval_every", 0), ("q_hidden", [2048] * 10),
])  # fmt: skip
def test_flags_in_a_checkpoint_are_checked_like_flags(good, dataset, tmp_path, name, value):
    flags = json.loads(good[1]["flags"].item()) | {name: value}
    if value is ...:
        del flags[name]
    write(tmp_path / "checkpoint.npz", good[1] | {"flags": np.array(json.dumps(flags))})
    assert refusal(resume, smac, dataset, tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


def test_a_module_is_imported_if_the_command_line_names_it_and_not_for_a_file(
    good, tmp_path, monkeypatch
):
    (tmp_path / "trap_module.py").write_text("open('created', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    flags = json.loads(good[1]["flags"].item()) | {"env_id": "trap_module:PointDirection2"}
    write(tmp_path / "checkpoint.npz", good[1] | {"flags": np.array(json.dumps(flags))})
    words = ["--resume", str(tmp_path)]
    message = refusal(parse_args, smac.Args, smac.PRESETS, words)
    assert (
        "give --env-id trap_module:PointDirection2 as well" in message
        and not Path("created").exists()
    )
    words += ["--env-id", "trap_module:PointDirection2"]
    assert "there is no environment" in refusal(parse_args, smac.Args, smac.PRESETS, words)
    assert Path("created").exists()  # the trap works


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 9000, "{", '{"a": 1}', "x" * 50_000, '{"env_id": ["Point"]}']
)
def test_flags_in_a_checkpoint_that_are_none(good, dataset, tmp_path, text):
    for array in (np.array(text), np.arange(3)):
        write(tmp_path / "checkpoint.npz", good[1] | {"flags": array})
        assert "checkpoint.npz does not fit this script" in refusal(resume, smac, dataset, tmp_path)


def test_a_flag_that_a_checkpoint_lacks_takes_its_default(good, dataset, tmp_path):
    flags = json.loads(good[1]["flags"].item())
    del flags["gamma"]
    write(tmp_path / "checkpoint.npz", good[1] | {"flags": np.array(json.dumps(flags))})
    args = parse_args(
        smac.Args, smac.PRESETS, ["--resume", str(tmp_path), "--dataset", str(dataset)]
    )
    assert args.gamma == 0.99 and args.offline_steps == 8


ROW = [1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 5.0]  # one of a table of evaluations
NO_ROWS = [  # (column, what it cannot be)
    (0, -1), (0, 0.5), (0, 13), (0, 2.0**60), (1, -1), (1, 2.0**60), (2, 2), (2, 0.5), (3, -1), (3, 2), (4, -1),
    (4, 1.5), (5, np.nan), (5, np.inf), (6, -np.inf), (6, 1e39),
]  # fmt: skip
TABLES = [np.array([[*ROW[:column], value, *ROW[column + 1 :]]]) for column, value in NO_ROWS]
TABLES += [np.array([[5.0, *ROW[1:]], ROW])]  # not in the order of steps
CHANGES = [  # (what of a checkpoint is changed, what the message says)
    *((dict(evaluations=table), "its table of evaluations is none|evaluations is NaN") for table in TABLES),
    (dict(evaluations=np.zeros((1, 6))), "evaluations is float64"), (dict(evaluations=np.array("a")), "evaluations is"),
    (dict(eval_csv=np.array("a")), "checkpoint.npz is of an earlier version, which cannot be resumed"),
    (dict(step=np.array(-1)), "its step is none"), (dict(step=np.array(2**63 - 1)), "its step is none"),
    (dict(env_steps=np.array(-1)), "its env_steps is none"), (dict(precision=np.array("high")), "its precision is none"),
    (dict(rng=np.zeros(16, "u1")), "is of the other kind of device, GPU or CPU"),
    (dict(rng=np.full(5056, 255, "u1")), "checkpoint.npz does not fit this run"),
    (dict(torch_rng=np.full(5056, 255, "u1")), "checkpoint.npz does not fit this run"),
    (dict(sha256=np.array("0" * 64)), "are others than in this dataset: name theirs with --dataset"),
    ({"totals/a/b": np.zeros(2, "f4")}, "totals/a/b is float32"), ({"agent/x": np.zeros(2)}, "agent/x is unknown"),
    ({"../x": np.zeros(2)}, "../x is unknown"), ({"optimizer/state/99/step": np.float32(1)}, "99/step is unknown"),
]  # fmt: skip


@pytest.mark.parametrize("change, words", CHANGES)
def test_what_no_run_of_this_dataset_writes(good, tmp_path, change, words):
    write(tmp_path / "checkpoint.npz", good[1] | change)
    assert re.search(words, refusal(good[2], tmp_path))


def test_a_buffer_of_another_dataset_is_refused(good, tmp_path):
    rewards = good[1]["buffer/fields/rewards"].copy()
    rewards[95] += 1  # the last of 64 + 32 transitions
    write(tmp_path / "checkpoint.npz", good[1] | {"buffer/fields/rewards": rewards})
    assert "begins with other rewards than the dataset" in refusal(good[2], tmp_path)


def test_an_optimizer_that_lacks_a_moment_is_refused(good, tmp_path):
    arrays = {name: array for name, array in good[1].items() if name != "optimizer/state/3/exp_avg"}
    write(tmp_path / "checkpoint.npz", arrays)
    assert "a state of the optimizer is not complete" in refusal(good[2], tmp_path)


def test_what_a_checkpoint_may_hold_beside_numbers_that_fit(good, tmp_path):
    """Sums of the loss curves of any name, columns in any order, any compression: they are taken, and do no harm."""
    _, arrays, take, parts = good
    more = {"totals/a": np.float32(1), "totals/a/b": np.float32(2)}
    columns = {
        name: np.asfortranarray(array) if array.ndim else array for name, array in arrays.items()
    }
    for content in (arrays | more, columns):
        write(tmp_path / "checkpoint.npz", content, np.savez_compressed)
        take(tmp_path)
        assert same_state(parts, arrays)
    for parameter in parts["optimizer"].param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    parts["optimizer"].step()


def test_parameters_that_lie_by_columns_come_back(tmp_path):
    agent, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    for network in (agent, other):
        network.weight = torch.nn.Parameter(torch.randn(2, 3).T)
    args = meta_bc.Args(env_id="PointDirection", run_dir=str(tmp_path), device="cpu")
    with (
        contextlib.suppress(Unexpected),
        buffers.Run(args, "a.py", agent=agent, optimizer=adam(agent)) as run,
    ):
        agent(torch.ones(1, 2)).sum().backward()
        run.parts["optimizer"].step()
        run.save()
        raise Unexpected
    args = dataclasses.replace(args, resume=str(run.folder))
    buffers.Run(args, "a.py", agent=other, optimizer=adam(other)).file.close()
    assert torch.equal(agent.weight, other.weight) and not agent.weight.is_contiguous()


def adam(network):
    return torch.optim.Adam(network.parameters())


# ----- Checkpoints and datasets made to do harm


def harmful(members, names, trap):
    yield from zip_tricks(members, names[0], MAX_UNPACKED)
    for name in names:
        for what, data in header_tricks(name, trap):
            yield f"{what} in {name}", archive({**members, name: data})


def check_harmful(function, as_before, file, content, names, trap):
    """Each is refused, or (the second table) as good as before: at once, in a sentence, no warning, no code ran."""
    with zipfile.ZipFile(io.BytesIO(content)) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    for what, data in harmful(members, names, trap):
        file.write_bytes(data)
        began = time.process_time()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            message = refusal(function, file)
        assert (
            file.name in message
            if message
            else what == "a second table in the comment" and as_before()
        ), what
        assert time.process_time() - began < 5 and warned == [] and not trap.exists(), what


def test_a_harmful_dataset_is_refused_at_once(dataset, tmp_path):
    file, trap = tmp_path / "d.npz", tmp_path / "created"
    load = functools.partial(buffers.load_dataset, "PointDirection")
    names = ["rl_obs.npy", "env_id.npy", "train_tasks.npy"]
    expected = pickle.dumps(load(dataset))
    text, peak = forked(
        lambda: check_harmful(
            load,
            lambda: pickle.dumps(load(file)) == expected,
            file,
            dataset.read_bytes(),
            names,
            trap,
        )
    )
    assert text == "nothing" and peak < resident() + 500


def test_a_harmful_checkpoint_is_refused_at_once(good, tmp_path):
    file, trap, take = (
        tmp_path / "checkpoint.npz",
        tmp_path / "created",
        lambda file: good[2](file.parent),
    )
    names = ["agent/policy.net.0.weight.npy", "flags.npy", "evaluations.npy"]
    text, peak = forked(
        lambda: check_harmful(
            take, lambda: same_state(good[3], good[1]), file, good[0], names, trap
        )
    )
    assert text == "nothing" and peak < resident() + 500


def resident():
    """MB of memory that this process uses, at least."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
