"""SMAC, semi-supervised meta actor-critic: offline meta-training, then self-supervised meta-training without rewards.

Paper: Pong, Nair, Smith, Huang, Levine, "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022
(https://arxiv.org/abs/2107.03974). The file follows the paper: networks (C.3), losses (Eq. 1 to 4), the meta-episode (Section 3),
Algorithm 1. A departure from the paper's text says `PAPER: ... CODE: ...` at its line; README.md lists them all.

Run: python smac_offline_online.py --env-id HopperParam
"""

import csv
import dataclasses
import difflib
import importlib.metadata
import json
import math
import os
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
from buffers import InputError, ReplayBuffer, fill_from_dataset, load_dataset


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


# What differs from the defaults above. C.2 freezes the encoder buffer on Cheetah. PointDirection is not in the paper: small networks,
# and a KL weight that fits rewards of about .1 to .5.
PRESETS = {
    "HopperParam": dict(),
    "WalkerParam": dict(),
    "CheetahVelocity": dict(encoder_buffer="frozen"),
    "AntDirection": dict(),
    "HumanoidDirection": dict(),
    "PointDirection": dict(
        q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), rl_batch=128, lr=1e-3, kl_coef=0.002, offline_steps=3_000,
        online_iterations=24, tasks_per_iteration=5, prior_steps=150, posterior_steps=250, updates_per_iteration=400,
        eval_every=1_200, checkpoint_every=1_200,
    ),
}  # fmt: skip
POSITIVE = "rl_batch context_batch meta_batch q_hidden policy_hidden encoder_hidden decoder_hidden latent_dim lr awr_lambda".split()
POSITIVE += "eval_every checkpoint_every tasks_per_iteration updates_per_iteration".split()
EVAL_REPEATS, TRAIN_EVAL_TASKS = 4, 10  # meta-episodes a task in an evaluation; training tasks in it
LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves


# ===== Networks: Table 1 and C.3


def mlp(sizes, last_init=3e-3):
    """ReLU network of the given layer sizes. Initial values as in the authors' code: hidden U(+-1/sqrt(out)), biases 0."""
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
        self.weights = nn.ParameterList(torch.stack([q.weight.T for q in pair]).detach() for pair in pairs)  # (2, in, out)
        self.biases = nn.ParameterList(torch.stack([q.bias[None] for q in pair]).detach() for pair in pairs)  # (2, 1, out)

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
    return (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)  # the last term is log(1 - a^2), exact for any u


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
        # PAPER: with the entropy, as here. The authors' code has no log pi term.
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
        batch: context h (T, C, in_dim) and, of the second history h', obs, next_obs (T, B, o), actions (T, B, a), rewards,
            terminals (T, B, 1); standard normal noise_z (T, dz), noise_a, noise_next_a (N, a).
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
    torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)
    with torch.no_grad():
        info = {"losses/critic": l_critic, "losses/actor": l_actor, "losses/reward": error, "losses/kl": kl}
        info |= {"train/q_mean": q.mean(), "train/q_max": q.amax()}
        info["train/actor_weight_ess"] = 1 / weights.square().mean()  # effective sample size over N, as the mean weight is 1
        return {name: value.detach() for name, value in info.items()}


def sample_batch(buffer, args, generator):
    """[Alg. 1, l. 3 and 10] Buffers D_i ~ D, two histories h, h' of each, and all the noise of one update."""
    num_tasks, device = len(buffer.sizes["rl"]), buffer.sizes["rl"].device
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=generator, device=device)
    batch = buffer.sample(tasks, args.rl_batch, generator)
    batch["context"] = make_context(buffer.sample(tasks, args.context_batch, generator, "context"), args)
    action_shape = (args.meta_batch * args.rl_batch, batch["actions"].shape[-1])
    for name, shape in (("noise_z", (args.meta_batch, args.latent_dim)), ("noise_a", action_shape), ("noise_next_a", action_shape)):
        batch[name] = torch.randn(shape, generator=generator, device=device)
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


