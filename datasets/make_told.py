"""Make data of a Humanoid that is TOLD its task: python datasets/make_told.py

PAPER: the replay buffer of PEARL's iteration 100. CODE: PEARL learns to stand on a CPU's budget, so
the data are of a policy that is told the direction. Off-policy RL of a library trains it (CrossQ of
sb3-contrib, see requirements.txt here), from position and velocity alone, turned into the frame in
which its task is straight ahead. Nothing in the physics knows a direction, so that all tasks are one
task there; only the yaw at which an episode starts is another.

Training goes on from its last checkpoint if it was stopped. What it has learned so far stands in
RUN_DIR/curve.csv, a row for each evaluation. The data are of several stages of the training.

    python datasets/make_told.py --steps 600000 --run-dir runs/told
    python datasets/make_told.py --run-dir runs/told --out runs/HumanoidDirectionTold.npz

The repository has five stages of one training, so that the data can be made without any:

    python datasets/make_told.py --run-dir datasets/told --out runs/HumanoidDirectionTold.npz
"""

import csv
import dataclasses
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import CrossQ
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import buffers
import envs
from plumbing.flags import launch_tool

ENV_ID = "HumanoidDirection"
SEEN = 45  # numbers of the observation that the policy sees: qpos[2:] (22) and qvel (23)
# What it is paid while it learns, {from this step on: (for a step in which it is up, for one m/s
# along the task)}. The task itself pays 5 and 1.25, and for these the policy only stands.
PAY = {
    0: (2.0, 2.5),
    400_000: (1.0, 5.0),  # once it stays up
}
LEARNING_STARTS = 5_000  # environment steps with random actions
LARGEST_ACTION = 0.97  # of an action of 1 the policy's log-density would be an outlier
DIRECTION_ERROR = 0.5  # rad, standard deviation of a heading around the task's, in the others
COLUMNS = "steps", "hours", "steps_up", "along", "speed", "return"


@dataclasses.dataclass
class Args:
    steps: int = 0  # environment steps of the training, all together; 0: only collect
    run_dir: Path = Path("runs/told")  # checkpoints, and the policies of all stages
    eval_every: int = 25_000  # environment steps between two evaluations
    save_every: int = 100_000  # environment steps between two checkpoints
    seed: int = 1
    stages: int = 5  # policies that make the data, at even distances in the training's second half
    transitions: int = 1_200  # of each task, as in the paper: 96 MB
    # Share of the trajectories that head for any direction, as with z from the prior
    other_share: float = 0.4
    out: Path | None = None  # the dataset to write


def turned(obs, angle):
    """What the policy sees: position and velocity in the frame in which `angle` is straight ahead.

    Args:
        obs: (376,) of HumanoidDirection.
        angle: rad, the task.
    Returns (45,): the torso's quaternion and velocity over ground are turned by -angle. Its angular
    velocity is that in its own frame, and stays.
    """
    seen = obs[:SEEN].astype(np.float32)
    c, s = np.cos(angle / 2), -np.sin(angle / 2)
    w, x, y, z = obs[1:5]
    seen[1:5] = c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w
    vx, vy = obs[22:24]
    seen[22:24] = np.cos(angle) * vx + np.sin(angle) * vy, np.cos(angle) * vy - np.sin(angle) * vx
    return seen


def pay(steps):
    """What is paid after so many steps of training: a value of PAY."""
    return PAY[max(start for start in PAY if start <= steps)]


class Told(gym.Env):
    """HumanoidDirection for a policy that is told its task: a new one in each episode, or `task`."""

    def __init__(self, seed, task=None):
        self.env = envs.make(ENV_ID)
        self.task = task
        self.pay = pay(0)
        self.rng = np.random.default_rng(seed)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (SEEN,), np.float32)
        self.action_space = self.env.action_space
        self.angle = 0.0

    def reset(self, *, seed=None, options=None):
        self.angle = self.rng.uniform(0, 2 * np.pi) if self.task is None else self.task
        self.env.unwrapped.set_task([self.angle])
        obs, info = self.env.reset(seed=int(self.rng.integers(2**31)))
        return turned(obs, self.angle), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        info["true_reward"] = reward
        forward = info["reward_forward"]
        info["along"] = forward / 1.25
        # Less for being up, more for the way; the costs stay
        costs = reward - forward - info["reward_survive"]
        for_up, for_speed = self.pay
        shaped = costs + for_up + for_speed * info["along"]
        return turned(obs, self.angle), float(shaped), terminated, truncated, info


