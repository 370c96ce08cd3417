"""SMAC, semi-supervised meta actor-critic: offline meta-training, then self-supervised meta-training without rewards.

Paper: Pong, Nair, Smith, Huang, Levine, "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974. Start at the end: `main` is Algorithm 1. Before it networks (C.3), losses (Eq. 1 to 4)
and acting (Section 3). A departure from the paper says `PAPER: ... CODE: ...`; PAPER.md lists them all.
Run: python smac_offline_online.py --env-id HopperParam
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
    offline_steps: int = 50_000  # gradient steps of the offline phase [C.3]
    online_iterations: int = 50  # iterations of the self-supervised phase
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint, with its flags
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Algorithm
    rl_batch: int = 256  # transitions a task for critic and actor [Table 1]
    context_batch: int = 64  # transitions a task in a history h [Table 1, encoder batch size]
    meta_batch: int = 4  # tasks a gradient step [Table 1]
    q_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the Q-functions [Table 1]
    policy_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the policy [Table 1]
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden sizes of the encoder [Table 1]
    decoder_hidden: tuple[int, ...] = (64, 64)  # hidden sizes of the reward decoder [Table 1]
    latent_dim: int = 5  # size of z [Table 1]
    num_critics: Literal[1, 2] = (
        2  # Q-functions: one (the text), or two, of which the smaller counts (authors' code)
    )
    gamma: float = 0.99  # discount [Table 1]
    tau: float = 0.005  # soft target update [Table 1, "eta"]
    lr: float = 3e-4  # Adam's learning rate, all networks [Table 1]
    awr_lambda: float = 100.0  # lambda of Eq. 2 [Table 2, "AWR beta"]
    awr_weights: Literal["softmax", "exp"] = (
        "softmax"  # Eq. 2: exp scaled to mean 1 (authors), or exp, at most 20
    )
    reward_scale: float = 5.0  # factor on the reward in the Bellman target [Table 2]
    lambda_pearl: float = (
        1.0  # weight of the PEARL actor loss in the self-supervised phase [Table 2]
    )
    kl_coef: float = (
        0.1  # weight of the KL term of Eq. 3 (authors' code; it must fit the size of the rewards)
    )
    next_obs_in_context: bool = (
        False  # the encoder sees s' as well (Section 3 lists it in h, C.3 does not)
    )
    tasks_per_iteration: int = (
        5  # tasks that collect data in one iteration, side by side (authors: in turn)
    )
    prior_steps: int = (
        400  # new transitions a task with z from the prior (the authors' split of the 1000 of C.2)
    )
    posterior_steps: int = 600  # new transitions a task with z from the posterior
    updates_per_iteration: int = (
        4_000  # gradient steps an iteration (PEARL's code; authors: 16,000; Table 1: 4,000)
    )
    encoder_buffer: Literal["prior", "all", "frozen"] = (
        "prior"  # new data that enter the encoder buffer [C.2]
    )

    # --- Ablations and oracle of the paper
    oracle_rewards: bool = (
        False  # second phase with true rewards, encoder and decoder train on: oracle of Figure 9
    )
    explore_tasks: Literal["train", "test"] = (
        "train"  # where the second phase collects data [Figure 9 compares both]
    )
    actor_ablation: bool = (
        False  # PEARL's actor loss, weight 1, in place of Eq. 2, in both phases [Figure 5]
    )
    encoder_loss: Literal["reward", "reward_then_q", "q"] = (
        "reward"  # what trains the encoder beside the KL [Figure 7]
    )


SMALL = dict(
    q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), lr=1e-3
)  # of both short runs
# What differs from the defaults above. C.2 freezes the encoder buffer on Cheetah, and has one buffer on Sawyer. The KL
# weight must fit the rewards: on Sawyer, where they are 0 or -1 and 0.1 leaves the latent empty, Eq. 3 is taken as
# written, a sum over 256 transitions; on PointDirection, which is not in the paper, they are .1 to .5.
PRESETS = {
    "CheetahVelocity": dict(encoder_buffer="frozen"), "AntDirection": dict(eval_every=8_000),
    "SawyerManipulation": dict(num_critics=1, tasks_per_iteration=1, eval_every=8_000, reward_scale=1.0, awr_lambda=0.3,
        awr_weights="exp", lambda_pearl=0.0, kl_coef=1 / 256, encoder_buffer="all"),
    "PointDirection": SMALL | dict(rl_batch=128, kl_coef=0.002, offline_steps=3_000, online_iterations=24,
        updates_per_iteration=400, prior_steps=150, posterior_steps=250, eval_every=1_200),
    "short": SMALL | dict(rl_batch=64, offline_steps=15_000, online_iterations=20,
        updates_per_iteration=1_000, eval_every=5_000),
    "CheetahVelocity short": dict(q_hidden=(300, 300, 300), policy_hidden=(300, 300, 300),  # small ones learned nothing
        encoder_hidden=(200, 200, 200), lr=3e-4, offline_steps=20_000, online_iterations=10),
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
    gaussian = (
        -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    )
    log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - a^2), exact for any u
    return (gaussian - log_derivative).sum(-1)


def kl_to_prior(mu, sigma):
    """D_KL(N(mu, sigma^2) || N(0, 1)), summed over the dimensions of z: (T, dz) each -> (T,)."""
    return 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).sum(-1)


# ===== Losses. T tasks, B transitions a task, N = T * B; pure functions of networks and a flat batch, (N, .)


def critic_loss(agent, batch, z, args):
    """L_critic (Eq. 1): mean of (Q_w(s, a, z) - y)^2. z (N, dz) -> loss, and Q of the critics (num_critics, N)."""
    with torch.no_grad():
        # y = r + gamma Q_target(s', a', z), a' ~ pi(a' | s', z); a fall ends the sum, the time limit does not
        mean, log_std = agent.policy(batch["next_obs"], z)
        next_actions = torch.tanh(mean + log_std.exp() * batch["noise_next_a"])  # (N, a)
        # PAPER: one Q-function. CODE: two, and the smaller of both in every use; one on Sawyer.
        next_q = agent.q_target(batch["next_obs"], next_actions, z).amin(0)  # (N,)
        target = (
            args.reward_scale * batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_q
        )
    q = agent.q(batch["obs"], batch["actions"], z)  # (num_critics, N)
    return (q - target).square().mean(1).sum(), q


def actor_loss(agent, batch, z, q, args, lambda_pearl):
    """L_actor (Eq. 2) + lambda_pearl * L_actor^PEARL (C.3). z (N, dz), q as above -> loss, weights of Eq. 2 (N,)."""
    mean, log_std = agent.policy(batch["obs"], z)  # (N, a)
    u = mean + log_std.exp() * batch["noise_a"]
    u = (
        u if lambda_pearl else u.detach()
    )  # only the PEARL loss differentiates through the new action
    q_new = agent.q(batch["obs"], torch.tanh(u), z, frozen=True).amin(0)  # (N,)
    # Eq. 2: maximise exp((Q(s, a, z) - V(s, z)) / lambda) log pi(a | s, z); V is Q at one sampled action.
    # PAPER: V(s', z). CODE: V(s, z), as the paper's next sentence and AWAC have it.
    advantage = (q.amin(0) - q_new).detach()
    # PAPER: exp. CODE: softmax over the batch, times N: exp scaled to mean 1, no overflow. On Sawyer exp, at most 20.
    scaled = advantage / args.awr_lambda  # (N,)
    weights = (
        len(scaled) * F.softmax(scaled, dim=0)
        if args.awr_weights == "softmax"
        else scaled.exp().clamp(max=20)
    )
    data_u = torch.atanh(batch["actions"].clamp(-1 + 1e-6, 1 - 1e-6))
    loss = (
        0.0
        if args.actor_ablation
        else -(weights * tanh_gaussian_log_prob(data_u, mean, log_std)).mean()
    )
    if lambda_pearl:  # D_KL(pi(a | s, z) || exp Q / Z), up to a constant
        # As in the text, with log pi, PEARL's entropy; the authors' code leaves it out.
        loss = loss + lambda_pearl * (tanh_gaussian_log_prob(u, mean, log_std) - q_new).mean()
    return loss, weights


def reward_loss(agent, batch, z):
    """The squared error of L_reward (Eq. 3), on unscaled rewards of h'; `update` adds the KL. z (N, dz) -> scalar."""
    # PAPER: sum over h, KL weight 1. CODE: mean over transitions and tasks, KL weight kl_coef.
    return (agent.decoder(batch["obs"], batch["actions"], z) - batch["rewards"]).square().mean()


