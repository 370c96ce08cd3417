"""BOReL: Bayesian offline RL, an offline baseline of Figure 5.

Dorfman, Shenfeld, Tamar, "Offline Meta Learning of Exploration", NeurIPS 2021,
https://arxiv.org/abs/2008.02598; their code is https://github.com/Rondorf/BOReL. PAPER below
means this paper; SMAC's Section 6 and C.3 compare with BOReL.

BOReL has two stages, both on the dataset alone, and no second phase. A meta-trajectory is three
episodes of one task in a row.
1. A variational autoencoder (VAE) reads meta-trajectories. Its encoder, a GRU, turns the steps so
   far into a belief about the task, q(z | a_0, s_1, r_0, ...). Its decoder predicts from z the
   rewards of the whole meta-trajectory, past and future.
2. The encoder is frozen, and SAC learns on hyper-states (s_t, mu_t, log sigma_t^2): a state and
   the belief at that step.
Such a policy is Bayes-adaptive: it explores as far as knowing more pays, without being told to.

Start at the end: `main` has the two stages. What it calls stands before it: networks, the loss and
gradient step of stage 1, hyper-states, the losses and gradient step of stage 2, acting,
evaluation. Where the code departs from the published algorithm a comment says
`PAPER: ... CODE: ...`; PAPER.md lists all departures.

Run: python borel.py --env-id HopperParam [--preset matched]
"""

import dataclasses
import math
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import buffers
import envs


# [B] marks the values that the authors' code has for its MuJoCo tasks.
@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of your own
    preset: Literal["original", "matched", "short"] = "original"  # [B], SMAC's sizes, or small ones
    seed: int = 1  # seed of the networks, of exploration and of sampling
    dataset: Optional[str] = None  # offline dataset; by default datasets/{env_id}.npz
    vae_steps: int = 5_000  # gradient steps of stage 1 (ours; 100 epochs, as in the code: 2,500)
    # PAPER: 1,000,000 steps (code; SMAC's authors' fork 400,000). CODE: as many as MACAW here.
    offline_steps: int = 25_000  # gradient steps of stage 2: 102 million transitions (SMAC: 51)
    eval_every: int = 4_000  # steps between checkpoints; in stage 2 each comes with an evaluation
    keep_agents: bool = False  # keep the agent of every evaluation, agent_{step}.npz
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Networks
    q_hidden: tuple[int, ...] = (256, 256)  # hidden sizes of the Q-functions [B]
    policy_hidden: tuple[int, ...] = (256, 256)  # hidden sizes of the policy [B]
    latent_dim: int = 5  # size of z [B]

    # --- Gradient step of stage 1, the VAE
    vae_tasks: int = 4  # tasks a gradient step [B]
    vae_trajectories: int = 4  # meta-trajectories a task (8 in the authors' code, of more data)
    elbo_terms: int = 64  # beliefs, and rewards, drawn of each meta-trajectory for the ELBO
    kl_coef: float = 0.05  # weight of the KL term [B]
    vae_lr: float = 3e-4  # Adam's learning rate, encoder and decoder [B]

    # --- Gradient step of stage 2, SAC
    rl_batch: int = 256  # transitions a task [B]
    meta_batch: int = 16  # tasks a gradient step [B]
    gamma: float = 0.99  # discount [B]
    tau: float = 0.005  # soft target update [B]
    lr: float = 3e-4  # Adam's learning rate, policy and Q-functions [B]
    alpha: float = 0.2  # weight of the policy's entropy [B]


# --- What differs from these defaults. Later rows win: the preset's, that of the environment,
# "ENVIRONMENT PRESET".
# SMAC's paper ran BOReL with its own values and with SMAC's (`matched`), and reports the better
# result (Section 6).
SMALL = dict(q_hidden=(128, 128), policy_hidden=(128, 128), lr=1e-3)
PRESETS = {
    "AntDirection": dict(eval_every=8_000),
    "PointDirection": SMALL  # a point mass, which is not in the papers
    | dict(
        rl_batch=128,
        alpha=0.01,  # of the authors' point robot: it fits rewards of size .3
        vae_trajectories=2,
        vae_lr=3e-3,
        vae_steps=1_000,
        offline_steps=2_000,
        eval_every=500,
    ),
    "matched": dict(q_hidden=(300, 300, 300), policy_hidden=(300, 300, 300), meta_batch=4),
    "short": SMALL | dict(rl_batch=64, vae_steps=1_500, offline_steps=7_500, eval_every=2_500),
}

