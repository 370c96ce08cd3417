"""The replay buffer, and the dataset file: what comes in goes out again, and what is damaged or hostile is refused."""

import io
import os
import pickle
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import envs
from buffers import InputError, ReplayBuffer

OBS, ACTION = 4, 2  # those of PointDirection
SPEC = envs.SPECS["PointDirection"]
SHIPPED = sorted((Path(buffers.__file__).parent / "datasets").glob("*.npz"))


def make_path(task, number, length):
    """A trajectory unlike all others: obs[:, 0] is the task, obs[:, 1] the trajectory's number, obs[:, 2] time."""
    steps = np.arange(length + 1)
    obs = np.stack([np.full(length + 1, task), np.full(length + 1, number), steps, -steps], 1).astype(np.float32)
    actions = np.stack([np.full(length, 0.01 * number), steps[:-1] / 1000], 1).astype(np.float32)
    terminals = np.arange(length) == length - 1 if number % 2 else np.zeros(length, bool)
    return dict(obs=obs, actions=actions, rewards=(100 * number + steps[:-1]).astype(np.float32), terminals=terminals)


def make_buffer(num_tasks=3, capacity=100, **tables):
    """Task t has the trajectories 10 t + 0, 1, 2 of lengths 4, 1 and 3."""
    buffer = ReplayBuffer(num_tasks, OBS, ACTION, capacity)
    for number, length in enumerate((4, 1, 3)):
        for task in range(num_tasks):
            buffer.add(task, make_path(task, 10 * task + number, length), **tables)
    return buffer


def draw(buffer, tasks, n, source="rl", seed=0):
    return buffer.sample(torch.as_tensor(tasks), n, torch.Generator().manual_seed(seed), source)


