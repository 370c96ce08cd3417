"""BOReL, Bayesian offline RL: an offline meta-RL baseline of Figure 5, without a second phase.

Paper: Dorfman, Shenfeld, Tamar, "Offline Meta Learning of Exploration", 2020, https://arxiv.org/abs/2008.02598, code
https://github.com/Rondorf/BOReL. Two stages, both on the dataset alone; a meta-trajectory is three episodes of a task.
1. A VAE over meta-trajectories. A GRU turns the steps so far into a belief over the task, q(z | a, s', r, ...);
   a decoder predicts from z the rewards of the whole meta-trajectory, past and future.
2. The encoder is frozen, and SAC learns on hyper-states: a state and the belief at that step.
Such a policy is Bayes-adaptive: it explores as far as knowing more pays, without anyone telling it to.
A departure from the published algorithm says `PAPER: ... CODE: ...` at its line; README.md lists them all.

Run: python borel.py --env-id HopperParam
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
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from buffers import InputError, ReplayBuffer, load_dataset  # D and its file
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
    vae_steps: int = 5_000
    """gradient steps of stage 1; on 1200 transitions a task the 100 epochs of the authors' code would be about 2,500"""
    offline_steps: int = 25_000
    """gradient steps of stage 2; of 16 x 256 transitions, in all twice as many as in SMAC's offline phase"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and buffers live"""
    run_dir: str = "runs"
    """results go to RUN_DIR/{env_id}__{script}__{seed}/"""
    resume: Optional[str] = None
    """folder of a run: continue it from its checkpoint, with its flags"""
    eval_every: int = 4_000
    """gradient steps between two evaluations of stage 2"""
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

    # --- Stage 1. Values without a source: the authors' code, for its MuJoCo tasks
    latent_dim: int = 5
    """size of z"""
    vae_tasks: int = 4
    """tasks a gradient step"""
    vae_trajectories: int = 4
    """meta-trajectories a task (the authors' code has 8 and more data)"""
    elbo_terms: int = 64
    """beliefs, and rewards, drawn of each meta-trajectory to estimate the reconstruction term"""
    kl_coef: float = 0.05
    """weight of the KL term"""
    vae_lr: float = 3e-4
    """Adam's learning rate, encoder and decoder"""

    # --- Stage 2
    hyperparameters: Literal["original", "smac"] = "original"
    """whose values the next five flags take where they are not given, BOReL's or SMAC's: see HYPERPARAMETERS"""
    q_hidden: Optional[tuple[int, ...]] = None
    """hidden sizes of the Q-functions"""
    policy_hidden: Optional[tuple[int, ...]] = None
    """hidden sizes of the policy"""
    lr: Optional[float] = None
    """Adam's learning rate, policy and Q-functions"""
    meta_batch: Optional[int] = None
    """tasks a gradient step"""
    rl_batch: Optional[int] = None
    """transitions a task"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """soft target update"""
    alpha: float = 0.2
    """weight of the policy's entropy"""


# What differs from the defaults above. PointDirection is not in the paper: small networks, short stages, and the
# entropy weight of the authors' point robot, which fits rewards of about .1 to .5.
PRESETS = {
    "HopperParam": {}, "WalkerParam": {}, "CheetahVelocity": {}, "AntDirection": {}, "HumanoidDirection": {},
    "SawyerManipulation": {}, "SawyerManipulation8": {},
    "PointDirection": dict(
        q_hidden=(128, 128), policy_hidden=(128, 128), rl_batch=128, lr=1e-3, alpha=0.01, vae_trajectories=2,
        vae_lr=3e-3, vae_steps=1_000, offline_steps=2_000, eval_every=500, checkpoint_every=1_000,
    ),
}  # fmt: skip
# SMAC's paper ran BOReL with both and reports the better one (Section 6).
HYPERPARAMETERS = {
    "original": dict(q_hidden=(256, 256), policy_hidden=(256, 256), lr=3e-4, meta_batch=16, rl_batch=256),
    "smac": dict(q_hidden=(300, 300, 300), policy_hidden=(300, 300, 300), lr=3e-4, meta_batch=4, rl_batch=256),
}
MAY_BE_ZERO = "seed offline_steps kl_coef alpha".split()
FREE = "resume device eval_only capture_video compile cuda_graph".split()  # of --resume
AT_MOST = {"gamma": 1, "tau": 1, "seed": 2**32}
AT_MOST |= {name: 10_000 for name in vars(Args()) if name.endswith(("_batch", "_hidden", "_dim"))}  # sizes, for memory
EVAL_REPEATS, TRAIN_EVAL_TASKS = 4, 10  # meta-episodes a task in an evaluation; training tasks in it
LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves
EPISODES = 3  # in a meta-trajectory: T of Section 3


