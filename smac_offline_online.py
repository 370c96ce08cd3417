"""SMAC, semi-supervised meta actor-critic: offline meta-training, then self-supervised meta-training without rewards.

Paper: Pong, Nair, Smith, Huang, Levine, "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974. The file has the networks (C.3), the losses (Eq. 1 to 4), the meta-episode (Section 3)
and Algorithm 1. A departure from the paper's text says `PAPER: ... CODE: ...` at its line; README.md lists them all.

Run: python smac_offline_online.py --env-id HopperParam
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
from buffers import InputError, ReplayBuffer, fill_from_dataset, load_dataset  # D and its file
from buffers import check_flags, claim, load_checkpoint, log_evaluation, print_csv, print_rows  # files of a run
from buffers import restore, save_checkpoint, writing_to


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
    decoder_hidden: tuple[int, ...] = (64, 64)
    """hidden sizes of the reward decoder [Table 1]"""
    latent_dim: int = 5
    """size of z [Table 1]"""
    num_critics: Literal[1, 2] = 2
    """Q-functions: one as in the text, or two, of which the smaller counts (the authors' code)"""
    gamma: float = 0.99
    """discount [Table 1]"""
    tau: float = 0.005
    """soft target update [Table 1, "eta"]"""
    lr: float = 3e-4
    """Adam's learning rate, all networks [Table 1]"""
    awr_lambda: float = 100.0
    """lambda of Eq. 2 [Table 2, "AWR beta"]"""
    awr_weights: Literal["softmax", "exp"] = "softmax"
    """weights of Eq. 2 over a batch: scaled to mean 1 (the authors' code), or as in the text, but at most 20"""
    reward_scale: float = 5.0
    """factor on the reward in the Bellman target [Table 2]"""
    lambda_pearl: float = 1.0
    """weight of the PEARL actor loss in the self-supervised phase [Table 2]"""
    kl_coef: float = 0.1
    """weight of the KL term of Eq. 3 (the authors' code; it must fit the size of the rewards)"""
    next_obs_in_context: bool = False
    """the encoder sees s' as well (Section 3 lists it in h, C.3 does not)"""
    tasks_per_iteration: int = 5
    """tasks that collect data in one iteration, one after the other (the authors' code)"""
    prior_steps: int = 400
    """new transitions a task with z from the prior (the authors' split of the 1000 of C.2)"""
    posterior_steps: int = 600
    """new transitions a task with z from the posterior"""
    updates_per_iteration: int = 4_000
    """gradient steps an iteration (the authors' code; Table 1 asks for 4 per new transition)"""
    z_resample: Literal["step", "episode"] = "step"
    """how often acting draws a new z [Algorithm 1, line 7: z_t ~ p(z)]"""
    encoder_buffer: Literal["prior", "all", "frozen"] = "prior"
    """new data that enter the encoder buffer: exploration with z from the prior, all, or none [C.2]"""

    # --- Ablations and oracle of the paper
    oracle_rewards: bool = False
    """read the true rewards in the second phase and go on training encoder and decoder: the oracle of Figure 9"""
    explore_tasks: Literal["train", "test"] = "train"
    """tasks in which the second phase collects data [Figure 9 compares both]"""
    actor_ablation: bool = False
    """PEARL's actor loss, weight 1, in place of Eq. 2, in both phases [Figure 5, "SMAC (actor ablation)"]"""
    encoder_loss: Literal["reward", "reward_then_q", "q"] = "reward"
    """what trains the encoder, beside the KL: Eq. 3; Eq. 3 and Q-loss offline, then Q-loss; Q-loss only [Figure 7]"""


# What differs from the defaults above. C.2 freezes the encoder buffer on Cheetah, and has a single buffer on Sawyer.
# The KL weight must fit the rewards. Sawyer's are 0 or -1: 0.1 leaves the latent empty, and Eq. 3 is taken as written,
# a sum over 256 transitions. PointDirection, not in the paper, has rewards of .1 to .5; small networks, a short run.
PRESETS = {
    "HopperParam": {}, "WalkerParam": {}, "AntDirection": {}, "HumanoidDirection": {},
    "CheetahVelocity": dict(encoder_buffer="frozen"),
    "SawyerManipulation": dict(
        awr_lambda=0.3, awr_weights="exp", reward_scale=1.0, lambda_pearl=0.0, kl_coef=1 / 256, encoder_buffer="all",
        num_critics=1, tasks_per_iteration=1,
    ),
    "PointDirection": dict(
        q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), rl_batch=128, lr=1e-3, kl_coef=0.002,
        offline_steps=3_000, online_iterations=24, tasks_per_iteration=5, prior_steps=150, posterior_steps=250,
        updates_per_iteration=400, eval_every=1_200, checkpoint_every=1_200,
    ),
}  # fmt: skip
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]
MAY_BE_ZERO = "seed offline_steps online_iterations lambda_pearl kl_coef posterior_steps".split()
FREE = "resume device online_iterations eval_only capture_video compile cuda_graph".split()  # of --resume
AT_MOST = {"gamma": 1, "tau": 1, "seed": 2**32}
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
        self.decoder = Decoder(obs_dim, action_dim, args.decoder_hidden, args.latent_dim)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, args.latent_dim)
        sizes = obs_dim, action_dim, args.q_hidden, args.latent_dim, args.num_critics
        self.q, self.q_target = QFunctions(*sizes), QFunctions(*sizes)
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
    """L_critic (Eq. 1): mean of (Q_w(s, a, z) - y)^2. z (N, dz) -> loss, and Q of the critics (num_critics, N)."""
    with torch.no_grad():
        # y = r + gamma Q_target(s', a', z), a' ~ pi(a' | s', z); a fall ends the sum, the time limit does not
        mean, log_std = agent.policy(batch["next_obs"], z)
        next_actions = torch.tanh(mean + log_std.exp() * batch["noise_next_a"])  # (N, a)
        # PAPER: one Q-function. CODE: two, and the smaller of both in every use; one on Sawyer.
        next_q = agent.q_target(batch["next_obs"], next_actions, z).amin(0)  # (N,)
        target = args.reward_scale * batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_q
    q = agent.q(batch["obs"], batch["actions"], z)  # (num_critics, N)
    return (q - target).square().mean(1).sum(), q


