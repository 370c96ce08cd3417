"""PEARL with true rewards: the Online Oracle of Figure 5, and the source of the offline datasets.

PEARL: Rakelly, Zhou, Quillen, Finn, Levine, "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context
Variables", ICML 2019, https://arxiv.org/abs/1903.08254. SMAC: https://arxiv.org/abs/2107.03974 (PEARL: Section 3).
Where the two papers name different sizes, SMAC's Table 1 holds. Networks and helpers are smac_offline_online.py's.

Run: python pearl_online_oracle.py --env-id HopperParam
Its dataset: the same with --online-iterations 50 --save-dataset datasets/HopperParam.npz
"""

import ctypes
import dataclasses
import math
import signal
import sys
import time
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from buffers import InputError, ReplayBuffer, save_dataset  # D and the file of offline data
from buffers import check_flags, claim, load_checkpoint, log_evaluation, print_csv, print_rows  # files of a run
from buffers import restore, save_checkpoint, writing_to


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"
    """a key of envs.SPECS; its row in PRESETS replaces the defaults below"""
    seed: int = 1
    """seed of the networks, of exploration and of sampling"""
    task_seed: int = 1337
    """seed of the task list; 1337 gives the published tasks of Cheetah and Ant"""
    online_iterations: int = 100
    """iterations of collecting data and training on them"""
    save_dataset: Optional[str] = None
    """write the offline dataset to this file after --dataset-iteration iterations"""
    dataset_iteration: int = 40
    """iteration at which the dataset is taken [C.2 and the authors' scripts]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and buffers live"""
    run_dir: str = "runs"
    """results go to RUN_DIR/{env_id}__{script}__{seed}/"""
    resume: Optional[str] = None
    """folder of a run: continue it from its checkpoint, with its flags"""
    eval_every: int = 4_000
    """gradient steps between two evaluations"""
    checkpoint_every: int = 4_000
    """gradient steps between two checkpoints"""
    eval_only: bool = False
    """with --resume: evaluate the checkpoint, print the return on each task, write nothing else"""
    capture_video: bool = False
    """at the end (or with --eval-only) film the three episodes on the first test task: RUN/video.gif"""
    compile: bool = False
    """torch.compile the gradient step; needs a C++ compiler"""
    cuda_graph: bool = True
    """on a GPU, record the gradient step once and replay it"""

    # --- Algorithm
    rl_batch: int = 256
    """transitions a task for critic and actor [Table 1]"""
    context_batch: int = 64
    """transitions a task in a history h [Table 1, encoder batch size]"""
    meta_batch: int = 4
    """tasks a gradient step [Table 1]"""
    q_hidden: tuple[int, ...] = (300, 300, 300)
    """hidden sizes of the Q-functions [Table 1]"""
    policy_hidden: tuple[int, ...] = (300, 300, 300)
    """hidden sizes of the policy [Table 1]"""
    encoder_hidden: tuple[int, ...] = (200, 200, 200)
    """hidden sizes of the encoder [Table 1]"""
    latent_dim: int = 5
    """size of z [Table 1]"""
    gamma: float = 0.99
    """discount [Table 1]"""
    tau: float = 0.005
    """soft target update [Table 1, "eta"]"""
    lr: float = 3e-4
    """Adam's learning rate, all networks [Table 1]"""
    reward_scale: float = 5.0
    """factor on the reward in the Bellman target [Table 2]; the entropy has weight 1"""
    kl_coef: float = 0.4
    """weight of the KL term, a mean over tasks (PEARL: 0.1 on the sum over the meta batch, here 4 tasks)"""
    policy_reg: float = 1e-3
    """weight of the squares of the policy's mean and log standard deviation (PEARL's code)"""
    next_obs_in_context: bool = False
    """the encoder sees s' as well (PEARL: where the dynamics differ from task to task)"""
    initial_steps: int = 2_000
    """transitions of each task before training, z from the prior (PEARL)"""
    tasks_per_iteration: int = 5
    """tasks that collect data in one iteration, one after the other (PEARL)"""
    prior_steps: int = 400
    """new transitions a task with z from the prior (PEARL)"""
    posterior_steps: int = 600
    """new transitions a task with z from the posterior (PEARL)"""
    updates_per_iteration: int = 4_000
    """gradient steps an iteration [Table 1 asks for 4 per new transition]"""
    z_resample: Literal["step", "episode"] = "episode"
    """how often acting draws a new z (PEARL: each episode)"""


