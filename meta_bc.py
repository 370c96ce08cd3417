"""Meta behaviour cloning: SMAC's offline phase with imitation in place of reinforcement learning.

It is a baseline of Figure 5 of Pong, Nair, Smith, Huang, Levine, "Offline Meta-Reinforcement
Learning with Online Self-Supervision", ICML 2022, https://arxiv.org/abs/2107.03974, Section 6:
"replaces the actor update in Equation (2) with simply maximizing log pi(a | s, z)".

Encoder and reward decoder train as in smac_offline_online.py (Eq. 3). There is no critic, and no
second phase. It explores as SMAC does, with z from the prior, and adapts as SMAC does, with z from
q(z | h).

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
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of your own
    preset: Literal["paper", "short"] = "paper"  # the paper's sizes, or small ones
    seed: int = 1  # seed of the networks, of exploration and of sampling
    dataset: Optional[str] = None  # offline dataset; by default datasets/{env_id}.npz
    offline_steps: int = 50_000  # gradient steps [C.3]
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    keep_agents: bool = False  # keep the agent of every evaluation, agent_{step}.npz
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Networks
    policy_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the policy [Table 1]
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden sizes of the encoder [Table 1]
    decoder_hidden: tuple[int, ...] = (64, 64)  # hidden sizes of the reward decoder [Table 1]
    latent_dim: int = 5  # size of z [Table 1]
    next_obs_in_context: bool = False  # the encoder sees s' (in h in Section 3, not in C.3)

    # --- Gradient step
    rl_batch: int = 256  # transitions a task for policy and decoder [Table 1]
    context_batch: int = 64  # transitions a task in a history h [Table 1, encoder batch size]
    meta_batch: int = 4  # tasks a gradient step [Table 1]
    lr: float = 3e-4  # Adam's learning rate, all networks [Table 1]
    kl_coef: float = 0.1  # weight of the KL term of Eq. 3 (authors' code); it must fit the rewards


# --- What differs from these defaults. Later rows win: "short" (with --preset short), that of the
# environment, "ENVIRONMENT short".
SMALL = dict(policy_hidden=(128, 128), encoder_hidden=(128, 128), lr=1e-3)
PRESETS = {
    "AntDirection": dict(eval_every=8_000),
    "SawyerManipulation": dict(
        kl_coef=1 / 256,  # Eq. 3 as written, a sum over rl_batch 256: rewards are 0 or -1
        eval_every=8_000,
    ),
    "PointDirection": SMALL  # a point mass, which is not in the paper
    | dict(
        rl_batch=128,
        kl_coef=0.002,  # its rewards are of size .3
        offline_steps=3_000,
        eval_every=1_200,
    ),
    "short": SMALL | dict(rl_batch=64, offline_steps=15_000, eval_every=5_000),
    "CheetahVelocity short": dict(  # with small networks SMAC learned nothing here
        policy_hidden=(300, 300, 300),
        encoder_hidden=(200, 200, 200),
        lr=3e-4,
        offline_steps=20_000,
    ),
}
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]


# ===== Networks: Table 1 and C.3


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


class Encoder(nn.Module):
    """q_phi_e(z | h), the product over h of Gaussian factors Phi(z | s, a, r) (C.3)."""

    def __init__(self, in_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([in_dim, *hidden, 2 * latent_dim])

    def forward(self, context):
        """History h (T, C, in_dim), of any length C -> mean, standard deviation of z, (T, dz)."""
        mu, raw = self.net(context).chunk(2, dim=-1)  # (T, C, dz) each
        # As in C.3, softplus gives each factor's standard deviation; in the authors' code it
        # gives the variance.
        variance = F.softplus(raw).square().clamp(min=1e-7)  # (T, C, dz)
        precision = variance.reciprocal()
        # A product of Gaussians: precisions add up, means are weighted by them.
        posterior_variance = precision.sum(1).reciprocal()  # (T, dz)
        posterior_mean = posterior_variance * (precision * mu).sum(1)
        return posterior_mean, posterior_variance.sqrt()


class Decoder(nn.Module):
    """Reward decoder r_phi_d(s, a, z)."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + action_dim + latent_dim, *hidden, 1])

    def forward(self, obs, actions, z):
        """obs (N, o), actions (N, a), z (N, dz) -> predicted rewards (N,)."""
        inputs = torch.cat([obs, actions, z], dim=-1)
        return self.net(inputs).squeeze(-1)


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


