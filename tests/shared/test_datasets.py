"""The scripts that made the shipped datasets still make them."""

import dataclasses
import runpy
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest

import buffers
import envs

FOLDER = Path(buffers.__file__).parent / "datasets"


def test_the_point_direction_datasets_are_what_their_script_makes(tmp_path, monkeypatch):
    save_dataset = buffers.save_dataset

    def save_elsewhere(file, *args, **kwargs):
        save_dataset(tmp_path / Path(file).name, *args, **kwargs)

    monkeypatch.setattr(buffers, "save_dataset", save_elsewhere)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    monkeypatch.setattr(sys, "argv", ["make_point_direction.py"])
    runpy.run_path(str(FOLDER / "make_point_direction.py"), run_name="__main__")
    names = ["PointDirection.npz", "PointDirectionGoal.npz"]
    assert sorted(file.name for file in tmp_path.glob("*.npz")) == names
    for name in names:
        with np.load(tmp_path / name) as made, np.load(FOLDER / name) as shipped:
            assert sorted(made.files) == sorted(shipped.files)
            for field in shipped.files:
                array, expected = made[field], shipped[field]
                assert array.dtype == expected.dtype and array.shape == expected.shape, field
                if array.dtype.kind == "f":  # another processor may round otherwise
                    np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)
                else:
                    np.testing.assert_array_equal(array, expected)


@pytest.fixture
def told(monkeypatch):
    """datasets/make_told.py, with sizes for a test."""
    pytest.importorskip("sb3_contrib", reason="needs datasets/requirements.txt")
    monkeypatch.syspath_prepend(str(FOLDER))
    import make_told

    monkeypatch.setattr(make_told.make_model, "__defaults__", (4, 1_000))  # a small buffer
    monkeypatch.setattr(make_told, "LEARNING_STARTS", 24)
    return make_told


def test_all_tasks_are_one_for_a_policy_that_is_told_its_task(told):
    """Two humanoids, the second turned with its task: the policy sees the same, and is paid the same."""
    first, second = (envs.make("HumanoidDirection") for _ in range(2))
    angle = 2.5
    turn = np.array([np.cos(angle / 2), 0, 0, np.sin(angle / 2)])
    for env, task in ((first, 0.0), (second, angle)):
        env.unwrapped.set_task([task])
        env.reset(seed=0)
    qpos, qvel = (array.copy() for array in (first.unwrapped.data.qpos, first.unwrapped.data.qvel))
    mujoco.mju_mulQuat(qpos[3:7], turn, first.unwrapped.data.qpos[3:7])
    for array in (qpos, qvel):
        x, y = array[:2]
        array[0] = np.cos(angle) * x - np.sin(angle) * y
        array[1] = np.sin(angle) * x + np.cos(angle) * y
    second.unwrapped.set_state(qpos, qvel)
    rng = np.random.default_rng(0)
    for _ in range(5):
        action = rng.uniform(-1, 1, 17)
        (obs, reward, *_), (other_obs, other_reward, *_) = first.step(action), second.step(action)
        assert np.abs(obs[22:24] - other_obs[22:24]).max() > 1e-3
        np.testing.assert_allclose(told.turned(obs, 0), told.turned(other_obs, angle), atol=1e-5)
        assert abs(reward - other_reward) < 1e-5


def test_training_of_the_told_policy_goes_on_and_makes_data(told, tmp_path, monkeypatch):
    monkeypatch.setattr(told, "evaluate", lambda *args: np.arange(4.0))
    args = told.Args(48, tmp_path / "run", eval_every=16, save_every=32, stages=2, transitions=5)
    told.main(dataclasses.replace(args, steps=32))
    before = (tmp_path / "run" / "curve.csv").read_text().splitlines()
    told.main(dataclasses.replace(args, out=tmp_path / "HumanoidDirection.npz"))
    after = (tmp_path / "run" / "curve.csv").read_text().splitlines()
    assert after[: len(before)] == before
    assert [line.split(",")[0] for line in after] == ["steps", "16", "32", "48"]
    files = told.chosen_stages(tmp_path / "run", 2)
    assert [file.name for file in files] == ["actor_32.npz", "actor_48.npz"]
    dataset = buffers.load_dataset("HumanoidDirection", str(tmp_path / "HumanoidDirection.npz"))
    rows = (tmp_path / "HumanoidDirection.csv").read_text().splitlines()
    assert len(rows) == 1 + len(dataset["test_tasks"])
    lengths = [len(path["actions"]) for _, path in dataset["rl"]]
    assert sum(lengths) == 50 * 5
    assert max(np.abs(path["actions"]).max() for _, path in dataset["rl"]) <= told.LARGEST_ACTION