def actor_loss(agent, batch, z, q, args, lambda_pearl):
    """L_actor (Eq. 2) + lambda_pearl * L_actor^PEARL (C.3). z (N, dz), q as above -> loss, weights of Eq. 2 (N,)."""
    mean, log_std = agent.policy(batch["obs"], z)  # (N, a)
    u = mean + log_std.exp() * batch["noise_a"]
    u = u if lambda_pearl else u.detach()  # only the PEARL loss differentiates through the new action
    q_new = agent.q(batch["obs"], torch.tanh(u), z, frozen=True).amin(0)  # (N,)
    # Eq. 2: maximise exp((Q(s, a, z) - V(s, z)) / lambda) log pi(a | s, z); V is Q at one sampled action.
    # PAPER: V(s', z). CODE: V(s, z), as the paper's next sentence and AWAC have it.
    advantage = (q.amin(0) - q_new).detach()
    # PAPER: exp. CODE: softmax over the batch, times N: the same weights scaled to mean 1, which can not overflow. On
    # Sawyer they leave only a few of N samples, and it is exp, at most 20.
    scaled = advantage / args.awr_lambda  # (N,)
    softmax = args.awr_weights == "softmax"
    weights = len(scaled) * F.softmax(scaled, dim=0) if softmax else scaled.exp().clamp(max=20)
    data_u = torch.atanh(batch["actions"].clamp(-1 + 1e-6, 1 - 1e-6))
    loss = 0.0 if args.actor_ablation else -(weights * tanh_gaussian_log_prob(data_u, mean, log_std)).mean()
    if lambda_pearl:  # D_KL(pi(a | s, z) || exp Q / Z), up to a constant
        # As in the text, with log pi, PEARL's entropy; the authors' code leaves it out.
        loss = loss + lambda_pearl * (tanh_gaussian_log_prob(u, mean, log_std) - q_new).mean()
    return loss, weights