class Agent(nn.Module):
    """All networks, for one optimizer and one checkpoint."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        dz = args.latent_dim
        context_dim = obs_dim + action_dim + 1
        if args.next_obs_in_context:
            context_dim += obs_dim
        self.encoder = Encoder(context_dim, args.encoder_hidden, dz)
        self.decoder = Decoder(obs_dim, action_dim, args.decoder_hidden, dz)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, dz)


# ===== What the losses are made of


def make_context(data, args):
    """A history h as the encoder reads it: (s, a, r) of each transition, or (s, a, r, s').

    data: obs (..., o), actions (..., a), rewards (..., 1), next_obs (..., o) -> (..., in_dim).
    """
    parts = [data["obs"], data["actions"], data["rewards"]]
    if args.next_obs_in_context:
        parts.append(data["next_obs"])
    return torch.cat(parts, dim=-1)


def tanh_gaussian_log_prob(u, mean, log_std):
    """Log density of a = tanh(u) with u ~ N(mean, std^2): (N, a) each -> (N,)."""
    standardised = (u - mean) * (-log_std).exp()
    gaussian = -0.5 * standardised.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - a^2), exact for any u
    return (gaussian - log_derivative).sum(-1)


def kl_to_prior(mu, sigma):
    """D_KL(N(mu, sigma^2) || N(0, 1)), summed over the dimensions of z: (T, dz) each -> (T,)."""
    return 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).sum(-1)


# ===== Losses: pure functions of networks and a flat batch of N = T * B transitions,
# B of each of T tasks


def cloning_loss(agent, batch, z):
    """The mean of -log pi(a | s, z) over the dataset's actions.

    z (N, dz) -> scalar.
    """
    mean, log_std = agent.policy(batch["obs"], z)  # (N, a)
    data_u = torch.atanh(batch["actions"].clamp(-1 + 1e-6, 1 - 1e-6))
    return -tanh_gaussian_log_prob(data_u, mean, log_std).mean()


def reward_loss(agent, batch, z):
    """The squared error of L_reward (Eq. 3), on the unscaled rewards of h', as in l. 5 of Alg. 1
    (Eq. 3 itself has h); `update` adds the KL.

    z (N, dz) -> scalar.
    """
    # PAPER: sum over h, KL weight 1. CODE: mean over transitions and tasks, KL weight kl_coef.
    predicted = agent.decoder(batch["obs"], batch["actions"], z)
    return (predicted - batch["rewards"]).square().mean()


# ===== One gradient step


def sample_batch(buffer, args, rng):
    """Buffers D_i ~ D, of each two histories h and h' (as Alg. 1 of SMAC, l. 3), and all noise."""
    num_tasks = len(buffer.sizes["rl"])
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=rng, device=rng.device)  # (T,)

    batch = buffer.sample(tasks, args.rl_batch, rng)  # h'
    h = buffer.sample(tasks, args.context_batch, rng, "encoder")
    batch["context"] = make_context(h, args)

    z_shape = (args.meta_batch, args.latent_dim)
    batch["noise_z"] = torch.randn(z_shape, generator=rng, device=rng.device)
    return batch


