"""SMAC, semi-supervised meta actor-critic: offline meta-training, then self-supervised meta-training without rewards.

Paper: Pong, Nair, Smith, Huang, Levine, "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974. The file has the networks (C.3), the losses (Eq. 1 to 4), the meta-episode (Section 3)
and Algorithm 1. A departure from the paper's text says `PAPER: ... CODE: ...` at its line; README.md lists them all.

Run: python smac_offline_online.py --env-id HopperParam
"""

import ctypes
import dataclasses
import difflib
import importlib.metadata
import json
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
from buffers import InputError, ReplayBuffer, fill_from_dataset, load_dataset  # D and its file
from buffers import append_csv, load_checkpoint, print_csv, restore, save_checkpoint, start_csv  # files of a run


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"
    """a key of envs.SPECS; its row in PRESETS replaces the defaults below"""
    seed: int = 1
    """seed of the networks, of exploration and of sampling"""
    dataset: Optional[str] = None
    """offline dataset; default datasets/{env_id}.npz beside this file"""
    offline_steps: int = 50_000
    """gradient steps of the offline phase [C.3]"""
    online_iterations: int = 50
    """iterations of the self-supervised phase"""
    oracle_rewards: bool = False
    """read the true rewards in the second phase and go on training encoder and decoder: the oracle of Figure 9"""
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
    decoder_hidden: tuple[int, ...] = (64, 64)
    """hidden sizes of the reward decoder [Table 1]"""
    latent_dim: int = 5
    """size of z [Table 1]"""
    gamma: float = 0.99
    """discount [Table 1]"""
    tau: float = 0.005
    """soft target update [Table 1]"""
    lr: float = 3e-4
    """Adam's learning rate, all networks [Table 1]"""
    awr_lambda: float = 100.0
    """lambda of Eq. 2 [Table 2, "AWR beta"]"""
    reward_scale: float = 5.0
    """factor on the reward in the Bellman target [Table 2]"""
    lambda_pearl: float = 1.0
    """weight of the PEARL actor loss in the self-supervised phase [Table 2]"""
    kl_coef: float = 0.1
    """weight of the KL term of Eq. 3 (the authors' code; it must fit the size of the rewards)"""
    next_obs_in_context: bool = False
    """the encoder sees s' as well (Section 3 lists it in h, C.3 does not)"""
    tasks_per_iteration: int = 1
    """tasks that collect data in one iteration"""
    prior_steps: int = 400
    """new transitions a task with z from the prior (the authors' split of the 1000 of C.2)"""
    posterior_steps: int = 600
    """new transitions a task with z from the posterior"""
    updates_per_iteration: int = 4_000
    """gradient steps an iteration [Table 1: 4 for each of 1000 transitions]"""
    z_resample: Literal["step", "episode"] = "step"
    """how often acting draws a new z [Algorithm 1, line 7: z_t ~ p(z)]"""
    encoder_buffer: Literal["prior", "all", "frozen"] = "prior"
    """new data that enter the encoder buffer: exploration with z from the prior, all, or none [C.2]"""


# What differs from the defaults above. C.2 freezes the encoder buffer on Cheetah, and has a single buffer on Sawyer.
# PointDirection is not in the paper: small networks, a short run, and a KL weight that fits rewards of about .1 to .5.
PRESETS = {
    "HopperParam": {}, "WalkerParam": {}, "AntDirection": {}, "HumanoidDirection": {},
    "CheetahVelocity": dict(encoder_buffer="frozen"),
    "SawyerManipulation": dict(awr_lambda=0.3, reward_scale=1.0, lambda_pearl=0.0, encoder_buffer="all"),
    "PointDirection": dict(
        q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), rl_batch=128, lr=1e-3, kl_coef=0.002,
        offline_steps=3_000, online_iterations=24, tasks_per_iteration=5, prior_steps=150, posterior_steps=250,
        updates_per_iteration=400, eval_every=1_200, checkpoint_every=1_200,
    ),
}  # fmt: skip
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]
MAY_BE_ZERO = "seed offline_steps online_iterations lambda_pearl kl_coef prior_steps posterior_steps".split()
AT_MOST = {"gamma": 1, "tau": 1, "seed": 2**32}
EVAL_REPEATS, TRAIN_EVAL_TASKS = 4, 10  # meta-episodes a task in an evaluation; training tasks in it
LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves


# ===== Networks: Table 1 and C.3


def mlp(sizes, last_init=3e-3):
    """ReLU network of the given layer sizes; initial values of the authors' code: hidden U(+-1/sqrt(out)), biases 0."""
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


class Decoder(nn.Module):
    """Reward decoder r_phi_d(s, a, z)."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + action_dim + latent_dim, *hidden, 1])

    def forward(self, obs, actions, z):
        """obs (N, o), actions (N, a), z (N, dz) -> (N,)."""
        return self.net(torch.cat([obs, actions, z], dim=-1)).squeeze(-1)


class Policy(nn.Module):
    """pi_theta(a | s, z), a Gaussian squashed by tanh."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + latent_dim, *hidden, 2 * action_dim], last_init=1e-3)

    def forward(self, obs, z):
        """obs (N, o), z (N, dz) -> mean and log standard deviation before tanh, (N, a) each."""
        mean, log_std = self.net(torch.cat([obs, z], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)


class TwinQ(nn.Module):
    """Two Q-functions Q_w(s, a, z), their weights stacked: one batched product a layer for both."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        nets = [mlp([obs_dim + action_dim + latent_dim, *hidden, 1]) for _ in range(2)]
        pairs = [pair for pair in zip(*nets) if isinstance(pair[0], nn.Linear)]
        # A list entry for each layer: weights (2, in, out), biases (2, 1, out)
        self.weights = nn.ParameterList(torch.stack([q.weight.T for q in pair]).detach() for pair in pairs)
        self.biases = nn.ParameterList(torch.stack([q.bias[None] for q in pair]).detach() for pair in pairs)

    def forward(self, obs, actions, z, frozen=False):
        """obs (N, o), actions (N, a), z (N, dz) -> (2, N). frozen: gradients reach the inputs and not the weights."""
        x = torch.cat([obs, actions, z], dim=-1).expand(2, -1, -1)  # (2, N, o + a + dz)
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
        self.decoder = Decoder(obs_dim, action_dim, args.decoder_hidden, args.latent_dim)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, args.latent_dim)
        self.q = TwinQ(obs_dim, action_dim, args.q_hidden, args.latent_dim)
        self.q_target = TwinQ(obs_dim, action_dim, args.q_hidden, args.latent_dim)
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


def critic_loss(agent, batch, z, args):
    """L_critic (Eq. 1): mean of (Q_w(s, a, z) - y)^2. z (N, dz) -> loss, and Q of both critics (2, N)."""
    with torch.no_grad():
        # y = r + gamma Q_target(s', a', z), a' ~ pi(a' | s', z); a fall ends the sum, the time limit does not
        mean, log_std = agent.policy(batch["next_obs"], z)
        next_actions = torch.tanh(mean + log_std.exp() * batch["noise_next_a"])  # (N, a)
        # PAPER: one Q-function. CODE: two, and the smaller of both in every use.
        next_q = agent.q_target(batch["next_obs"], next_actions, z).amin(0)  # (N,)
        target = args.reward_scale * batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_q
    q = agent.q(batch["obs"], batch["actions"], z)  # (2, N)
    return (q - target).square().mean(1).sum(), q


def actor_loss(agent, batch, z, q, args, lambda_pearl):
    """L_actor (Eq. 2) + lambda_pearl * L_actor^PEARL (C.3). z (N, dz), q (2, N) -> loss, weights of Eq. 2 (N,)."""
    mean, log_std = agent.policy(batch["obs"], z)  # (N, a)
    u = mean + log_std.exp() * batch["noise_a"]
    u = u if lambda_pearl else u.detach()  # only the PEARL loss differentiates through the new action
    q_new = agent.q(batch["obs"], torch.tanh(u), z, frozen=True).amin(0)  # (N,)
    # Eq. 2: maximise exp((Q(s, a, z) - V(s, z)) / lambda) log pi(a | s, z); V is Q at one sampled action.
    # PAPER: V(s', z). CODE: V(s, z), as the paper's next sentence and AWAC have it.
    advantage = (q.amin(0) - q_new).detach()
    # PAPER: exp. CODE: softmax over the batch, times N: the same weights scaled to mean 1, which can not overflow.
    weights = len(advantage) * F.softmax(advantage / args.awr_lambda, dim=0)
    data_u = torch.atanh(batch["actions"].clamp(-1 + 1e-6, 1 - 1e-6))
    loss = -(weights * tanh_gaussian_log_prob(data_u, mean, log_std)).mean()
    if lambda_pearl:  # D_KL(pi(a | s, z) || exp Q / Z), up to a constant
        # As in the text, with log pi, PEARL's entropy; the authors' code leaves it out.
        loss = loss + lambda_pearl * (tanh_gaussian_log_prob(u, mean, log_std) - q_new).mean()
    return loss, weights


def reward_loss(agent, batch, z, mu, sigma, args):
    """L_reward (Eq. 3), on unscaled rewards. z (N, dz), mu, sigma (T, dz) -> loss, squared error, KL."""
    # PAPER: sum over h, KL weight 1. CODE: mean over transitions and tasks, KL weight kl_coef.
    error = (agent.decoder(batch["obs"], batch["actions"], z) - batch["rewards"]).square().mean()
    kl = kl_to_prior(mu, sigma).mean()
    return error + args.kl_coef * kl, error, kl


@torch.no_grad()
def generate_rewards(agent, obs, actions, context, noise_z):
    """Eq. 4: r_generated = r_phi_d(s, a, z), one z ~ q(z | h_offline) for the trajectory.

    obs (L, o), actions (L, a), context h_offline (1, C, in_dim), noise_z (1, dz) -> (L,).
    """
    mu, sigma = agent.encoder(context)
    return agent.decoder(obs, actions, (mu + sigma * noise_z).expand(len(obs), -1))


def update(agent, optimizer, batch, args, online):
    """One gradient step: Algorithm 1, lines 4 and 5 (offline), 11 and 12 (online).

    Args:
        batch: context h (T, C, in_dim); of the second history h': obs, next_obs (T, B, o), actions (T, B, a), rewards,
            terminals (T, B, 1); standard normal noise_z (T, dz), noise_a and noise_next_a (N, a).
        online: self-supervised phase: the PEARL actor loss joins, encoder and decoder stay as they are (Section 5.2).
    Returns:
        scalars to log, as tensors.
    """
    repeat = batch["obs"].shape[1]
    batch = batch | {name: batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")}  # (N, .)
    batch |= {name: batch[name].flatten() for name in ("rewards", "terminals")}  # (N,)
    train_encoder = not online or args.oracle_rewards

    # One backward pass: the detached z keeps the losses of critic and actor out of the encoder.
    with torch.set_grad_enabled(train_encoder):
        mu, sigma = agent.encoder(batch["context"])  # (T, dz)
        z = (mu + sigma * batch["noise_z"]).repeat_interleave(repeat, dim=0)  # (N, dz)
        l_reward, error, kl = reward_loss(agent, batch, z, mu, sigma, args)
    l_critic, q = critic_loss(agent, batch, z.detach(), args)
    l_actor, weights = actor_loss(agent, batch, z.detach(), q, args, args.lambda_pearl if online else 0.0)

    optimizer.zero_grad(set_to_none=True)  # the optimizer skips a frozen network, whose gradient is None
    (l_critic + l_actor + l_reward if train_encoder else l_critic + l_actor).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)  # soft update
        info = {"losses/critic": l_critic, "losses/actor": l_actor, "losses/reward": error, "losses/kl": kl}
        info |= {"train/q_mean": q.mean(), "train/q_max": q.amax()}
        info["train/actor_weight_ess"] = 1 / weights.square().mean()  # effective sample size / N: the mean weight is 1
        return {name: value.detach() for name, value in info.items()}


def sample_batch(buffer, args, generator):
    """[Alg. 1, l. 3 and 10] Buffers D_i ~ D, two histories h, h' of each, and all the noise of one update."""
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
        return of the third episode (E,), mean return of the first two (E,), KL of the posterior to the prior (E,), and
        the two exploration trajectories of each environment.
    """
    device = next(agent.parameters()).device
    mu, sigma = prior(len(env_list), args, device)
    exploration = list(zip(*(rollout(env_list, agent, mu, sigma, args, generator) for _ in range(2))))
    contexts = [make_context(concatenate(paths, device), args)[None] for paths in exploration]  # (1, L, in_dim) each
    mu, sigma = (torch.cat(part) for part in zip(*(agent.encoder(context) for context in contexts)))  # (E, dz)
    final = rollout(env_list, agent, mu, sigma, args, generator, deterministic=True)
    returns = np.array([path["rewards"].sum() for path in final])
    explored = np.array([sum(path["rewards"].sum() for path in paths) / 2 for paths in exploration])
    return returns, explored, kl_to_prior(mu, sigma).cpu().numpy(), exploration


def make_eval_envs(args, train_tasks, test_tasks):
    """{"test": all test tasks, "train": TRAIN_EVAL_TASKS training tasks}, as pairs (task number, environment)."""
    # Evenly spaced in sorted order: ten directions drawn at random would favour policies that ignore the task.
    middles = (np.arange(TRAIN_EVAL_TASKS) + 0.5) / TRAIN_EVAL_TASKS * len(train_tasks)
    spaced = np.unique(np.argsort(train_tasks[:, 0])[middles.astype(int)])
    pairs = {"test": [], "train": []}
    for split, tasks, numbers in (("test", test_tasks, range(len(test_tasks))), ("train", train_tasks, spaced)):
        for number in np.repeat(numbers, EVAL_REPEATS).tolist():
            pairs[split].append((number, envs.make(args.env_id)))
            pairs[split][-1][1].unwrapped.set_task(tasks[number])
    return pairs


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns and diagnostics, with generators of their own: evaluating changes nothing in training.

    Args:
        eval_envs: {"test": pairs, "train": pairs}, a pair being (task number, environment), E of them.
    Returns:
        rows (split, context, returns (E,), exploration returns (E,)), scalars to log, KL values (E,) for histograms.
    """
    device = buffer.sizes["rl"].device
    rng, buffer_rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    rows, kls, scalars = [], {}, {}
    for split, pairs in eval_envs.items():  # "train" comes last, and is used below
        env_list = [env for _, env in pairs]
        returns, explored, kls[f"{split}_online_context"], exploration = adapt(env_list, agent, args, rng)
        rows.append((split, "online", returns, explored))
        scalars[f"eval/{split}/exploration_return"] = explored.mean()

    # The same training tasks with z ~ q(z | h_offline) instead (Figure 2)
    tasks = torch.tensor([task for task, _ in eval_envs["train"]], device=device)  # (E,)
    h_offline = make_context(buffer.sample(tasks, args.context_batch, buffer_rng, "offline"), args)
    mu, sigma = agent.encoder(h_offline)  # (E, dz)
    kls["train_offline_context"] = kl_to_prior(mu, sigma).cpu().numpy()
    final = rollout(env_list, agent, mu, sigma, args, rng, deterministic=True)
    rows.append(("train", "offline", np.array([path["rewards"].sum() for path in final]), explored))

    # Decoder against true rewards, on offline data and on this exploration: for us to read, never for training
    data = buffer.sample(tasks, args.rl_batch, buffer_rng, "offline")
    lengths = torch.tensor([sum(len(path["actions"]) for path in paths) for paths in exploration], device=device)
    explored_data = concatenate([path for paths in exploration for path in paths], device)
    for name, batch, z in (
        ("decoder_loss", {k: v.flatten(0, 1) for k, v in data.items()}, mu.repeat_interleave(args.rl_batch, 0)),
        ("generated_reward_mse", explored_data, mu.repeat_interleave(lengths, 0)),
    ):
        error = agent.decoder(batch["obs"], batch["actions"], z) - batch["rewards"].squeeze(-1)
        scalars[f"eval/{name}"] = error.square().mean()
        scalars[f"eval/{name}_over_reward_variance"] = scalars[f"eval/{name}"] / batch["rewards"].var()
    scalars |= {f"eval/{split}/{context}_context_return": returns.mean() for split, context, returns, _ in rows}
    scalars |= {f"eval/kl_{name}": kl.mean() for name, kl in kls.items()}
    return rows, {name: float(value) for name, value in scalars.items()}, kls


# ===== The run


def parse_args(argv=None):
    """The flags, over the environment's PRESETS row or over the flags of the run to resume. Raises InputError."""
    known, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    if known.env_id not in PRESETS:
        near = difflib.get_close_matches(known.env_id, PRESETS, n=3, cutoff=0)
        raise InputError(f"--env-id {known.env_id}: there is no such environment, the nearest are {', '.join(near)}")
    defaults = Args(**{"env_id": known.env_id} | PRESETS[known.env_id])
    if known.resume:
        defaults = load_checkpoint(known.resume, Args)["args"]
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__)
    for name, value in vars(args).items():
        flag, old = "--" + name.replace("_", "-"), getattr(defaults, name)
        if known.resume and value != old and name not in ("resume", "device", "online_iterations"):
            raise InputError(f"{flag} is {old} in the run to resume and can not become {value}")
        numbers = [n for n in (value if isinstance(value, tuple) else [value]) if type(n) in (int, float)]
        low, high = "at least" if name in MAY_BE_ZERO else "above", AT_MOST.get(name, math.inf)
        if not all((0 < n or n == 0 and name in MAY_BE_ZERO) and n <= high and math.isfinite(n) for n in numbers):
            bound = f" and at most {high}" if name in AT_MOST else ""
            raise InputError(f"{flag} is {value}, it must be {low} 0{bound}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here")
    return args