# --- What no flag changes
EPISODES = 3  # episodes in a meta-trajectory: T of SMAC's Section 6
MEMORY_DIM = 128  # size of the GRU's memory [B]
MAX_PADDED = 1 << 27  # numbers in all meta-trajectories, padded to the length of the longest


# ===== Networks


def mlp(sizes, last_init=3e-3):
    """ReLU network of the given layer sizes, with the initial weights of rlkit."""
    layers = []
    last = len(sizes) - 2
    for i in range(len(sizes) - 1):
        linear = nn.Linear(sizes[i], sizes[i + 1])
        # By the number of outputs, not of inputs, as rlkit's `fanin_init`
        bound = last_init if i == last else 1 / math.sqrt(sizes[i + 1])
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if i < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class BeliefEncoder(nn.Module):
    """The belief after t steps: q(z | a_0, s_1, r_0, ..., a_t-1, s_t, r_t-1) = N(mu_t, sigma_t^2).

    The belief before the first step, q_0, is learned: `belief` of a blank memory.
    """

    def __init__(self, obs_dim, action_dim, latent_dim):
        super().__init__()
        self.actions = nn.Linear(action_dim, 16)
        self.next_obs = nn.Linear(obs_dim, 32)
        self.rewards = nn.Linear(1, 16)
        self.gru = nn.GRU(16 + 32 + 16, MEMORY_DIM, batch_first=True)
        for name, parameter in self.gru.named_parameters():
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)
        self.belief = nn.Linear(MEMORY_DIM, 2 * latent_dim)  # memory -> mu_t, log sigma_t^2

    def forward(self, steps, memory):
        """Read L more steps.

        Args:
            steps: actions (N, L, a), next_obs (N, L, o), rewards (N, L, 1).
            memory: (N, 128), what the GRU has kept of the steps before.

        Returns the memory before these steps and after each of them, (N, L+1, 128).
        """
        actions = self.actions(steps["actions"]).relu()
        next_obs = self.next_obs(steps["next_obs"]).relu()
        rewards = self.rewards(steps["rewards"]).relu()
        inputs = torch.cat([actions, next_obs, rewards], dim=-1)  # (N, L, 64)
        after, _ = self.gru(inputs, memory[None])
        return torch.cat([memory[:, None], after], dim=1)


def blank_memory(num, device):
    """The encoder's memory before the first step, (num, 128)."""
    return torch.zeros(num, MEMORY_DIM, device=device)


class RewardDecoder(nn.Module):
    """The reward r(s, a, s') of a step, given z."""

    def __init__(self, obs_dim, action_dim, latent_dim):
        super().__init__()
        self.obs = nn.Linear(obs_dim, 32)  # of s and of s'
        self.actions = nn.Linear(action_dim, 16)
        self.first = nn.Linear(latent_dim + 32 + 16 + 32, 32)
        self.second = nn.Linear(32, 32)
        self.last = nn.Linear(32, 1)

    def forward(self, z, steps):
        """Every z with every step.

        z (N, Z, dz); steps: obs, next_obs (N, K, o), actions (N, K, a) -> rewards (N, Z, K).
        """
        next_obs = self.obs(steps["next_obs"])
        actions = self.actions(steps["actions"])
        obs = self.obs(steps["obs"])
        x = torch.cat([next_obs, actions, obs], dim=-1).relu()  # (N, K, 80)

        # The first layer of (z, x) is a sum of one product with z and one with x. So the Z and
        # the K products are computed once each, and added for the Z * K pairs.
        weight_z, weight_x = self.first.weight.split([z.shape[-1], x.shape[-1]], dim=1)
        from_z = F.linear(z, weight_z)  # (N, Z, 32)
        from_x = F.linear(x, weight_x, self.first.bias)  # (N, K, 32)
        hidden = (from_z[:, :, None] + from_x[:, None]).relu()  # (N, Z, K, 32)
        hidden = self.second(hidden).relu()
        return self.last(hidden).squeeze(-1)


