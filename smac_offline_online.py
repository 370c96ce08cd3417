"""SMAC: offline meta-training, then self-supervised meta-training without rewards.

SMAC is the semi-supervised meta actor-critic of Pong, Nair, Smith, Huang, Levine,
"Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974.

Start at the end: `main` is Algorithm 1. What it calls stands before it: networks (C.3), losses
(Eq. 1 to 3) and labels (Eq. 4), one gradient step, acting (Section 3), evaluation. Where the code
departs from the paper's text a comment says `PAPER: ... CODE: ...`; PAPER.md lists all departures
with the reasons.

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
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of your own
    preset: Literal["paper", "short"] = "paper"  # the paper's sizes, or small ones
    seed: int = 1  # seed of the networks, of exploration and of sampling
    dataset: Optional[str] = None  # offline dataset; by default datasets/{env_id}.npz
    offline_steps: int = 50_000  # gradient steps of the offline phase [C.3]
    online_iterations: int = 50  # iterations of the self-supervised phase [ours]
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    keep_agents: bool = False  # keep the agent of every evaluation, agent_{step}.npz
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Networks
    q_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the Q-functions [Table 1]
    policy_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the policy [Table 1]
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden sizes of the encoder [Table 1]
    decoder_hidden: tuple[int, ...] = (64, 64)  # hidden sizes of the reward decoder [Table 1]
    latent_dim: int = 5  # size of z [Table 1]
    num_critics: Literal[1, 2] = 2  # one Q-function (paper), or the smaller of two (authors' code)
    next_obs_in_context: bool = False  # the encoder sees s' (in h in Section 3, not in C.3)

    # --- Gradient step
    rl_batch: int = 256  # transitions a task for critic and actor [Table 1]
    context_batch: int = 64  # transitions a task in a history h [Table 1, encoder batch size]
    meta_batch: int = 4  # tasks a gradient step [Table 1]
    gamma: float = 0.99  # discount [Table 1]
    tau: float = 0.005  # soft target update [Table 1, "eta"]
    lr: float = 3e-4  # Adam's learning rate, all networks [Table 1]
    reward_scale: float = 5.0  # factor on the reward in the Bellman target [Table 2]
    awr_lambda: float = 100.0  # lambda of Eq. 2 [Table 2, "AWR beta"]
    awr_weights: Literal["softmax", "exp"] = "softmax"  # Eq. 2: exp scaled to mean 1, or exp
    lambda_pearl: float = 1.0  # PEARL's actor loss in the self-supervised phase [Table 2]
    kl_coef: float = 0.1  # weight of the KL term of Eq. 3 (authors' code); it must fit the rewards

    # --- Self-supervised phase
    tasks_per_iteration: int = 5  # tasks that collect data in one iteration, side by side
    prior_steps: int = 400  # new transitions of each task, z from the prior [authors' code]
    posterior_steps: int = 600  # the same with z from the posterior [authors' code]
    updates_per_iteration: int = 4_000  # gradient steps an iteration [PEARL; by Table 1 20,000]
    encoder_buffer: Literal["prior", "all", "frozen"] = "prior"  # of new data: z ~ p(z), all, none

    # --- Ablations, and the oracle of Figure 9; that of Figure 5 is pearl_online_oracle.py
    explore_tasks: Literal["train", "test"] = "train"  # where the second phase collects [Figure 9]
    oracle_rewards: bool = False  # second phase with true rewards, all networks train [Figure 9]
    oracle_frozen: bool = False  # with --oracle-rewards: Eq. 3 stays frozen [a control of ours]
    actor_ablation: bool = False  # PEARL's actor loss in place of Eq. 2, both phases [Figure 5]
    encoder_loss: Literal["reward", "reward_then_q", "q"] = "reward"  # trains encoder [Figure 7]


# --- What differs from these defaults. Later rows win: "short" (with --preset short), that of the
# environment, "ENVIRONMENT short".
SMALL = dict(q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), lr=1e-3)
PRESETS = {
    "CheetahVelocity": dict(encoder_buffer="frozen"),  # [C.2]
    "AntDirection": dict(eval_every=8_000),  # with --preset short, too
    "SawyerManipulation": dict(
        num_critics=1,
        tasks_per_iteration=1,
        encoder_buffer="all",  # it has one buffer [C.2]
        reward_scale=1.0,
        awr_lambda=0.3,
        awr_weights="exp",
        lambda_pearl=0.0,
        kl_coef=1 / 256,  # Eq. 3 as written, a sum over 256 transitions: rewards are 0 or -1
        eval_every=8_000,
    ),
    "PointDirection": SMALL  # a point mass, which is not in the paper
    | dict(
        rl_batch=128,
        kl_coef=0.002,  # its rewards are of size .3
        offline_steps=3_000,
        online_iterations=24,
        updates_per_iteration=400,
        prior_steps=150,
        posterior_steps=250,
        eval_every=1_200,
    ),
    "short": SMALL
    | dict(
        rl_batch=64,
        offline_steps=15_000,
        online_iterations=20,
        updates_per_iteration=1_000,
        eval_every=5_000,
    ),
    "CheetahVelocity short": dict(  # small networks learned nothing here
        q_hidden=(300, 300, 300),
        policy_hidden=(300, 300, 300),
        encoder_hidden=(200, 200, 200),
        lr=3e-4,
        offline_steps=20_000,
        online_iterations=10,
    ),
}
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]


# ===== Networks: Table 1 and C.3
# Shapes: T tasks of a batch (not the paper's T = 3 episodes), C transitions of a history h, B of
# h', N = T * B; E environments, L steps of a trajectory; o, a, dz: sizes of s, a and z.


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
        self.q = QFunctions(obs_dim, action_dim, args.q_hidden, dz, args.num_critics)
        self.q_target = QFunctions(obs_dim, action_dim, args.q_hidden, dz, args.num_critics)
        self.q_target.load_state_dict(self.q.state_dict())
        self.q_target.requires_grad_(False)


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


def critic_loss(agent, batch, z, args):
    """L_critic (Eq. 1): the mean of (Q_w(s, a, z) - y)^2 over transitions, summed over the critics.

    z (N, dz) -> loss, and Q of the batch (num_critics, N).
    """
    with torch.no_grad():
        # a' ~ pi(a' | s', z)
        mean, log_std = agent.policy(batch["next_obs"], z)
        next_actions = torch.tanh(mean + log_std.exp() * batch["noise_next_a"])  # (N, a)
        # PAPER: one Q-function. CODE: two, the smaller in every use; one on Sawyer.
        next_q = agent.q_target(batch["next_obs"], next_actions, z).amin(0)  # (N,)
        # y = r + gamma Q_target(s', a', z). A fall ends the sum, the time limit does not.
        rewards = args.reward_scale * batch["rewards"]
        target = rewards + args.gamma * (1 - batch["terminals"]) * next_q
    q = agent.q(batch["obs"], batch["actions"], z)  # (num_critics, N)
    return (q - target).square().mean(1).sum(), q


def actor_loss(agent, batch, z, q, args, pearl_weight):
    """L_actor (Eq. 2) + pearl_weight * L_actor^PEARL (C.3).

    z (N, dz), q of the batch (num_critics, N) -> loss, weights of Eq. 2 (N,). pearl_weight is
    0 but in SMAC's second phase (lambda_pearl) and in the actor ablation (1).
    """
    # --- A new action, a ~ pi(a | s, z), and its Q. Only PEARL's loss differentiates through it;
    # without that loss the graph is not needed.
    mean, log_std = agent.policy(batch["obs"], z)  # (N, a)
    u = mean + log_std.exp() * batch["noise_a"]
    if not pearl_weight:
        u = u.detach()
    q_new = agent.q(batch["obs"], torch.tanh(u), z, frozen=True).amin(0)  # (N,)

    # --- Eq. 2: maximise exp((Q(s, a, z) - V(s, z)) / lambda) log pi(a | s, z)
    # PAPER: V(s', z). CODE: V(s, z), as the paper's next sentence and AWAC have it.
    value = q_new  # V(s, z): its one sample is the new action
    advantage = (q.amin(0) - value).detach()
    scaled = advantage / args.awr_lambda  # (N,)
    # PAPER: exp. CODE: softmax over the batch, all tasks together, times N: exp scaled to mean 1.
    # On Sawyer exp, at most 20.
    if args.awr_weights == "softmax":
        weights = len(scaled) * F.softmax(scaled, dim=0)
    else:
        weights = scaled.exp().clamp(max=20)
    data_u = torch.atanh(batch["actions"].clamp(-1 + 1e-6, 1 - 1e-6))
    log_prob = tanh_gaussian_log_prob(data_u, mean, log_std)  # (N,)
    loss = 0.0 if args.actor_ablation else -(weights * log_prob).mean()

    # --- PEARL's: D_KL(pi(a | s, z) || exp Q / Z) up to a constant. As in the text it contains
    # log pi, the entropy term; the authors' code leaves that out.
    if pearl_weight:
        new_log_prob = tanh_gaussian_log_prob(u, mean, log_std)
        loss = loss + pearl_weight * (new_log_prob - q_new).mean()
    return loss, weights


def reward_loss(agent, batch, z):
    """The squared error of L_reward (Eq. 3), on the unscaled rewards of h', as in l. 5 of Alg. 1
    (Eq. 3 itself has h); `update` adds the KL.

    z (N, dz) -> scalar.
    """
    # PAPER: sum over h, KL weight 1. CODE: mean over transitions and tasks, KL weight kl_coef.
    predicted = agent.decoder(batch["obs"], batch["actions"], z)
    return (predicted - batch["rewards"]).square().mean()


# ===== Labels


@torch.no_grad()
def generate_rewards(agent, path, h_offline, args, rng):
    """Eq. 4: r_generated = r_phi_d(s, a, z), with one z ~ q(z | h_offline) for the trajectory.

    path: a trajectory of L steps. h_offline: as `ReplayBuffer.sample` gives it for one task.
    Returns (L,).
    """
    mu, sigma = agent.encoder(make_context(h_offline, args))  # (1, dz)
    z = mu + sigma * torch.randn(mu.shape, generator=rng, device=mu.device)
    obs = torch.as_tensor(path["obs"]).to(mu.device)  # (L+1, o)
    actions = torch.as_tensor(path["actions"]).to(mu.device)  # (L, a)
    return agent.decoder(obs[:-1], actions, z.expand(len(actions), -1))


# ===== One gradient step


def sample_batch(buffer, args, rng):
    """[Alg. 1, l. 3 and 10] Buffers D_i ~ D, of each two histories h and h', and all noise.

    h' is of the RL buffer of D_i, h of its encoder buffer, which may hold other data [C.2].
    """
    has_data = buffer.sizes["encoder"] > 0  # a test task has none before it is explored
    draws = torch.rand(args.meta_batch, len(has_data), generator=rng, device=rng.device)
    tasks = (draws * has_data).argmax(1)  # (T,), uniform over the tasks with data

    batch = buffer.sample(tasks, args.rl_batch, rng)  # h'
    h = buffer.sample(tasks, args.context_batch, rng, "encoder")
    batch["context"] = make_context(h, args)

    z_shape = (args.meta_batch, args.latent_dim)
    batch["noise_z"] = torch.randn(z_shape, generator=rng, device=rng.device)
    actions_shape = batch["actions"].flatten(0, 1).shape  # (N, a)
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(actions_shape, generator=rng, device=rng.device)
    return batch


def update(agent, optimizer, batch, args, self_supervised):
    """One gradient step [Alg. 1, l. 4 and 5; in the self-supervised phase l. 11 and 12].

    On a GPU the step is recorded once and replayed: no `.item()`, no `if` on a tensor, and all
    noise comes with the batch.

    Args:
        batch: the history h that the encoder reads, context (T, C, in_dim); the second history h':
            obs, next_obs (T, B, o), actions (T, B, a), rewards, terminals (T, B, 1); standard
            normal noise_z (T, dz), noise_a and noise_next_a (N, a).
        self_supervised: PEARL's actor loss joins (C.3), encoder and decoder are frozen (Section
            5.2), but for the ablations and the oracle.

    Returns scalars to log, as tensors.
    """
    # Here, and not before the backward pass: --compile then makes one graph of losses and gradients
    optimizer.zero_grad(set_to_none=True)

    # --- Who trains: the ablations of Figures 5 and 7, the oracle of Figure 9. In the second phase
    # encoder and decoder are frozen, as in Section 5.2; Appendix B lets them train on.
    train_decoder = not self_supervised or (args.oracle_rewards and not args.oracle_frozen)
    if args.encoder_loss == "reward":  # SMAC
        reward_loss_to_encoder = train_decoder
        q_loss_to_encoder = False
    elif args.encoder_loss == "reward_then_q":  # both losses offline, then the Q-loss alone
        reward_loss_to_encoder = not self_supervised
        q_loss_to_encoder = True
    else:  # "q": the Q-loss alone, in both phases
        reward_loss_to_encoder = False
        q_loss_to_encoder = True
    # If False, z is a constant: no loss trains the encoder, not even the KL term. If True, at least
    # one does, and the KL term with it.
    train_encoder = reward_loss_to_encoder or q_loss_to_encoder
    if args.actor_ablation:
        pearl_weight = 1.0
    elif self_supervised:
        pearl_weight = args.lambda_pearl
    else:
        pearl_weight = 0.0

    # --- h' as flat rows: N = T * B
    transitions = batch["obs"].shape[1]
    flat = dict(batch)
    for name in ("obs", "actions", "next_obs"):
        flat[name] = batch[name].flatten(0, 1)  # (N, .)
    for name in ("rewards", "terminals"):
        flat[name] = batch[name].flatten()  # (N,)

    # --- l. 4 and 11: z ~ q(z | h), one for each task. (l. 11 has z = q(h); here it is drawn.)
    with torch.set_grad_enabled(train_encoder):
        mu, sigma = agent.encoder(batch["context"])  # (T, dz)
        # The KL term trains the encoder in Figure 7's ablations, too (Appendix B)
        kl = kl_to_prior(mu, sigma).mean()
        z = mu + sigma * batch["noise_z"]
        z = z.repeat_interleave(transitions, dim=0)  # (N, dz)

    # --- l. 5 and 12: losses, Eq. 3, Eq. 1, Eq. 2. A detached z keeps a loss out of the encoder.
    with torch.set_grad_enabled(train_decoder):
        z_decoder = z if reward_loss_to_encoder else z.detach()
        l_reward = reward_loss(agent, flat, z_decoder)
    z_critic = z if q_loss_to_encoder else z.detach()
    l_critic, q = critic_loss(agent, flat, z_critic, args)
    l_actor, weights = actor_loss(agent, flat, z.detach(), q, args, pearl_weight)

    # --- What is logged, detached before the backward pass (for --compile, as above)
    # The effective sample size of Eq. 2's weights, as a share of N
    ess_share = weights.mean().square() / weights.square().mean()
    info = {
        "losses/critic": l_critic,
        "losses/actor": l_actor,
        "losses/reward": l_reward,
        "losses/kl": kl,
        "train/q_mean": q.mean(),
        "train/q_max": q.amax(),
        "train/actor_weight_ess": ess_share,
    }
    info = {name: value.detach() for name, value in info.items()}

    # --- l. 5 and 12: one backward pass for all. A loss that was computed without gradients is a
    # constant; a frozen network then has the gradient None, and Adam skips it.
    loss = l_critic + l_actor + l_reward + args.kl_coef * kl
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        targets = list(agent.q_target.parameters())
        torch._foreach_lerp_(targets, list(agent.q.parameters()), args.tau)  # soft update
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


@torch.no_grad()
def collect(env_list, tasks, num_steps, from_prior, agent, buffer, args, act_rng, train_rng):
    """Explore without rewards (unless --oracle-rewards), label, and store [Alg. 1, l. 7 to 9].

    Whole episodes in E environments side by side, until each has given at least `num_steps`
    transitions.

    Args:
        env_list: E environments, already set to their tasks.
        tasks: the numbers of these E tasks among the training (or test) tasks.
        from_prior: True: z ~ p(z). False: z ~ q(z | h), with h from the encoder buffer.

    Returns the number of new transitions.
    """
    num_train = int((buffer.sizes["offline"] > 0).sum())  # training tasks alone have offline data
    new_steps = [0] * len(tasks)
    while unfinished := [e for e in range(len(tasks)) if new_steps[e] < num_steps]:
        # --- l. 8: the buffer D_i that each new trajectory enters
        # PAPER: D_i drawn anew. CODE: the one of the training task that is explored.
        numbers = [tasks[e] for e in unfinished]
        if args.explore_tasks == "train":
            owners = numbers
        else:
            # A test task has no D_i: as in the text, any of them takes the trajectory. With z from
            # the posterior h, too, is of that D_i.
            owners = torch.randint(num_train, (len(unfinished),), generator=act_rng).tolist()
            # With true rewards it gets a buffer of its own. (The draw is made all the same: both
            # kinds of run then explore with the same random numbers.)
            if args.oracle_rewards:
                owners = [num_train + number for number in numbers]

        # --- l. 7: one trajectory in each task. Its rewards are not read, unless --oracle-rewards.
        # PAPER: z ~ p(z) only. CODE: by default z ~ q(z | h) in 600 of 1000 transitions.
        if from_prior:
            mu, sigma = prior(len(unfinished), args, train_rng.device)  # (unfinished, dz)
        else:
            h = buffer.sample(owners, args.context_batch, train_rng, "encoder")
            mu, sigma = agent.encoder(make_context(h, args))
        chosen = [env_list[e] for e in unfinished]
        paths = rollout(chosen, agent, mu, sigma, act_rng, read_rewards=args.oracle_rewards)

        for e, i, path in zip(unfinished, owners, paths):  # environment e, buffer D_i
            if not args.oracle_rewards:
                # l. 8: h_offline ~ D_i, of the offline transitions in its encoder buffer
                h_offline = buffer.sample([i], args.context_batch, train_rng, "offline")
                # l. 9: r_generated
                path["rewards"] = generate_rewards(agent, path, h_offline, args, train_rng)
            # l. 9: D_i grows. Its encoder buffer takes what was explored from the prior [C.2], or
            # everything, or nothing; in a buffer without offline data it is never frozen.
            if args.encoder_buffer == "all":
                to_encoder = True
            elif args.encoder_buffer == "frozen" and i < num_train:
                to_encoder = False
            else:
                to_encoder = from_prior
            buffer.add(i, path, encoder=to_encoder)
            new_steps[e] += len(path["actions"])
    return sum(new_steps)


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


# ===== Algorithm 1


def main(args):
    """Algorithm 1. Returns the trained agent. Raises InputError."""
    spec = envs.lookup(args.env_id)  # sizes, horizon, numbers of tasks [Table 2]
    device = buffers.choose_device(args)
    torch.manual_seed(args.seed)
    act_rng = torch.Generator().manual_seed(args.seed)  # for acting, on the CPU
    train_rng = torch.Generator(device).manual_seed(args.seed)

    # l. 1: datasets D_i, with room for what will be collected
    dataset = buffers.load_dataset(args.env_id, args.dataset)
    explored_tasks = dataset[f"{args.explore_tasks}_tasks"]
    own_buffers = args.explore_tasks == "test" and args.oracle_rewards
    extra_tasks = len(explored_tasks) if own_buffers else 0
    # In an iteration a task gets two portions of data, one for each call of `collect`. Each may
    # exceed its size by an episode.
    longest_visit = args.prior_steps + args.posterior_steps + 2 * spec.horizon
    extra_steps = args.online_iterations * args.tasks_per_iteration * longest_visit
    buffer = buffers.from_dataset(dataset, args.env_id, device, extra_tasks, extra_steps)

    # l. 1: policy, Q-functions, encoder, decoder
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True, capturable=on_gpu)

    env_list = [envs.make(args.env_id) for _ in range(args.tasks_per_iteration)]
    eval_envs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"])
    state = dict(agent=agent, optimizer=optimizer, buffer=buffer, act_rng=act_rng, rng=train_rng)
    common = dict(agent=agent, buffer=buffer, args=args, act_rng=act_rng, train_rng=train_rng)
    with buffers.Run(args, __file__, dataset["sha256"], **state) as run:
        # The same functions, faster. On a GPU they are recorded and replayed as a CUDA graph:
        # `sample` fills the same tensors each time, `learn` must get these, and later changes of
        # args or lr have no effect. --no-cuda-graph turns that off.
        sample = run.fast(sample_batch)
        learn = run.fast(update, args.compile)

        # ----- Offline phase
        for _ in run.steps(args.offline_steps, "offline"):  # l. 2
            batch = sample(buffer, args, train_rng)  # l. 3: D_i ~ D, histories h and h' of each
            info = learn(agent, optimizer, batch, args, self_supervised=False)  # l. 4 and 5
            run.log(info)
            if run.evaluation_due:  # every eval_every steps, and at the end of a phase
                run.write(*evaluate(agent, buffer, eval_envs, args))

        # ----- Self-supervised phase: new data have no true rewards, unless --oracle-rewards
        online_steps = args.online_iterations * args.updates_per_iteration
        last_step = args.offline_steps + online_steps  # `step` counts on
        for step in run.steps(last_step, "self-supervised"):  # l. 6
            if (step - args.offline_steps) % args.updates_per_iteration == 0:
                # PAPER: 4 gradient steps for each new transition (Table 1). CODE: 0.8, since five
                # tasks collect and not one; 4 on Sawyer (short 0.2 and 1; point mass 0.2).
                size = (args.tasks_per_iteration,)
                tasks = torch.randint(len(explored_tasks), size, generator=act_rng).tolist()
                for env, task in zip(env_list, tasks):
                    env.unwrapped.set_task(explored_tasks[task])
                # l. 7 to 9
                new = collect(env_list, tasks, args.prior_steps, from_prior=True, **common)
                run.env_steps += new
                new = collect(env_list, tasks, args.posterior_steps, from_prior=False, **common)
                run.env_steps += new
            batch = sample(buffer, args, train_rng)  # l. 10
            info = learn(agent, optimizer, batch, args, self_supervised=True)  # l. 11 and 12
            run.log(info)
            if run.evaluation_due:
                run.write(*evaluate(agent, buffer, eval_envs, args))
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
