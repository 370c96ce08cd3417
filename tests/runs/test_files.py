"""Files: what is replaced and what is refused; trajectories that no dataset holds; provenance."""

import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest

import buffers
import envs
from buffers import InputError
from plumbing.files import check_replaceable, write_file
from plumbing.provenance import description_file, returns_by_task

ROOT = Path(__file__).resolve().parents[2]


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_link(path):
    path.with_name("target").write_bytes(b"precious")
    path.symlink_to(path.with_name("target"))


def make_dangling_link(path):
    path.symlink_to(path.with_name("nowhere"))


def make_folder(path):
    path.mkdir()


ODD = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a link": make_link,
    "a link to nothing": make_dangling_link,
    "a folder": make_folder,
}


@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_are_replaced(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path = Path("x")
    ODD[kind](path)
    before = os.lstat(path)
    expected = f"^x is {kind.removesuffix(' to nothing')}, and only a regular file is replaced$"
    with pytest.raises(InputError, match=expected):
        write_file(path, lambda file: file.write(b"new"))
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not Path("x.tmp").exists() and not Path("nowhere").exists()
    assert kind != "a link" or Path("target").read_bytes() == b"precious"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_devices_stay(path):
    with pytest.raises(InputError, match=f"^{path} is a device"):
        check_replaceable(path)


def test_regular_files_and_new_names_are_written(tmp_path):
    for content in (b"first", b"second"):
        write_file(tmp_path / "x", lambda file, content=content: file.write(content))
        assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("flag", ["--save-dataset", "--out", "--video"])
def test_flags_that_name_what_is_no_file_are_refused_before_anything_is_played(flag, tmp_path):
    import pearl_online_oracle as pearl
    from benchmark import film, watch
    from plumbing.flags import check_flags

    path = tmp_path / "film.gif"
    make_pipe(path)  # reading it would not end
    with pytest.raises(InputError, match="film.gif is a pipe"):
        if flag == "--save-dataset":
            check_flags(pearl.Args(save_dataset=str(path)))
        elif flag == "--video":
            film.check_file(path)
        else:
            watch.main(watch.Args(tmp_path / "no agent", episodes=2, out=path))


# ----- What no dataset holds


def entry(task=0, **changes):
    path = {
        "obs": np.zeros((3, 4)),
        "actions": np.zeros((2, 2)),
        "rewards": np.zeros(2),
        "terminals": np.zeros(2, bool),
    }
    return task, path | changes


def without(name):
    task, path = entry()
    del path[name]
    return task, path


BAD = {
    "no trajectory": ([], "rl has no trajectory"),
    "no terminals": ([without("terminals")], r"rl\[0\] has no terminals"),
    "no obs": ([entry(), without("obs")], r"rl\[1\] has no obs"),
    "a terminal of .3": ([entry(terminals=[0, 0.3])], "terminals must be booleans, or 0 and 1"),
    "a terminal of 2": ([entry(terminals=[0, 2])], "terminals must be booleans, or 0 and 1"),
    "a terminal that is NaN": ([entry(terminals=[0, np.nan])], "terminals must be booleans"),
    "terminals that are words": ([entry(terminals=["no", "no"])], "expected numbers"),
    "too few obs": ([entry(obs=np.zeros((2, 4)))], r"obs is \(2, 4\), expected \(3, 4\)"),
    "too wide": ([entry(actions=np.zeros((2, 3)))], r"expected \(2, 2\)"),
    "a reward too many": ([entry(rewards=np.zeros(3))], r"rewards is \(3,\), expected \(2,\)"),
    "rows of several lengths": ([entry(obs=[[1, 2], [1]])], "is no pair of task number and"),
    "no pair": ([entry()[1]], "is no pair of task number and trajectory"),
    "a number": ([3], "is no pair of task number and trajectory"),
    "a task of -1": ([entry(-1)], "is of task -1, expected a number from 0 on"),
    "a task of 2^40": ([entry(2**40)], "is of task 1099511627776"),
    "a task of .5": ([entry(0.5)], "is of task 0.5"),
    "a task in words": ([entry("left")], "is of task 'left'"),
    "one number": ([entry(actions=np.float64(1))], "expected .1, 4. by its actions"),
}


@pytest.mark.parametrize("what", BAD)
def test_trajectories_that_no_dataset_holds(what, tmp_path):
    rl, words = BAD[what]
    tasks = envs.sample_tasks("PointDirection", 2)
    file = tmp_path / "d.npz"
    parts = [(rl, [])]
    if rl:  # an empty encoder part is right
        parts.append(([entry()], rl))
    for both in parts:
        with pytest.raises(InputError) as error:
            buffers.save_dataset(file, "PointDirection", tasks[:1], tasks[1:], *both, "")
        pattern = words.replace(r"rl\[", r"(rl|encoder)\[")
        sentence = str(error.value)
        assert re.search(pattern, sentence) and "\n" not in sentence and str(file) in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("terminals", [[0, 1], [0.0, 1.0], np.array([False, True])])
def test_terminals_may_be_numbers_that_are_booleans(terminals, tmp_path):
    tasks = envs.sample_tasks("PointDirection", 2)
    rl = [entry(terminals=terminals)]
    buffers.save_dataset(tmp_path / "d.npz", "PointDirection", tasks[:1], tasks[1:], rl, [], "")
    ((_, path),) = buffers.load_dataset("PointDirection", tmp_path / "d.npz")["rl"]
    assert path["terminals"].tolist() == [False, True] and path["terminals"].dtype == bool


# ----- Where datasets come from


def test_a_dataset_says_where_it_comes_from(tmp_path):
    tasks = envs.sample_tasks("PointDirection", 3)
    rewards = [[1, 2], [3, 4], [10, 20]]  # returns 3 and 7 in task 0, 30 in task 1
    rl = [entry(task, rewards=row) for task, row in zip((0, 0, 1), rewards)]
    file = tmp_path / "d.npz"
    buffers.save_dataset(file, "PointDirection", tasks[:2], tasks[2:], rl, [], "make it")
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["mean_return_by_task"] == [5, 30] and found["mean_return"] == 17.5
    assert found["command"] == "make it" and found["env_id"] == "PointDirection"
    assert found["file"] == "d.npz" and found["versions"]["numpy"] == np.__version__
    assert found["cpu"] and re.match(r"20\d\d-\d\d-\d\dT", found["date"])
    data = buffers.load_dataset("PointDirection", file)
    assert found["sha256_of_contents"] == data["sha256"]


def test_returns_by_task_have_the_order_of_the_tasks():
    data = {
        "rl_lengths": np.array([1, 2, 1], np.int32),
        "rl_tasks": np.array([1, 0, 1], np.int32),
        "rl_rewards": np.array([5, 1, 1, 7], np.float32),
    }
    assert returns_by_task(data, 2).tolist() == [2, 6]
    assert returns_by_task(data, 1).tolist() == [1, 6]  # what is beyond the horizon does not count


SHIPPED = sorted((ROOT / "datasets").glob("*.npz"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_description_of_a_shipped_dataset_is_of_this_file(file):
    if file.stem.startswith("Sawyer"):
        pytest.importorskip("pybullet")
    written = json.loads(Path(description_file(file)).read_text())
    env_id = written["env_id"]
    data = buffers.load_dataset(env_id, file)
    assert written["sha256_of_contents"] == data["sha256"]
    assert written["command"] == data["command"] and written["file"] == file.name
    returns = [[] for _ in data["train_tasks"]]
    horizon = envs.SPECS[env_id].horizon
    for task, path in data["rl"]:
        returns[task].append(path["rewards"][:horizon].sum())
    means = [np.mean(values) for values in returns]
    np.testing.assert_allclose(written["mean_return_by_task"], means, rtol=1e-3, atol=1e-2)
    assert abs(written["mean_return"] - np.mean(means)) < 0.01
    known = {version is not None for version in [*written["versions"].values(), written["cpu"]]}
    assert len(known) == 1  # all is known, or nothing
    assert re.match(r"2026-\d\d-\d\dT", written["date"])
