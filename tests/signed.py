"""A family whose observations say which task, episode and buffer they are of.

There are small runs of the six scripts on it. A test can then read off from every datum where it
comes from, and see from its place where it went.
"""

import gymnasium as gym
import numpy as np

import borel
import buffers
import envs
import focal
import macaw
import meta_bc
import pearl_online_oracle as pearl
import smac_offline_online as smac
from plumbing.flags import parse_args

SIGNS = np.array([5, 2, 7, 4, 3, 11, 6, 9]) / 16  # of the tasks; the first are training tasks
TRAIN, TEST = SIGNS[:5], SIGNS[5:]
# A task with an odd number ends with a fall after two steps, the others at the time limit.
HORIZON = 3
FALL = 2
# Of an observation; the last is the action that led to it.
COLUMNS = SIGN, TIME, ORIGIN, EPISODE, ACTION = range(5)
ENCODER_DATA, RL_DATA, COLLECTED, EVALUATION = -1, 0, 1, 2  # what ORIGIN says
OFFLINE = 4  # gradient steps of the offline phase
ITERATIONS = 3
UPDATES = 3  # gradient steps of an iteration
TASKS = 5  # tasks of an iteration
PRIOR_STEPS = 4
POSTERIOR_STEPS = 5
EVAL_EVERY = 5
EPISODES = 4  # episodes of each task in the RL part of the dataset
VAE_STEPS = 6


