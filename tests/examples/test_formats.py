"""Datasets to the formats of others and back: nothing is lost."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import meta_bc

# Minari would like to know the author, and more.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
EXAMPLES = Path(buffers.__file__).parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import peers_dataset


def small_dataset(file, env_id="PointDirection", encoder=(3,)):
    """Three training tasks, trajectories of several lengths, a terminal, and an encoder part, or none."""
    rng = np.random.default_rng(0)
    parts = {"rl": [], "encoder": []}
    for part, lengths in (("rl", (50, 7, 1, 50)), ("encoder", encoder)):
        for task in range(3):
            for length in lengths:
                path = {
                    "obs": rng.normal(size=(length + 1, 4)).astype(np.float32),
                    "actions": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
                    "rewards": rng.normal(size=length).astype(np.float32),
                    "terminals": np.zeros(length, bool),
                }
                # A cut trajectory is shorter than the horizon too, and has no terminal.
                path["terminals"][-1] = length == 7
                parts[part].append((task, path))
    train_tasks = rng.uniform(0, 6, (3, 1))
    test_tasks = rng.uniform(0, 6, (2, 1))
    made_by = "python make.py 'with words'"
    buffers.save_dataset(file, env_id, train_tasks, test_tasks, *parts.values(), made_by)
    return buffers.load_dataset(env_id, file)


def assert_equal(dataset, other):
    """Bit for bit the same tasks and trajectories, in the same order."""
    for split in ("train_tasks", "test_tasks"):
        assert dataset[split].tobytes() == other[split].tobytes()
    for part in ("rl", "encoder"):
        assert [task for task, _ in dataset[part]] == [task for task, _ in other[part]]
        for (_, path), (_, other_path) in zip(dataset[part], other[part]):
            for name in path:
                assert path[name].dtype == other_path[name].dtype
                assert path[name].tobytes() == other_path[name].tobytes()


@pytest.mark.parametrize("encoder", [(3,), ()])
def test_minari_and_back(encoder, tmp_path, monkeypatch):
    pytest.importorskip("minari")
    import minari_dataset

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset = small_dataset(tmp_path / "mine.npz", encoder=encoder)
    made = minari_dataset.to_minari(dataset, "PointDirection", "PointDirection/test-v0")
    assert made.total_steps == sum(
        len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"]
    )
    minari_dataset.from_minari("PointDirection/test-v0", "PointDirection", tmp_path / "new.npz")
    new = buffers.load_dataset("PointDirection", tmp_path / "new.npz")
    assert_equal(dataset, new)
    assert new["sha256"] == dataset["sha256"]  # which is of the command too


def test_minari_says_what_ended_an_episode(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    import minari_dataset

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset = small_dataset(tmp_path / "mine.npz")
    minari_dataset.to_minari(dataset, "PointDirection", "PointDirection/test-v0")
    data = minari.load_dataset("PointDirection/test-v0")
    for episode, (task, path) in zip(data, dataset["rl"]):
        ended = bool(path["terminals"][-1])
        assert (episode.terminations[-1], episode.truncations[-1]) == (ended, not ended)
        assert not episode.truncations[:-1].any()
        (metadata,) = data.storage.get_episode_metadata([episode.id])
        assert metadata["options"]["task"] == dataset["train_tasks"][task]


def test_a_minari_dataset_without_tasks(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    import minari_dataset
    from gymnasium.spaces import Box

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = Box(-1, 1, (4,), np.float32)
    minari.create_dataset_from_buffers(
        "else/where-v0", [], observation_space=space, action_space=space, description="a pole"
    )
    with pytest.raises(buffers.InputError, match="else/where-v0"):
        minari_dataset.from_minari("else/where-v0", "PointDirection", tmp_path / "new.npz")


@pytest.mark.parametrize("encoder", [(3,), ()])
def test_the_peers_folders_and_back(encoder, tmp_path):
    dataset = small_dataset(tmp_path / "mine.npz", encoder=encoder)
    folder = tmp_path / "peers"
    peers_dataset.to_folder(dataset, folder)

    # As their code reads it
    rows = np.load(folder / "goal_idx2" / "trj_evalsample1_step0.npy", allow_pickle=True)
    path = [path for task, path in dataset["rl"] if task == 2][1]
    assert np.array_equal(np.stack(rows[:, 0]), path["obs"][:-1])
    assert np.array_equal(np.stack(rows[:, 1]), path["actions"])
    assert rows[:, 2].tolist() == path["rewards"].tolist()
    assert np.array_equal(np.stack(rows[:, 3]), path["obs"][1:])

    peers_dataset.from_folder(folder, "PointDirection", tmp_path / "new.npz", trusted=True)
    assert_equal(dataset, buffers.load_dataset("PointDirection", tmp_path / "new.npz"))


def their_folder(folder, lengths=(50, 7)):
    """A folder as theirs: float64, four columns, several ages of the policy, also a test task."""
    rng = np.random.default_rng(0)
    for task in range(3):
        for step in (200, 1000):
            for i, length in enumerate(lengths):
                obs = rng.normal(size=(length + 1, 4))
                rows = np.empty((length, 4), object)
                for t in range(length):
                    rows[t, 0] = obs[t]
                    rows[t, 1] = rng.uniform(-1, 1, 2)
                    rows[t, 2] = 100.0 * task + step / 1000 + i
                    rows[t, 3] = obs[t + 1]
                file = folder / f"goal_idx{task}" / f"trj_evalsample{i}_step{step}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, rows)
    np.save(folder / "train_tasks.npy", [[0.1], [0.2]])
    np.save(folder / "test_tasks.npy", [[0.3]])


def test_a_folder_of_theirs(tmp_path):
    their_folder(tmp_path / "data")
    new = tmp_path / "new.npz"
    peers_dataset.from_folder(tmp_path / "data", "PointDirection", new, trusted=True)
    dataset = buffers.load_dataset("PointDirection", new)
    # In order of the policy's age, and the test task is left out
    first_rewards = [(task, float(path["rewards"][0])) for task, path in dataset["rl"]]
    of_task_0 = [(0, 0.2), (0, 1.2), (0, 1.0), (0, 2.0)]
    of_task_1 = [(1, 100.2), (1, 101.2), (1, 101.0), (1, 102.0)]
    assert [task for task, _ in first_rewards] == [0] * 4 + [1] * 4
    expected = np.array(of_task_0 + of_task_1)
    assert np.allclose(first_rewards, expected)
    # A trajectory of the full horizon, 50 steps, was cut off; a shorter one ended by itself.
    ends = [bool(path["terminals"][-1]) for _, path in dataset["rl"]]
    assert ends == [False, True] * 4


def test_a_folder_with_a_gap(tmp_path):
    their_folder(tmp_path / "data")
    file = tmp_path / "data" / "goal_idx1" / "trj_evalsample0_step200.npy"
    rows = np.load(file, allow_pickle=True)
    np.save(file, np.delete(rows, 3, axis=0))
    with pytest.raises(buffers.InputError, match="goal_idx1"):
        peers_dataset.from_folder(
            tmp_path / "data", "PointDirection", tmp_path / "new.npz", trusted=True
        )


class Evil:
    """Its unpickling makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_nothing_is_unpickled_unless_asked_for(tmp_path):
    """From the command line: exit code 2 and one line, and no code of the files has run."""
    their_folder(tmp_path / "data")
    rows = np.empty((1, 4), object)
    rows[0, 0] = Evil(tmp_path / "trace")
    np.save(tmp_path / "data" / "goal_idx0" / "trj_evalsample0_step0.npy", rows)
    command = [sys.executable, EXAMPLES / "peers_dataset.py", "PointDirection", "import"]
    command += [tmp_path / "data", tmp_path / "new.npz"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--i-trust-these-files" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "new.npz").exists()


@pytest.mark.parametrize("way", ["minari", "peers"])
def test_into_a_run(way, tmp_path, monkeypatch, quick):
    """A run with data that were away and came back learns the same, bit for bit."""
    dataset = small_dataset(tmp_path / "mine.npz")
    new = tmp_path / "new.npz"
    if way == "minari":
        pytest.importorskip("minari")
        import minari_dataset

        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
        minari_dataset.to_minari(dataset, "PointDirection", "PointDirection/test-v0")
        minari_dataset.from_minari("PointDirection/test-v0", "PointDirection", new)
    else:
        peers_dataset.to_folder(dataset, tmp_path / "peers")
        peers_dataset.from_folder(tmp_path / "peers", "PointDirection", new, trusted=True)
    sizes = dict(policy_hidden=(8,), encoder_hidden=(8,), rl_batch=8, offline_steps=3)
    agents = []
    for file in (tmp_path / "mine.npz", new):
        flags = sizes | dict(dataset=str(file), run_dir=str(tmp_path / file.stem))
        agents.append(buffers.train(meta_bc, env_id="PointDirection", **flags))
    for one, other in zip(agents[0].parameters(), agents[1].parameters()):
        assert torch.equal(one, other)