def assert_same_paths(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        for name in buffers.PATH_FIELDS:
            np.testing.assert_array_equal(a[name], b[name])


# ----- Replay buffer


def test_sampled_rows_are_whole_transitions_of_the_right_task():
    tasks = [2, 0, 2]
    data = draw(make_buffer(), tasks, 200)
    assert {name: tuple(x.shape) for name, x in data.items()} == {
        "obs": (3, 200, 4),
        "actions": (3, 200, 2),
        "rewards": (3, 200, 1),
        "next_obs": (3, 200, 4),
        "terminals": (3, 200, 1),
    }
    for row, task in enumerate(tasks):
        for i in range(200):
            _, number, step, _ = data["obs"][row, i].tolist()
            assert int(number) in range(10 * task, 10 * task + 3)
            path = make_path(task, int(number), (4, 1, 3)[int(number) % 10])
            t = int(step)
            for name, expected in (
                ("obs", path["obs"][t]), ("next_obs", path["obs"][t + 1]), ("actions", path["actions"][t]),
                ("rewards", path["rewards"][t]), ("terminals", path["terminals"][t]),
            ):  # fmt: skip
                np.testing.assert_array_equal(data[name][row, i].numpy(), np.atleast_1d(expected))


def test_every_transition_is_sampled_equally_often():
    n = 80_000
    rewards = draw(make_buffer(), [1], n)["rewards"].flatten().numpy()
    values, counts = np.unique(rewards, return_counts=True)
    assert len(values) == 8  # all transitions of task 1
    chi_square = ((counts - n / 8) ** 2 / (n / 8)).sum()
    assert chi_square < 24.3  # 99.9 % quantile with 7 degrees of freedom


def test_tasks_are_sampled_independently():
    data = draw(make_buffer(), [1, 1], 50)
    assert not torch.equal(data["rewards"][0], data["rewards"][1])
    assert torch.equal(data["rewards"], draw(make_buffer(), [1, 1], 50)["rewards"])  # and by the generator alone


def test_each_source_draws_from_its_own_transitions():
    buffer = ReplayBuffer(2, OBS, ACTION, 100)
    for task in (0, 1):
        buffer.add(task, make_path(task, 1, 3), context=False)
        buffer.add(task, make_path(task, 2, 3), rl=False)
        buffer.add(task, make_path(task, 3, 3))
    buffer.mark_offline()
    buffer.add(0, make_path(0, 4, 3))
    numbers = {s: set(draw(buffer, [0], 300, s)["obs"][0, :, 1].int().tolist()) for s in ("rl", "context", "offline")}
    assert numbers == {"rl": {1, 3, 4}, "context": {2, 3, 4}, "offline": {2, 3}}
    assert set(draw(buffer, [1], 300, "rl")["obs"][0, :, 1].int().tolist()) == {1, 3}
    assert buffer.used == 21  # a transition in both tables is stored once


def test_clear_context_empties_one_encoder_buffer_and_keeps_the_rest():
    buffer = make_buffer()
    buffer.clear_context(1)
    assert buffer.sizes["context"].tolist() == [8, 0, 8] and buffer.sizes["rl"].tolist() == [8, 8, 8]
    buffer.add(1, make_path(1, 99, 2))
    assert set(draw(buffer, [1], 100, "context")["obs"][0, :, 1].int().tolist()) == {99}
    assert set(draw(buffer, [1], 300, "rl")["obs"][0, :, 1].int().tolist()) == {10, 11, 12, 99}
    assert set(draw(buffer, [0], 300, "context")["obs"][0, :, 1].int().tolist()) == {0, 1, 2}


def test_a_full_buffer_says_so_and_stays_as_it_was():
    buffer = make_buffer(capacity=26)  # 24 of them used
    buffer.add(0, make_path(0, 7, 2))
    state = buffer.state_dict()
    with pytest.raises(IndexError, match="holds 26 transitions and is full"):
        buffer.add(0, make_path(0, 8, 1))
    assert buffer.used == 26 and all(torch.equal(buffer.sizes[k], v) for k, v in state["sizes"].items())


def test_paths_gives_the_trajectories_back():
    buffer = make_buffer()
    for task in range(3):
        expected = [make_path(task, 10 * task + number, length) for number, length in enumerate((4, 1, 3))]
        for where in ("first", "last"):
            assert_same_paths(buffer.paths(task, where, 8), expected)
            assert_same_paths(buffer.paths(task, where, 1000), expected)


def test_paths_may_begin_or_end_in_the_middle_of_a_trajectory():
    buffer, (a, b, c) = make_buffer(), [make_path(1, 10 + number, n) for number, n in enumerate((4, 1, 3))]

    def part(path, start, stop):
        rest = {name: path[name][start:stop] for name in ("actions", "rewards", "terminals")}
        return rest | {"obs": path["obs"][start : stop + 1]}

    assert_same_paths(buffer.paths(1, "first", 3), [part(a, 0, 3)])
    assert_same_paths(buffer.paths(1, "first", 7), [a, b, part(c, 0, 2)])
    assert_same_paths(buffer.paths(1, "last", 2), [part(c, 1, 3)])
    assert_same_paths(buffer.paths(1, "last", 6), [part(a, 2, 4), b, c])


def test_paths_of_the_encoder_buffer():
    buffer = make_buffer()
    buffer.add(0, make_path(0, 50, 2), rl=False)
    assert [len(p["actions"]) for p in buffer.paths(0, "last", 3, "context")] == [1, 2]
    assert [len(p["actions"]) for p in buffer.paths(0, "last", 3, "rl")] == [3]


def test_state_dict_round_trip(tmp_path):
    buffer = make_buffer()
    buffer.mark_offline()
    buffer.add(1, make_path(1, 40, 2), context=False)
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["fields"]["obs"]) == 26 and state["tables"]["rl"].shape == (3, 10)  # cut to what is used
    other = ReplayBuffer(3, OBS, ACTION, 40)  # a longer or shorter run has another capacity
    other.load_state_dict(state)
    for b in (buffer, other):
        b.add(2, make_path(2, 41, 5))
    for source in ("rl", "context", "offline"):
        ours, theirs = (draw(b, [0, 1, 2], 64, source) for b in (buffer, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_state_dict_is_a_copy():
    buffer = make_buffer()
    state = buffer.state_dict()
    buffer.fields["obs"].zero_()
    buffer.sizes["rl"].zero_()
    assert state["fields"]["obs"].any() and state["sizes"]["rl"].tolist() == [8, 8, 8]


@pytest.mark.parametrize("size", [1, 3, 7, 200, 65_537, 1_000_003, 8_388_607, 8_388_609, 16_777_215])
def test_the_largest_random_number_still_gives_an_index_in_range(size, monkeypatch):
    for drawn in (0.0, 1 - 2**-24):  # the smallest and the largest float32 in [0, 1) that torch.rand gives
        buffer = ReplayBuffer(1, 1, 1, 1)
        buffer.tables["rl"] = torch.zeros(1, size, dtype=torch.int32)
        buffer.sizes["rl"][0] = size
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, drawn))
        buffer.fields["obs"][0], buffer.tables["rl"][0, -1 if drawn else 0] = 5.0, 0
        assert draw(buffer, [0], 3)["obs"].flatten().tolist() == [5.0] * 3  # indexing would raise beyond the end
        index = (torch.rand(1, 1) * buffer.sizes["rl"][:, None]).long().item()
        assert index == 0 if not drawn else size - 2 <= index <= size - 1