# ===== Networks


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


class BeliefEncoder(nn.Module):
    """The belief after t steps, q(z | a_0, s_1, r_0, ..., a_t-1, s_t, r_t-1) = N(mu_t, exp(log_var_t))."""

    def __init__(self, obs_dim, action_dim, latent_dim):
        super().__init__()
        self.actions, self.next_obs, self.rewards = nn.Linear(action_dim, 16), nn.Linear(obs_dim, 32), nn.Linear(1, 16)
        self.gru = nn.GRU(64, 128, batch_first=True)
        for name, parameter in self.gru.named_parameters():
            (nn.init.orthogonal_ if "weight" in name else nn.init.zeros_)(parameter)
        self.belief = nn.Linear(128, 2 * latent_dim)  # memory -> mu, log_var

    def forward(self, steps, memory):
        """Read L more steps.

        Args:
            steps: actions (N, L, a), next_obs (N, L, o), rewards (N, L, 1).
            memory: (N, 128), what the GRU has kept of the steps before.
        Returns:
            the memory before these steps and after each, (N, L+1, 128).
        """
        embedded = [getattr(self, name)(steps[name]).relu() for name in ("actions", "next_obs", "rewards")]
        after, _ = self.gru(torch.cat(embedded, dim=-1), memory[None])
        return torch.cat([memory[:, None], after], dim=1)


def blank_memory(num, device):
    """The encoder's memory before the first step, (num, 128)."""
    return torch.zeros(num, 128, device=device)