# What differs from the defaults above. PointDirection is not in the paper: small networks and a short run.
PRESETS = {
    "HopperParam": dict(next_obs_in_context=True), "WalkerParam": dict(next_obs_in_context=True),
    "CheetahVelocity": dict(dataset_iteration=50),
    "AntDirection": dict(dataset_iteration=100), "HumanoidDirection": dict(dataset_iteration=100),
    "SawyerManipulation": dict(reward_scale=1.0),
    "PointDirection": dict(
        q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), rl_batch=128, lr=1e-3, kl_coef=0.002,
        online_iterations=24, tasks_per_iteration=5, initial_steps=300, prior_steps=150, posterior_steps=250,
        updates_per_iteration=400, eval_every=1_200, checkpoint_every=1_200, dataset_iteration=10,
    ),
}  # fmt: skip
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]
# The transitions of each task that become the dataset, (RL buffer, encoder buffer) [C.2]; None: RL's serve as both.
# PAPER: Ant has an encoder part of 400. CODE: one buffer. The paper does not say for Walker, Hopper, Humanoid.
DATASET_SLICES = {"CheetahVelocity": (("first", 1200), ("last", 400))}
DEFAULT_SLICES = (("last", 1200), None)
MAY_BE_ZERO = "seed task_seed policy_reg kl_coef posterior_steps online_iterations".split()
FREE = "resume device online_iterations eval_only capture_video compile cuda_graph".split()  # of --resume
AT_MOST = {"gamma": 1, "tau": 1, "seed": 2**32, "task_seed": 2**32 - 1}
AT_MOST |= {name: 10_000 for name in vars(Args()) if name.endswith(("_batch", "_hidden", "_dim"))}  # sizes, for memory
EVAL_REPEATS, TRAIN_EVAL_TASKS = 4, 10  # meta-episodes a task in an evaluation; training tasks in it
LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves


# ===== Networks: Table 1 and C.3


def mlp(sizes, last_init=3e-3):
    """ReLU network of the given layer sizes; initial values of rlkit: hidden U(+-1/sqrt(out)), biases 0."""
    layers = []
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        linear = nn.Linear(n_in, n_out)
        bound = last_init if i == len(sizes) - 2 else 1 / math.sqrt(n_out)
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q_phi_e(z | h), the product over h of Gaussian factors Phi(z | s, a, r) (C.3)."""

    def __init__(self, in_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([in_dim, *hidden, 2 * latent_dim])

    def forward(self, context):
        """context h (T, C, in_dim) -> mean and standard deviation of z, (T, dz) each."""
        mu, raw = self.net(context).chunk(2, dim=-1)  # (T, C, dz) each
        # Softplus gives each factor's standard deviation (the authors' code: its variance).
        precision = F.softplus(raw).square().clamp(min=1e-7).reciprocal()  # (T, C, dz)
        variance = precision.sum(1).reciprocal()  # (T, dz)
        return variance * (precision * mu).sum(1), variance.sqrt()


class Policy(nn.Module):
    """pi_theta(a | s, z), a Gaussian squashed by tanh."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + latent_dim, *hidden, 2 * action_dim], last_init=1e-3)

    def forward(self, obs, z):
        """obs (N, o), z (N, dz) -> mean and log standard deviation before tanh, (N, a) each."""
        mean, log_std = self.net(torch.cat([obs, z], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)


class QFunctions(nn.Module):
    """`count` Q-functions Q_w(s, a, z), their weights stacked: one batched product a layer for all."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim, count=2):
        super().__init__()
        nets = [mlp([obs_dim + action_dim + latent_dim, *hidden, 1]) for _ in range(count)]
        layers = [layer for layer in zip(*nets) if isinstance(layer[0], nn.Linear)]
        # A list entry for each layer: weights (count, in, out), biases (count, 1, out)
        self.weights = nn.ParameterList(torch.stack([q.weight.T for q in layer]).detach() for layer in layers)
        self.biases = nn.ParameterList(torch.stack([q.bias[None] for q in layer]).detach() for layer in layers)

    def forward(self, obs, actions, z, frozen=False):
        """obs (N, o), actions (N, a), z (N, dz) -> (count, N). frozen: gradients reach inputs and not weights."""
        x = torch.cat([obs, actions, z], dim=-1).expand(len(self.weights[0]), -1, -1)  # (count, N, o + a + dz)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias.detach(), x, weight.detach()) if frozen else torch.baddbmm(bias, x, weight)
            x = x.relu_() if i < len(self.weights) - 1 else x
        return x.squeeze(-1)


class Agent(nn.Module):
    """All networks, for one optimizer and one checkpoint."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        context_dim = obs_dim + action_dim + 1 + obs_dim * args.next_obs_in_context
        self.encoder = Encoder(context_dim, args.encoder_hidden, args.latent_dim)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, args.latent_dim)
        self.q = QFunctions(obs_dim, action_dim, args.q_hidden, args.latent_dim)
        self.q_target = QFunctions(obs_dim, action_dim, args.q_hidden, args.latent_dim)
        self.q_target.load_state_dict(self.q.state_dict())
        self.q_target.requires_grad_(False)


