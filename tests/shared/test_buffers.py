"""The replay buffer, and the dataset file: what comes in goes out again, and what is damaged or hostile is refused."""

import hashlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import envs
import plumbing.files
from buffers import InputError, ReplayBuffer
from plumbing.files import PATH_FIELDS, read_npz, write_file

OBS, ACTION = 4, 2  # those of PointDirection
SPEC = envs.SPECS["PointDirection"]
SHIPPED = sorted((Path(buffers.__file__).parent / "datasets").glob("*.npz"))


def make_path(task, number, length):
    """A trajectory unlike all others: obs[:, 0] is the task, obs[:, 1] the trajectory's number, obs[:, 2] time."""
    steps = np.arange(length + 1)
    obs = np.stack(
        [np.full(length + 1, task), np.full(length + 1, number), steps, -steps], 1
    ).astype(np.float32)
    actions = np.stack([np.full(length, 0.01 * number), steps[:-1] / 1000], 1).astype(np.float32)
    terminals = np.arange(length) == length - 1 if number % 2 else np.zeros(length, bool)
    return dict(
        obs=obs,
        actions=actions,
        rewards=(100 * number + steps[:-1]).astype(np.float32),
        terminals=terminals,
    )


def make_buffer(num_tasks=3, capacity=100, **lists):
    """Task t has the trajectories 10 t + 0, 1, 2 of lengths 4, 1 and 3."""
    buffer = ReplayBuffer(num_tasks, OBS, ACTION, capacity)
    for number, length in enumerate((4, 1, 3)):
        for task in range(num_tasks):
            buffer.add(task, make_path(task, 10 * task + number, length), **lists)
    return buffer


def draw(buffer, tasks, n, source="rl", seed=0):
    return buffer.sample(torch.as_tensor(tasks), n, torch.Generator().manual_seed(seed), source)