def speed_up(device):
    """Settings of the process that make a gradient step on a CPU faster, at the precision of fp32."""
    # Faster matrix products ("medium"), on most CPUs true fp32 as well; not where they are less exact.
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    exact = x.double() @ x.double()
    if ((x @ x - exact).norm() / exact.norm()).item() > 1e-5:
        torch.set_float32_matmul_precision("highest")
    # glibc gives large freed blocks back to the system: thousands of page faults in a step. Let it keep them.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD
        for option, size in ((-3, 1 << 25), (-2, 1 << 26), (-1, (1 << 31) - 1)):
            mallopt(option, size)


def main(args):
    """Algorithm 1. Returns the trained agent. Raises InputError."""
    spec = envs.SPECS[args.env_id]
    gpu = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    speed_up(device)
    run = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__{Path(__file__).stem}__{args.seed}")
    if not args.resume and (run / "checkpoint.pt").exists():
        raise InputError(f"{run} holds a run: continue it with --resume {run}, or choose another --run-dir or --seed")

    # --- [Alg. 1, l. 1] Datasets D_i, networks, environments
    default_file = Path(__file__).parent / "datasets" / f"{args.env_id}.npz"
    dataset = load_dataset(args.dataset or default_file, args.env_id, spec)
    train_tasks, test_tasks = dataset["train_tasks"], dataset["test_tasks"]
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=args.lr, fused=True)
    visit = args.prior_steps + args.posterior_steps + 2 * spec.horizon  # new transitions of one visit, at most
    capacity = sum(len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"])
    capacity += args.online_iterations * args.tasks_per_iteration * visit
    buffer = ReplayBuffer(len(train_tasks), spec.obs_dim, spec.action_dim, capacity, device)
    fill_from_dataset(buffer, dataset)
    env, eval_envs = envs.make(args.env_id), make_eval_envs(args, train_tasks, test_tasks)

    # --- State of the run: everything that a checkpoint holds
    act_rng, rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer}
    generators = {"act_rng": act_rng, "rng": rng}
    step, env_steps = 0, 0
    if args.resume:
        step, env_steps = restore(load_checkpoint(run, Args), parts, generators)
    total_steps = args.offline_steps + args.online_iterations * args.updates_per_iteration

    run.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "numpy", "gymnasium", "mujoco", "pybullet")
    versions = {name: importlib.metadata.version(name) for name in packages}
    (run / "args.json").write_text(json.dumps(vars(args) | {"versions": versions}, indent=1))
    start_csv(run / "eval.csv", step)
    writer = SummaryWriter(str(run), purge_step=step)
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_signals.append(number))
    totals, count, since = {}, 0, time.time()

    def collect(task, num_steps, explore):
        """[Alg. 1, l. 7 to 9] Explore one training task, label each trajectory, add it to D_task."""
        nonlocal env_steps
        index, end = torch.tensor([task], device=device), env_steps + num_steps
        mu, sigma = prior(1, args, device)
        env.unwrapped.set_task(train_tasks[task])
        while env_steps < end:  # whole episodes
            if not explore:
                # PAPER: z ~ p(z) only. CODE: z ~ q(z | h) in 600 of 1000 transitions, which enter the RL buffer only.
                with torch.no_grad():
                    history = buffer.sample(index, args.context_batch, rng, "context")
                    mu, sigma = agent.encoder(make_context(history, args))
            (path,) = rollout([env], agent, mu, sigma, args, act_rng, read_rewards=args.oracle_rewards)
            if not args.oracle_rewards:
                # PAPER: D_i drawn anew for the label. CODE: D_i of the task that was explored.
                h_offline = make_context(buffer.sample(index, args.context_batch, rng, "offline"), args)
                obs, actions = (torch.as_tensor(path[name]).to(device) for name in ("obs", "actions"))
                noise_z = torch.randn(1, args.latent_dim, generator=rng, device=device)
                path["rewards"] = generate_rewards(agent, obs[:-1], actions, h_offline, noise_z)
            in_context = args.encoder_buffer == "all" or explore and args.encoder_buffer == "prior"
            buffer.add(task, path, context=in_context)
            env_steps += len(path["actions"])

    def after_update(info, progress):
        """Count a gradient step; log, evaluate and save what is due after it."""
        nonlocal step, totals, count, since
        step, count, stopping = step + 1, count + 1, bool(stop_signals)
        totals = {name: totals.get(name, 0) + value for name, value in info.items()}
        progress.update()
        phase_ends = step in (args.offline_steps, total_steps)
        eval_due = phase_ends or step % args.eval_every == 0
        save_due = phase_ends or step % args.checkpoint_every == 0 or stopping
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
            rows, scalars, kls = evaluate(agent, buffer, eval_envs, args)
            append_csv(run / "eval.csv", step, env_steps, rows, eval_envs, EVAL_REPEATS)
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            for name, values in kls.items():
                writer.add_histogram(f"eval/kl_{name}", values, step)
            returns = ", ".join(f"{split} ({context} context) {r.mean():.1f}" for split, context, r, _ in rows)
            tqdm.write(f"step {step}, {env_steps} new transitions | return: {returns}")
        if save_due:
            save_checkpoint(run, args, step, env_steps, parts, generators)
        if stopping:
            progress.close()
            raise SystemExit(f"stopped after step {step}; continue with: python {Path(__file__).name} --resume {run}")
        if count == 0:
            since = time.time()  # charts/SPS leaves out evaluations and checkpoints

    # ===== Offline phase [Alg. 1, l. 2 to 5]
    with tqdm(total=args.offline_steps, initial=min(step, args.offline_steps), desc="offline", unit="step") as progress:
        while step < args.offline_steps:
            batch = sample_batch(buffer, args, rng)  # l. 3
            after_update(update(agent, optimizer, batch, args, online=False), progress)  # l. 4, 5

    # ===== Self-supervised phase, without rewards from the environment [Alg. 1, l. 6 to 12]
    online_total, done = total_steps - args.offline_steps, step - args.offline_steps
    with tqdm(total=online_total, initial=done, desc="self-supervised", unit="step") as progress:
        while step < total_steps:
            if (step - args.offline_steps) % args.updates_per_iteration == 0:
                drawn = torch.randint(len(train_tasks), (args.tasks_per_iteration,), generator=act_rng)
                for task in drawn.tolist():
                    collect(task, args.prior_steps, explore=True)  # l. 7 to 9
                    collect(task, args.posterior_steps, explore=False)
            batch = sample_batch(buffer, args, rng)  # l. 10
            after_update(update(agent, optimizer, batch, args, online=True), progress)  # l. 11, 12

    writer.close()
    print_csv(run / "eval.csv")
    return agent


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