def update(agent, optimizer, batch, args):
    """One gradient step.

    On a GPU the step is recorded once and replayed: no `.item()`, no `if` on a tensor, and all
    noise comes with the batch.

    Args:
        batch: the history h that the encoder reads, context (T, C, in_dim); the second history h':
            obs (T, B, o), actions (T, B, a), rewards (T, B, 1); standard normal noise_z (T, dz).

    Returns scalars to log, as tensors.
    """
    # Here, and not before the backward pass: --compile then makes one graph of losses and gradients
    optimizer.zero_grad(set_to_none=True)

    # --- h' as flat rows: N = T * B
    transitions = batch["obs"].shape[1]
    flat = dict(batch)
    for name in ("obs", "actions"):
        flat[name] = batch[name].flatten(0, 1)  # (N, .)
    flat["rewards"] = batch["rewards"].flatten()  # (N,)

    # --- z ~ q(z | h), one for each task
    mu, sigma = agent.encoder(batch["context"])  # (T, dz)
    kl = kl_to_prior(mu, sigma).mean()
    z = mu + sigma * batch["noise_z"]
    z = z.repeat_interleave(transitions, dim=0)  # (N, dz)

    # --- Losses: Eq. 3, and imitation. The detached z keeps the policy's loss out of the encoder.
    l_reward = reward_loss(agent, flat, z)
    l_actor = cloning_loss(agent, flat, z.detach())

    # --- What is logged, detached before the backward pass (for --compile, as above)
    info = {
        "losses/actor": l_actor,
        "losses/reward": l_reward,
        "losses/kl": kl,
    }
    info = {name: value.detach() for name, value in info.items()}

    # --- One backward pass for all
    loss = l_actor + l_reward + args.kl_coef * kl
    loss.backward()
    optimizer.step()
    return info


# ===== Acting: Section 3


def prior(num, args, device):
    """p(z) = N(0, 1): mean and standard deviation, (num, dz) each."""
    mu = torch.zeros(num, args.latent_dim, device=device)
    sigma = torch.ones(num, args.latent_dim, device=device)
    return mu, sigma


@torch.no_grad()
def rollout(env_list, agent, mu, sigma, rng, deterministic=False, read_rewards=True):
    """One episode in each of E environments, side by side.

    A new z_t ~ N(mu, sigma^2) is drawn at every step [Alg. 1, l. 7]; mu, sigma (E, dz).

    Returns E trajectories: obs (L+1, o), actions (L, a), terminals (L,), and rewards (L,) if they
    may be read.
    """
    episodes = envs.Episodes(env_list, rng, read_rewards)
    while episodes.live:  # the numbers of the episodes that have not ended
        z = mu + sigma * torch.randn(mu.shape, generator=rng).to(mu.device)
        obs = episodes.obs().to(mu.device)  # (live, o)
        mean, log_std = agent.policy(obs, z[episodes.live])
        if deterministic:
            u = mean
        else:
            noise = torch.randn(mean.shape, generator=rng).to(mu.device)
            u = mean + log_std.exp() * noise
        episodes.step(torch.tanh(u))
    return episodes.paths()


def encode(agent, histories, args):
    """q(z | h) of E histories, each a list of trajectories: mu and sigma, (E, dz) each."""
    device = next(agent.parameters()).device
    posteriors = []
    for paths in histories:  # they differ in length, so that each is encoded alone
        h = buffers.join(paths, device)
        posteriors.append(agent.encoder(make_context(h, args)[None]))  # (1, dz) each
    mu = torch.cat([mu for mu, _ in posteriors])  # (E, dz)
    sigma = torch.cat([sigma for _, sigma in posteriors])
    return mu, sigma


@torch.no_grad()
def adapt(env_list, agent, args, rng):
    """The meta-episode, T = 3: two exploration episodes with z ~ p(z), then one with z ~ q(z | h).

    h: the transitions of both. The actions of the third episode are deterministic; its z is drawn
    as in the others, see `rollout`.

    Returns for each of E environments its third trajectory, and its two of exploration; then mu
    and sigma (E, dz) of q.
    """
    # PAPER: adapts after each episode. CODE: after the second alone, as the authors' code does.
    mu, sigma = prior(len(env_list), args, next(agent.parameters()).device)
    first = rollout(env_list, agent, mu, sigma, rng)
    second = rollout(env_list, agent, mu, sigma, rng)
    exploration = list(zip(first, second))
    mu, sigma = encode(agent, exploration, args)
    final = rollout(env_list, agent, mu, sigma, rng, deterministic=True)
    return final, exploration, mu, sigma