def make_context(data, args):
    """A history h as the encoder reads it: (s, a, r) or (s, a, r, s') of each transition, (..., in_dim)."""
    names = ["obs", "actions", "rewards"] + ["next_obs"] * args.next_obs_in_context
    return torch.cat([data[name] for name in names], dim=-1)


def tanh_gaussian_log_prob(u, mean, log_std):
    """log density of a = tanh(u) with u ~ N(mean, std): (N, a) each -> (N,)."""
    gaussian = -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - a^2), exact for any u
    return (gaussian - log_derivative).sum(-1)


def kl_to_prior(mu, sigma):
    """D_KL(N(mu, sigma^2) || N(0, 1)), summed over the dimensions of z: (T, dz) each -> (T,)."""
    return 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).sum(-1)


# ===== Losses. T tasks, B transitions a task, N = T * B; all pure functions of networks and data


def sample_action(agent, obs, z, noise):
    """Reparameterised a ~ pi(a | s, z): (N, a), log pi (N,), and mean and log standard deviation before tanh (N, a)."""
    mean, log_std = agent.policy(obs, z)
    u = mean + log_std.exp() * noise
    return torch.tanh(u), tanh_gaussian_log_prob(u, mean, log_std), mean, log_std


def soft_critic_loss(agent, batch, z, args):
    """Soft Bellman error; its gradient trains the encoder too, through z (N, dz). -> loss, Q of both critics (2, N)."""
    with torch.no_grad():
        # y = r + gamma (Q_target(s', a', z) - log pi(a' | s', z)); a fall ends the sum, the time limit does not
        next_actions, next_log_prob, _, _ = sample_action(agent, batch["next_obs"], z, batch["noise_next_a"])
        # PEARL learns V(s, z) and its target network; as in later SAC, target Q-functions take their place.
        next_v = agent.q_target(batch["next_obs"], next_actions, z).amin(0) - next_log_prob  # (N,)
        target = args.reward_scale * batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_v
    q = agent.q(batch["obs"], batch["actions"], z)  # (2, N)
    return (q - target).square().mean(1).sum(), q


def pearl_actor_loss(agent, batch, z, args):
    """L_actor^PEARL: D_KL(pi(a | s, z) || exp Q / Z) up to a constant (C.3). z (N, dz) -> loss, log pi (N,)."""
    actions, log_prob, mean, log_std = sample_action(agent, batch["obs"], z, batch["noise_a"])
    loss = (log_prob - agent.q(batch["obs"], actions, z, frozen=True).amin(0)).mean()
    return loss + args.policy_reg * (mean.square().mean() + log_std.square().mean()), log_prob