@torch.no_grad()
def infer_posterior(agent, paths, args):
    """q(z | h), h all transitions of some trajectories: mean and standard deviation, (dz,) each."""
    columns = {"obs": [p["obs"][:-1] for p in paths], "next_obs": [p["obs"][1:] for p in paths]}
    columns |= {"actions": [p["actions"] for p in paths], "rewards": [p["rewards"][:, None] for p in paths]}
    data = {name: torch.as_tensor(np.concatenate(parts)) for name, parts in columns.items()}
    mu, sigma = agent.encoder(make_context(data, args)[None].to(next(agent.parameters()).device))
    return mu[0], sigma[0]


def adapt(env_list, agent, args, generator):
    """The meta-episode of Section 3 with T = 3: two exploration episodes with z ~ p(z), then one with z ~ q(z | both).

    Returns:
        return of the third episode (E,), mean return of the first two (E,), KL of the posterior to the prior (E,), and for
        each environment its two exploration trajectories.
    """
    device = next(agent.parameters()).device
    mu, sigma = torch.zeros(len(env_list), args.latent_dim, device=device), torch.ones(len(env_list), args.latent_dim, device=device)
    exploration = list(zip(*(rollout(env_list, agent, mu, sigma, args, generator) for _ in range(2))))
    mu, sigma = (torch.stack(part) for part in zip(*(infer_posterior(agent, paths, args) for paths in exploration)))
    final = rollout(env_list, agent, mu, sigma, args, generator, deterministic=True)
    returns = np.array([path["rewards"].sum() for path in final])
    explored = np.array([np.mean([path["rewards"].sum() for path in paths]) for paths in exploration])
    return returns, explored, kl_to_prior(mu, sigma).cpu().numpy(), exploration


def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns and diagnostics, with generators of their own: evaluating changes nothing in training.

    Args:
        eval_envs: {"test": environments, "train": environments}, EVAL_REPEATS for each task, train task i being buffer D_i.
    Returns:
        rows (split, context, returns (E,), exploration returns (E,)), scalars to log, KL values to log as histograms (E,).
    """
    device = buffer.sizes["rl"].device
    rng, buffer_rng = torch.Generator().manual_seed(10_000 + args.seed), torch.Generator(device).manual_seed(args.seed)
    rows, scalars, kls = [], {}, {}
    for split, env_list in eval_envs.items():
        returns, explored, kls[f"{split}_online_context"], exploration = adapt(env_list, agent, args, rng)
        rows.append((split, "online", returns, explored))

    # The same training tasks, z ~ q(z | h_offline) instead (Figure 2).
    tasks = torch.arange(len(eval_envs["train"]), device=device) // EVAL_REPEATS
    with torch.no_grad():
        mu, sigma = agent.encoder(make_context(buffer.sample(tasks, args.context_batch, buffer_rng, "offline"), args))  # (E, dz)
    kls["train_offline_context"] = kl_to_prior(mu, sigma).cpu().numpy()
    final = rollout(eval_envs["train"], agent, mu, sigma, args, rng, deterministic=True)
    rows.append(("train", "offline", np.array([path["rewards"].sum() for path in final]), explored))

    # How good is the decoder on offline data, and on the exploration of the training tasks? For us to read, never for training.
    data = buffer.sample(tasks, args.rl_batch, buffer_rng, "offline")
    with torch.no_grad():
        predicted = agent.decoder(data["obs"], data["actions"], mu[:, None].expand(-1, args.rl_batch, -1))
        scalars["eval/decoder_loss_over_reward_variance"] = ((predicted - data["rewards"].squeeze(-1)).square().mean() / data["rewards"].var()).item()
        pairs = [(path, mean) for paths, mean in zip(exploration, mu) for path in paths]
        obs, actions = (torch.as_tensor(np.concatenate(part)).to(device) for part in zip(*((p["obs"][:-1], p["actions"]) for p, _ in pairs)))
        z = torch.cat([mean.expand(len(path["actions"]), -1) for path, mean in pairs])
        true = torch.as_tensor(np.concatenate([path["rewards"] for path, _ in pairs])).to(device)
        error = (agent.decoder(obs, actions, z) - true).square().mean()
    scalars["eval/generated_reward_mse"] = error.item()
    scalars["eval/generated_reward_mse_over_variance"] = (error / true.var()).item()
    for split, context, returns, explored in rows:
        scalars[f"eval/{split}/{context}_context_return"] = float(returns.mean())
    scalars |= {f"eval/{split}/exploration_return": float(explored.mean()) for split, context, _, explored in rows if context == "online"}
    return rows, scalars | {f"eval/kl_{name}": float(kl.mean()) for name, kl in kls.items()}, kls


# ===== The run: flags, checkpoint, eval.csv


def parse_args(argv=None):
    """The flags, over the environment's PRESETS row or over the flags of the run to resume. Raises InputError."""
    known, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    if known.env_id not in PRESETS:
        near = difflib.get_close_matches(known.env_id, PRESETS, n=3, cutoff=0)
        raise InputError(f"--env-id {known.env_id}: there is no such environment, the nearest are {', '.join(near)}")
    defaults = Args(**{"env_id": known.env_id} | PRESETS[known.env_id])
    if known.resume:
        saved = load_checkpoint(known.resume)["args"]
        defaults = Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__)
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if known.resume and value != getattr(defaults, name) and name not in ("resume", "device", "online_iterations"):
            raise InputError(f"{flag} is {getattr(defaults, name)} in the run to resume and can not become {value}")
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, (int, float)) and not (math.isfinite(number) and (number > 0 or number == 0 and name not in POSITIVE)):
                raise InputError(f"{flag} is {number}, it must be {'above' if name in POSITIVE else 'at least'} 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here")
    return args