@torch.no_grad()
def generate_rewards(agent, path, h_offline, args, rng):
    """Eq. 4: r_generated = r_phi_d(s, a, z), one z ~ q(z | h_offline) for the trajectory of L steps -> (L,)."""
    mu, sigma = agent.encoder(make_context(h_offline, args))  # (1, dz)
    z = mu + sigma * torch.randn(mu.shape, generator=rng, device=mu.device)
    obs, actions = (
        torch.as_tensor(path[name]).to(mu.device) for name in ("obs", "actions")
    )  # (L+1, o), (L, a)
    return agent.decoder(obs[:-1], actions, z.expand(len(actions), -1))


def sample_batch(buffer, args, rng):
    """[Alg. 1, l. 3 and 10] Buffers D_i ~ D, two histories h, h' of each, and all the noise of one update."""
    filled = buffer.sizes["encoder"] > 0
    draws = torch.rand(args.meta_batch, len(filled), generator=rng, device=rng.device)
    tasks = (draws * filled).argmax(1)  # (T,), uniform over the tasks that have data
    batch = buffer.sample(tasks, args.rl_batch, rng)
    batch["context"] = make_context(buffer.sample(tasks, args.context_batch, rng, "encoder"), args)
    batch["noise_z"] = torch.randn(
        args.meta_batch, args.latent_dim, generator=rng, device=rng.device
    )
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(
            batch["actions"].flatten(0, 1).shape, generator=rng, device=rng.device
        )
    return batch