def update(agent, optimizer, batch, args):
    """One gradient step of PEARL.

    Args:
        batch: context h (T, C, in_dim); of the second history h': obs, next_obs (T, B, o), actions (T, B, a), rewards,
            terminals (T, B, 1); standard normal noise_z (T, dz), noise_a and noise_next_a (N, a).
    Returns:
        scalars to log, as tensors.
    """
    repeat = batch["obs"].shape[1]
    batch = batch | {name: batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")}  # (N, .)
    batch |= {name: batch[name].flatten() for name in ("rewards", "terminals")}  # (N,)

    # One backward pass: the detached z keeps the actor's loss out of the encoder.
    mu, sigma = agent.encoder(batch["context"])  # (T, dz)
    z = (mu + sigma * batch["noise_z"]).repeat_interleave(repeat, dim=0)  # (N, dz)
    kl = kl_to_prior(mu, sigma).mean()
    l_critic, q = soft_critic_loss(agent, batch, z, args)
    l_actor, log_prob = pearl_actor_loss(agent, batch, z.detach(), args)

    optimizer.zero_grad(set_to_none=True)
    (l_critic + l_actor + args.kl_coef * kl).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)  # soft update
        info = {"losses/critic": l_critic, "losses/actor": l_actor, "losses/kl": kl}
        info |= {"train/q_mean": q.mean(), "train/q_max": q.amax(), "train/policy_entropy": -log_prob.mean()}
        return {name: value.detach() for name, value in info.items()}


def sample_batch(buffer, args, generator):
    """Buffers D_i ~ D, two histories h, h' of each (lines 3, 10 of SMAC's Alg. 1), and all the noise of one update."""
    num_tasks, device = len(buffer.sizes["rl"]), buffer.sizes["rl"].device
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=generator, device=device)
    batch = buffer.sample(tasks, args.rl_batch, generator)
    batch["context"] = make_context(buffer.sample(tasks, args.context_batch, generator, "context"), args)
    batch["noise_z"] = torch.randn(args.meta_batch, args.latent_dim, generator=generator, device=device)
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(batch["actions"].flatten(0, 1).shape, generator=generator, device=device)
    return batch


# ===== Acting: Section 3


@torch.no_grad()
def rollout(env_list, agent, mu, sigma, args, generator, deterministic=False, read_rewards=True):
    """One episode in each environment, in lockstep with one policy call a step.

    Args:
        mu, sigma: (E, dz); z ~ N(mu, sigma^2) is drawn at every step or once (--z-resample).
        deterministic: act with the policy's mean instead of a sample.
        read_rewards: if False the environment's reward is dropped unread, and the trajectories have none.
    Returns:
        E trajectories: obs (L+1, o), actions (L, a), terminals (L,), rewards (L,).
    """
    seeds = torch.randint(2**31 - 1, (len(env_list),), generator=generator).tolist()
    paths = [{"obs": [env.reset(seed=seed)[0]], "actions": [], "terminals": []} for env, seed in zip(env_list, seeds)]
    rewards, live, z, device = [[] for _ in env_list], list(range(len(env_list))), None, mu.device
    while live:
        if z is None or args.z_resample == "step":
            z = mu + sigma * torch.randn(mu.shape, generator=generator).to(device)
        obs = torch.as_tensor(np.stack([paths[i]["obs"][-1] for i in live])).to(device)
        mean, log_std = agent.policy(obs, z[live])
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=generator)
        actions = torch.tanh(mean + log_std.exp() * noise.to(device)).cpu().numpy()
        running = []
        for i, action in zip(live, actions):
            next_obs, reward, terminated, truncated, _ = env_list[i].step(action)
            for name, value in (("obs", next_obs), ("actions", action), ("terminals", terminated)):
                paths[i][name].append(value)
            if read_rewards:
                rewards[i].append(reward)
            if not (terminated or truncated):
                running.append(i)
        live = running
    paths = [{name: np.array(values, np.float32) for name, values in path.items()} for path in paths]
    return [path | {"rewards": np.array(r, np.float32)} for path, r in zip(paths, rewards)] if read_rewards else paths


def concatenate(paths, device):
    """All transitions of some trajectories, as `ReplayBuffer.sample` gives them: obs (L, o), ..., rewards (L, 1)."""
    columns = {"obs": [p["obs"][:-1] for p in paths], "next_obs": [p["obs"][1:] for p in paths]}
    columns |= {"actions": [p["actions"] for p in paths], "rewards": [p["rewards"][:, None] for p in paths]}
    return {name: torch.as_tensor(np.concatenate(parts)).to(device) for name, parts in columns.items()}


