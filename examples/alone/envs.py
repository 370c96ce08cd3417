"""Your tasks. Here: push a ball on a line to a place that only the rewards reveal."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

SIZES = SimpleNamespace(obs_dim=2, action_dim=1, horizon=20, num_train_tasks=20, num_test_tasks=10)


class Ball(gym.Env):
    """Observation (2,): place and velocity. Action (1,): force, from -1 to 1."""

    def set_task(self, task):
        self.goal = task[0]  # the place to reach

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.array([self.np_random.normal(0.0, 0.1), 0.0])
        return self.state, {}

    def step(self, action):
        place, velocity = self.state
        velocity = 0.7 * velocity + 0.1 * action[0]
        self.state = np.array([place + velocity, velocity])
        return self.state, -abs(self.state[0] - self.goal), False, False, {}


def lookup(env_id):
    return SIZES


def make(env_id):
    return gym.wrappers.TimeLimit(Ball(), SIZES.horizon)


def sample_tasks(env_id, num_tasks, seed=0):
    return np.random.RandomState(seed).uniform(-1, 1, (num_tasks, 1))


def make_evaluation(env_id, train_tasks, test_tasks):
    """For each split the numbers of its tasks, and environments that are set to them."""
    eval_envs = {}
    for split, tasks in (("test", test_tasks), ("train", train_tasks)):
        env_list = [make(env_id) for _ in tasks]
        for env, task in zip(env_list, tasks):
            env.unwrapped.set_task(task)
        eval_envs[split] = list(range(len(tasks))), env_list
    return eval_envs


class Episodes:
    """One episode in each of E environments, side by side."""

    def __init__(self, env_list, rng, read_rewards=True):
        self.env_list = env_list
        self.live = list(range(len(env_list)))  # the episodes that have not ended
        self.records = []
        for env in env_list:
            seed = torch.randint(2**31 - 1, (1,), generator=rng).item()
            obs, _ = env.reset(seed=seed)
            self.records.append({"obs": [np.array(obs)], "actions": [], "terminals": []})
            if read_rewards:
                self.records[-1]["rewards"] = []

    def last(self, name, numbers):
        """The newest obs, actions or rewards of some episodes: (len(numbers), .)."""
        values = np.array([self.records[i][name][-1] for i in numbers], np.float32)
        return torch.from_numpy(values.reshape(len(numbers), -1))

    def obs(self):
        return self.last("obs", self.live)

    def step(self, actions):
        """Act in the live episodes: actions (live, a)."""
        still_live = []
        for i, action in zip(self.live, actions.cpu().numpy()):
            # Copies: an environment may go on writing into its own arrays
            obs, reward, terminated, truncated, _ = self.env_list[i].step(action.copy())
            new = {"obs": np.array(obs), "actions": action}
            new |= {"rewards": reward, "terminals": terminated}
            for name, values in self.records[i].items():
                values.append(new[name])
            if not (terminated or truncated):
                still_live.append(i)
        self.live = still_live

    def paths(self):
        """E trajectories: obs (L+1, o), actions (L, a), terminals (L,) and rewards (L,)."""
        paths = []
        for record in self.records:
            paths.append({name: np.array(values, np.float32) for name, values in record.items()})
        return paths


def random_episodes(env_list, rng):
    """One episode of uniform actions in each of E environments: E trajectories."""
    episodes = Episodes(env_list, rng)
    while episodes.live:
        episodes.step(2 * torch.rand(len(episodes.live), SIZES.action_dim, generator=rng) - 1)
    return episodes.paths()