def load_checkpoint(run):
    """Read RUN/checkpoint.pt; it can not run code. Raises InputError where it is missing or damaged."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}")
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        raise InputError(f"{path} can not be read as a checkpoint ({type(error).__name__})") from None


def use_fast_matmul(device):
    """Allow the faster matrix products ("medium") unless they are less exact than fp32 here. On CPUs they often are fp32, and twice as fast."""
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    exact = x.double() @ x.double()
    if ((x @ x - exact).norm() / exact.norm()).item() > 1e-5:
        torch.set_float32_matmul_precision("highest")


CSV_COLUMNS = ["gradient_step", "env_steps", "split", "context", "task", "return", "exploration_return"]


def start_csv(path, step):
    """Write eval.csv with its header and, of a run to resume, the rows up to `step`: the later ones come again."""
    rows = []
    if step and path.exists():
        with open(path, newline="") as file:
            rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([CSV_COLUMNS, *rows])


def append_csv(path, step, env_steps, rows):
    """One line for each task: the mean over its EVAL_REPEATS meta-episodes."""
    with open(path, "a", newline="") as file:
        for split, context, *columns in rows:
            means = np.stack(columns, -1).reshape(-1, EVAL_REPEATS, 2).mean(1)  # (tasks, 2)
            csv.writer(file).writerows([step, env_steps, split, context, i, f"{r:.4f}", f"{e:.4f}"] for i, (r, e) in enumerate(means))


def print_csv(path):
    """The table at the end of a run: mean over tasks of every evaluation."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    groups = list(dict.fromkeys((row["split"], row["context"]) for row in rows))
    print("\nPost-adaptation return, mean over tasks\n" + f"{'gradient step':>14}{'transitions':>13}" + "".join(f"{s + ', ' + c + ' context':>24}" for s, c in groups))
    for step, env_steps in dict.fromkeys((row["gradient_step"], row["env_steps"]) for row in rows):
        at = [row for row in rows if row["gradient_step"] == step and row["env_steps"] == env_steps]
        means = [np.mean([float(row["return"]) for row in at if (row["split"], row["context"]) == group]) for group in groups]
        print(f"{step:>14}{env_steps:>13}" + "".join(f"{mean:>24.1f}" for mean in means))