class Policy(nn.Module):
    """pi_theta(a | s, z), a Gaussian squashed by tanh."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + latent_dim, *hidden, 2 * action_dim], last_init=1e-3)

    def forward(self, obs, z):
        """obs (N, o), z (N, dz) -> mean and log standard deviation before tanh, (N, a) each."""
        inputs = torch.cat([obs, z], dim=-1)
        mean, log_std = self.net(inputs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)


class QFunctions(nn.Module):
    """`count` Q-functions Q_w(s, a, z). Stacked weights: one batched product a layer for all."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim, count=2):
        super().__init__()
        nets = [mlp([obs_dim + action_dim + latent_dim, *hidden, 1]) for _ in range(count)]
        self.weights = nn.ParameterList()  # for each layer (count, in, out)
        self.biases = nn.ParameterList()  # for each layer (count, 1, out)
        for layers in zip(*nets):
            if isinstance(layers[0], nn.Linear):
                self.weights.append(torch.stack([layer.weight.T for layer in layers]).detach())
                self.biases.append(torch.stack([layer.bias[None] for layer in layers]).detach())

    def forward(self, obs, actions, z, frozen=False):
        """obs (N, o), actions (N, a), z (N, dz) -> (count, N).

        frozen: gradients reach the inputs, and not the weights.
        """
        x = torch.cat([obs, actions, z], dim=-1)  # (N, o + a + dz)
        x = x.expand(len(self.weights[0]), -1, -1)  # (count, N, o + a + dz)
        last = len(self.weights) - 1
        for i in range(last + 1):
            weight = self.weights[i]
            bias = self.biases[i]
            if frozen:
                weight = weight.detach()
                bias = bias.detach()
            x = torch.baddbmm(bias, x, weight)
            if i < last:
                x = x.relu_()
        return x.squeeze(-1)


