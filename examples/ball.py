"""A ball on a line that shall be at a place which only its rewards tell. `python ball.py` makes the data.

The README, "Your own tasks", says how to use it. Copy it and put your own environment in.
"""

import gymnasium as gym
import numpy as np
import torch

import buffers
import envs


class Ball(gym.Env):
    """Observation (2,): place, velocity. Action (1,): force, in [-1, 1]. Task (1,): where the ball shall be."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    @staticmethod
    def sample_tasks(rng, num_tasks):  # rng: a numpy RandomState; returns (num_tasks, task_dim)
        return rng.uniform(-1, 1, (num_tasks, 1))

    def set_task(self, task):
        self.goal = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.velocity = self.np_random.normal(0.0, 0.1), 0.0
        return np.array([self.place, self.velocity]), {}

    def step(self, action):
        self.velocity = 0.7 * self.velocity + 0.1 * float(action[0])
        self.place += self.velocity
        return np.array([self.place, self.velocity]), -abs(self.place - self.goal), False, False, {}


small = dict(
    policy_hidden=(64, 64),
    encoder_hidden=(64, 64),
    rl_batch=64,
    lr=1e-3,
    kl_coef=0.001,
    eval_every=400,
)
smac = dict(q_hidden=(64, 64), offline_steps=400, online_iterations=2, updates_per_iteration=200)
smac |= dict(prior_steps=60, posterior_steps=60)
presets = {"smac_offline_online": small | smac, "meta_bc": small | dict(offline_steps=1000)}
sizes = dict(obs_dim=2, action_dim=1, task_dim=1, horizon=20, num_train_tasks=20, num_test_tasks=10)
envs.register("Ball", envs.Spec(Ball, **sizes, presets=presets))

if __name__ == "__main__":
    rng, env, data = torch.Generator().manual_seed(0), envs.make("Ball"), []
    train_tasks, test_tasks = np.split(envs.sample_tasks("Ball", 30), [20])
    for number, task in enumerate(train_tasks):
        env.unwrapped.set_task(task)
        for _ in range(5):  # episodes that head for some place, whatever the task
            episodes, target = envs.Episodes([env], rng), 2 * torch.rand(1, generator=rng) - 1
            while episodes.live:
                place, velocity = episodes.obs()[0]
                force = 3 * (target - place) - 2 * velocity + 0.3 * torch.randn(1, generator=rng)
                episodes.step(force.clamp(-1, 1)[None])
            data.append((number, episodes.paths()[0]))
    buffers.save_dataset(
        "ball.npz", "Ball", train_tasks, test_tasks, data, encoder=[], command="python ball.py"
    )
    print(f"ball.npz: mean return {np.mean([path['rewards'].sum() for _, path in data]):.1f}")