# ----- Training


def evaluate(model, seed, episodes=40, task=None):
    """How it does with its best actions: (steps up, velocity along the task, speed, true return).

    Means over episodes; the velocities, in m/s, are means over an episode's steps.

    Args:
        task: rad; without one each episode has another.
    """
    env = Told(seed, task)
    rows = []
    for _ in range(episodes):
        seen, _ = env.reset()
        along, speed, total = [], [], 0.0
        done = False
        while not done:
            action, _ = model.predict(seen, deterministic=True)
            seen, _, terminated, truncated, info = env.step(action)
            along.append(info["along"])
            speed.append(np.hypot(*seen[22:24]))
            total += info["true_reward"]
            done = terminated or truncated
        rows.append((len(along), np.mean(along), np.mean(speed), total))
    return np.mean(rows, axis=0)


class Stages(BaseCallback):
    """Evaluates, keeps the policy of each stage, and writes checkpoints."""

    def __init__(self, args, hours):
        super().__init__()
        self.args = args
        self.hours_before = hours
        self.start = time.time()

    def _on_step(self):
        done = self.num_timesteps
        if self.training_env.get_attr("pay")[0] != pay(done):
            self.change_pay(pay(done))
        before = done - self.training_env.num_envs
        if done // self.args.eval_every > before // self.args.eval_every:
            hours = self.hours_before + (time.time() - self.start) / 3600
            row = [done, f"{hours:.3f}", *(f"{x:.3f}" for x in evaluate(self.model, 10_000))]
            with open(self.args.run_dir / "curve.csv", "a", newline="") as file:
                csv.writer(file).writerow(row)
            print(dict(zip(COLUMNS, row)), flush=True)
            save_actor(self.model, self.args.run_dir / f"actor_{done}.npz")
        if done // self.args.save_every > before // self.args.save_every:
            save(self.model, self.args.run_dir)
        return True

    def change_pay(self, new):
        """Pay otherwise from now on; what is in the replay buffer is labelled anew."""
        for_up, for_speed = self.training_env.get_attr("pay")[0]
        stored = self.model.replay_buffer
        # The cost of control, as HumanoidDirection charges it; a motor takes .4
        costs = -0.1 * np.square(0.4 * stored.actions).sum(-1)
        along = (stored.rewards - costs - for_up) / for_speed
        stored.rewards[:] = costs + new[0] + new[1] * along
        self.training_env.set_attr("pay", new)


def save_actor(model, file):
    """Write what acting needs."""
    state = model.policy.actor.state_dict()
    np.savez(file, allow_pickle=False, **{name: array.numpy() for name, array in state.items()})


