"""Meta behaviour cloning: SMAC's offline phase with imitation in place of reinforcement learning (Figure 5's baseline).

Paper: Pong, Nair, Smith, Huang, Levine, "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974, Section 6: "replaces the actor update in Equation (2) with simply maximizing
log pi(a | s, z)". Encoder and reward decoder train as in SMAC (Eq. 3); there is no critic and no second phase.
It explores as SMAC does, with z from the prior, and adapts as SMAC does, with z from q(z | h).

Run: python meta_bc.py --env-id HopperParam
"""

import dataclasses
import math
from typing import Literal, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

import buffers
import envs


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of one's own; its PRESETS replace what follows
    preset: Literal["paper", "short"] = (
        "paper"  # the paper's sizes, or small ones: 8 to 20 minutes of one core
    )
    seed: int = 1  # seed of the networks, of exploration and of sampling
    dataset: Optional[str] = None  # offline dataset; default datasets/{env_id}.npz beside this file
    offline_steps: int = 50_000  # gradient steps [C.3]
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint, with its flags
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Algorithm
    rl_batch: int = 256  # transitions a task for policy and decoder [Table 1]
    context_batch: int = 64  # transitions a task in a history h [Table 1, encoder batch size]
    meta_batch: int = 4  # tasks a gradient step [Table 1]
    policy_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the policy [Table 1]
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden sizes of the encoder [Table 1]
    decoder_hidden: tuple[int, ...] = (64, 64)  # hidden sizes of the reward decoder [Table 1]
    latent_dim: int = 5  # size of z [Table 1]
    lr: float = 3e-4  # Adam's learning rate, all networks [Table 1]
    kl_coef: float = 0.1  # weight of the KL term of Eq. 3 (the authors' code; it must fit the size of the rewards)
    next_obs_in_context: bool = (
        False  # the encoder sees s' as well (Section 3 lists it in h, C.3 does not)
    )


SMALL = dict(policy_hidden=(128, 128), encoder_hidden=(128, 128), lr=1e-3)
# What differs from the defaults above. The KL weight must fit the rewards, as in smac_offline_online.py. PointDirection
# is not in the paper: small networks and a short run.
PRESETS = {
    "AntDirection": dict(eval_every=8_000), "SawyerManipulation": dict(kl_coef=1 / 256, eval_every=8_000),
    "PointDirection": SMALL | dict(rl_batch=128, kl_coef=0.002, offline_steps=3_000, eval_every=1_200),
    "short": SMALL | dict(rl_batch=64, offline_steps=15_000, eval_every=5_000),
    "CheetahVelocity short": dict(
        policy_hidden=(300, 300, 300), encoder_hidden=(200, 200, 200), lr=3e-4, offline_steps=20_000),
}  # fmt: skip
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]


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
        """context h (T, C, in_dim), of any length C -> mean and standard deviation of z, (T, dz) each."""
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


class Agent(nn.Module):
    """All networks, for one optimizer and one checkpoint."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        context_dim = obs_dim + action_dim + 1 + obs_dim * args.next_obs_in_context
        self.encoder = Encoder(context_dim, args.encoder_hidden, args.latent_dim)
        self.decoder = Decoder(obs_dim, action_dim, args.decoder_hidden, args.latent_dim)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, args.latent_dim)


def make_context(data, args):
    """A history h as the encoder reads it: (s, a, r) or (s, a, r, s') of each transition, (..., in_dim)."""
    names = ["obs", "actions", "rewards"] + ["next_obs"] * args.next_obs_in_context
    return torch.cat([data[name] for name in names], dim=-1)


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


# ===== Losses. T tasks, B transitions a task, N = T * B; all pure functions of networks and data


def cloning_loss(agent, batch, z):
    """-log pi(a | s, z) of the dataset's actions, mean. z (N, dz)."""
    mean, log_std = agent.policy(batch["obs"], z)  # (N, a)
    data_u = torch.atanh(batch["actions"].clamp(-1 + 1e-6, 1 - 1e-6))
    return -tanh_gaussian_log_prob(data_u, mean, log_std).mean()


def reward_loss(agent, batch, z):
    """The squared error of L_reward (Eq. 3), on unscaled rewards of h'; `update` adds the KL. z (N, dz) -> scalar."""
    # PAPER: sum over h, KL weight 1. CODE: mean over transitions and tasks, KL weight kl_coef.
    return (agent.decoder(batch["obs"], batch["actions"], z) - batch["rewards"]).square().mean()


def update(agent, optimizer, batch, args):
    """One gradient step.

    Args:
        batch: context h (T, C, in_dim); of the second history h': obs (T, B, o), actions (T, B, a), rewards (T, B, 1);
            standard normal noise_z (T, dz).
    Returns:
        scalars to log, as tensors.
    """
    repeat = batch["obs"].shape[1]
    batch = batch | {name: batch[name].flatten(0, 1) for name in ("obs", "actions")}  # (N, .)
    batch["rewards"] = batch["rewards"].flatten()  # (N,)

    # One backward pass: the detached z keeps the policy's loss out of the encoder.
    mu, sigma = agent.encoder(batch["context"])  # (T, dz)
    kl = kl_to_prior(mu, sigma).mean()
    z = (mu + sigma * batch["noise_z"]).repeat_interleave(repeat, dim=0)  # (N, dz)
    l_reward = reward_loss(agent, batch, z)
    l_actor = cloning_loss(agent, batch, z.detach())

    optimizer.zero_grad(set_to_none=True)
    (l_actor + l_reward + args.kl_coef * kl).backward()
    optimizer.step()
    return {
        "losses/actor": l_actor.detach(),
        "losses/reward": l_reward.detach(),
        "losses/kl": kl.detach(),
    }


def sample_batch(buffer, args, rng):
    """Buffers D_i ~ D, two histories h, h' of each, and the noise of one update."""
    tasks = torch.randint(
        len(buffer.sizes["rl"]), (args.meta_batch,), generator=rng, device=rng.device
    )
    batch = buffer.sample(tasks, args.rl_batch, rng)
    batch["context"] = make_context(buffer.sample(tasks, args.context_batch, rng, "encoder"), args)
    batch["noise_z"] = torch.randn(
        args.meta_batch, args.latent_dim, generator=rng, device=rng.device
    )
    return batch


# ===== Acting: Section 3


@torch.no_grad()
def rollout(env_list, agent, mu, sigma, rng, deterministic=False, read_rewards=True):
    """One episode in each of E environments, side by side; z ~ N(mu, sigma^2), (E, dz), is drawn anew at every step.

    Returns E trajectories: obs (L+1, o), actions (L, a), terminals (L,), and rewards (L,) if they may be read.
    """
    episodes = envs.Episodes(env_list, rng, read_rewards)
    while episodes.live:
        z = mu + sigma * torch.randn(mu.shape, generator=rng).to(mu.device)
        mean, log_std = agent.policy(episodes.obs().to(mu.device), z[episodes.live])
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=rng)
        episodes.step(torch.tanh(mean + log_std.exp() * noise.to(mu.device)))
    return episodes.paths()