def prior(num, args, device):
    """p(z) = N(0, 1): mean and standard deviation, (num, dz) each."""
    return torch.zeros(num, args.latent_dim, device=device), torch.ones(num, args.latent_dim, device=device)


@torch.no_grad()
def adapt(env_list, agent, args, generator):
    """The meta-episode of Section 3, T = 3: two exploration episodes with z ~ p(z), then one with z ~ q(z | both).

    Returns:
        for each of E environments the third trajectory, the two of exploration, and the KL of the posterior (E,).
    """
    # PAPER: adapts between all episodes. CODE: once, before the third, as the authors' code does.
    device = next(agent.parameters()).device
    mu, sigma = prior(len(env_list), args, device)
    exploration = list(zip(*(rollout(env_list, agent, mu, sigma, args, generator) for _ in range(2))))
    contexts = [make_context(concatenate(paths, device), args)[None] for paths in exploration]  # (1, L, in_dim) each
    mu, sigma = (torch.cat(part) for part in zip(*(agent.encoder(context) for context in contexts)))  # (E, dz)
    final = rollout(env_list, agent, mu, sigma, args, generator, deterministic=True)
    return final, exploration, kl_to_prior(mu, sigma).cpu().numpy()


def sum_rewards(paths):
    """Undiscounted returns of E trajectories: (E,)."""
    return np.array([path["rewards"].sum() for path in paths])


@torch.no_grad()
def evaluate(agent, eval_envs, args):
    """Post-adaptation returns, with a generator of its own: evaluating changes nothing in training.

    Args:
        eval_envs: {"test": pairs, "train": pairs}, a pair being (task number, environment), E of them.
    Returns:
        rows (split, context, task numbers, returns, exploration returns: (E,) each), scalars to log, arrays to draw: KL
        values (E,) and, of the Direction families, paths over ground (., L+1, 2) on the training tasks.
    """
    rng, rows, scalars, arrays = torch.Generator().manual_seed(args.seed), [], {}, {}
    for split, pairs in eval_envs.items():  # "train" comes last, and is drawn
        numbers, env_list = zip(*pairs)
        final, exploration, arrays[f"kl_{split}_online_context"] = adapt(env_list, agent, args, rng)
        explored = np.mean([sum_rewards(paths) for paths in zip(*exploration)], axis=0)  # (E,)
        rows.append((split, "online", numbers, sum_rewards(final), explored))
        if args.env_id in envs.SPARSE:
            scalars[f"eval/{split}/online_context_success"] = np.mean([path["rewards"][-1] == 0 for path in final])
    if args.env_id in envs.GROUND_VELOCITY:
        explored_paths = [path for pair in exploration for path in pair]
        for name, paths in (("exploration", explored_paths), ("online context", final)):
            arrays[name] = envs.ground_paths(args.env_id, paths)
    return rows, scalars, arrays


# ===== The run


def parse_args(argv=None):
    """The flags, over the environment's PRESETS row or over the flags of the run to resume. Raises InputError."""
    known, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    defaults = Args(**{"env_id": known.env_id} | PRESETS.get(known.env_id, {}))
    if known.resume:
        defaults = load_checkpoint(known.resume, Args)["args"]
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__)
    check_flags(args, defaults, PRESETS, MAY_BE_ZERO, AT_MOST, FREE)
    return args


def speed_up(device):
    """Make gradient steps on a CPU faster; returns the precision to set for their matrix products, as exact as fp32."""
    # "medium" has faster kernels, on most CPUs true fp32 as well; not where they are less exact.
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    exact = x.double() @ x.double()
    error = ((x @ x - exact).norm() / exact.norm()).item()
    torch.set_float32_matmul_precision("highest")
    # glibc gives large freed blocks back to the system: thousands of page faults in a step. Let it keep them.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD
        for option, size in ((-3, 1 << 25), (-2, 1 << 26), (-1, (1 << 31) - 1)):
            mallopt(option, size)
    return "medium" if error < 1e-5 else "highest"