class RewardDecoder(nn.Module):
    """The reward r(s, a, s') of a step, given z."""

    def __init__(self, obs_dim, action_dim, latent_dim):
        super().__init__()
        self.obs, self.actions = nn.Linear(obs_dim, 32), nn.Linear(action_dim, 16)
        self.first, self.second, self.last = nn.Linear(latent_dim + 80, 32), nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, z, steps):
        """Every z (N, Z, dz) with every step, obs, next_obs (N, K, o), actions (N, K, a): -> (N, Z, K)."""
        embedded = [self.obs(steps["next_obs"]), self.actions(steps["actions"]), self.obs(steps["obs"])]
        x = torch.cat(embedded, dim=-1).relu()  # (N, K, 80)
        # The first layer of (z, x) is a sum: compute one product for the Z, one for the K, and add for the pairs.
        weight_z, weight_x = self.first.weight.split([z.shape[-1], 80], dim=1)
        pairs = F.linear(z, weight_z)[:, :, None] + F.linear(x, weight_x, self.first.bias)[:, None]  # (N, Z, K, 32)
        return self.last(self.second(pairs.relu()).relu()).squeeze(-1)


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
    """All networks, for one optimizer and one checkpoint. Policy and critic have the belief in the place of z."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.encoder = BeliefEncoder(obs_dim, action_dim, args.latent_dim)
        self.decoder = RewardDecoder(obs_dim, action_dim, args.latent_dim)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, 2 * args.latent_dim)
        self.q = QFunctions(obs_dim, action_dim, args.q_hidden, 2 * args.latent_dim)
        self.q_target = QFunctions(obs_dim, action_dim, args.q_hidden, 2 * args.latent_dim)
        self.q_target.load_state_dict(self.q.state_dict())
        self.q_target.requires_grad_(False)


def tanh_gaussian_log_prob(u, mean, log_std):
    """log density of a = tanh(u) with u ~ N(mean, std): (N, a) each -> (N,)."""
    gaussian = -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - a^2), exact for any u
    return (gaussian - log_derivative).sum(-1)


def kl_to_prior(mu, sigma):
    """D_KL(N(mu, sigma^2) || N(0, 1)), summed over the dimensions of z: (T, dz) each -> (T,)."""
    return 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).sum(-1)


# ===== Stage 1: the VAE, on N meta-trajectories of at most L steps


def vae_loss(agent, steps, lengths, t, k, noise):
    """The two terms of the ELBO, with the signs of a loss.

    Args:
        steps: obs, next_obs (N, L, o), actions (N, L, a), rewards (N, L, 1).
        lengths: how many of the L steps are real, (N,).
        t: (N, Z), which beliefs are decoded, each of 0..length.
        k: (N, K), which rewards are predicted from each of them, each of 0..length-1.
        noise: standard normal (N, Z, dz).
    Returns:
        (N,) each: sum over all beliefs of the mean squared error over all rewards, estimated from t and k; KL.
    """
    memory = agent.encoder(steps, blank_memory(len(lengths), lengths.device))  # (N, L+1, 128)
    mu, log_var = agent.encoder.belief(memory).chunk(2, dim=-1)  # (N, L+1, dz) each

    # From each belief a z, and from each z the rewards before t and after.
    # PAPER: all beliefs, all rewards. CODE: some of both, drawn uniformly, which gives the same sum on average.
    mu_t, log_var_t = (torch.take_along_dim(x, t[..., None], dim=1) for x in (mu, log_var))  # (N, Z, dz) each
    drawn = {name: torch.take_along_dim(x, k[..., None], dim=1) for name, x in steps.items()}  # (N, K, .)
    error = agent.decoder(mu_t + (0.5 * log_var_t).exp() * noise, drawn) - drawn["rewards"].mT  # (N, Z, K)
    reconstruction = (lengths + 1) * error.square().mean((1, 2))

    # KL(q_0 || N(0, 1)) + sum over t of KL(q_t || q_t-1): the prior of a belief is the belief before it.
    mu_before, log_var_before = (F.pad(x[:, :-1], (0, 0, 1, 0)) for x in (mu, log_var))  # zeros first: N(0, 1)
    ratio = (log_var.exp() + (mu - mu_before).square()) * (-log_var_before).exp()
    kl = 0.5 * (ratio - 1 + log_var_before - log_var).sum(-1)  # (N, L+1)
    real = torch.arange(kl.shape[1], device=lengths.device) <= lengths[:, None]
    return reconstruction, (kl * real).sum(1)


def update_vae(agent, optimizer, batch, args):
    """One gradient step of stage 1; `batch` has the arguments of `vae_loss`. Returns scalars to log, as tensors."""
    reconstruction, kl = vae_loss(agent, **batch)
    optimizer.zero_grad(set_to_none=True)  # the optimizer skips policy and critic, whose gradient is None
    (reconstruction + args.kl_coef * kl).mean().backward()
    optimizer.step()
    mse = (reconstruction / (batch["lengths"] + 1)).mean()
    return {"losses/reward": mse.detach(), "losses/kl": kl.mean().detach()}


def stack(trajectories, device):
    """Meta-trajectories as tensors.

    Args:
        trajectories: for each task a list of meta-trajectories, each of them a list of episodes.
    Returns:
        steps: obs, next_obs (M, L, o), actions (M, L, a), rewards (M, L, 1), with zeros after the end;
        their lengths (M,); the first row of each task, and M (tasks + 1,).
    """
    rows = [concatenate(episodes, device) for of_task in trajectories for episodes in of_task]
    steps = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}
    lengths = torch.tensor([len(row["obs"]) for row in rows], device=device)
    return steps, lengths, torch.tensor([0] + [len(of_task) for of_task in trajectories], device=device).cumsum(0)


def sample_vae_batch(stacked, args, generator):
    """Meta-trajectories of some tasks, and all that is drawn for the estimate of the ELBO: arguments of `vae_loss`."""
    # PAPER: other tasks' episodes join, with rewards from this task's reward function (reward relabelling). CODE: none,
    # as in SMAC's paper: the reward functions are not part of the dataset.
    steps, lengths, first_rows = stacked
    tasks = torch.randint(len(first_rows) - 1, (args.vae_tasks,), generator=generator, device=lengths.device)
    tasks = tasks.repeat_interleave(args.vae_trajectories)  # (N,)

    def draw(limits, num):
        """Whole numbers from 0 to limit - 1: limits (N,) -> (N, num)."""
        uniform = torch.rand(len(limits), num, generator=generator, device=limits.device)
        return (uniform * limits[:, None]).long()

    rows = first_rows[tasks] + draw(first_rows[tasks + 1] - first_rows[tasks], 1)[:, 0]  # (N,)
    steps, lengths = {name: x[rows] for name, x in steps.items()}, lengths[rows]
    t, k = draw(lengths + 1, args.elbo_terms), draw(lengths, args.elbo_terms)  # (N, Z), (N, K)
    noise = torch.randn(*t.shape, args.latent_dim, generator=generator, device=t.device)
    return {"steps": steps, "lengths": lengths, "t": t, "k": k, "noise": noise}


# ===== Between the stages


@torch.no_grad()
def make_hyper_buffer(agent, trajectories, obs_dim, action_dim):
    """The dataset as a replay buffer of hyper-states (s, mu, log_var), dimension o + 2 dz."""
    device, belief_dim = next(agent.parameters()).device, agent.encoder.belief.out_features
    capacity = sum(len(path["actions"]) for of_task in trajectories for episodes in of_task for path in episodes)
    buffer = ReplayBuffer(len(trajectories), obs_dim + belief_dim, action_dim, capacity, device)
    for task, of_task in enumerate(trajectories):
        for episodes in of_task:
            # PAPER: a terminal state clears the GRU. CODE: a fall does not end the task, the belief runs on. (The
            # critic's return does end there, so that falling stays bad.)
            steps = {name: x[None] for name, x in concatenate(episodes, device).items()}
            memory = agent.encoder(steps, blank_memory(1, device))[0]  # (steps + 1, 128)
            belief, t = agent.encoder.belief(memory).cpu().numpy(), 0  # (steps + 1, 2 dz)
            for path, following in zip(episodes, [*episodes[1:], None]):
                obs, length = path["obs"].copy(), len(path["actions"])
                # PAPER: an episode starts from the last observation of the one before, which carries a flag. CODE: from
                # its own first state, and that is where the last step of the one before leads. No flag.
                if following:
                    obs[-1] = following["obs"][0]
                buffer.add(task, path | {"obs": np.concatenate([obs, belief[t : t + length + 1]], axis=1)})
                t += length
    return buffer


# ===== Stage 2: SAC on hyper-states. T tasks, B transitions a task, N = T * B


def sample_action(agent, obs, z, noise):
    """Reparameterised a ~ pi(a | s, z): (N, a), log pi (N,), and mean and log standard deviation before tanh (N, a)."""
    mean, log_std = agent.policy(obs, z)
    u = mean + log_std.exp() * noise
    return torch.tanh(u), tanh_gaussian_log_prob(u, mean, log_std), mean, log_std


def sac_critic_loss(agent, batch, args):
    """Soft Bellman error, on unscaled rewards. -> loss, Q of both critics (2, N)."""
    (obs, belief), (next_obs, next_belief) = batch["obs"], batch["next_obs"]
    with torch.no_grad():
        # y = r + gamma (Q_target(s', a') - alpha log pi(a' | s')); a fall ends the sum, the time limit does not
        next_actions, log_prob, _, _ = sample_action(agent, next_obs, next_belief, batch["noise_next_a"])
        next_v = agent.q_target(next_obs, next_actions, next_belief).amin(0) - args.alpha * log_prob  # (N,)
        target = batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_v
    q = agent.q(obs, batch["actions"], belief)  # (2, N)
    return (q - target).square().mean(1).sum(), q


def sac_actor_loss(agent, batch, args):
    """Mean of alpha log pi(a | s) - Q(s, a), a ~ pi. -> loss, log pi (N,)."""
    actions, log_prob, _, _ = sample_action(agent, *batch["obs"], batch["noise_a"])
    q = agent.q(batch["obs"][0], actions, batch["obs"][1], frozen=True).amin(0)  # (N,)
    return (args.alpha * log_prob - q).mean(), log_prob


def update(agent, optimizer, batch, args):
    """One gradient step of stage 2.

    Args:
        batch: hyper-states obs, next_obs (T, B, o + 2 dz), actions (T, B, a), rewards, terminals (T, B, 1); standard
            normal noise_a and noise_next_a (N, a).
    Returns:
        scalars to log, as tensors.
    """
    batch = batch | {name: batch[name].flatten() for name in ("rewards", "terminals")}  # (N,)
    batch["actions"] = batch["actions"].flatten(0, 1)  # (N, a)
    for name in ("obs", "next_obs"):  # the two parts of a hyper-state: state (N, o), belief (N, 2 dz)
        batch[name] = batch[name].flatten(0, 1).tensor_split([-2 * args.latent_dim], dim=1)

    l_critic, q = sac_critic_loss(agent, batch, args)
    l_actor, log_prob = sac_actor_loss(agent, batch, args)
    optimizer.zero_grad(set_to_none=True)  # the optimizer skips encoder and decoder, whose gradient is None
    (l_critic + l_actor).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)  # soft update
        info = {"losses/critic": l_critic, "losses/actor": l_actor}
        info |= {"train/q_mean": q.mean(), "train/q_max": q.amax(), "train/policy_entropy": -log_prob.mean()}
        return {name: value.detach() for name, value in info.items()}


def sample_batch(buffer, args, generator):
    """Transitions of some tasks, and the noise of one update."""
    num_tasks, device = len(buffer.sizes["rl"]), buffer.sizes["rl"].device
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=generator, device=device)
    batch = buffer.sample(tasks, args.rl_batch, generator)
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(batch["actions"].flatten(0, 1).shape, generator=generator, device=device)
    return batch


# ===== Acting: Section 3


@torch.no_grad()
def rollout_belief(env_list, agent, memory, generator, deterministic=False):
    """One episode in each environment, in lockstep; after every step its true reward enters the belief.

    Args:
        memory: (E, 128), what the encoder has kept of the episodes before.
        deterministic: act with the policy's mean instead of a sample.
    Returns:
        E trajectories, obs (L+1, o), actions (L, a), rewards (L,), terminals (L,), and the memory afterwards (E, 128).
    """
    seeds = torch.randint(2**31 - 1, (len(env_list),), generator=generator).tolist()
    paths = [{"obs": [env.reset(seed=seed)[0]]} for env, seed in zip(env_list, seeds)]
    paths = [path | {"actions": [], "rewards": [], "terminals": []} for path in paths]
    live, memory, device = list(range(len(env_list))), memory.clone(), memory.device

    def newest(name):
        """The last entry of each live trajectory, (live, .)."""
        values = np.array([paths[i][name][-1] for i in live], np.float32)
        return torch.as_tensor(values).reshape(len(live), -1).to(device)

    while live:
        mean, log_std = agent.policy(newest("obs"), agent.encoder.belief(memory[live]))
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=generator)
        actions = torch.tanh(mean + log_std.exp() * noise.to(device)).cpu().numpy()
        running = []
        for i, action in zip(live, actions):
            next_obs, reward, terminated, truncated, _ = env_list[i].step(action)
            for name, value in (("obs", next_obs), ("actions", action), ("rewards", reward), ("terminals", terminated)):
                paths[i][name].append(value)
            if not (terminated or truncated):
                running.append(i)
        step = {"actions": newest("actions"), "next_obs": newest("obs"), "rewards": newest("rewards")}
        memory[live] = agent.encoder({name: x[:, None] for name, x in step.items()}, memory[live])[:, -1]
        live = running
    return [{name: np.array(values, np.float32) for name, values in path.items()} for path in paths], memory


def concatenate(paths, device):
    """All transitions of some trajectories, as `ReplayBuffer.sample` gives them: obs (L, o), ..., rewards (L, 1)."""
    columns = {"obs": [p["obs"][:-1] for p in paths], "next_obs": [p["obs"][1:] for p in paths]}
    columns |= {"actions": [p["actions"] for p in paths], "rewards": [p["rewards"][:, None] for p in paths]}
    return {name: torch.as_tensor(np.concatenate(parts)).to(device) for name, parts in columns.items()}


def adapt_belief(env_list, agent, generator):
    """The meta-episode of Section 3, T = 3: one policy plays all three episodes, and the belief runs on through them.

    Nothing marks the first two as exploration: the policy explores while its belief is vague.

    Returns:
        for each of E environments the third trajectory, the first two, and the encoder's memory of these two (E, 128).
    """
    memory, exploration = blank_memory(len(env_list), next(agent.parameters()).device), []
    for _ in range(EPISODES - 1):
        # PAPER: the policy's mean at test time. CODE: samples in the first two episodes, as in the other scripts.
        paths, memory = rollout_belief(env_list, agent, memory, generator)
        exploration.append(paths)
    final, _ = rollout_belief(env_list, agent, memory, generator, deterministic=True)
    return final, list(zip(*exploration)), memory


def sum_rewards(paths):
    """Undiscounted returns of E trajectories: (E,)."""
    return np.array([path["rewards"].sum() for path in paths])


@torch.no_grad()
def evaluate(agent, trajectories, eval_envs, args):
    """Post-adaptation returns and diagnostics, with a generator of its own: evaluating changes nothing in training.

    Args:
        trajectories: for each training task its meta-trajectories in the dataset.
        eval_envs: {"test": pairs, "train": pairs}, a pair being (task number, environment), E of them.
    Returns:
        rows (split, context, task numbers, returns, exploration returns: (E,) each), scalars to log, arrays to draw: KL
        values (E,) for Figure 2 and, of the Direction families, paths over ground (., L+1, 2) for Figures 6 and 8.
    """
    device, rng = next(agent.parameters()).device, torch.Generator().manual_seed(args.seed)
    rows, scalars, arrays, scored = [], {}, {}, {}
    memories = {}  # (E, 128): the encoder's, after two episodes
    for split, pairs in eval_envs.items():  # "train" comes last, and is used below
        numbers, env_list = zip(*pairs)
        final, exploration, memories[f"{split}_online"] = adapt_belief(env_list, agent, rng)
        explored = np.mean([sum_rewards(paths) for paths in zip(*exploration)], axis=0)  # (E,)
        rows.append((split, "online", numbers, sum_rewards(final), explored))
        scored[f"{split}/online"] = final

    # The same training tasks, after at most two episodes of the dataset in place of the policy's own
    offline = [trajectories[task][i % len(trajectories[task])][: EPISODES - 1] for i, task in enumerate(numbers)]
    steps, lengths, _ = stack([offline], device)
    memory = agent.encoder(steps, blank_memory(len(offline), device))  # (E, L+1, 128)
    memories["train_offline"] = memory[torch.arange(len(offline), device=device), lengths]
    final_offline, _ = rollout_belief(env_list, agent, memories["train_offline"], rng, deterministic=True)
    rows.append(("train", "offline", numbers, sum_rewards(final_offline), explored))
    scored["train/offline"] = final_offline

    beliefs = {name: agent.encoder.belief(x).chunk(2, dim=-1) for name, x in memories.items()}  # mu, log_var (E, dz)
    for name, (mu, log_var) in beliefs.items():
        arrays[f"kl_{name}_context"] = kl_to_prior(mu, (0.5 * log_var).exp()).cpu().numpy()

    # Decoder against true rewards, on the two episodes that the belief comes from: the dataset's, and the policy's own
    for key, name, episodes in (
        ("decoder_loss", "train_offline", offline),
        ("generated_reward_mse", "train_online", exploration),
    ):
        steps, lengths, _ = stack([episodes], device)
        real = torch.arange(steps["rewards"].shape[1], device=device) < lengths[:, None]  # (E, L)
        rewards, predicted = steps["rewards"].squeeze(-1), agent.decoder(beliefs[name][0][:, None], steps).squeeze(1)
        error = (predicted - rewards)[real].square().mean()
        scalars[f"eval/{key}"] = error.item()
        scalars[f"eval/{key}_over_reward_variance"] = (error / rewards[real].var()).item()

    if args.env_id in envs.SPARSE:
        for name, paths in scored.items():
            scalars[f"eval/{name}_context_success"] = np.mean([path["rewards"][-1] == 0 for path in paths])
    if args.env_id in envs.GROUND_VELOCITY:
        data = [path for task in set(numbers) for episodes in trajectories[task] for path in episodes]
        explored_paths = [path for pair in exploration for path in pair]
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
    """Train. Returns the trained agent. Raises InputError."""
    chosen = {k: v for k, v in HYPERPARAMETERS[args.hyperparameters].items() if getattr(args, k) is None}
    args = dataclasses.replace(args, **chosen)
    spec = envs.SPECS[args.env_id]
    gpu = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    precision = speed_up(device)
    run = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__{Path(__file__).stem}__{args.seed}")

    # --- Dataset, networks, environments
    default_file = Path(__file__).parent / "datasets" / f"{args.env_id}.npz"
    env = envs.make(args.env_id)
    dataset = load_dataset(args.dataset or default_file, args.env_id, spec, env.unwrapped.set_task)
    train_tasks, test_tasks = dataset["train_tasks"], dataset["test_tasks"]
    # An encoder part, which SMAC's encoder and decoder learn from (Cheetah), is not used.
    paths_of_tasks = [[path for i, path in dataset["rl"] if i == task] for task in range(len(train_tasks))]
    # Meta-trajectories: three episodes in a row; the last ones of a task may have fewer
    trajectories = [[paths[i : i + EPISODES] for i in range(0, len(paths), EPISODES)] for paths in paths_of_tasks]
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    vae = {"params": [*agent.encoder.parameters(), *agent.decoder.parameters()], "lr": args.vae_lr}
    sac = {"params": [*agent.policy.parameters(), *agent.q.parameters()], "lr": args.lr}
    optimizer = torch.optim.Adam([vae, sac], fused=True, capturable=gpu)
    eval_envs = envs.make_evaluation(args.env_id, train_tasks, test_tasks, TRAIN_EVAL_TASKS, EVAL_REPEATS)

    # --- State of the run: everything that a checkpoint holds
    rng = torch.Generator(device).manual_seed(args.seed)
    parts, generators, step = {"agent": agent, "optimizer": optimizer}, {"rng": rng}, 0
    lock = None if args.eval_only else claim(run, args)
    if args.resume:
        step, _ = restore(load_checkpoint(run, Args), parts, {} if args.eval_only else generators)

    def film():
        """The meta-episode on the first test task, as a GIF. Raises OSError if this machine can not render."""
        film_rng = torch.Generator().manual_seed(args.seed)
        envs.film(args.env_id, test_tasks[0], lambda env: adapt_belief([env], agent, film_rng), run / "video.gif")

    total_steps = args.vae_steps + args.offline_steps

    if args.eval_only:
        print_rows(evaluate(agent, trajectories, eval_envs, args)[0])
        if args.capture_video:
            film()
        return agent

    writer = SummaryWriter(str(run), purge_step=step + 1)
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_signals.append(number))
    totals, count, since = {}, 0, time.time()

    def make_step(update, draw):
        """One gradient step as a function without arguments, the draw of its batch included."""
        fn = torch.compile(update) if args.compile else update

        def take_step():
            # Only here: the faster products keep memory for every shape they meet, and trajectories are of any length.
            torch.set_float32_matmul_precision(precision)
            info = fn(agent, optimizer, draw(), args)
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
        stage_ends = step in (args.vae_steps, total_steps)
        eval_due = stage_ends or step > args.vae_steps and step % args.eval_every == 0
        save_due = stage_ends or step % args.checkpoint_every == 0 or stopping
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
            rows, scalars, arrays = evaluate(agent, trajectories, eval_envs, args)
            returns = log_evaluation(run, writer, step, 0, rows, scalars, arrays)
            tqdm.write(f"step {step} | return: {returns}")
            if step == total_steps:
                np.savez_compressed(run / f"figures_{step}.npz", **arrays)  # for benchmark/figures.py
        if save_due:
            writer.flush()
            save_checkpoint(run, args, step, 0, parts, generators)
        if stopping:
            progress.close()
            raise SystemExit(f"stopped after step {step}; continue with: python {Path(__file__).name} --resume {run}")
        if count == 0:
            since = time.time()  # charts/SPS leaves out evaluations and checkpoints

    # ===== Stage 1: the VAE
    stacked = stack(trajectories, device)
    take_step = make_step(update_vae, lambda: sample_vae_batch(stacked, args, rng))
    with tqdm(total=args.vae_steps, initial=min(step, args.vae_steps), desc="VAE", unit="step") as progress:
        while step < args.vae_steps:
            after_update(take_step(), progress)

    # ===== Stage 2: SAC on hyper-states
    buffer = make_hyper_buffer(agent, trajectories, spec.obs_dim, spec.action_dim)  # a resumed run makes the same again
    take_step = make_step(update, lambda: sample_batch(buffer, args, rng))
    with tqdm(total=args.offline_steps, initial=step - args.vae_steps, desc="SAC", unit="step") as progress:
        while step < total_steps:
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
