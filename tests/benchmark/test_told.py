"""The experiments with data of a Humanoid that is told its task."""

import numpy as np
import torch

import buffers
import envs
from benchmark.experiments import follow, humanoid_scaled, told_direction


def test_the_scaled_humanoid_is_the_humanoid(tmp_path):
    """The same physics and rewards, and position and velocity of the same state."""
    plain = envs.make("HumanoidDirection")
    scaled = envs.make("benchmark.experiments.humanoid_scaled:HumanoidScaled")
    path = {"obs": [], "actions": [], "rewards": [], "terminals": []}
    shown = []
    for env, kept in ((plain, path["obs"]), (scaled, shown)):
        env.unwrapped.set_task([1.0])
        kept.append(env.reset(seed=3)[0])
    for action in np.random.default_rng(0).uniform(-0.9, 0.9, (5, 17)).astype(np.float32):
        obs, reward, terminated, _, _ = plain.step(action)
        again, same, _, _, _ = scaled.step(action)
        assert same == reward
        shown.append(again)
        for key, value in zip(path, (obs, action, reward, terminated)):
            path[key].append(value)
    assert shown[0].shape == (45,)
    for obs, (height, *rest) in zip(path["obs"], shown):
        np.testing.assert_allclose(height, (obs[0] - 1.25) / 0.1, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rest[21:23], obs[22:24], rtol=1e-6)  # velocity, m/s
        np.testing.assert_allclose(rest[-1], obs[44] / 3, rtol=1e-6)

    # A dataset, converted
    path = {key: np.array(values) for key, values in path.items()}
    source, target = tmp_path / "source.npz", tmp_path / "target.npz"
    tasks = np.zeros((1, 1)), np.ones((1, 1))
    buffers.save_dataset(source, "HumanoidDirection", *tasks, [(0, path)], [], "by hand")
    humanoid_scaled.main(humanoid_scaled.Args(source, target))
    env_id = "benchmark.experiments.humanoid_scaled:HumanoidScaled"
    ((_, found),) = buffers.load_dataset(env_id, target)["rl"]
    np.testing.assert_allclose(found["obs"], shown, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["rewards"], path["rewards"].astype(np.float32))


def test_velocity_along_the_task():
    """3 m/s along x: all of it, none of it, and backwards."""
    obs = np.zeros((5, 45), np.float32)
    obs[1:, 22] = 3
    np.testing.assert_allclose(
        follow.along([{"obs": obs}] * 3, np.array([0, np.pi / 2, np.pi])), [3, 0, -3], atol=1e-6
    )


def test_does_z_know_the_task():
    """Posterior means that hold the direction, turned and shifted; of own context reversed."""
    angles = np.linspace(0, 6, 12)
    circle = np.stack([-np.sin(angles), np.cos(angles)], axis=1)
    means = [torch.tensor(2 * circle + 1)]
    cosines = follow.cosines(means, torch.tensor(-2 * circle + 1), angles)
    assert cosines == ["1.00 ± 0.00", "-1.00 ± 0.00"]


def test_told_as_by_a_z():
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    exact = told_direction.told(directions, False, torch.Generator())
    assert exact.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    many = directions[:1].expand(20_000, 2)
    noise = told_direction.told(many, True, torch.Generator().manual_seed(0)) - torch.eye(5)[0]
    torch.testing.assert_close(noise.std(0), torch.tensor([0.2, 0.2, 1, 1, 1]), atol=0.02, rtol=0)