def write_dataset(buffer, train_tasks, test_tasks, args):
    """Write the offline dataset of C.2: of each task a few transitions, from early in the run."""
    parts = ([], [])  # trajectories for the RL buffer, for the encoder buffer
    for part, source, piece in zip(parts, ("rl", "context"), DATASET_SLICES.get(args.env_id, DEFAULT_SLICES)):
        if piece:
            part += [(task, path) for task in range(len(train_tasks)) for path in buffer.paths(task, *piece, source)]
    # The command, from the flags themselves: sys.argv has none of them if the run was resumed.
    preset, command = vars(Args(**{"env_id": args.env_id} | PRESETS[args.env_id])), ["python", Path(__file__).name]
    for name, value in vars(args).items():
        if value != preset[name] and name != "resume" or name == "env_id":
            words = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            command += [f"--{'no-' if value is False else ''}{name.replace('_', '-')}", *map(str, words)]
    save_dataset(args.save_dataset, args.env_id, train_tasks, test_tasks, *parts, " ".join(command))
    tqdm.write(f"dataset written to {args.save_dataset}")


def cuda_graph(take_step, generator):
    """`take_step` recorded on its fourth call and replayed from then on: one launch in place of hundreds.

    Its tensors must keep their shapes and places, and so do those it returns: each call overwrites them.
    """
    graph, stream, info, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), {}, 0

    def replay():
        nonlocal calls, info
        calls += 1
        if calls <= 3:  # as they are, on a stream of their own, so that libraries allocate what they need
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                info = take_step()
            torch.cuda.current_stream().wait_stream(stream)
            return info
        if calls == 4:
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph):  # records, computes nothing
                info = take_step()
        graph.replay()
        return info

    return replay