def load_actor(model, file):
    """The inverse of `save_actor`."""
    with np.load(file, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    model.policy.actor.load_state_dict(state)


def save(model, folder):
    """Write a checkpoint, so that a stop while it is written leaves the one before.

    (A stop between the two last lines leaves the new buffer with the old model, which can go on.)
    """
    model.save_replay_buffer(folder / "buffer.new.pkl")
    model.save(folder / "model.new.zip")
    (folder / "buffer.new.pkl").replace(folder / "buffer.pkl")
    (folder / "model.new.zip").replace(folder / "model.zip")


def make_model(args, num_envs=4, buffer_size=1_000_000):
    """A new agent: two gradient steps for four environment steps, networks of 256, 256."""
    venv = DummyVecEnv([lambda i=i: Told(args.seed + i) for i in range(num_envs)])
    networks = {"net_arch": {"pi": [256, 256], "qf": [256, 256]}}
    options = dict(learning_starts=LEARNING_STARTS, train_freq=1, gradient_steps=2)
    options |= {"buffer_size": buffer_size}
    return CrossQ(
        "MlpPolicy", venv, policy_kwargs=networks, device="cpu", seed=args.seed, **options
    )


def train(args):
    """Train to args.steps environment steps, from the last checkpoint if there is one."""
    args.run_dir.mkdir(parents=True, exist_ok=True)
    model = make_model(args)
    curve = args.run_dir / "curve.csv"
    hours = 0.0
    if (args.run_dir / "model.zip").exists():
        # Files that this script wrote; they are pickled, so load none of others
        model = CrossQ.load(args.run_dir / "model.zip", env=model.get_env(), device="cpu")
        model.load_replay_buffer(args.run_dir / "buffer.pkl")
        rows = [
            row for row in csv.DictReader(open(curve)) if int(row["steps"]) <= model.num_timesteps
        ]
        hours = float(rows[-1]["hours"]) if rows else 0.0
        model.get_env().set_attr("pay", pay(model.num_timesteps))
    else:
        rows = []
    with open(curve, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    left = args.steps - model.num_timesteps
    if left > 0:
        model.learn(left, callback=Stages(args, hours), reset_num_timesteps=False)
        save(model, args.run_dir)


# ----- Collecting


def chosen_stages(folder, number):
    """Files of at most `number` policies, at even distances over the second half of the training.

    Of a folder that holds no more than `number` of them all are taken; else as many as its second
    half has, if that is fewer.
    """
    if number < 1:
        raise buffers.InputError(f"--stages is {number}, expected 1 at least")
    files = sorted(folder.glob("actor_*.npz"), key=lambda file: int(file.stem.split("_")[1]))
    if not files:
        raise buffers.InputError(f"there is no actor in {folder}: train one first, with --steps")
    first = 0 if len(files) <= number else len(files) // 2
    places = np.linspace(first, len(files) - 1, number).round().astype(int)
    return [files[place] for place in dict.fromkeys(places.tolist())]


def play(env, model, heading, seed, most_steps):
    """One trajectory with sampled actions, of at most `most_steps`, as `ReplayBuffer.add` takes it.

    Args:
        heading: rad, the direction that the policy is told, which need not be the task's.
    """
    path = {"obs": [env.reset(seed=seed)[0]], "actions": [], "rewards": [], "terminals": []}
    done = False
    while not done and len(path["actions"]) < most_steps:
        action, _ = model.predict(turned(path["obs"][-1], heading))
        action = np.clip(action, -LARGEST_ACTION, LARGEST_ACTION).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        path["actions"].append(action)
        path["obs"].append(obs)
        path["rewards"].append(reward)
        path["terminals"].append(terminated)
        done = terminated or truncated
    return {key: np.array(values) for key, values in path.items()}


def collect(args):
    """Write the dataset. Raises InputError."""
    if not 0 <= args.other_share <= 1:
        raise buffers.InputError(f"--other-share is {args.other_share}, expected 0 to 1")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    policies = []
    for file in chosen_stages(args.run_dir, args.stages):
        model = make_model(args, num_envs=1, buffer_size=1)
        load_actor(model, file)
        policies.append(model)
    env = envs.make(ENV_ID)
    spec = envs.lookup(ENV_ID)
    tasks = envs.sample_tasks(ENV_ID, spec.num_train_tasks + spec.num_test_tasks)
    train_tasks = tasks[: spec.num_train_tasks]
    test_tasks = tasks[spec.num_train_tasks :]
    entries = []
    for task, (angle,) in enumerate(train_tasks):
        env.unwrapped.set_task([angle])
        steps = 0
        while steps < args.transitions:
            heading = rng.normal(angle, DIRECTION_ERROR)
            if rng.random() < args.other_share:
                heading = rng.uniform(-np.pi, np.pi)
            model = policies[rng.integers(len(policies))]
            path = play(env, model, heading, len(entries), args.transitions - steps)
            entries.append((task, path))
            steps += len(path["actions"])
    flags = f"--stages {args.stages} --transitions {args.transitions}"
    if args.other_share != Args.other_share:
        flags += f" --other-share {args.other_share}"
    if args.seed != Args.seed:
        flags += f" --seed {args.seed}"
    command = f"python datasets/make_told.py --run-dir RUN {flags}"
    buffers.save_dataset(args.out, ENV_ID, train_tasks, test_tasks, entries, [], command)
    returns = [path["rewards"].sum() for _, path in entries]
    falls = [path["terminals"][-1] for _, path in entries]
    words = f"{len(entries)} trajectories, mean return {np.mean(returns):.1f}, {sum(falls)} falls"
    print(f"{args.out.name}: {words}")

    # What a policy that is told its task returns on the test tasks: a bound for those that are not
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "angle", *COLUMNS[2:]))
        for task, (angle,) in enumerate(test_tasks):
            numbers = evaluate(policies[-1], 20_000 + task, 20, angle)
            writer.writerow((task, f"{angle:.4f}", *(f"{number:.3f}" for number in numbers)))


def main(args):
    """Train, collect, or both. Raises InputError."""
    if args.steps:
        train(args)
    if args.out:
        collect(args)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("medium")  # 1.25 times as fast where there is bfloat16
    launch_tool(main, Args)