# ===== Evaluation


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns and diagnostics [Section 6, Figure 2].

    The generators are its own: evaluating changes nothing in training.

    Returns what `Run.write` takes: a list of `Evaluation`, scalars to log, and the trajectories of
    the dataset in the training tasks, to be drawn.
    """
    rng = torch.Generator().manual_seed(args.seed)
    buffer_rng = torch.Generator(buffer.device).manual_seed(args.seed)
    evaluations = []

    # --- Own context: z from what the agent itself explores
    for split in ("test", "train"):
        tasks, env_list = eval_envs[split]
        # `on_cores` cuts env_list, and every tensor (E, .), in parts, one for each process
        final, exploration, mu, sigma = buffers.on_cores(adapt, env_list, agent, args, rng)
        kl = kl_to_prior(mu, sigma)  # (E,)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration, kl))

    # --- Offline context: the same training tasks with z ~ q(z | h_offline) (Figure 2). Every
    # further transition narrows the posterior: h_offline has as many as the own histories have on
    # average.
    tasks, env_list = eval_envs["train"]
    exploration = evaluations[-1].exploration  # the loop ends with "train"
    lengths = []  # how many transitions each environment has explored
    explored_paths = []
    for pair in exploration:
        lengths.append(sum(len(path["actions"]) for path in pair))
        explored_paths += pair
    mean_length = round(sum(lengths) / len(lengths))
    lengths = torch.tensor(lengths, device=buffer.device)  # (E,)
    h_offline = buffer.sample(tasks, mean_length, buffer_rng, "offline")
    mu, sigma = agent.encoder(make_context(h_offline, args))  # (E, dz)
    final = buffers.on_cores(rollout, env_list, agent, mu, sigma, rng, deterministic=True)
    kl = kl_to_prior(mu, sigma)
    # (nothing was explored for it: `exploration` is that of the own context)
    evaluations.append(buffers.Evaluation("train", "offline", tasks, final, exploration, kl))

    # --- Decoder against true rewards, with the mean of z given h_offline, on offline data and on
    # what was explored: for people to read; training never uses them
    offline = buffer.sample(tasks, args.rl_batch, buffer_rng, "offline")
    offline = {name: values.flatten(0, 1) for name, values in offline.items()}  # (E * B, .)
    explored = buffers.join(explored_paths, buffer.device)
    z_offline = mu.repeat_interleave(args.rl_batch, dim=0)  # (E * B, dz)
    z_explored = mu.repeat_interleave(lengths, dim=0)  # a row for each explored transition
    scalars = {}
    for name, data, z in (
        ("decoder_loss", offline, z_offline),
        ("generated_reward_mse", explored, z_explored),
    ):
        rewards = data["rewards"][:, 0]
        error = agent.decoder(data["obs"], data["actions"], z) - rewards
        scalars[f"eval/{name}"] = error.square().mean()
        scalars[f"eval/{name}_over_reward_variance"] = error.square().mean() / rewards.var()

    dataset_paths = []
    for task in set(tasks):
        dataset_paths += buffer.offline_paths(task)
    return evaluations, scalars, dataset_paths


# ===== Training on the dataset


def main(args):
    """Train. Returns the trained agent. Raises InputError."""
    spec = envs.lookup(args.env_id)
    device = buffers.choose_device(args)
    torch.manual_seed(args.seed)
    rng = torch.Generator(device).manual_seed(args.seed)

    dataset = buffers.load_dataset(args.env_id, args.dataset)
    buffer = buffers.from_dataset(dataset, args.env_id, device)

    # Policy, encoder, decoder
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True, capturable=on_gpu)

    eval_envs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"])
    state = dict(agent=agent, optimizer=optimizer, rng=rng)
    with buffers.Run(args, __file__, dataset["sha256"], **state) as run:
        # The same functions, faster: a CUDA graph on a GPU, the best exact precision on a CPU
        sample = run.fast(sample_batch)
        learn = run.fast(update, args.compile)

        for _ in run.steps(args.offline_steps, "offline"):
            batch = sample(buffer, args, rng)
            info = learn(agent, optimizer, batch, args)
            run.log(info)
            if run.evaluation_due:
                run.write(*evaluate(agent, buffer, eval_envs, args))
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