class Agent(nn.Module):
    """All networks, for one optimizer and one checkpoint.

    Policy and Q-functions have the belief (mu_t, log sigma_t^2) in the place of SMAC's z.
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        dz = args.latent_dim
        self.encoder = BeliefEncoder(obs_dim, action_dim, dz)
        self.decoder = RewardDecoder(obs_dim, action_dim, dz)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, 2 * dz)
        self.q = QFunctions(obs_dim, action_dim, args.q_hidden, 2 * dz)
        self.q_target = QFunctions(obs_dim, action_dim, args.q_hidden, 2 * dz)
        self.q_target.load_state_dict(self.q.state_dict())
        self.q_target.requires_grad_(False)


# ===== What the losses are made of


def tanh_gaussian_log_prob(u, mean, log_std):
    """Log density of a = tanh(u) with u ~ N(mean, std^2): (N, a) each -> (N,)."""
    standardised = (u - mean) * (-log_std).exp()
    gaussian = -0.5 * standardised.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - a^2), exact for any u
    return (gaussian - log_derivative).sum(-1)


def kl_to_prior(mu, sigma):
    """D_KL(N(mu, sigma^2) || N(0, 1)), summed over the dimensions of z: (T, dz) each -> (T,)."""
    return 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).sum(-1)


# ===== Stage 1: the VAE, on N meta-trajectories of at most L steps


def vae_loss(agent, steps, lengths, t, k, noise):
    """The two terms of the ELBO, with the signs of a loss.

    Reconstruction: the sum over t = 0..length of the mean over k = 0..length-1 of
    (r(s_k, a_k, s_k+1, z_t) - r_k)^2, where z_t ~ q_t.
    KL: D_KL(q_0 || N(0, 1)) + the sum over t = 1..length of D_KL(q_t || q_t-1).

    Args:
        steps: obs, next_obs (N, L, o), actions (N, L, a), rewards (N, L, 1).
        lengths: how many of the L steps are real, (N,).
        t: (N, Z), which beliefs are decoded, each of 0..length.
        k: (N, K), which rewards are predicted from each of them, each of 0..length-1.
        noise: standard normal (N, Z, dz).

    Returns both terms, (N,) each; the reconstruction is estimated from t and k.
    """
    memory = agent.encoder(steps, blank_memory(len(lengths), lengths.device))  # (N, L+1, 128)
    mu, log_var = agent.encoder.belief(memory).chunk(2, dim=-1)  # (N, L+1, dz) each

    # --- Reconstruction: z_t from each belief t, and from it rewards before t and after
    # PAPER: all beliefs, all rewards. CODE: some of both, drawn uniformly, which gives the same
    # sum on average.
    mu_t = torch.take_along_dim(mu, t[..., None], dim=1)  # (N, Z, dz)
    log_var_t = torch.take_along_dim(log_var, t[..., None], dim=1)
    z_t = mu_t + (0.5 * log_var_t).exp() * noise
    steps_k = {}
    for name, values in steps.items():
        steps_k[name] = torch.take_along_dim(values, k[..., None], dim=1)  # (N, K, .)
    error = agent.decoder(z_t, steps_k) - steps_k["rewards"].mT  # (N, Z, K)
    reconstruction = (lengths + 1) * error.square().mean((1, 2))

    # --- KL: the prior of each belief is the belief before it. Zeros before the first are N(0, 1).
    mu_before = F.pad(mu[:, :-1], (0, 0, 1, 0))  # (N, L+1, dz)
    log_var_before = F.pad(log_var[:, :-1], (0, 0, 1, 0))
    ratio = (log_var.exp() + (mu - mu_before).square()) * (-log_var_before).exp()
    kl = 0.5 * (ratio - 1 + log_var_before - log_var).sum(-1)  # (N, L+1)
    is_real = torch.arange(kl.shape[1], device=lengths.device) <= lengths[:, None]
    return reconstruction, (kl * is_real).sum(1)


def update_vae(agent, optimizer, batch, args):
    """One gradient step of stage 1.

    batch: the arguments of `vae_loss`. Returns scalars to log, as tensors.
    """
    # Here, and not before the backward pass: --compile then makes one graph of losses and gradients
    optimizer.zero_grad(set_to_none=True)
    reconstruction, kl = vae_loss(agent, **batch)
    squared_error = (reconstruction / (batch["lengths"] + 1)).mean()
    info = {"losses/reward": squared_error.detach(), "losses/kl": kl.mean().detach()}

    loss = (reconstruction + args.kl_coef * kl).mean()
    # The gradient of policy and Q-functions stays None, and the optimizer skips them.
    loss.backward()
    optimizer.step()
    return info


def stack(trajectories, device):
    """Meta-trajectories as tensors.

    Args:
        trajectories: for each task a list of meta-trajectories, each of them a list of episodes.

    Returns steps: obs, next_obs (M, L, o), actions (M, L, a), rewards (M, L, 1), with zeros after
    the end; their lengths (M,); the first row of each task, and M (tasks + 1,).
    """
    rows = []
    first_rows = [0]
    for of_task in trajectories:
        rows += [buffers.join(episodes, device) for episodes in of_task]
        first_rows.append(len(rows))

    longest = 0  # numbers in the longest
    for row in rows:
        longest = max(longest, sum(values.numel() for values in row.values()))
    if len(rows) * longest > MAX_PADDED:
        raise buffers.InputError(
            "the longest meta-trajectory of the dataset is too long to pad all others to it"
        )
    steps = {}
    for name in rows[0]:
        steps[name] = pad_sequence([row[name] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["obs"]) for row in rows], device=device)
    return steps, lengths, torch.tensor(first_rows, device=device)


def draw(limits, num, rng):
    """Whole numbers from 0 to limit - 1, uniformly: limits (N,) -> (N, num)."""
    uniform = torch.rand(len(limits), num, generator=rng, device=limits.device)
    return (uniform * limits[:, None]).long()


def sample_vae_batch(stacked, args, rng):
    """Meta-trajectories of some tasks, and all that is drawn to estimate the ELBO.

    stacked: what `stack` returns. Returns the arguments of `vae_loss`.
    """
    # PAPER: other tasks' episodes join, with rewards from this task's reward function (reward
    # relabelling). CODE: none, as in SMAC's paper: the reward functions are not in the dataset.
    steps, lengths, first_rows = stacked
    num_tasks = len(first_rows) - 1
    tasks = torch.randint(num_tasks, (args.vae_tasks,), generator=rng, device=lengths.device)
    tasks = tasks.repeat_interleave(args.vae_trajectories)  # (N,)
    num_rows = first_rows[tasks + 1] - first_rows[tasks]  # (N,)
    rows = first_rows[tasks] + draw(num_rows, 1, rng)[:, 0]  # (N,)

    steps = {name: values[rows] for name, values in steps.items()}  # (N, L, .)
    lengths = lengths[rows]
    t = draw(lengths + 1, args.elbo_terms, rng)  # (N, Z)
    k = draw(lengths, args.elbo_terms, rng)  # (N, K)
    noise = torch.randn(*t.shape, args.latent_dim, generator=rng, device=t.device)
    return {"steps": steps, "lengths": lengths, "t": t, "k": k, "noise": noise}


# ===== Between the stages: state relabelling


@torch.no_grad()
def make_hyper_buffer(agent, trajectories, obs_dim, action_dim):
    """The dataset as a replay buffer of hyper-states (s_t, mu_t, log sigma_t^2), size o + 2 dz.

    trajectories: for each task a list of meta-trajectories, each of them a list of episodes.
    """
    device = next(agent.parameters()).device
    belief_dim = agent.encoder.belief.out_features  # 2 dz
    capacity = 0
    for of_task in trajectories:
        for episodes in of_task:
            capacity += sum(len(path["actions"]) for path in episodes)
    hyper_dim = obs_dim + belief_dim
    buffer = buffers.ReplayBuffer(len(trajectories), hyper_dim, action_dim, capacity, device)

    for task, of_task in enumerate(trajectories):
        for episodes in of_task:
            # PAPER: a terminal state clears the GRU. CODE: a fall does not end the task, so that
            # the belief runs on. (The critic's return ends there, so that falling stays bad.)
            columns = buffers.join(episodes, device)
            steps = {name: values[None] for name, values in columns.items()}
            memory = agent.encoder(steps, blank_memory(1, device))[0]  # (steps + 1, 128)
            belief = agent.encoder.belief(memory).cpu().numpy()  # (steps + 1, 2 dz)

            t = 0  # steps of the meta-trajectory before this episode
            for i, path in enumerate(episodes):
                length = len(path["actions"])
                obs = path["obs"].copy()  # (length + 1, o)
                # PAPER: an episode starts from the last observation of the one before, which
                # carries a flag. CODE: from its own first state, and that is where the last step
                # of the one before leads. No flag.
                if i + 1 < len(episodes):
                    obs[-1] = episodes[i + 1]["obs"][0]
                beliefs = belief[t : t + length + 1]  # (length + 1, 2 dz)
                hyper_states = np.concatenate([obs, beliefs], axis=1)
                buffer.add(task, path | {"obs": hyper_states})
                t += length
    return buffer


# ===== Stage 2: SAC on hyper-states: N = T * B transitions, B of each of T tasks


def sample_belief_action(agent, obs, belief, noise):
    """Reparameterised a ~ pi(a | s, belief).

    obs (N, o), belief (N, 2 dz), noise (N, a) -> actions (N, a), log pi (N,).
    """
    mean, log_std = agent.policy(obs, belief)
    u = mean + log_std.exp() * noise
    return torch.tanh(u), tanh_gaussian_log_prob(u, mean, log_std)


def sac_critic_loss(agent, batch, args):
    """The soft Bellman error, mean of (Q(s, belief, a) - y)^2, on unscaled rewards.

    Returns the loss, and Q of the batch (2, N).
    """
    with torch.no_grad():
        next_actions, next_log_prob = sample_belief_action(
            agent, batch["next_obs"], batch["next_belief"], batch["noise_next_a"]
        )
        next_q = agent.q_target(batch["next_obs"], next_actions, batch["next_belief"]).amin(0)
        next_v = next_q - args.alpha * next_log_prob  # (N,)
        # y = r + gamma (Q_target(s', belief', a') - alpha log pi(a' | s', belief')). A fall ends
        # the sum, the time limit does not.
        target = batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_v
    q = agent.q(batch["obs"], batch["actions"], batch["belief"])  # (2, N)
    return (q - target).square().mean(1).sum(), q


def sac_actor_loss(agent, batch, args):
    """The mean of alpha log pi(a | s, belief) - Q(s, belief, a), with a ~ pi.

    Returns the loss, and log pi (N,).
    """
    actions, log_prob = sample_belief_action(agent, batch["obs"], batch["belief"], batch["noise_a"])
    q = agent.q(batch["obs"], actions, batch["belief"], frozen=True).amin(0)  # (N,)
    return (args.alpha * log_prob - q).mean(), log_prob


def update(agent, optimizer, batch, args):
    """One gradient step of stage 2.

    On a GPU the step is recorded once and replayed: no `.item()`, no `if` on a tensor, and all
    noise comes with the batch.

    Args:
        batch: hyper-states obs, next_obs (T, B, o + 2 dz), actions (T, B, a), rewards, terminals
            (T, B, 1); standard normal noise_a and noise_next_a (N, a).

    Returns scalars to log, as tensors.
    """
    # Here, and not before the backward pass: --compile then makes one graph of losses and gradients
    optimizer.zero_grad(set_to_none=True)

    # --- Flat rows, N = T * B, and the two parts of a hyper-state apart
    flat = dict(batch)
    for name in ("rewards", "terminals"):
        flat[name] = batch[name].flatten()  # (N,)
    flat["actions"] = batch["actions"].flatten(0, 1)  # (N, a)
    for state, belief in (("obs", "belief"), ("next_obs", "next_belief")):
        hyper_states = batch[state].flatten(0, 1)  # (N, o + 2 dz)
        parts = hyper_states.tensor_split([-2 * args.latent_dim], dim=1)
        flat[state], flat[belief] = parts  # (N, o), (N, 2 dz)

    # --- Losses
    l_critic, q = sac_critic_loss(agent, flat, args)
    l_actor, log_prob = sac_actor_loss(agent, flat, args)

    # --- What is logged, detached before the backward pass (for --compile, as above)
    info = {
        "losses/critic": l_critic,
        "losses/actor": l_actor,
        "train/q_mean": q.mean(),
        "train/q_max": q.amax(),
        "train/policy_entropy": -log_prob.mean(),
    }
    info = {name: value.detach() for name, value in info.items()}

    # --- One backward pass for both. The gradient of encoder and decoder stays None, and the
    # optimizer skips them.
    loss = l_critic + l_actor
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        targets = list(agent.q_target.parameters())
        torch._foreach_lerp_(targets, list(agent.q.parameters()), args.tau)  # soft update
    return info


def sample_batch(buffer, args, rng):
    """Transitions of some tasks, and the noise of one update."""
    num_tasks = len(buffer.sizes["rl"])
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=rng, device=rng.device)
    batch = buffer.sample(tasks, args.rl_batch, rng)
    actions_shape = batch["actions"].flatten(0, 1).shape  # (N, a)
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(actions_shape, generator=rng, device=rng.device)
    return batch


# ===== Acting


@torch.no_grad()
def rollout_belief(env_list, agent, memory, rng, deterministic=False, frozen=False):
    """One episode in each of E environments, side by side.

    After every step its true reward enters the belief.

    Args:
        memory: (E, 128), what the encoder has kept of the episodes before.
        deterministic: act with the policy's mean instead of a sample.
        frozen: the belief stays as it is, and no reward of this episode is read for it.

    Returns E trajectories, obs (L+1, o), actions (L, a), terminals (L,), rewards (L,), and the
    memory after them (E, 128).
    """
    device = memory.device
    memory = memory.clone()
    episodes = envs.Episodes(env_list, rng)
    while live := episodes.live:  # the numbers of the episodes that have not ended
        belief = agent.encoder.belief(memory[live])  # (live, 2 dz)
        mean, log_std = agent.policy(episodes.obs().to(device), belief)
        if deterministic:
            u = mean
        else:
            noise = torch.randn(mean.shape, generator=rng).to(device)
            u = mean + log_std.exp() * noise
        episodes.step(torch.tanh(u))

        if not frozen:
            step = {
                "actions": episodes.last("actions", live),
                "next_obs": episodes.last("obs", live),
                "rewards": episodes.last("rewards", live),
            }
            step = {name: values[:, None].to(device) for name, values in step.items()}
            memory[live] = agent.encoder(step, memory[live])[:, -1]
    return episodes.paths(), memory


@torch.no_grad()
def adapt_belief(env_list, agent, rng):
    """The meta-episode, T = 3 (SMAC's Section 6): one policy plays all three episodes, and the
    belief runs on.

    Nothing marks the first two as exploration: the policy explores while its belief is vague.

    Returns for each of E environments its third trajectory, and its first two; then the encoder's
    memory of these two (E, 128).
    """
    # PAPER: the policy's mean at test time. CODE: samples in the first two episodes, as in the
    # other scripts.
    memory = blank_memory(len(env_list), next(agent.parameters()).device)
    first, memory = rollout_belief(env_list, agent, memory, rng)
    second, memory = rollout_belief(env_list, agent, memory, rng)
    exploration = list(zip(first, second))
    final, _ = rollout_belief(env_list, agent, memory, rng, deterministic=True)
    return final, exploration, memory


# ===== Evaluation


def posterior_of(agent, memory):
    """mu (E, dz) of the belief, and its KL to the prior (E,)."""
    mu, log_var = agent.encoder.belief(memory).chunk(2, dim=-1)
    return mu, kl_to_prior(mu, (0.5 * log_var).exp())


@torch.no_grad()
def evaluate(agent, trajectories, eval_envs, args):
    """Post-adaptation returns and diagnostics.

    The generator is its own: evaluating changes nothing in training.

    trajectories: for each training task its meta-trajectories in the dataset.

    Returns what `Run.write` takes: a list of `Evaluation`, scalars to log, and the trajectories of
    the dataset in the training tasks, to be drawn.
    """
    rng = torch.Generator().manual_seed(args.seed)
    device = next(agent.parameters()).device
    evaluations = []

    # --- Own context: the belief from what the agent itself explores
    memories = {}
    for split in ("test", "train"):
        tasks, env_list = eval_envs[split]
        final, exploration, memory = buffers.on_cores(adapt_belief, env_list, agent, rng)
        _, kl = posterior_of(agent, memory)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration, kl))
        memories[split] = memory

    # --- Offline context: the same training tasks, after at most two episodes of the dataset
    tasks, env_list = eval_envs["train"]
    exploration = evaluations[-1].exploration  # the loop ends with "train"
    mu_own, _ = posterior_of(agent, memories["train"])
    offline = []
    for i, task in enumerate(tasks):
        of_task = trajectories[task]
        episodes = of_task[i % len(of_task)]
        offline.append(episodes[: EPISODES - 1])
    steps, lengths, _ = stack([offline], device)
    memory = agent.encoder(steps, blank_memory(len(offline), device))  # (E, L+1, 128)
    memory = memory[torch.arange(len(offline), device=device), lengths]  # (E, 128)
    mu_offline, kl = posterior_of(agent, memory)
    final, _ = buffers.on_cores(rollout_belief, env_list, agent, memory, rng, deterministic=True)
    evaluations.append(buffers.Evaluation("train", "offline", tasks, final, exploration, kl))

    # --- Decoder against true rewards, on the two episodes that the belief comes from
    scalars = {}
    for name, mu, episodes in (
        ("decoder_loss", mu_offline, offline),
        ("generated_reward_mse", mu_own, exploration),
    ):
        steps, lengths, _ = stack([episodes], device)
        rewards = steps["rewards"].squeeze(-1)  # (E, L)
        predicted = agent.decoder(mu[:, None], steps).squeeze(1)
        is_real = torch.arange(rewards.shape[1], device=device) < lengths[:, None]
        error = (predicted - rewards)[is_real].square().mean()
        scalars[f"eval/{name}"] = error
        scalars[f"eval/{name}_over_reward_variance"] = error / rewards[is_real].var()

    # --- The belief goes on reading true rewards in the scored episode, and SMAC's z does not. So
    # the third episode is played once more on the test tasks, without them.
    _, test_envs = eval_envs["test"]
    memory = memories["test"]
    modes = dict(deterministic=True, frozen=True)
    frozen, _ = buffers.on_cores(rollout_belief, test_envs, agent, memory, rng, **modes)
    frozen_returns = [path["rewards"].sum() for path in frozen]
    scalars["charts/test/frozen_belief_return"] = np.mean(frozen_returns)

    dataset_paths = []
    for task in set(tasks):
        for episodes in trajectories[task]:
            dataset_paths += episodes
    return evaluations, scalars, dataset_paths


# ===== The two stages


def meta_trajectories(dataset):
    """For each training task its meta-trajectories: lists of three episodes of the dataset in a
    row; the last one of a task may have fewer.

    An encoder part, from which SMAC's histories h are (Cheetah), is not used.
    """
    paths_of_tasks = [[] for _ in dataset["train_tasks"]]
    for task, path in dataset["rl"]:
        paths_of_tasks[task].append(path)
    trajectories = []
    for paths in paths_of_tasks:
        starts = range(0, len(paths), EPISODES)
        trajectories.append([paths[start : start + EPISODES] for start in starts])
    return trajectories


def main(args):
    """Train both stages on the dataset. Returns the trained agent. Raises InputError."""
    spec = envs.lookup(args.env_id)
    device = buffers.choose_device(args)
    torch.manual_seed(args.seed)
    rng = torch.Generator(device).manual_seed(args.seed)

    dataset = buffers.load_dataset(args.env_id, args.dataset)
    trajectories = meta_trajectories(dataset)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    vae_parameters = [*agent.encoder.parameters(), *agent.decoder.parameters()]
    sac_parameters = [*agent.policy.parameters(), *agent.q.parameters()]
    vae = {"params": vae_parameters, "lr": args.vae_lr}
    sac = {"params": sac_parameters, "lr": args.lr}
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam([vae, sac], fused=True, capturable=on_gpu)

    eval_envs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"])
    state = dict(agent=agent, optimizer=optimizer, rng=rng)
    with buffers.Run(args, __file__, dataset["sha256"], **state) as run:
        # ----- Stage 1: the VAE
        # `run.fast`: the same function, faster, with a CUDA graph on a GPU
        stacked = stack(trajectories, device)
        sample = run.fast(sample_vae_batch)
        learn = run.fast(update_vae, args.compile)
        for step in run.steps(args.vae_steps, "VAE"):
            batch = sample(stacked, args, rng)
            info = learn(agent, optimizer, batch, args)
            run.log(info)
            if step + 1 == args.vae_steps:
                run.write(*evaluate(agent, trajectories, eval_envs, args))

        # ----- Stage 2: SAC on hyper-states; a resumed run makes the same ones again
        buffer = make_hyper_buffer(agent, trajectories, spec.obs_dim, spec.action_dim)
        sample = run.fast(sample_batch)
        learn = run.fast(update, args.compile)
        for _ in run.steps(args.vae_steps + args.offline_steps, "SAC"):
            batch = sample(buffer, args, rng)
            info = learn(agent, optimizer, batch, args)
            run.log(info)
            if run.evaluation_due:
                run.write(*evaluate(agent, trajectories, eval_envs, args))
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
