"""BOReL, Bayesian offline RL: an offline meta-RL baseline of Figure 5, without a second phase.

Paper: Dorfman, Shenfeld, Tamar, "Offline Meta Learning of Exploration", 2020, https://arxiv.org/abs/2008.02598, code
https://github.com/Rondorf/BOReL. Two stages, both on the dataset alone; a meta-trajectory is three episodes of a task.
1. A VAE over meta-trajectories. A GRU turns the steps so far into a belief over the task, q(z | a, s', r, ...);
   a decoder predicts from z the rewards of the whole meta-trajectory, past and future.
2. The encoder is frozen, and SAC learns on hyper-states: a state and the belief at that step.
Such a policy is Bayes-adaptive: it explores as far as knowing more pays, without anyone telling it to.
A departure from the published algorithm says `PAPER: ... CODE: ...` at its line; PAPER.md lists them all.

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


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of one's own; its PRESETS replace what follows
    seed: int = 1  # seed of the networks, of exploration and of sampling
    dataset: Optional[str] = None  # offline dataset; default datasets/{env_id}.npz beside this file
    vae_steps: int = 5_000  # gradient steps of stage 1 (authors: 100 epochs, about 2,500 on 1200 transitions a task)
    offline_steps: int = (
        25_000  # gradient steps of stage 2; 102 million transitions, SMAC's offline phase has 51
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint, with its flags
    eval_every: int = (
        4_000  # gradient steps between two evaluations, each with a checkpoint of stage 2
    )
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Stage 1. Values without a source: the authors' code, for its MuJoCo tasks
    latent_dim: int = 5  # size of z
    vae_tasks: int = 4  # tasks a gradient step
    vae_trajectories: int = 4  # meta-trajectories a task (the authors' code has 8 and more data)
    elbo_terms: int = 64  # beliefs, and rewards, drawn of each meta-trajectory to estimate the reconstruction term
    kl_coef: float = 0.05  # weight of the KL term
    vae_lr: float = 3e-4  # Adam's learning rate, encoder and decoder

    # --- Stage 2. SMAC's paper ran BOReL with its own values and with SMAC's, and reports the better one (Section 6)
    preset: Literal["original", "matched", "short"] = (
        "original"  # its values, SMAC's sizes, or small ones
    )
    q_hidden: tuple[int, ...] = (256, 256)  # hidden sizes of the Q-functions
    policy_hidden: tuple[int, ...] = (256, 256)  # hidden sizes of the policy
    lr: float = 3e-4  # Adam's learning rate, policy and Q-functions
    meta_batch: int = 16  # tasks a gradient step
    rl_batch: int = 256  # transitions a task
    gamma: float = 0.99  # discount
    tau: float = 0.005  # soft target update
    alpha: float = 0.2  # weight of the policy's entropy


SMALL = dict(q_hidden=(128, 128), policy_hidden=(128, 128), lr=1e-3)
# What differs from the defaults above. PointDirection is not in the paper: small networks, short stages, and the
# entropy weight of the authors' point robot, which fits rewards of about .1 to .5.
PRESETS = {
    "AntDirection": dict(eval_every=8_000),
    "PointDirection": SMALL | dict(
        rl_batch=128, alpha=0.01, vae_trajectories=2, vae_lr=3e-3, vae_steps=1_000, offline_steps=2_000, eval_every=500,
    ),
    "matched": dict(q_hidden=(300, 300, 300), policy_hidden=(300, 300, 300), meta_batch=4),
    "short": SMALL | dict(rl_batch=64, vae_steps=1_500, offline_steps=7_500, eval_every=2_500),
}  # fmt: skip
EPISODES = 3  # in a meta-trajectory: T of Section 6
MAX_PADDED = 1 << 27  # numbers in all meta-trajectories, were all as long as the longest


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
        self.actions, self.next_obs, self.rewards = (
            nn.Linear(action_dim, 16),
            nn.Linear(obs_dim, 32),
            nn.Linear(1, 16),
        )
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
        embedded = [
            getattr(self, name)(steps[name]).relu() for name in ("actions", "next_obs", "rewards")
        ]
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
        self.first, self.second, self.last = (
            nn.Linear(latent_dim + 80, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 1),
        )

    def forward(self, z, steps):
        """Every z (N, Z, dz) with every step, obs, next_obs (N, K, o), actions (N, K, a): -> (N, Z, K)."""
        embedded = [
            self.obs(steps["next_obs"]),
            self.actions(steps["actions"]),
            self.obs(steps["obs"]),
        ]
        x = torch.cat(embedded, dim=-1).relu()  # (N, K, 80)
        # The first layer of (z, x) is a sum: compute one product for the Z, one for the K, and add for the pairs.
        weight_z, weight_x = self.first.weight.split([z.shape[-1], 80], dim=1)
        pairs = (
            F.linear(z, weight_z)[:, :, None] + F.linear(x, weight_x, self.first.bias)[:, None]
        )  # (N, Z, K, 32)
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
        self.weights = nn.ParameterList(
            torch.stack([q.weight.T for q in layer]).detach() for layer in layers
        )
        self.biases = nn.ParameterList(
            torch.stack([q.bias[None] for q in layer]).detach() for layer in layers
        )

    def forward(self, obs, actions, z, frozen=False):
        """obs (N, o), actions (N, a), z (N, dz) -> (count, N). frozen: gradients reach inputs and not weights."""
        x = torch.cat([obs, actions, z], dim=-1).expand(
            len(self.weights[0]), -1, -1
        )  # (count, N, o + a + dz)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = (
                torch.baddbmm(bias.detach(), x, weight.detach())
                if frozen
                else torch.baddbmm(bias, x, weight)
            )
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
    gaussian = (
        -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    )
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
    mu_t, log_var_t = (
        torch.take_along_dim(x, t[..., None], dim=1) for x in (mu, log_var)
    )  # (N, Z, dz) each
    drawn = {
        name: torch.take_along_dim(x, k[..., None], dim=1) for name, x in steps.items()
    }  # (N, K, .)
    error = (
        agent.decoder(mu_t + (0.5 * log_var_t).exp() * noise, drawn) - drawn["rewards"].mT
    )  # (N, Z, K)
    reconstruction = (lengths + 1) * error.square().mean((1, 2))

    # KL(q_0 || N(0, 1)) + sum over t of KL(q_t || q_t-1): the prior of a belief is the belief before it.
    mu_before, log_var_before = (
        F.pad(x[:, :-1], (0, 0, 1, 0)) for x in (mu, log_var)
    )  # zeros first: N(0, 1)
    ratio = (log_var.exp() + (mu - mu_before).square()) * (-log_var_before).exp()
    kl = 0.5 * (ratio - 1 + log_var_before - log_var).sum(-1)  # (N, L+1)
    real = torch.arange(kl.shape[1], device=lengths.device) <= lengths[:, None]
    return reconstruction, (kl * real).sum(1)


def update_vae(agent, optimizer, batch, args):
    """One gradient step of stage 1; `batch` has the arguments of `vae_loss`. Returns scalars to log, as tensors."""
    reconstruction, kl = vae_loss(agent, **batch)
    optimizer.zero_grad(
        set_to_none=True
    )  # the optimizer skips policy and critic, whose gradient is None
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
    rows = [buffers.join(episodes, device) for of_task in trajectories for episodes in of_task]
    if len(rows) * max(sum(x.numel() for x in row.values()) for row in rows) > MAX_PADDED:
        raise buffers.InputError(
            "the longest meta-trajectory of the dataset is too long to pad all others to it"
        )
    steps = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}
    lengths = torch.tensor([len(row["obs"]) for row in rows], device=device)
    return (
        steps,
        lengths,
        torch.tensor([0] + [len(of_task) for of_task in trajectories], device=device).cumsum(0),
    )


def sample_vae_batch(stacked, args, rng):
    """Meta-trajectories of some tasks, and all that is drawn for the estimate of the ELBO: arguments of `vae_loss`."""
    # PAPER: other tasks' episodes join, with rewards from this task's reward function (reward relabelling). CODE: none,
    # as in SMAC's paper: the reward functions are not part of the dataset.
    steps, lengths, first_rows = stacked
    tasks = torch.randint(
        len(first_rows) - 1, (args.vae_tasks,), generator=rng, device=lengths.device
    )
    tasks = tasks.repeat_interleave(args.vae_trajectories)  # (N,)

    def draw(limits, num):
        """Whole numbers from 0 to limit - 1: limits (N,) -> (N, num)."""
        uniform = torch.rand(len(limits), num, generator=rng, device=limits.device)
        return (uniform * limits[:, None]).long()

    rows = first_rows[tasks] + draw(first_rows[tasks + 1] - first_rows[tasks], 1)[:, 0]  # (N,)
    steps, lengths = {name: x[rows] for name, x in steps.items()}, lengths[rows]
    t, k = draw(lengths + 1, args.elbo_terms), draw(lengths, args.elbo_terms)  # (N, Z), (N, K)
    noise = torch.randn(*t.shape, args.latent_dim, generator=rng, device=t.device)
    return {"steps": steps, "lengths": lengths, "t": t, "k": k, "noise": noise}


# ===== Between the stages


@torch.no_grad()
def make_hyper_buffer(agent, trajectories, obs_dim, action_dim):
    """The dataset as a replay buffer of hyper-states (s, mu, log_var), dimension o + 2 dz."""
    device, belief_dim = next(agent.parameters()).device, agent.encoder.belief.out_features
    capacity = sum(
        len(path["actions"])
        for of_task in trajectories
        for episodes in of_task
        for path in episodes
    )
    buffer = buffers.ReplayBuffer(
        len(trajectories), obs_dim + belief_dim, action_dim, capacity, device
    )
    for task, of_task in enumerate(trajectories):
        for episodes in of_task:
            # PAPER: a terminal state clears the GRU. CODE: a fall does not end the task, the belief runs on. (The
            # critic's return does end there, so that falling stays bad.)
            steps = {name: x[None] for name, x in buffers.join(episodes, device).items()}
            memory = agent.encoder(steps, blank_memory(1, device))[0]  # (steps + 1, 128)
            belief, t = agent.encoder.belief(memory).cpu().numpy(), 0  # (steps + 1, 2 dz)
            for path, following in zip(episodes, [*episodes[1:], None]):
                obs, length = path["obs"].copy(), len(path["actions"])
                # PAPER: an episode starts from the last observation of the one before, which carries a flag. CODE: from
                # its own first state, and that is where the last step of the one before leads. No flag.
                if following:
                    obs[-1] = following["obs"][0]
                buffer.add(
                    task, path | {"obs": np.concatenate([obs, belief[t : t + length + 1]], axis=1)}
                )
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
        next_actions, log_prob, _, _ = sample_action(
            agent, next_obs, next_belief, batch["noise_next_a"]
        )
        next_v = (
            agent.q_target(next_obs, next_actions, next_belief).amin(0) - args.alpha * log_prob
        )  # (N,)
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
    for name in (
        "obs",
        "next_obs",
    ):  # the two parts of a hyper-state: state (N, o), belief (N, 2 dz)
        batch[name] = batch[name].flatten(0, 1).tensor_split([-2 * args.latent_dim], dim=1)

    l_critic, q = sac_critic_loss(agent, batch, args)
    l_actor, log_prob = sac_actor_loss(agent, batch, args)
    optimizer.zero_grad(
        set_to_none=True
    )  # the optimizer skips encoder and decoder, whose gradient is None
    (l_critic + l_actor).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(
            list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau
        )  # soft update
        info = {"losses/critic": l_critic, "losses/actor": l_actor}
        info |= {
            "train/q_mean": q.mean(),
            "train/q_max": q.amax(),
            "train/policy_entropy": -log_prob.mean(),
        }
        return {name: value.detach() for name, value in info.items()}


def sample_batch(buffer, args, rng):
    """Transitions of some tasks, and the noise of one update."""
    tasks = torch.randint(
        len(buffer.sizes["rl"]), (args.meta_batch,), generator=rng, device=rng.device
    )
    batch = buffer.sample(tasks, args.rl_batch, rng)
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(
            batch["actions"].flatten(0, 1).shape, generator=rng, device=rng.device
        )
    return batch


# ===== Acting: Section 3


@torch.no_grad()
def rollout_belief(env_list, agent, memory, rng, deterministic=False, frozen=False):
    """One episode in each of E environments, side by side; after every step its true reward enters the belief.

    Args:
        memory: (E, 128), what the encoder has kept of the episodes before.
        deterministic: act with the policy's mean instead of a sample.
        frozen: the belief stays as it is, and no reward of this episode is read for it.
    Returns:
        E trajectories, obs (L+1, o), actions (L, a), rewards (L,), terminals (L,), and the memory afterwards (E, 128).
    """
    episodes, memory, device = envs.Episodes(env_list, rng), memory.clone(), memory.device
    while live := episodes.live:
        mean, log_std = agent.policy(episodes.obs().to(device), agent.encoder.belief(memory[live]))
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=rng)
        episodes.step(torch.tanh(mean + log_std.exp() * noise.to(device)))
        if frozen:
            continue
        last = {
            name: episodes.last(name, live).to(device) for name in ("actions", "obs", "rewards")
        }  # (live, .)
        steps = {"actions": last["actions"], "next_obs": last["obs"], "rewards": last["rewards"]}
        memory[live] = agent.encoder({name: x[:, None] for name, x in steps.items()}, memory[live])[
            :, -1
        ]
    return episodes.paths(), memory


@torch.no_grad()
def adapt_belief(env_list, agent, rng):
    """The meta-episode (Section 3; T = 3 of Section 6): one policy plays all three episodes, with one belief.

    Nothing marks the first two as exploration: the policy explores while its belief is vague.

    Returns:
        for each of E environments the third trajectory, the first two, and the encoder's memory of these two (E, 128).
    """
    memory, exploration = blank_memory(len(env_list), next(agent.parameters()).device), []
    for _ in range(EPISODES - 1):
        # PAPER: the policy's mean at test time. CODE: samples in the first two episodes, as in the other scripts.
        paths, memory = rollout_belief(env_list, agent, memory, rng)
        exploration.append(paths)
    final, _ = rollout_belief(env_list, agent, memory, rng, deterministic=True)
    return final, list(zip(*exploration)), memory


@torch.no_grad()
def evaluate(agent, trajectories, eval_envs, args):
    """Post-adaptation episodes and diagnostics, with a generator of its own: evaluating changes nothing in training.

    Args:
        trajectories: for each training task its meta-trajectories in the dataset.
    Returns:
        what Run.write takes: a list of evaluations, "test" first; scalars to log; trajectories of the
        dataset to draw.
    """
    device, rng = next(agent.parameters()).device, torch.Generator().manual_seed(args.seed)

    def belief_of(memory):
        """mu (E, dz) of the belief, and its KL to the prior (E,)."""
        mu, log_var = agent.encoder.belief(memory).chunk(2, dim=-1)
        return mu, kl_to_prior(mu, (0.5 * log_var).exp())

    evaluations, memories = [], {}
    for split, (tasks, env_list) in eval_envs.items():  # "train" comes last, and is used below
        final, exploration, memories[split] = buffers.on_cores(adapt_belief, env_list, agent, rng)
        mu_own, kl = belief_of(memories[split])
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration, kl))

    # The same training tasks, after at most two episodes of the dataset in place of the policy's own
    offline = [
        trajectories[task][i % len(trajectories[task])][: EPISODES - 1]
        for i, task in enumerate(tasks)
    ]
    steps, lengths, _ = stack([offline], device)
    memory = agent.encoder(steps, blank_memory(len(offline), device))  # (E, L+1, 128)
    memory = memory[torch.arange(len(offline), device=device), lengths]
    mu_offline, kl = belief_of(memory)
    final, _ = buffers.on_cores(rollout_belief, env_list, agent, memory, rng, deterministic=True)
    evaluations.append(buffers.Evaluation("train", "offline", tasks, final, exploration, kl))

    # Decoder against true rewards, on the two episodes that the belief comes from: the dataset's, and the policy's own
    scalars = {}
    for name, mu, episodes in (
        ("decoder_loss", mu_offline, offline),
        ("generated_reward_mse", mu_own, exploration),
    ):
        steps, lengths, _ = stack([episodes], device)
        real = torch.arange(steps["rewards"].shape[1], device=device) < lengths[:, None]  # (E, L)
        rewards, predicted = (
            steps["rewards"].squeeze(-1),
            agent.decoder(mu[:, None], steps).squeeze(1),
        )
        error = (predicted - rewards)[real].square().mean()
        scalars[f"eval/{name}"] = error
        scalars[f"eval/{name}_over_reward_variance"] = error / rewards[real].var()

    # The belief goes on reading true rewards in the scored episode; SMAC's z does not. What is left without them:
    env_list, memory = eval_envs["test"][1], memories["test"]
    final, _ = buffers.on_cores(
        rollout_belief, env_list, agent, memory, rng, deterministic=True, frozen=True
    )
    scalars["charts/test/frozen_belief_return"] = np.mean([path["rewards"].sum() for path in final])
    return (
        evaluations,
        scalars,
        [path for task in set(tasks) for episodes in trajectories[task] for path in episodes],
    )


# ===== The two stages


def main(args):
    """Train. Returns the trained agent. Raises InputError."""
    spec, device = envs.lookup(args.env_id), buffers.choose_device(args)
    rng = torch.Generator(device).manual_seed(args.seed)
    torch.manual_seed(args.seed)

    # An encoder part of the dataset, which SMAC's encoder and decoder learn from (Cheetah), is not used.
    dataset = buffers.load_dataset(args.env_id, args.dataset)
    paths_of_tasks = [[] for _ in dataset["train_tasks"]]
    for task, path in dataset["rl"]:
        paths_of_tasks[task].append(path)
    # Meta-trajectories: three episodes in a row; the last ones of a task may have fewer
    trajectories = [
        [paths[i : i + EPISODES] for i in range(0, len(paths), EPISODES)]
        for paths in paths_of_tasks
    ]
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    vae = {"params": [*agent.encoder.parameters(), *agent.decoder.parameters()], "lr": args.vae_lr}
    sac = {"params": [*agent.policy.parameters(), *agent.q.parameters()], "lr": args.lr}
    optimizer = torch.optim.Adam([vae, sac], fused=True, capturable=device.type == "cuda")

    eval_envs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"])
    with buffers.Run(
        args, __file__, dataset["sha256"], agent=agent, optimizer=optimizer, rng=rng
    ) as run:
        # Stage 1: the VAE
        stacked = stack(trajectories, device)
        sample, learn = run.fast(sample_vae_batch), run.fast(update_vae, args.compile)
        for step in run.steps(args.vae_steps, "VAE"):
            run.log(learn(agent, optimizer, sample(stacked, args, rng), args))
            if step + 1 == args.vae_steps:
                run.write(*evaluate(agent, trajectories, eval_envs, args))

        # Stage 2: SAC on hyper-states; a resumed run makes the same ones again
        buffer = make_hyper_buffer(agent, trajectories, spec.obs_dim, spec.action_dim)
        sample, learn = run.fast(sample_batch), run.fast(update, args.compile)
        for _ in run.steps(args.vae_steps + args.offline_steps, "SAC"):
            run.log(learn(agent, optimizer, sample(buffer, args, rng), args))
            if run.evaluation_due:
                run.write(*evaluate(agent, trajectories, eval_envs, args))
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