def update(agent, optimizer, batch, args, online):
    """One gradient step [Alg. 1, l. 4 and 5; online: l. 11 and 12]. Returns scalars to log, as tensors.
    On a GPU this is recorded once and replayed: no .item(), no `if` on a tensor, all noise from the batch.

    Args:
        batch: context h (T, C, in_dim); of the second history h': obs, next_obs (T, B, o), actions (T, B, a), rewards,
            terminals (T, B, 1); standard normal noise_z (T, dz), noise_a and noise_next_a (N, a).
        online: self-supervised phase: the PEARL actor loss joins, encoder and decoder stay as they are (Section 5.2).
    """
    # Who trains: Section 5.2, and the ablations of Figures 5 and 7
    train_decoder = not online or args.oracle_rewards
    q_to_encoder = args.encoder_loss != "reward"
    reward_to_encoder = (
        args.encoder_loss == "reward" or args.encoder_loss == "reward_then_q" and not online
    )
    lambda_pearl = 1.0 if args.actor_ablation else args.lambda_pearl * online
    repeat = batch["obs"].shape[1]
    batch = batch | {
        name: batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")
    }  # (N, .)
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

    optimizer.zero_grad(
        set_to_none=True
    )  # the optimizer skips a frozen network, whose gradient is None
    (
        l_critic + l_actor + l_reward + args.kl_coef * kl
    ).backward()  # where nothing trains, a term is a constant
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(
            list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau
        )  # soft update
        info = {
            "losses/critic": l_critic,
            "losses/actor": l_actor,
            "losses/reward": l_reward,
            "losses/kl": kl,
        }
        info |= {"train/q_mean": q.mean(), "train/q_max": q.amax()}
        info["train/actor_weight_ess"] = (
            weights.mean().square() / weights.square().mean()
        )  # effective sample size / N
        return {name: value.detach() for name, value in info.items()}


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


def explore(env_list, tasks, agent, buffer, args, act_rng, rng):
    """[Alg. 1, l. 7] Whole episodes in E tasks side by side, each in its environment: z ~ p(z), then z ~ q(z | h).

    Yields, for each trajectory: number i of the buffer D_i that it shall enter; the trajectory, without rewards unless
    --oracle-rewards; whether the encoder buffer takes it too. Goes on when `main` has added it, so that h may have it.
    """
    num_train = int((buffer.sizes["offline"] > 0).sum())
    for from_prior, num_steps in ((True, args.prior_steps), (False, args.posterior_steps)):
        missing = [num_steps] * len(tasks)
        while live := [e for e, steps in enumerate(missing) if steps > 0]:
            # PAPER: D_i drawn anew for each trajectory (l. 8). CODE: D_i of the training task that is explored.
            owners = [tasks[e] for e in live]
            if (
                args.explore_tasks == "test"
            ):  # it has no offline data: any D_i, as in the text, or one of its own
                drawn = torch.randint(num_train, (len(live),), generator=act_rng)
                owners = (
                    [num_train + task for task in owners] if args.oracle_rewards else drawn.tolist()
                )
            mu, sigma = prior(len(live), args, rng.device)  # (live, dz)
            if not from_prior:
                # PAPER: z ~ p(z) only. CODE: z ~ q(z | h) in 600 of 1000 transitions, for the RL buffer (Sawyer: both).
                with torch.no_grad():
                    h = buffer.sample(owners, args.context_batch, rng, "encoder")
                    mu, sigma = agent.encoder(make_context(h, args))
            paths = rollout(
                [env_list[e] for e in live],
                agent,
                mu,
                sigma,
                act_rng,
                read_rewards=args.oracle_rewards,
            )
            for e, i, path in zip(live, owners, paths):
                missing[e] -= len(path["actions"])
                frozen = args.encoder_buffer == "frozen" and i < num_train
                yield i, path, args.encoder_buffer == "all" or from_prior and not frozen


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