def main(args):
    """Train PEARL. Returns the trained agent. Raises InputError."""
    spec = envs.SPECS[args.env_id]
    gpu = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    precision = speed_up(device)
    run = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__{Path(__file__).stem}__{args.seed}")

    if args.save_dataset and args.dataset_iteration > args.online_iterations:
        raise InputError(f"--save-dataset: --dataset-iteration {args.dataset_iteration} comes after the last")
    if args.save_dataset and not Path(args.save_dataset).absolute().parent.is_dir():
        raise InputError(f"--save-dataset {args.save_dataset}: there is no such folder")

    # --- Tasks, networks, environments
    tasks = envs.sample_tasks(args.env_id, spec.num_train_tasks + spec.num_test_tasks, args.task_seed)
    train_tasks, test_tasks = np.split(tasks, [spec.num_train_tasks])
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.lr, fused=True, capturable=gpu)
    visit = args.prior_steps + args.posterior_steps + 2 * spec.horizon  # new transitions of one visit, at most
    capacity = len(train_tasks) * (args.initial_steps + spec.horizon)
    capacity += args.online_iterations * args.tasks_per_iteration * visit
    buffer = ReplayBuffer(len(train_tasks), spec.obs_dim, spec.action_dim, capacity, device)
    env = envs.make(args.env_id)
    eval_envs = envs.make_evaluation(args.env_id, train_tasks, test_tasks, TRAIN_EVAL_TASKS, EVAL_REPEATS)

    # --- State of the run: everything that a checkpoint holds
    act_rng, rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer}
    generators = {"act_rng": act_rng, "rng": rng}
    step, env_steps = 0, 0
    lock = None if args.eval_only else claim(run, args)
    if args.resume:
        step, env_steps = restore(load_checkpoint(run, Args), parts, {} if args.eval_only else generators)

    def film():
        """The meta-episode on the first test task, as a GIF. Raises OSError if this machine can not render."""
        film_rng = torch.Generator().manual_seed(args.seed)
        envs.film(args.env_id, test_tasks[0], lambda env: adapt([env], agent, args, film_rng), run / "video.gif")

    if args.eval_only:
        print_rows(evaluate(agent, eval_envs, args)[0])
        if args.capture_video:
            film()
        return agent
    total_steps = args.online_iterations * args.updates_per_iteration

    writer = SummaryWriter(str(run), purge_step=step + 1)
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_signals.append(number))
    totals, count, since = {}, 0, time.time()

    def collect(task, num_steps, explore):
        """Add new transitions of one training task: z ~ p(z) into both buffers, or z ~ q(z | h) into the RL buffer."""
        nonlocal env_steps
        index, end = torch.tensor([task], device=device), env_steps + num_steps
        mu, sigma = prior(1, args, device)
        env.unwrapped.set_task(train_tasks[task])
        while env_steps < end:  # whole episodes
            if not explore:
                with torch.no_grad():
                    history = buffer.sample(index, args.context_batch, rng, "context")
                    mu, sigma = agent.encoder(make_context(history, args))
            (path,) = rollout([env], agent, mu, sigma, args, act_rng)
            buffer.add(task, path, context=explore)
            env_steps += len(path["actions"])

    def make_step():
        """One gradient step as a function without arguments, the draw of its batch included."""
        fn = torch.compile(update) if args.compile else update

        def take_step():
            # Only here: the faster products keep memory for every shape they meet, and trajectories are of any length.
            torch.set_float32_matmul_precision(precision)
            info = fn(agent, optimizer, sample_batch(buffer, args, rng), args)
            torch.set_float32_matmul_precision("highest")
            return info

        return cuda_graph(take_step, rng) if gpu and args.cuda_graph else take_step

    @writing_to(run)
    def after_update(info, progress):
        """Count a gradient step; log, evaluate and save what is due after it."""
        nonlocal step, totals, count, since
        step, count, stopping = step + 1, count + 1, bool(stop_signals)
        totals = {name: totals.get(name, 0) + value for name, value in info.items()}
        progress.update()
        eval_due = step == total_steps or step % args.eval_every == 0
        save_due = step == total_steps or step % args.checkpoint_every == 0 or stopping
        if step % LOG_EVERY == 0 or eval_due or save_due:
            means = {name: value.item() / count for name, value in totals.items()}
            broken = ", ".join(name for name, value in means.items() if not math.isfinite(value))
            if broken:
                last = f"the last good checkpoint is {run}/checkpoint.pt, if there is one"
                raise InputError(f"{broken} became NaN or infinite before step {step}; {last}")
            for name, value in (means | {"charts/SPS": count / (time.time() - since)}).items():
                writer.add_scalar(name, value, step)
            totals, count = {}, 0
        if eval_due:
            rows, scalars, arrays = evaluate(agent, eval_envs, args)
            returns = log_evaluation(run, writer, step, env_steps, rows, scalars, arrays)
            tqdm.write(f"step {step}, {env_steps} new transitions | return: {returns}")
        if args.save_dataset and step == args.dataset_iteration * args.updates_per_iteration:
            write_dataset(buffer, train_tasks, test_tasks, args)
        if save_due:
            writer.flush()
            save_checkpoint(run, args, step, env_steps, parts, generators)
        if stopping:
            progress.close()
            raise SystemExit(f"stopped after step {step}; continue with: python {Path(__file__).name} --resume {run}")
        if count == 0:
            since = time.time()  # charts/SPS leaves out evaluations and checkpoints

    # ===== Initial data, then collect and train in turns
    if step == 0:
        for task in tqdm(range(len(train_tasks)), desc="initial data", unit="task"):
            collect(task, args.initial_steps, explore=True)
    take_step = make_step()
    with tqdm(total=total_steps, initial=step, desc="PEARL", unit="step") as progress:
        while step < total_steps:
            if step % args.updates_per_iteration == 0:
                # PAPER: 1000 new transitions an iteration, 4 gradient steps for each. CODE: 1000 on each of five tasks,
                # 0.8 gradient steps for each, after 2000 on every task before training.
                drawn = torch.randint(len(train_tasks), (args.tasks_per_iteration,), generator=act_rng)
                for task in drawn.tolist():
                    buffer.clear_context(task)  # h is what the present policy explores
                    collect(task, args.prior_steps, explore=True)
                    collect(task, args.posterior_steps, explore=False)
            after_update(take_step(), progress)

    for opened in (writer, lock, env, *(env for _, env in eval_envs["test"] + eval_envs["train"])):
        opened.close()
    print_csv(run / "eval.csv")
    if args.capture_video:
        film()
    return agent


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