def assert_same_paths(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        for name in PATH_FIELDS:
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
    assert torch.equal(
        data["rewards"], draw(make_buffer(), [1, 1], 50)["rewards"]
    )  # and by the generator alone


def test_each_source_draws_from_its_own_transitions():
    buffer = ReplayBuffer(2, OBS, ACTION, 100)
    for task in (0, 1):
        buffer.add(task, make_path(task, 1, 3), encoder=False)
        buffer.extend([(task, make_path(task, 2, 3))], rl=False)
        buffer.add(task, make_path(task, 3, 3))
    buffer.mark_offline()
    buffer.add(0, make_path(0, 4, 3))
    numbers = {
        s: set(draw(buffer, [0], 300, s)["obs"][0, :, 1].int().tolist())
        for s in ("rl", "encoder", "offline")
    }
    assert numbers == {"rl": {1, 3, 4}, "encoder": {2, 3, 4}, "offline": {2, 3}}
    assert set(draw(buffer, [1], 300, "rl")["obs"][0, :, 1].int().tolist()) == {1, 3}
    assert buffer.used == 21  # a transition in both lists is stored once


def test_clear_encoder_empties_one_encoder_buffer_and_keeps_the_rest():
    buffer = make_buffer()
    buffer.clear_encoder(1)
    assert buffer.sizes["encoder"].tolist() == [8, 0, 8] and buffer.sizes["rl"].tolist() == [
        8,
        8,
        8,
    ]
    buffer.add(1, make_path(1, 99, 2))
    assert set(draw(buffer, [1], 100, "encoder")["obs"][0, :, 1].int().tolist()) == {99}
    assert set(draw(buffer, [1], 300, "rl")["obs"][0, :, 1].int().tolist()) == {10, 11, 12, 99}
    assert set(draw(buffer, [0], 300, "encoder")["obs"][0, :, 1].int().tolist()) == {0, 1, 2}


def test_a_full_buffer_says_so_and_stays_as_it_was():
    buffer = make_buffer(capacity=26)  # 24 of them used
    buffer.add(0, make_path(0, 7, 2))
    state = buffer.state_dict()
    with pytest.raises(IndexError, match="holds 26 transitions and is full"):
        buffer.add(0, make_path(0, 8, 1))
    assert buffer.used == 26 and all(
        torch.equal(buffer.sizes[k], v) for k, v in state["sizes"].items()
    )


def test_paths_gives_the_trajectories_back():
    buffer = make_buffer()
    for task in range(3):
        expected = [
            make_path(task, 10 * task + number, length) for number, length in enumerate((4, 1, 3))
        ]
        for where in ("first", "last"):
            assert_same_paths(buffer.paths(task, where, 8), expected)
            assert_same_paths(buffer.paths(task, where, 1000), expected)


def test_paths_may_begin_or_end_in_the_middle_of_a_trajectory():
    buffer, (a, b, c) = (
        make_buffer(),
        [make_path(1, 10 + number, n) for number, n in enumerate((4, 1, 3))],
    )

    def part(path, start, stop):
        rest = {name: path[name][start:stop] for name in ("actions", "rewards", "terminals")}
        return rest | {"obs": path["obs"][start : stop + 1]}

    assert_same_paths(buffer.paths(1, "first", 3), [part(a, 0, 3)])
    assert_same_paths(buffer.paths(1, "first", 7), [a, b, part(c, 0, 2)])
    assert_same_paths(buffer.paths(1, "last", 2), [part(c, 1, 3)])
    assert_same_paths(buffer.paths(1, "last", 6), [part(a, 2, 4), b, c])


def test_paths_of_the_encoder_buffer():
    buffer = make_buffer()
    buffer.extend([(0, make_path(0, 50, 2))], rl=False)
    assert [len(p["actions"]) for p in buffer.paths(0, "last", 3, "encoder")] == [1, 2]
    assert [len(p["actions"]) for p in buffer.paths(0, "last", 3, "rl")] == [3]


def test_join_makes_columns_of_trajectories():
    paths = [make_path(1, 7, 2), make_path(2, 8, 1)]
    columns = buffers.join(paths)
    assert {name: x.dtype for name, x in columns.items()} == dict.fromkeys(columns, torch.float32)
    assert columns["obs"].tolist() == [[1, 7, 0, 0], [1, 7, 1, -1], [2, 8, 0, 0]]
    assert columns["next_obs"].tolist() == [[1, 7, 1, -1], [1, 7, 2, -2], [2, 8, 1, -1]]
    assert columns["rewards"].tolist() == [[700], [701], [800]]
    assert columns["terminals"].tolist() == [[0], [1], [0]]
    assert columns["actions"].shape == (3, 2)
    unread = [{name: path[name] for name in ("obs", "actions", "terminals")} for path in paths]
    assert buffers.join(unread).keys() == {"obs", "next_obs", "actions", "terminals"}


def test_extend_is_add_of_each():
    entries = [
        (task, make_path(task, number, length))
        for task, number, length in ((1, 5, 3), (0, 6, 1), (1, 7, 2))
    ]
    one, each = ReplayBuffer(2, OBS, ACTION, 20), ReplayBuffer(2, OBS, ACTION, 20)
    one.extend(entries, encoder=False)
    for entry in entries:
        each.add(*entry, encoder=False)
    for task, expected in ((0, [entries[1][1]]), (1, [entries[0][1], entries[2][1]])):
        assert_same_paths(one.paths(task, "first", 20), expected)
        assert_same_paths(each.paths(task, "first", 20), expected)
    assert one.sizes["encoder"].tolist() == [0, 0] and one.used == 6


def test_memory_grows_with_the_transitions_and_not_with_the_tasks():
    buffer = ReplayBuffer(10_000, OBS, ACTION, 1000)
    tensors = [
        *buffer.fields.values(),
        *buffer.index.values(),
        *buffer.starts.values(),
        *buffer.sizes.values(),
    ]
    # 12 numbers and two lists of four indices for each transition; five numbers of 8 bytes for each task
    assert (
        sum(x.numel() * x.element_size() for x in tensors)
        == 1000 * (4 * 12 + 2 * 4 * 4) + 10_000 * 5 * 8
    )


def test_a_buffer_that_can_not_be_is_refused():
    for capacity in (10**15, 10**30):
        with pytest.raises(
            InputError, match=f"a replay buffer for {capacity} transitions does not fit into memory"
        ):
            ReplayBuffer(3, OBS, ACTION, capacity)


def test_state_dict_round_trip():
    buffer = make_buffer()
    buffer.mark_offline()
    buffer.add(1, make_path(1, 40, 2), encoder=False)
    state = buffer.state_dict()
    assert len(state["fields"]["obs"]) == 26  # cut to what is used
    assert {name: len(listed) for name, listed in state["index"].items()} == {
        "rl": 26,
        "encoder": 24,
    }
    other = ReplayBuffer(3, OBS, ACTION, 40)  # a longer or shorter run has another capacity
    other.load_state_dict(state)
    for b in (buffer, other):
        b.add(2, make_path(2, 41, 5))
        b.add(0, make_path(0, 42, 1))
    for source in ("rl", "encoder", "offline"):
        ours, theirs = (draw(b, [0, 1, 2], 64, source) for b in (buffer, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_same_paths(other.paths(2, "last", 5), [make_path(2, 41, 5)])


def rows(state, name):
    return state["fields"][name].clone()


OUTSIDE = "sizes.{}, or its index, points outside of 24 transitions"
SPOILED = [  # (what the message says, how the state of `make_buffer` is changed)
    ("has .26. transitions, expected at most 25",
     lambda s: s["fields"].update({name: torch.cat([x, x[:2]]) for name, x in s["fields"].items()})),
    ("has .23, 24. transitions", lambda s: s["fields"].update(rewards=s["fields"]["rewards"][1:])),
    (OUTSIDE.format("rl"), lambda s: s["sizes"].update(rl=torch.tensor([8, 8, 9]))),
    (OUTSIDE.format("rl"), lambda s: s["sizes"].update(rl=torch.tensor([-8, 16, 16]))),
    (OUTSIDE.format("rl"), lambda s: s["index"]["rl"].__setitem__(3, 24)),
    (OUTSIDE.format("rl"), lambda s: s["index"]["rl"].__setitem__(3, -1)),
    (OUTSIDE.format("rl"), lambda s: (  # each twice
        s["index"].update(rl=s["index"]["rl"].repeat(2)), s["sizes"].update(rl=torch.tensor([16, 16, 16])))),
    (OUTSIDE.format("encoder"), lambda s: s["index"].update(encoder=s["index"]["encoder"][1:])),
    (OUTSIDE.format("offline"), lambda s: s["sizes"].update(offline=torch.tensor([9, 7, 8]))),
]  # fmt: skip


@pytest.mark.parametrize("message, change", SPOILED)
def test_a_state_that_no_buffer_has_is_refused(message, change):
    buffer = make_buffer(capacity=25)
    buffer.mark_offline()
    state = {name: dict(part) for name, part in buffer.state_dict().items()}
    state["index"] = {name: listed.clone() for name, listed in state["index"].items()}
    change(state)
    with pytest.raises(InputError, match=message):
        ReplayBuffer(3, OBS, ACTION, 25).load_state_dict(state)


def test_a_state_must_begin_with_what_is_there():
    state = make_buffer().state_dict()
    buffer = ReplayBuffer(3, OBS, ACTION, 100)
    buffer.add(0, make_path(0, 0, 4))
    buffer.load_state_dict(state)
    assert buffer.used == 24
    other = ReplayBuffer(3, OBS, ACTION, 100)
    other.add(0, make_path(0, 0, 4) | {"rewards": np.array([0, 1, 2, 4], np.float32)})
    with pytest.raises(InputError, match="begins with other rewards than the dataset"):
        other.load_state_dict(state)
    with pytest.raises(InputError, match="has .24. transitions"):  # fewer than there are
        make_buffer(num_tasks=4).load_state_dict(state)


@pytest.mark.parametrize(
    "size", [1, 3, 7, 200, 65_537, 1_000_003, 8_388_607, 8_388_609, 16_777_215]
)
def test_the_largest_random_number_still_gives_an_index_in_range(size, monkeypatch):
    for drawn, first, last in ((0.0, 0, 0), (1 - 2**-24, max(0, size - 2), size - 1)):
        # The smallest and the largest float32 in [0, 1) that torch.rand gives; transition i has reward i
        buffer = ReplayBuffer(1, 1, 1, 1)
        buffer.index["rl"] = torch.arange(size, dtype=torch.int32)
        buffer.fields = {"rewards": torch.arange(size, dtype=torch.float64)[:, None]}
        buffer.sizes["rl"][0] = size
        monkeypatch.setattr(
            torch, "rand", lambda *shape, drawn=drawn, **_: torch.full(shape, drawn)
        )
        found = (
            draw(buffer, [0], 3)["rewards"].flatten().tolist()
        )  # indexing would raise beyond the end
        assert len(set(found)) == 1 and first <= found[0] <= last


def test_an_empty_list_gives_something_and_no_error():
    buffer = ReplayBuffer(2, OBS, ACTION, 10)
    buffer.add(0, make_path(0, 3, 2))
    assert draw(buffer, [1], 4)["obs"][0].tolist() == 4 * [
        [0, 3, 0, 0]
    ]  # the first transition there is


# ----- Dataset files


def make_dataset(path, encoder=False, num_tasks=3, command="python make.py --seed 1"):
    """A small valid PointDirection dataset; returns its tasks and trajectories."""
    lengths = (4, 1, 3)
    rl = [
        (task, make_path(task, 3 * task + i, n))
        for i, n in enumerate(lengths)
        for task in range(num_tasks)
    ]
    enc = [(task, make_path(task, 50 + task, 2)) for task in range(num_tasks)] if encoder else []
    tasks = envs.sample_tasks("PointDirection", num_tasks + 2)
    buffers.save_dataset(
        path, "PointDirection", tasks[:num_tasks], tasks[num_tasks:], rl, enc, command
    )
    return tasks, rl, enc


def load(path):
    return buffers.load_dataset("PointDirection", path)


def fields(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def changed(path, **arrays):
    """Write the dataset again with some fields replaced, or left out where the value is None."""
    data = fields(path) | arrays
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
    assert sorted(os.listdir(tmp_path)) == ["d.json", "d.npz"]


@pytest.mark.parametrize("encoder", [False, True])
def test_a_buffer_from_a_dataset(tmp_path, encoder):
    make_dataset(tmp_path / "d.npz", encoder)
    buffer = buffers.from_dataset(
        load(tmp_path / "d.npz"), "PointDirection", more_tasks=1, more_steps=10
    )
    assert buffer.used == 24 + 6 * encoder  # stored once where both buffers share it
    assert buffer.capacity == buffer.used + 10
    assert buffer.sizes["rl"].tolist() == [8] * 3 + [0]
    assert buffer.sizes["encoder"].tolist() == [2 if encoder else 8] * 3 + [0]
    assert buffer.sizes["offline"].tolist() == [2 if encoder else 8] * 3 + [0]
    assert_same_paths(
        buffer.paths(1, "first", 99), [make_path(1, 3 + i, n) for i, n in enumerate((4, 1, 3))]
    )
    numbers = set(draw(buffer, [1], 200, "offline")["obs"][0, :, 1].int().tolist())
    assert numbers == ({51} if encoder else {3, 4, 5})
    buffer.add(1, make_path(1, 99, 10))
    offline = (
        [make_path(1, 51, 2)]
        if encoder
        else [make_path(1, 3 + i, n) for i, n in enumerate((4, 1, 3))]
    )
    assert_same_paths(buffer.offline_paths(1), offline)


def test_the_hash_is_of_what_a_dataset_says_and_not_of_its_file(tmp_path):
    make_dataset(tmp_path / "d.npz", encoder=True)
    digest = load(tmp_path / "d.npz")["sha256"]
    whole = fields(tmp_path / "d.npz")
    changed(tmp_path / "d.npz")  # the same, not compressed
    assert load(tmp_path / "d.npz")["sha256"] == digest
    changed(
        tmp_path / "d.npz",
        more=np.zeros(100),
        **{name: np.asfortranarray(x) for name, x in whole.items() if x.ndim},
    )
    assert load(tmp_path / "d.npz")["sha256"] == digest
    expected = hashlib.sha256()
    for name in sorted(whole):
        expected.update(
            f"{name} {whole[name].dtype} {whole[name].shape}".encode() + whole[name].tobytes()
        )
    assert digest == expected.hexdigest()
    others = {  # all that a dataset consists of
        "train_tasks": whole["train_tasks"][::-1], "test_tasks": whole["test_tasks"][::-1],
        "rl_tasks": 2 - whole["rl_tasks"],
        "rl_terminals": with_value(whole["rl_terminals"], -1, not whole["rl_terminals"][-1]),
        "encoder_rewards": whole["encoder_rewards"] + 1, "rl_obs": whole["rl_obs"] * 2,
        "encoder_lengths": whole["encoder_lengths"][::-1], "rl_actions": -whole["rl_actions"],
        "command": np.array("python other.py"),
    }  # fmt: skip
    for name, array in others.items():
        np.savez(tmp_path / "other.npz", **whole | {name: array})
        same = np.array_equal(array, whole[name])
        assert (load(tmp_path / "other.npz")["sha256"] == digest) == same, name
    assert not np.array_equal(others["rl_tasks"], whole["rl_tasks"])


def test_what_save_dataset_writes_is_read_whatever_its_order_and_size(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = {"obs": rng.normal(size=(4, 9)).T, "actions": rng.uniform(-1, 1, (2, 8)).T}  # by columns
    path |= {"rewards": rng.normal(size=8), "terminals": np.zeros(8)}
    tasks = envs.sample_tasks("PointDirection", 3)
    for room in (1 << 27, 100):
        monkeypatch.setattr(plumbing.files, "MAX_UNPACKED", room)
        buffers.save_dataset(
            tmp_path / "d.npz", "PointDirection", tasks[:1], tasks[1:], [(0, path)], [], "x"
        )
        ((task, found),) = load(tmp_path / "d.npz")["rl"]
        for name in path:
            np.testing.assert_array_equal(found[name], path[name].astype(found[name].dtype))
        with zipfile.ZipFile(
            tmp_path / "d.npz"
        ) as archive:  # what is too large to be unpacked is not packed
            assert {info.compress_type for info in archive.infolist()} == {8 if room > 100 else 0}


def test_a_dataset_is_written_where_the_flag_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_dataset("~/d.npz")
    assert len(load("~/d.npz")["rl"]) == len(load(tmp_path / "d.npz")["rl"]) == 9


def test_save_dataset_refuses_what_load_dataset_would(tmp_path):
    tasks, rl, _ = make_dataset(tmp_path / "d.npz")
    for entries, message in (
        (rl[:2], "rl has no transition of task 2"),
        (
            [(0, path | {"actions": path["actions"] + 2}) for _, path in rl],
            r"rl_actions must lie in \[-1, 1\]",
        ),
        (
            [(0, path | {"obs": path["obs"][:-1]}) for _, path in rl],
            r"rl\[0\]: obs is \(4, 4\), expected \(5, 4\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            buffers.save_dataset(
                tmp_path / "e.npz", "PointDirection", tasks[:3], tasks[3:], entries, [], "x"
            )
    assert not (tmp_path / "e.npz").exists()


def test_a_task_that_the_environment_does_not_know_is_refused(tmp_path, monkeypatch):
    tasks, *_ = make_dataset(tmp_path / "d.npz")

    def set_task(env, task):
        if task == tasks[-1]:
            raise ValueError("there is no such task")

    monkeypatch.setattr(envs.PointDirection, "set_task", set_task)
    with pytest.raises(InputError, match="d.npz: test_tasks: there is no such task"):
        load(tmp_path / "d.npz")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_dataset_is_valid(file, capsys, monkeypatch):
    with np.load(file) as data:
        env_id = data["env_id"].item()
    if env_id.startswith("Sawyer"):
        pytest.importorskip("pybullet")
    spec = envs.SPECS[env_id]
    dataset = buffers.load_dataset(env_id, file)
    assert not capsys.readouterr().err  # no test task is a training task
    tasks = envs.sample_tasks(env_id, spec.num_train_tasks + spec.num_test_tasks)
    train_tasks, test_tasks = np.split(tasks, [spec.num_train_tasks])
    if env_id.startswith("Sawyer"):  # SawyerManipulation200 has other tasks
        monkeypatch.syspath_prepend(str(file.parent))
        import make_sawyer

        number = int(file.stem.removeprefix(env_id) or 0)
        train_tasks, test_tasks = make_sawyer.draw_tasks(env_id, number)
    np.testing.assert_allclose(dataset["train_tasks"], train_tasks)
    np.testing.assert_allclose(dataset["test_tasks"], test_tasks)
    assert dataset["command"].startswith("python ")


def test_a_test_task_that_is_trained_on_is_warned_of(tmp_path, capsys):
    dataset = buffers.load_dataset("PointDirection")
    train_tasks = dataset["train_tasks"]
    test_tasks = np.concatenate([train_tasks[[3]], dataset["test_tasks"]])
    file = tmp_path / "d.npz"
    paths = dataset["rl"], dataset["encoder"]
    buffers.save_dataset(file, "PointDirection", train_tasks, test_tasks, *paths, "python test")
    load(file)
    assert "warning: 1 of 21 test tasks" in capsys.readouterr().err


def test_there_is_a_shipped_dataset():
    assert "PointDirection.npz" in [file.name for file in SHIPPED]
    assert len(buffers.load_dataset("PointDirection")["rl"]) == 300  # found without a path


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


REFUSED = {  # name: (what is changed, given the file's fields; what the message must say)
    "missing field": (lambda d: dict(rl_rewards=None), "rl_rewards is missing"),
    "other environment": (lambda d: dict(env_id=np.array("HopperParam")), "env_id is HopperParam, expected Point"),
    "other version": (lambda d: dict(format_version=np.array(2)), "format_version is 2, expected 1"),
    "version is an array": (lambda d: dict(format_version=np.array([1])), r"is int64 \(1,\), expected int64 \(\)"),
    "tasks of other dtype": (lambda d: dict(train_tasks=d["train_tasks"].astype("f4")), "is float32 .*, exp.* float64"),
    "tasks of other shape": (lambda d: dict(test_tasks=np.ones((2, 3))), r"is float64 \(2, 3\), .* \(any number, 1\)"),
    "tasks are a vector": (lambda d: dict(train_tasks=np.ones(3)), r"is float64 \(3,\), .* float64 \(any number, 1\)"),
    "no test task": (lambda d: dict(test_tasks=np.ones((0, 1))), "test_tasks must hold a task at least"),
    "too many tasks": (lambda d: dict(test_tasks=np.ones((10_001, 1))), "test_tasks has 10001 .*, expected at most"),
    "tasks out of range": (lambda d: dict(train_tasks=d["train_tasks"] + 1e3), r"numbers in \[-100.0, 100.0\]"),
    "tasks with NaN": (lambda d: dict(test_tasks=np.array([[np.nan]])), "test_tasks is NaN or infinite"),
    "numbers of other dtype": (lambda d: dict(rl_tasks=d["rl_tasks"].astype("i8")), "rl_tasks is int64 .*, exp"),
    "lengths too many": (lambda d: dict(rl_lengths=np.append(d["rl_lengths"], np.int32(1))), "_tasks has 9 .* has 10"),
    "too many paths": (lambda d: dict(rl_lengths=np.ones(50_001, "i4")), "rl_lengths has 50001 .*, expected at most"),
    "obs of other dtype": (lambda d: dict(rl_obs=d["rl_obs"].astype("f8")), "rl_obs is float64 .*, expected float32"),
    "terminals of other dtype": (lambda d: dict(rl_terminals=d["rl_rewards"]), "rl_terminals is float32"),
    "obs of another env": (lambda d: dict(rl_obs=d["rl_obs"][:, :3]), r"rl_obs is .*3\), expected .*4\)"),
    "rewards too short": (lambda d: dict(rl_rewards=d["rl_rewards"][:-1]), "rl_rewards has 23 rows, expected 24"),
    "NaN reward": (lambda d: dict(rl_rewards=with_value(d["rl_rewards"], 3, np.nan)), "rl_rewards is NaN or inf"),
    "infinite obs": (lambda d: dict(encoder_obs=with_value(d["encoder_obs"], 3, np.inf)), "encoder_obs is NaN or inf"),
    "action": (lambda d: dict(rl_actions=with_value(d["rl_actions"], 3, -1.01)), r"rl_actions must lie in \[-1, 1\]"),
    "task number": (lambda d: dict(rl_tasks=with_value(d["rl_tasks"], 2, 3)), r"rl_tasks must lie within 0\.\.2"),
    "negative number": (lambda d: dict(encoder_tasks=with_value(d["encoder_tasks"], 2, -1)), "encoder_tasks must"),
    "length 0": (lambda d: dict(rl_lengths=with_value(d["rl_lengths"], 2, 0)), r"rl_lengths must lie within 1\.\.1200"),
    "huge lengths": (lambda d: dict(rl_lengths=np.full(9, 2**31 - 1, "i4")), r"rl_lengths must lie within 1\.\.1200"),
    "task without data": (lambda d: dict(rl_tasks=d["rl_tasks"] % 2), "rl has no transition of task 2"),
    "task without context": (lambda d: dict(encoder_tasks=d["encoder_tasks"] % 2), "encoder has no transition of task"),
    "env id with a line break": (lambda d: dict(env_id=np.array("Point\nDirection")), "env_id is Point Direction"),
    "env id for the terminal": (lambda d: dict(env_id=np.array("\x1b[31mX")), r"env_id is \?\[31mX, expected"),
    "two episodes in one": (lambda d: dict(rl_terminals=with_value(d["rl_terminals"], 0, True)), "true inside of a traj"),
    "a long command": (lambda d: dict(command=np.array("x" * 10_001)), "command has 10001 entries, expected at most"),
    "no text": (lambda d: dict(command=np.array(1)), r"command is int64 \(\), expected text"),
    "no data": (lambda d: {f"rl_{n}": d[f"rl_{n}"][:0] for n in (*PATH_FIELDS, "tasks", "lengths")}, "no tran"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_dataset(tmp_path, case):
    make_dataset(tmp_path / "d.npz", encoder=True)
    change, message = REFUSED[case]
    changed(tmp_path / "d.npz", **change(fields(tmp_path / "d.npz")))
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "d.npz")
    assert "d.npz" in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("command", ["x" * 10_001, None, 5])
def test_a_command_that_no_dataset_can_hold(tmp_path, command):
    with pytest.raises(InputError, match="command must be text of at most 10000 characters"):
        buffers.save_dataset(tmp_path / "d.npz", "PointDirection", [], [], [], [], command)


def test_missing_and_damaged_files(tmp_path):
    make_dataset(tmp_path / "d.npz")
    content = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "text.npz").write_text("not a dataset")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    os.mkfifo(tmp_path / "fifo.npz")  # reading it would wait for ever
    np.save(tmp_path / "array.npy", np.ones(3))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("hello.txt", "hello")
    for name, message in {
        "absent.npz": "there is no dataset at .*absent.npz", "folder.npz": "there is no dataset",
        "loop.npz": "there is no dataset", "fifo.npz": "there is no dataset", "a/" * 3000: "there is no dataset",
        "~nobody_of_this_name/d.npz": "there is no dataset",
        "text.npz": "text.npz cannot be read: it is no .npz file", "empty.npz": "cannot be read: it is no .npz",
        "cut.npz": "cannot be read", "array.npy": "cannot be read", "zip.npz": "hello.txt is no plain array",
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
        with pytest.raises(InputError, match=f"cannot be read: {field} is no plain array"):
            load(tmp_path / "d.npz")
    with zipfile.ZipFile(
        tmp_path / "raw.npz", "w"
    ) as archive:  # a bare pickle where an array should be
        archive.writestr("format_version.npy", pickle.dumps(Hostile(tmp_path / "created")))
    with pytest.raises(InputError):
        load(tmp_path / "raw.npz")
    assert not (tmp_path / "created").exists()


def test_a_file_that_declares_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    make_dataset(tmp_path / "d.npz")
    np.savez_compressed(tmp_path / "d.npz", **fields(tmp_path / "d.npz"), more=np.zeros(100_000))
    load(tmp_path / "d.npz")
    monkeypatch.setattr(plumbing.files, "MAX_UNPACKED", 800_000)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match="cannot be read: its arrays are too large"):
        load(tmp_path / "d.npz")


def test_an_array_that_declares_more_than_it_holds_is_refused(tmp_path):
    make_dataset(tmp_path / "d.npz")
    changed(tmp_path / "d.npz", rl_rewards=None)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**14,)}
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("rl_rewards.npy", header.getvalue())
    with pytest.raises(InputError, match="rl_rewards has another size than it says"):
        load(tmp_path / "d.npz")


ARRAYS = [
    np.array("ab\u00e9"),
    np.array(""),
    np.array(1.5),
    np.arange(6).reshape(1, 2, 1, 3),
    np.zeros((0, 4), "f4"),
]
ARRAYS += [
    np.array([True, False]),
    np.arange(6, dtype="u1").reshape(2, 3).T,
    np.zeros((2, 3), "i4"),
]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype} {array.shape}")
def test_the_reader_gives_what_numpy_wrote(tmp_path, array, save):
    save(tmp_path / "a.npz", a=array, b=np.ones(3))
    seen = []
    found = read_npz(tmp_path / "a.npz", lambda *which: seen.append(which) or which[0] == "a")
    assert seen == [("a", array.dtype, array.shape), ("b", np.ones(3).dtype, (3,))] and list(
        found
    ) == ["a"]
    if array.dtype.kind == "U":
        assert found["a"] == array.item()
    else:
        assert found["a"].dtype == array.dtype and found["a"].flags.writeable
        np.testing.assert_array_equal(found["a"], array, strict=True)


def test_a_file_of_more_than_4_gb_has_one_record_more(tmp_path):
    """Its numbers of 64 bits stand before the end of the archive; here they are small."""
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    content = (tmp_path / "a.npz").read_bytes()
    at, table = content.rindex(b"PK\5\6"), content.index(b"PK\1\2")
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, at - table, table)
    end = b"PK\5\6" + bytes(4) + 2 * b"\xff\xff" + 2 * b"\xff\xff\xff\xff" + bytes(2)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    (tmp_path / "a.npz").write_bytes(content[:at] + record + locator + end)
    found = read_npz(tmp_path / "a.npz", lambda *_: True)
    assert found["a"].tolist() == [0, 1, 2]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_file(tmp_path / "file", fail)
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "target")
    write_file(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new" and (
        tmp_path / "target"
    ).read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "target"]


def test_a_trajectory_without_rewards_is_no_data():
    buffer, path = buffers.ReplayBuffer(1, 4, 2, 10), make_path(0, 0, 3)
    del path["rewards"]
    with pytest.raises(KeyError, match="rewards"):
        buffer.add(0, path)
    assert buffer.used == 0