# ----- Dataset files


def make_dataset(path, encoder=False, num_tasks=3, obs_dim=OBS):
    """A small valid PointDirection dataset; returns its trajectories."""
    lengths = (4, 1, 3)
    rl = [(task, make_path(task, 3 * task + i, n)) for i, n in enumerate(lengths) for task in range(num_tasks)]
    enc = [(task, make_path(task, 50 + task, 2)) for task in range(num_tasks)] if encoder else []
    tasks = envs.sample_tasks("PointDirection", num_tasks + 2)
    buffers.save_dataset(
        path, "PointDirection", tasks[:num_tasks], tasks[num_tasks:], rl, enc, "python make.py --seed 1"
    )
    return tasks, rl, enc


def load(path):
    return buffers.load_dataset(path, "PointDirection", SPEC)


def changed(path, **arrays):
    """Write the dataset again with some fields replaced, or left out where the value is None."""
    with np.load(path) as file:
        data = {name: file[name] for name in file.files} | arrays
    np.savez(path, **{name: value for name, value in data.items() if value is not None})


@pytest.mark.parametrize("encoder", [False, True])
def test_dataset_round_trip(tmp_path, encoder):
    tasks, rl, enc = make_dataset(tmp_path / "d.npz", encoder)
    loaded = load(tmp_path / "d.npz")
    np.testing.assert_array_equal(loaded["train_tasks"], tasks[:3])
    np.testing.assert_array_equal(loaded["test_tasks"], tasks[3:])
    assert loaded["command"] == "python make.py --seed 1"
    for part, expected in (("rl", rl), ("encoder", enc)):
        assert [task for task, _ in loaded[part]] == [task for task, _ in expected]
        assert_same_paths([path for _, path in loaded[part]], [path for _, path in expected])
    assert [file.name for file in tmp_path.iterdir()] == ["d.npz"]


@pytest.mark.parametrize("encoder", [False, True])
def test_filling_a_buffer_from_a_dataset(tmp_path, encoder):
    make_dataset(tmp_path / "d.npz", encoder)
    buffer = ReplayBuffer(3, OBS, ACTION, 30)
    buffers.fill_from_dataset(buffer, load(tmp_path / "d.npz"))
    assert buffer.used == 24 + 6 * encoder  # stored once where both buffers share it
    assert buffer.sizes["rl"].tolist() == [8] * 3
    assert buffer.sizes["context"].tolist() == buffer.sizes["offline"].tolist() == [2 if encoder else 8] * 3
    assert_same_paths(buffer.paths(1, "first", 99), [make_path(1, 3 + i, n) for i, n in enumerate((4, 1, 3))])
    numbers = set(draw(buffer, [1], 200, "offline")["obs"][0, :, 1].int().tolist())
    assert numbers == ({51} if encoder else {3, 4, 5})


def test_a_task_that_the_environment_does_not_know_is_refused(tmp_path):
    tasks, *_ = make_dataset(tmp_path / "d.npz")

    def set_task(task):
        if task == tasks[-1]:
            raise ValueError("there is no such task")

    with pytest.raises(InputError, match="d.npz: test_tasks: there is no such task"):
        buffers.load_dataset(tmp_path / "d.npz", "PointDirection", SPEC, set_task)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_dataset_is_valid(file):
    with np.load(file) as data:
        env_id = data["env_id"].item()
    spec = envs.SPECS[env_id]
    dataset = buffers.load_dataset(file, env_id, spec, envs.make(env_id).unwrapped.set_task)
    assert (len(dataset["train_tasks"]), len(dataset["test_tasks"])) == (spec.num_train_tasks, spec.num_test_tasks)
    tasks = envs.sample_tasks(env_id, spec.num_train_tasks + spec.num_test_tasks)
    np.testing.assert_allclose(np.concatenate([dataset["train_tasks"], dataset["test_tasks"]]), tasks)
    assert dataset["command"].startswith("python ")