class Signed(gym.Env):
    """It pays its sign times the number of the step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (len(COLUMNS),), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    evaluating, pay = False, staticmethod(lambda env: float(env.sign * env.time))

    def __init__(self):
        self.evaluating = type(self).evaluating  # whether it is one of an evaluation's

    @staticmethod
    def sample_tasks(rng, num_tasks):
        return SIGNS[:num_tasks, None]

    def set_task(self, task):
        if not (len(task) == 1 and task[0] in SIGNS):
            raise ValueError(f"there is no task {task}")
        self.sign = float(task[0])

    def reset(self, seed=None, options=None):
        self.time, self.episode = 0, (seed or 0) / 2**31
        return self.observe(0.0), {}

    def observe(self, action):
        origin = EVALUATION if self.evaluating else COLLECTED
        return np.array([self.sign, self.time, origin, self.episode, action], np.float32)

    def step(self, action):
        self.time += 1
        return (
            self.observe(float(action[0])),
            self.pay(self),
            falls(self.sign) and self.time == FALL,
            False,
            {},
        )


def falls(sign):
    return round(16 * float(sign)) % 2 == 1


def length(sign):
    """Steps of an episode."""
    return FALL if falls(sign) else HORIZON


def episode(sign, origin, number):
    """A trajectory of the dataset."""
    steps = length(sign)
    obs, actions = (
        np.zeros((steps + 1, len(COLUMNS)), np.float32),
        np.linspace(-0.9, 0.9, steps, dtype=np.float32),
    )
    obs[:, SIGN], obs[:, TIME], obs[:, ORIGIN], obs[:, EPISODE] = (
        sign,
        range(steps + 1),
        origin,
        number,
    )
    obs[1:, ACTION] = actions
    rewards, terminals = (
        sign * np.arange(1, steps + 1),
        np.arange(1, steps + 1) == FALL * falls(sign),
    )
    return {
        "obs": obs,
        "actions": actions[:, None],
        "rewards": rewards.astype(np.float32),
        "terminals": terminals,
    }


def save_data(file):
    """The dataset: of each training task four episodes for the RL buffer, and two others for the
    encoder buffer.
    """
    parts = [
        [
            (task, episode(sign, origin, number))
            for task, sign in enumerate(TRAIN)
            for number in range(count)
        ]
        for origin, count in ((RL_DATA, EPISODES), (ENCODER_DATA, 2))
    ]
    buffers.save_dataset(file, "Signed", TRAIN[:, None], TEST[:, None], *parts, "python test")
    return file


def register(patch):
    """Add the family for as long as `patch`, a MonkeyPatch, lasts; environments of an evaluation
    know what they are.
    """
    spec = envs.Spec(Signed, len(COLUMNS), 1, 1, HORIZON, len(TRAIN), len(TEST))
    patch.setitem(envs.SPECS, "Signed", spec)
    patch.setitem(gym.registry, "smac/Signed-v0", None)  # to be taken out again at the end
    envs.register("Signed", spec)
    envs.make("Signed")  # its environment is checked once, here
    make_evaluation = envs.make_evaluation

    def marked(*args):
        Signed.evaluating = True
        try:
            return make_evaluation(*args)
        finally:
            Signed.evaluating = False

    patch.setattr(envs, "make_evaluation", marked)


NETWORKS = "--policy-hidden 8 --latent-dim 2 --q-hidden 8"
BATCHES = "--meta-batch 3 --rl-batch 6 --context-batch 4"
COLLECT = f"--online-iterations {ITERATIONS} --updates-per-iteration {UPDATES}"
COLLECT += f" --tasks-per-iteration {TASKS}"
COLLECT += f" --prior-steps {PRIOR_STEPS} --posterior-steps {POSTERIOR_STEPS}"
SMAC = f"{NETWORKS} --encoder-hidden 8 --decoder-hidden 8 {BATCHES} {COLLECT} --lr 0.0123"
SMAC += f" --offline-steps {OFFLINE}"
RUNS = {  # name: (script, flags); no learning rate is a default
    "smac": (smac, SMAC),
    "smac, encoder buffer frozen": (smac, f"{SMAC} --encoder-buffer frozen"),
    "smac, one buffer": (smac, f"{SMAC} --encoder-buffer all"),
    "smac, true rewards": (smac, f"{SMAC} --oracle-rewards"),
    "smac, on test tasks": (smac, f"{SMAC} --explore-tasks test --encoder-buffer frozen"),
    "smac, on test tasks with true rewards": (
        smac,
        f"{SMAC} --explore-tasks test --oracle-rewards",
    ),
    "pearl": (
        pearl,
        f"{NETWORKS} --encoder-hidden 8 {BATCHES} {COLLECT} --initial-steps 4 --lr 0.0123",
    ),
    "meta_bc": (
        meta_bc,
        f"--policy-hidden 8 --encoder-hidden 8 --decoder-hidden 8 --latent-dim 2 {BATCHES} "
        "--offline-steps 9 --lr 0.0123",
    ),
    "focal": (
        focal,
        f"{NETWORKS} --encoder-hidden 8 --context-loss unicorn --explore prior --decoder-hidden 8 {BATCHES} "
        "--offline-steps 9 --lr 0.0123",
    ),
    "macaw": (
        macaw,
        f"--policy-hidden 8 --value-hidden 8 {BATCHES} --offline-steps 9 "
        "--policy-lr 0.0123 --value-lr 0.0234 --lr-lr 0.0345",
    ),
    "borel": (
        borel,
        f"{NETWORKS} --meta-batch 3 --rl-batch 6 --vae-tasks 2 --vae-trajectories 3 --elbo-terms 4 "
        f"--vae-steps {VAE_STEPS} --offline-steps 7 --lr 0.0123 --vae-lr 0.0234",
    ),
}


def arguments(name, folder, data, *flags):
    """The command line of a run in `folder`."""
    words = f"--env-id Signed --device cpu --eval-every {EVAL_EVERY} {RUNS[name][1]}".split()
    words += ["--run-dir", str(folder), *flags]
    if name != "pearl":
        words += ["--dataset", str(data)]
    return words


def start(name, folder, data, *flags):
    """Make a run; returns the trained agent."""
    script = RUNS[name][0]
    return script.main(
        parse_args(script.Args, script.PRESETS, arguments(name, folder, data, *flags))
    )


def resume(name, folder, data, *flags):
    """Continue a run, to its end; returns the trained agent."""
    script = RUNS[name][0]
    words = [
        "--resume",
        str(run_of(name, folder)),
        *flags,
        *([] if name == "pearl" else ["--dataset", str(data)]),
    ]
    return script.main(parse_args(script.Args, script.PRESETS, words))


def run_of(name, folder):
    """The run's own folder."""
    return folder / f"Signed__{RUNS[name][0].__name__}__1"


def load(folder):
    """All arrays of a checkpoint."""
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as file:
        return dict(file)


def members(checkpoint, task, name="rl"):
    """Which transitions of a checkpoint's buffer are in a list of a task, in time order."""
    sizes = checkpoint[f"buffer/sizes/{name}"]
    first = sizes[:task].sum()
    return checkpoint[f"buffer/index/{name}"][first : first + sizes[task]]