def main(args):
    """Algorithm 1. Returns the trained agent. Raises InputError."""
    spec = envs.SPECS[args.env_id]
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    use_fast_matmul(device)
    run = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__{Path(__file__).stem}__{args.seed}")
    checkpoint = load_checkpoint(run) if args.resume else None
    if checkpoint is None and (run / "checkpoint.pt").exists():
        raise InputError(f"{run} holds a run already: continue it with --resume {run}, or choose another --run-dir or --seed")

    # [Alg. 1, l. 1] datasets, networks
    dataset = load_dataset(args.dataset or Path(__file__).parent / "datasets" / f"{args.env_id}.npz", args.env_id, spec)
    train_tasks, test_tasks = dataset["train_tasks"], dataset["test_tasks"]
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=args.lr, fused=True)
    visit = args.prior_steps + args.posterior_steps + 2 * spec.horizon  # transitions of one visit of a task, at most
    capacity = sum(len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"])
    capacity += args.online_iterations * args.tasks_per_iteration * visit
    buffer = ReplayBuffer(len(train_tasks), spec.obs_dim, spec.action_dim, capacity, device)
    env, eval_envs = envs.make(args.env_id), {}
    for split, tasks in (("test", test_tasks), ("train", train_tasks[:TRAIN_EVAL_TASKS])):
        eval_envs[split] = [envs.make(args.env_id) for _ in range(len(tasks) * EVAL_REPEATS)]
        for i, eval_env in enumerate(eval_envs[split]):
            eval_env.unwrapped.set_task(tasks[i // EVAL_REPEATS])
    act_rng, rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    step, env_steps = 0, 0
    total_steps = args.offline_steps + args.online_iterations * args.updates_per_iteration
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        buffer.load_state_dict(checkpoint["buffer"])
        act_rng.set_state(checkpoint["act_rng"])
        rng.set_state(checkpoint["rng"])
        step, env_steps = checkpoint["step"], checkpoint["env_steps"]
    else:
        fill_from_dataset(buffer, dataset)

    run.mkdir(parents=True, exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    (run / "args.json").write_text(json.dumps(vars(args) | {"versions": versions}, indent=1))
    start_csv(run / "eval.csv", step)
    writer = SummaryWriter(str(run), purge_step=step)
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_signals.append(number))

    def collect(task, num_steps, prior):
        """[Alg. 1, l. 7 to 9] Explore one training task, label each trajectory, add it to D_task."""
        nonlocal env_steps
        index, end = torch.tensor([task], device=device), env_steps + num_steps
        mu, sigma = torch.zeros(1, args.latent_dim, device=device), torch.ones(1, args.latent_dim, device=device)  # z ~ p(z)
        env.unwrapped.set_task(train_tasks[task])
        while env_steps < end:  # whole episodes
            if not prior:  # PAPER: z ~ p(z) only. CODE: in three fifths of the transitions z ~ q(z | h).
                with torch.no_grad():
                    mu, sigma = agent.encoder(make_context(buffer.sample(index, args.context_batch, rng, "context"), args))
            path = rollout([env], agent, mu, sigma, args, act_rng, read_rewards=args.oracle_rewards)[0]
            if not args.oracle_rewards:
                # PAPER: D_i drawn anew for the label. CODE: the D_i of the task that was explored.
                h_offline = make_context(buffer.sample(index, args.context_batch, rng, "offline"), args)
                obs, actions = (torch.as_tensor(path[name]).to(device) for name in ("obs", "actions"))
                noise_z = torch.randn(1, args.latent_dim, generator=rng, device=device)
                path["rewards"] = generate_rewards(agent, obs[:-1], actions, h_offline, noise_z)
            buffer.add(task, path, context=args.encoder_buffer == "all" or (prior and args.encoder_buffer == "prior"))
            env_steps += len(path["actions"])

    totals, count, since = {}, 0, time.time()

    def after_update(info, progress):
        """Log, evaluate, save: whatever is due after a gradient step."""
        nonlocal step, totals, count, since
        step, count = step + 1, count + 1
        totals = {name: totals.get(name, 0) + value for name, value in info.items()}
        progress.update()
        last = step in (args.offline_steps, total_steps)
        due = {what: last or step % every == 0 for what, every in (("eval", args.eval_every), ("save", args.checkpoint_every))}
        if step % LOG_EVERY == 0 or any(due.values()) or stop_signals:
            means = {name: value.item() / count for name, value in totals.items()}
            if not all(math.isfinite(value) for value in means.values()):
                broken = ", ".join(name for name, value in means.items() if not math.isfinite(value))
                raise InputError(f"{broken} became NaN or infinite before step {step}; the last good checkpoint is {run}/checkpoint.pt")
            for name, value in (means | {"charts/SPS": count / (time.time() - since)}).items():
                writer.add_scalar(name, value, step)
            totals, count, since = {}, 0, time.time()
        if due["eval"]:
            evaluate_now()
        if due["save"] or stop_signals:
            state = {"args": vars(args) | {"resume": None}, "step": step, "env_steps": env_steps, "act_rng": act_rng.get_state(), "rng": rng.get_state()}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "buffer": buffer.state_dict()}
            torch.save(state, run / "checkpoint.tmp")
            os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")
        if stop_signals:
            progress.close()
            raise SystemExit(f"stopped after step {step}; continue with: python {Path(__file__).name} --resume {run}")
        if due["eval"] or due["save"]:
            since = time.time()  # charts/SPS counts gradient steps and collection

    def evaluate_now():
        rows, scalars, kls = evaluate(agent, buffer, eval_envs, args)
        append_csv(run / "eval.csv", step, env_steps, rows)
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        for name, values in kls.items():
            writer.add_histogram(f"eval/kl_{name}", values, step)
        returns = "  ".join(f"{split}/{context} {returns.mean():.1f}" for split, context, returns, _ in rows)
        tqdm.write(f"step {step}, {env_steps} new transitions | return: {returns} | decoder loss / reward variance "
                   f"{scalars['eval/decoder_loss_over_reward_variance']:.3f}, KL {scalars['eval/kl_train_offline_context']:.2f}")  # fmt: skip

    if step == 0:
        evaluate_now()

    # ===== Offline phase [Alg. 1, l. 2 to 5]
    with tqdm(total=args.offline_steps, initial=min(step, args.offline_steps), desc="offline", unit="step", smoothing=0.02) as progress:
        while step < args.offline_steps:
            batch = sample_batch(buffer, args, rng)  # l. 3
            after_update(update(agent, optimizer, batch, args, online=False), progress)  # l. 4 and 5

    # ===== Self-supervised phase: no rewards from the environment [Alg. 1, l. 6 to 12]
    online_steps = total_steps - args.offline_steps
    with tqdm(total=online_steps, initial=step - args.offline_steps, desc="self-supervised", unit="step", smoothing=0.02) as progress:
        while step < total_steps:
            if (step - args.offline_steps) % args.updates_per_iteration == 0:
                for task in torch.randint(len(train_tasks), (args.tasks_per_iteration,), generator=act_rng).tolist():
                    collect(task, args.prior_steps, prior=True)  # l. 7 to 9
                    collect(task, args.posterior_steps, prior=False)
            batch = sample_batch(buffer, args, rng)  # l. 10
            after_update(update(agent, optimizer, batch, args, online=True), progress)  # l. 11 and 12

    writer.close()
    print_csv(run / "eval.csv")
    return agent


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
