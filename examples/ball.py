"""A ball on a line that shall be at a place which only its rewards tell.

Copied beside envs.py, `python ball.py` makes the data. The README, "Your own tasks", says how to
use it. Copy this file, and put your own environment in.
"""

import gymnasium as gym
import numpy as np
import torch

import buffers
import envs


class Ball(gym.Env):
    """A ball that a force pushes along a line.

    Observation (2,): place, velocity. Action (1,): force, in [-1, 1]. Task (1,): where the ball
    shall be. Reward: minus the distance to it.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    @staticmethod
    def sample_tasks(rng, num_tasks):  # rng: a numpy RandomState; returns (num_tasks, task_dim)
        return rng.uniform(-1, 1, (num_tasks, 1))

    def set_task(self, task):
        self.goal = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(0.0, 0.1)
        self.velocity = 0.0
        return np.array([self.place, self.velocity]), {}

    def step(self, action):
        self.velocity = 0.7 * self.velocity + 0.1 * float(action[0])
        self.place += self.velocity
        reward = -abs(self.place - self.goal)
        return np.array([self.place, self.velocity]), reward, False, False, {}


# --- The row of the family: its sizes, and flags for scripts in place of their defaults

small = {
    "policy_hidden": (64, 64),
    "encoder_hidden": (64, 64),
    "rl_batch": 64,
    "lr": 1e-3,
    "kl_coef": 0.001,
    "eval_every": 400,
}
smac = {
    "q_hidden": (64, 64),
    "offline_steps": 400,
    "online_iterations": 2,
    "updates_per_iteration": 200,
    "prior_steps": 60,
    "posterior_steps": 60,
}
spec = envs.Spec(
    Ball,
    obs_dim=2,
    action_dim=1,
    task_dim=1,
    horizon=20,
    num_train_tasks=20,
    num_test_tasks=10,
    presets={"smac_offline_online": small | smac, "meta_bc": small | {"offline_steps": 1000}},
)
envs.register("Ball", spec)


def collect(env, rng):
    """One episode that heads for some place, whatever the task."""
    episodes = envs.Episodes([env], rng)
    target = 2 * torch.rand(1, generator=rng) - 1
    while episodes.live:
        place, velocity = episodes.obs()[0]
        noise = torch.randn(1, generator=rng)
        force = 3 * (target - place) - 2 * velocity + 0.3 * noise
        episodes.step(force.clamp(-1, 1)[None])
    (path,) = episodes.paths()
    return path


if __name__ == "__main__":
    rng = torch.Generator().manual_seed(0)
    env = envs.make("Ball")
    tasks = envs.sample_tasks("Ball", spec.num_train_tasks + spec.num_test_tasks)
    train_tasks, test_tasks = np.split(tasks, [spec.num_train_tasks])
    data = []
    for number, task in enumerate(train_tasks):
        env.unwrapped.set_task(task)
        for _ in range(5):
            data.append((number, collect(env, rng)))

    buffers.save_dataset(
        "ball.npz", "Ball", train_tasks, test_tasks, data, encoder=[], command="python ball.py"
    )
    returns = [path["rewards"].sum() for _, path in data]
    print(f"ball.npz: mean return {np.mean(returns):.1f}")