def reward_loss(agent, batch, z):
    """The squared error of L_reward (Eq. 3), on unscaled rewards; `update` adds the KL. z (N, dz) -> scalar."""
    # PAPER: sum over h, KL weight 1. CODE: mean over transitions and tasks, KL weight kl_coef.
    return (agent.decoder(batch["obs"], batch["actions"], z) - batch["rewards"]).square().mean()


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
    # Who trains: Section 5.2, and the ablations of Figures 5 and 7
    train_decoder = not online or args.oracle_rewards
    q_to_encoder = args.encoder_loss != "reward"
    reward_to_encoder = args.encoder_loss == "reward" or args.encoder_loss == "reward_then_q" and not online
    lambda_pearl = 1.0 if args.actor_ablation else args.lambda_pearl * online
    repeat = batch["obs"].shape[1]
    batch = batch | {name: batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")}  # (N, .)
    batch |= {name: batch[name].flatten() for name in ("rewards", "terminals")}  # (N,)

    # One backward pass: a detached z keeps a loss out of the encoder.
    with torch.set_grad_enabled(train_decoder or q_to_encoder):
        mu, sigma = agent.encoder(batch["context"])  # (T, dz)
        kl = kl_to_prior(mu, sigma).mean()
        z = (mu + sigma * batch["noise_z"]).repeat_interleave(repeat, dim=0)  # (N, dz)
    with torch.set_grad_enabled(train_decoder):
        l_reward = reward_loss(agent, batch, z if reward_to_encoder else z.detach())
    l_critic, q = critic_loss(agent, batch, z if q_to_encoder else z.detach(), args)
    l_actor, weights = actor_loss(agent, batch, z.detach(), q, args, lambda_pearl)

    optimizer.zero_grad(set_to_none=True)  # the optimizer skips a frozen network, whose gradient is None
    (l_critic + l_actor + l_reward + args.kl_coef * kl).backward()  # where nothing trains, a term is a constant
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)  # soft update
        info = {"losses/critic": l_critic, "losses/actor": l_actor, "losses/reward": l_reward, "losses/kl": kl}
        info |= {"train/q_mean": q.mean(), "train/q_max": q.amax()}
        info["train/actor_weight_ess"] = weights.mean().square() / weights.square().mean()  # effective sample size / N
        return {name: value.detach() for name, value in info.items()}