def test_there_is_a_shipped_dataset():
    assert "PointDirection.npz" in [file.name for file in SHIPPED]


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


REFUSED = {  # name: (what is changed, given the file's fields; what the message must say)
    "missing field": (lambda d: dict(rl_rewards=None), r"rl_rewards is missing, expected float32 \(24,\)"),
    "other environment": (lambda d: dict(env_id=np.array("HopperParam")), "env_id is HopperParam, expected Point"),
    "other version": (lambda d: dict(format_version=np.array(2)), "format_version is 2, expected 1"),
    "version is an array": (lambda d: dict(format_version=np.array([1])), r"format_version is \[1\], expected 1"),
    "tasks of other dtype": (lambda d: dict(train_tasks=d["train_tasks"].astype("f4")), "is float32 .*, exp.* float64"),
    "tasks of other shape": (lambda d: dict(test_tasks=np.ones((2, 3))), r"is float64 \(2, 3\), expected .* \(2, 1\)"),
    "tasks are a vector": (lambda d: dict(train_tasks=np.ones(3)), r"is float64 \(3,\), expected float64 \(3, 1\)"),
    "no test task": (lambda d: dict(test_tasks=np.ones((0, 1))), r"is float64 \(0, 1\), expected float64 \(1, 1\)"),
    "tasks out of range": (lambda d: dict(train_tasks=d["train_tasks"] + 1e3), r"must lie in \[-100.0, 100.0\]"),
    "tasks with NaN": (lambda d: dict(test_tasks=np.array([[np.nan]])), "test_tasks is NaN or infinite"),
    "numbers of other dtype": (lambda d: dict(rl_tasks=d["rl_tasks"].astype("i8")), "rl_tasks is int64 .*, exp"),
    "lengths too many": (lambda d: dict(rl_lengths=np.append(d["rl_lengths"], np.int32(1))), r"rl_tasks is .* \(9,\)"),
    "obs of other dtype": (lambda d: dict(rl_obs=d["rl_obs"].astype("f8")), "rl_obs is float64 .*, expected float32"),
    "terminals of other dtype": (lambda d: dict(rl_terminals=d["rl_rewards"]), "rl_terminals is float32"),
    "obs of another env": (lambda d: dict(rl_obs=d["rl_obs"][:, :3]), r"rl_obs is .*3\), expected .*4\)"),
    "rewards too short": (lambda d: dict(rl_rewards=d["rl_rewards"][:-1]), r"float32 \(23,\), expected .*\(24,\)"),
    "NaN reward": (lambda d: dict(rl_rewards=with_value(d["rl_rewards"], 3, np.nan)), "rl_rewards is NaN or inf"),
    "infinite obs": (lambda d: dict(encoder_obs=with_value(d["encoder_obs"], 3, np.inf)), "encoder_obs is NaN or inf"),
    "action": (lambda d: dict(rl_actions=with_value(d["rl_actions"], 3, -1.01)), r"rl_actions must lie in \[-1, 1\]"),
    "task number": (lambda d: dict(rl_tasks=with_value(d["rl_tasks"], 2, 3)), r"rl_tasks within 0\.\.2"),
    "negative number": (lambda d: dict(encoder_tasks=with_value(d["encoder_tasks"], 2, -1)), r"encoder_tasks within 0"),
    "length 0": (lambda d: dict(rl_lengths=with_value(d["rl_lengths"], 2, 0)), "rl_lengths must be at least 1"),
    "huge lengths": (lambda d: dict(rl_lengths=np.full(9, 2**31 - 1, "i4")), r"rl_obs is .*, expected float32 \(193"),
    "task without data": (lambda d: dict(rl_tasks=d["rl_tasks"] % 2), "rl has no transition of task 2"),
    "task without context": (lambda d: dict(encoder_tasks=d["encoder_tasks"] % 2), "encoder has no transition of task"),
    "env id with a line break": (lambda d: dict(env_id=np.array("Point\nDirection")), "env_id is"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_dataset(tmp_path, case):
    make_dataset(tmp_path / "d.npz", encoder=True)
    with np.load(tmp_path / "d.npz") as file:
        data = {name: file[name] for name in file.files}
    change, message = REFUSED[case]
    changed(tmp_path / "d.npz", **change(data))
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "d.npz")
    assert "d.npz" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_missing_and_damaged_files(tmp_path):
    make_dataset(tmp_path / "d.npz")
    content = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "text.npz").write_text("not a dataset")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "folder.npz").mkdir()
    np.save(tmp_path / "array.npy", np.ones(3))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("hello.txt", "hello")
    for name, message in {
        "absent.npz": "there is no dataset at .*absent.npz", "folder.npz": "there is no dataset",
        "text.npz": "can not be read as a dataset", "empty.npz": "can not be read", "cut.npz": "can not be read",
        "array.npy": "can not be read", "zip.npz": "format_version is missing",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            load(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_dataset_can_not_run_code(tmp_path):
    make_dataset(tmp_path / "d.npz")
    pickle.loads(pickle.dumps(Hostile(tmp_path / "proof"))).close()
    assert (tmp_path / "proof").exists()  # the trap works
    for field in ("rl_obs", "env_id"):
        make_dataset(tmp_path / "d.npz")
        changed(tmp_path / "d.npz", **{field: np.array([Hostile(tmp_path / "created")], object)})
        with pytest.raises(InputError, match="can not be read as a dataset"):
            load(tmp_path / "d.npz")
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:  # a bare pickle where an array should be
        archive.writestr("format_version.npy", pickle.dumps(Hostile(tmp_path / "created")))
    with pytest.raises(InputError):
        load(tmp_path / "raw.npz")
    assert not (tmp_path / "created").exists()


def test_a_file_that_declares_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    make_dataset(tmp_path / "d.npz")
    changed(tmp_path / "d.npz", more=np.zeros(100_000))
    load(tmp_path / "d.npz")
    monkeypatch.setattr(buffers, "MAX_BYTES", 100_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(InputError, match="declares 8.* bytes, more than the 100000 allowed"):
        load(tmp_path / "d.npz")


def test_an_array_that_declares_more_than_it_holds_is_refused(tmp_path):
    make_dataset(tmp_path / "d.npz")
    changed(tmp_path / "d.npz", rl_rewards=None)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**14,)})
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("rl_rewards.npy", header.getvalue())
    with pytest.raises(InputError, match="can not be read as a dataset"):
        load(tmp_path / "d.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    make_dataset(tmp_path / "d.npz")
    before = (tmp_path / "d.npz").read_bytes()
    monkeypatch.setattr(np, "savez_compressed", lambda file, **_: (file.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        make_dataset(tmp_path / "d.npz", encoder=True)
    assert (tmp_path / "d.npz").read_bytes() == before


@pytest.mark.parametrize("seed", range(3))
def test_damage_never_causes_anything_but_one_clear_sentence(tmp_path, seed):
    """Flipped bits, overwritten bytes and cuts: the file loads or is refused, quickly."""
    rng, refused = np.random.default_rng(seed), 0
    make_dataset(tmp_path / "good.npz", encoder=True)
    if seed == 2:
        changed(tmp_path / "good.npz")  # uncompressed: the damage reaches the arrays' headers
    good = (tmp_path / "good.npz").read_bytes()
    for _ in range(60):
        bad = bytearray(good)
        kind = rng.integers(4)
        for at in rng.integers(0, len(bad), rng.integers(1, 5)):
            if kind == 0:
                bad[at] ^= 1 << rng.integers(8)
            if kind == 1:
                bad[at] = rng.integers(256)
        if kind == 2:
            bad = bad[: rng.integers(len(bad))]
        if kind == 3:
            at = len(bad) - 1 - rng.integers(1200)  # the directory at the end of the archive
            bad[at] ^= 1 << rng.integers(8)
        (tmp_path / "bad.npz").write_bytes(bad)
        start = time.time()
        try:
            load(tmp_path / "bad.npz")
        except InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and re.search("bad.npz", str(error))
        assert time.time() - start < 10
    assert refused > 20 and sorted(os.listdir(tmp_path)) == ["bad.npz", "good.npz"]