def prior(num, args, device):
    """p(z) = N(0, 1): mean and standard deviation, (num, dz) each."""
    return torch.zeros(num, args.latent_dim, device=device), torch.ones(
        num, args.latent_dim, device=device
    )


@torch.no_grad()
def adapt(env_list, agent, args, rng):
    """The meta-episode, T = 3: two exploration episodes with z ~ p(z), then one with z ~ q(z | both).

    Returns for each of E environments the third trajectory and the two of exploration; mu, sigma (E, dz) of q.
    """
    # PAPER: adapts between all episodes. CODE: once, before the third, as the authors' code does.
    device = next(agent.parameters()).device
    mu, sigma = prior(len(env_list), args, device)
    exploration = list(zip(*(rollout(env_list, agent, mu, sigma, rng) for _ in range(2))))
    posteriors = [
        agent.encoder(make_context(buffers.join(paths, device), args)[None])
        for paths in exploration
    ]
    mu, sigma = (torch.cat(parts) for parts in zip(*posteriors))  # (E, dz)
    return rollout(env_list, agent, mu, sigma, rng, deterministic=True), exploration, mu, sigma


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation episodes and diagnostics, with generators of their own: evaluating changes nothing in training.

    Returns what Run.write takes: a list of evaluations, "test" first; scalars to log; trajectories of
    the dataset to draw.
    """
    rng, buffer_rng = (
        torch.Generator().manual_seed(args.seed),
        torch.Generator(buffer.device).manual_seed(args.seed),
    )
    evaluations, scalars = [], {}
    for split, (tasks, env_list) in eval_envs.items():  # "train" comes last, and is used below
        final, exploration, mu, sigma = buffers.on_cores(adapt, env_list, agent, args, rng)
        kl = kl_to_prior(mu, sigma)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration, kl))

    # The same training tasks with z ~ q(z | h_offline) instead (Figure 2). Each transition more makes the posterior
    # narrower, so h_offline is as long as the agent's own histories are on average.
    lengths = torch.tensor(
        [sum(len(path["actions"]) for path in pair) for pair in exploration], device=buffer.device
    )
    h_offline = buffer.sample(tasks, round(lengths.float().mean().item()), buffer_rng, "offline")
    mu, sigma = agent.encoder(make_context(h_offline, args))  # (E, dz)
    final = buffers.on_cores(rollout, env_list, agent, mu, sigma, rng, deterministic=True)
    kl = kl_to_prior(mu, sigma)
    evaluations.append(buffers.Evaluation("train", "offline", tasks, final, exploration, kl))

    # Decoder against true rewards, on offline data and on this exploration: for us to read, never for training
    offline = {
        k: v.flatten(0, 1)
        for k, v in buffer.sample(tasks, args.rl_batch, buffer_rng, "offline").items()
    }
    explored = buffers.join([path for pair in exploration for path in pair], buffer.device)
    for name, batch, repeat in (
        ("decoder_loss", offline, args.rl_batch),
        ("generated_reward_mse", explored, lengths),
    ):
        error = (
            agent.decoder(batch["obs"], batch["actions"], mu.repeat_interleave(repeat, 0))
            - batch["rewards"][:, 0]
        )
        scalars[f"eval/{name}"] = error.square().mean()
        scalars[f"eval/{name}_over_reward_variance"] = (
            error.square().mean() / batch["rewards"].var()
        )
    return (
        evaluations,
        scalars,
        [path for task in set(tasks) for path in buffer.offline_paths(task)],
    )


# ===== Training on the dataset


def main(args):
    """Train. Returns the trained agent. Raises InputError."""
    spec, device = envs.lookup(args.env_id), buffers.choose_device(args)
    rng = torch.Generator(device).manual_seed(args.seed)
    torch.manual_seed(args.seed)

    dataset = buffers.load_dataset(args.env_id, args.dataset)
    buffer = buffers.from_dataset(dataset, args.env_id, device)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.lr, fused=True, capturable=device.type == "cuda"
    )
    eval_envs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"])
    with buffers.Run(
        args, __file__, dataset["sha256"], agent=agent, optimizer=optimizer, rng=rng
    ) as run:
        sample, learn = run.fast(sample_batch), run.fast(update, args.compile)
        for _ in run.steps(args.offline_steps, "offline"):
            run.log(learn(agent, optimizer, sample(buffer, args, rng), args))
            if run.evaluation_due:
                run.write(*evaluate(agent, buffer, eval_envs, args))
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