def sample_batch(buffer, args, generator):
    """[Alg. 1, l. 3 and 10] Buffers D_i ~ D, two histories h, h' of each, and all the noise of one update."""
    filled, device = buffer.sizes["context"] > 0, buffer.sizes["context"].device
    draws = torch.rand(args.meta_batch, len(filled), generator=generator, device=device)
    tasks = (draws * filled).argmax(1)  # (T,), uniform over the tasks that have data
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
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns and diagnostics, with generators of their own: evaluating changes nothing in training.

    Args:
        eval_envs: {"test": pairs, "train": pairs}, a pair being (task number, environment), E of them.
    Returns:
        rows (split, context, task numbers, returns, exploration returns: (E,) each), scalars to log, arrays to draw: KL
        values (E,) for Figure 2 and, of the Direction families, paths over ground (., L+1, 2) for Figures 6 and 8.
    """
    device = buffer.sizes["rl"].device
    rng, buffer_rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    rows, scalars, arrays, scored = [], {}, {}, {}
    for split, pairs in eval_envs.items():  # "train" comes last, and is used below
        numbers, env_list = zip(*pairs)
        final, exploration, arrays[f"kl_{split}_online_context"] = adapt(env_list, agent, args, rng)
        explored = np.mean([sum_rewards(paths) for paths in zip(*exploration)], axis=0)  # (E,)
        rows.append((split, "online", numbers, sum_rewards(final), explored))
        scored[f"{split}/online"] = final

    # The same training tasks with z ~ q(z | h_offline) instead (Figure 2), h as long as it is online, on average: each
    # transition more makes the posterior narrower.
    tasks = torch.tensor(numbers, device=device)  # (E,)
    lengths = torch.tensor([sum(len(path["actions"]) for path in pair) for pair in exploration], device=device)  # (E,)
    h_offline = make_context(buffer.sample(tasks, round(lengths.float().mean().item()), buffer_rng, "offline"), args)
    mu, sigma = agent.encoder(h_offline)  # (E, dz)
    arrays["kl_train_offline_context"] = kl_to_prior(mu, sigma).cpu().numpy()
    final_offline = rollout(env_list, agent, mu, sigma, args, rng, deterministic=True)
    rows.append(("train", "offline", numbers, sum_rewards(final_offline), explored))
    scored["train/offline"] = final_offline

    # Decoder against true rewards, on offline data and on this exploration: for us to read, never for training
    offline = buffer.sample(tasks, args.rl_batch, buffer_rng, "offline")
    explored_paths = [path for pair in exploration for path in pair]
    for name, batch, z in (
        ("decoder_loss", {k: v.flatten(0, 1) for k, v in offline.items()}, mu.repeat_interleave(args.rl_batch, 0)),
        ("generated_reward_mse", concatenate(explored_paths, device), mu.repeat_interleave(lengths, 0)),
    ):
        error = agent.decoder(batch["obs"], batch["actions"], z) - batch["rewards"].squeeze(-1)
        scalars[f"eval/{name}"] = error.square().mean().item()
        scalars[f"eval/{name}_over_reward_variance"] = (error.square().mean() / batch["rewards"].var()).item()

    if args.env_id in envs.SPARSE:
        for name, paths in scored.items():
            scalars[f"eval/{name}_context_success"] = np.mean([path["rewards"][-1] == 0 for path in paths])
    if args.env_id in envs.GROUND_VELOCITY:
        data = [path for task in set(numbers) for path in buffer.offline_paths(task)]
        groups = {"offline data": data, "exploration": explored_paths, "offline context": final_offline}
        for name, paths in (groups | {"online context": final}).items():
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
    """Algorithm 1. Returns the trained agent. Raises InputError."""
    spec = envs.SPECS[args.env_id]
    gpu = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    precision = speed_up(device)
    run = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__{Path(__file__).stem}__{args.seed}")

    # --- [Alg. 1, l. 1] Datasets D_i, networks, environments
    default_file = Path(__file__).parent / "datasets" / f"{args.env_id}.npz"
    env = envs.make(args.env_id)
    dataset = load_dataset(args.dataset or default_file, args.env_id, spec, env.unwrapped.set_task)
    train_tasks, test_tasks = dataset["train_tasks"], dataset["test_tasks"]
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.lr, fused=True, capturable=gpu)
    explored_tasks = train_tasks if args.explore_tasks == "train" else test_tasks
    own_buffers = len(test_tasks) * (args.explore_tasks == "test" and args.oracle_rewards)  # D_i with true rewards
    visit = args.prior_steps + args.posterior_steps + 2 * spec.horizon  # new transitions of one visit, at most
    capacity = sum(len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"])
    capacity += args.online_iterations * args.tasks_per_iteration * visit
    buffer = ReplayBuffer(len(train_tasks) + own_buffers, spec.obs_dim, spec.action_dim, capacity, device)
    fill_from_dataset(buffer, dataset)
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
        print_rows(evaluate(agent, buffer, eval_envs, args)[0])
        if args.capture_video:
            film()
        return agent
    total_steps = args.offline_steps + args.online_iterations * args.updates_per_iteration

    writer = SummaryWriter(str(run), purge_step=step + 1)
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_signals.append(number))
    totals, count, since = {}, 0, time.time()

    def collect(task, num_steps, explore):
        """[Alg. 1, l. 7 to 9] Explore one task, label each trajectory, add it to D_i."""
        nonlocal env_steps
        end = env_steps + num_steps
        mu, sigma = prior(1, args, device)
        env.unwrapped.set_task(explored_tasks[task])
        while env_steps < end:  # whole episodes
            # PAPER: D_i drawn anew for each trajectory. CODE: D_i of the training task that is explored.
            i = task
            if args.explore_tasks == "test":  # which has no offline data: as in the text, or its own D_i (true rewards)
                drawn = torch.randint(len(train_tasks), (), generator=act_rng)
                i = len(train_tasks) + task if args.oracle_rewards else int(drawn)
            index = torch.tensor([i], device=device)
            if not explore:
                # PAPER: z ~ p(z) only. CODE: z ~ q(z | h) in 600 of 1000 transitions, for the RL buffer (Sawyer: both).
                with torch.no_grad():
                    history = buffer.sample(index, args.context_batch, rng, "context")
                    mu, sigma = agent.encoder(make_context(history, args))
            (path,) = rollout([env], agent, mu, sigma, args, act_rng, read_rewards=args.oracle_rewards)
            if not args.oracle_rewards:
                h_offline = make_context(buffer.sample(index, args.context_batch, rng, "offline"), args)
                obs, actions = (torch.as_tensor(path[name]).to(device) for name in ("obs", "actions"))
                noise_z = torch.randn(1, args.latent_dim, generator=rng, device=device)
                path["rewards"] = generate_rewards(agent, obs[:-1], actions, h_offline, noise_z)
            in_context = args.encoder_buffer == "all" or explore and args.encoder_buffer == "prior"
            buffer.add(i, path, context=in_context or explore and i >= len(train_tasks))
            env_steps += len(path["actions"])

    def make_step(online):
        """One gradient step as a function without arguments, the draw of its batch included."""
        fn = torch.compile(update) if args.compile else update

        def take_step():
            # Only here: the faster products keep memory for every shape they meet, and trajectories are of any length.
            torch.set_float32_matmul_precision(precision)
            info = fn(agent, optimizer, sample_batch(buffer, args, rng), args, online=online)
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
            rows, scalars, arrays = evaluate(agent, buffer, eval_envs, args)
            returns = log_evaluation(run, writer, step, env_steps, rows, scalars, arrays)
            tqdm.write(f"step {step}, {env_steps} new transitions | return: {returns}")
            if phase_ends:
                np.savez_compressed(run / f"figures_{step}.npz", **arrays)  # for benchmark/figures.py
        if save_due:
            writer.flush()
            save_checkpoint(run, args, step, env_steps, parts, generators)
        if stopping:
            progress.close()
            raise SystemExit(f"stopped after step {step}; continue with: python {Path(__file__).name} --resume {run}")
        if count == 0:
            since = time.time()  # charts/SPS leaves out evaluations and checkpoints

    # ===== Offline phase [Alg. 1, l. 2 to 5]
    take_step = make_step(online=False)
    with tqdm(total=args.offline_steps, initial=min(step, args.offline_steps), desc="offline", unit="step") as progress:
        while step < args.offline_steps:
            after_update(take_step(), progress)  # l. 3 to 5

    # ===== Self-supervised phase, without rewards from the environment [Alg. 1, l. 6 to 12]
    take_step = make_step(online=True)
    online_total, done = total_steps - args.offline_steps, step - args.offline_steps
    with tqdm(total=online_total, initial=done, desc="self-supervised", unit="step") as progress:
        while step < total_steps:
            if (step - args.offline_steps) % args.updates_per_iteration == 0:
                # PAPER: 4 gradient steps per new transition. CODE: 0.8, as five tasks collect, not one. 4 on Sawyer.
                drawn = torch.randint(len(explored_tasks), (args.tasks_per_iteration,), generator=act_rng)
                for task in drawn.tolist():
                    collect(task, args.prior_steps, explore=True)  # l. 7 to 9
                    collect(task, args.posterior_steps, explore=False)
            after_update(take_step(), progress)  # l. 10 to 12

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