# ===== Algorithm 1


def main(args):
    """Algorithm 1. Returns the trained agent. Raises InputError."""
    spec, device = envs.lookup(args.env_id), buffers.choose_device(args)
    # act_rng, on the CPU as the environments are, is for acting; rng, on the device, for training
    act_rng, rng = (
        torch.Generator().manual_seed(args.seed),
        torch.Generator(device).manual_seed(args.seed),
    )
    torch.manual_seed(args.seed)

    # l. 1: datasets D_i, policy, Q-function, encoder, decoder
    dataset = buffers.load_dataset(args.env_id, args.dataset)
    explored_tasks = dataset[f"{args.explore_tasks}_tasks"]
    more_tasks = (
        len(explored_tasks) if args.explore_tasks == "test" and args.oracle_rewards else 0
    )  # D_i of their own
    visit = (
        args.prior_steps + args.posterior_steps + 2 * spec.horizon
    )  # at most, as both parts end with an episode
    more = args.online_iterations * args.tasks_per_iteration * visit
    buffer = buffers.from_dataset(dataset, args.env_id, device, more_tasks, more)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.lr, fused=True, capturable=device.type == "cuda"
    )

    env_list = [envs.make(args.env_id) for _ in range(args.tasks_per_iteration)]
    eval_envs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"])
    parts = dict(agent=agent, optimizer=optimizer, buffer=buffer, act_rng=act_rng, rng=rng)
    with buffers.Run(args, __file__, dataset["sha256"], **parts) as run:
        sample, learn = run.fast(sample_batch), run.fast(update, args.compile)  # these, but faster

        for _ in run.steps(
            args.offline_steps, "offline"
        ):  # l. 2; also counts, saves, and stops at a signal
            batch = sample(
                buffer, args, rng
            )  # l. 3: D_i ~ D, of each a history h (batch["context"]) and h' (the rest)
            run.log(
                learn(agent, optimizer, batch, args, online=False)
            )  # l. 4 and 5: z ~ q(z | h), train on z and h'
            if run.evaluation_due:
                run.write(*evaluate(agent, buffer, eval_envs, args))

        total_steps = args.offline_steps + args.online_iterations * args.updates_per_iteration
        for step in run.steps(total_steps, "self-supervised"):  # l. 6, up to that step
            if (step - args.offline_steps) % args.updates_per_iteration == 0:
                # PAPER: 4 gradient steps per new transition. CODE: 0.8, as five tasks collect, not one. 4 on Sawyer.
                drawn = torch.randint(
                    len(explored_tasks), (args.tasks_per_iteration,), generator=act_rng
                ).tolist()
                for env, task in zip(env_list, drawn):
                    env.unwrapped.set_task(explored_tasks[task])
                for i, path, to_encoder in explore(
                    env_list, drawn, agent, buffer, args, act_rng, rng
                ):  # l. 7
                    if not args.oracle_rewards:
                        # l. 8: h_offline ~ D_i, of the part of its encoder buffer that has true rewards
                        h_offline = buffer.sample([i], args.context_batch, rng, "offline")
                        path["rewards"] = generate_rewards(
                            agent, path, h_offline, args, rng
                        )  # l. 9: labels
                    buffer.add(i, path, encoder=to_encoder)  # l. 9: D_i grows
                    run.env_steps += len(path["actions"])
            batch = sample(buffer, args, rng)  # l. 10
            run.log(learn(agent, optimizer, batch, args, online=True))  # l. 11 and 12
            if run.evaluation_due:
                run.write(*evaluate(agent, buffer, eval_envs, args))
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
