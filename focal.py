"""FOCAL, CSRO and UNICORN: SMAC's offline phase with another loss for the encoder.

Three other answers to the shift of context, which SMAC's second phase is meant to repair. Policy,
Q-functions and their losses are those of smac_offline_online.py. What differs is the loss of the
encoder, with two histories of each task; z, which is deterministic and has no KL term; that the
encoder sees s' on Hopper and Walker; and how it explores. The losses of the encoder:

- focal: a distance metric between tasks. Li, Yang, Luo, "FOCAL: Efficient Fully-Offline
  Meta-Reinforcement Learning via Distance Metric Learning and Behavior Regularization", ICLR 2021,
  https://arxiv.org/abs/2010.01112.
- csro: the metric, and little information between z and (s, a). Gao et al., "Context Shift
  Reduction for Offline Meta-Reinforcement Learning", NeurIPS 2023,
  https://arxiv.org/abs/2311.03695.
- unicorn: the metric, and a decoder of (r, s'). Li et al., "Towards an Information Theoretic
  Framework of Context-Based Offline Meta-Reinforcement Learning", NeurIPS 2024,
  https://arxiv.org/abs/2402.02429.

None of them trains online. What they do at test time is how they explore: `--explore`.

Run: python focal.py --env-id HopperParam --context-loss csro
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
    offline_steps: int = 50_000  # gradient steps [SMAC, C.3]
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    keep_agents: bool = False  # keep the agent of every evaluation, agent_{step}.npz
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Loss of the encoder
    context_loss: Literal["focal", "csro", "unicorn"] = "focal"  # what trains the encoder
    csro_weight: float = 5.0  # weight of CLUB beside the metric (CSRO's in these units: 2, 5, 10)
    critic_to_encoder: bool = False  # the critic's loss trains it too (an option of CSRO's code)
    unicorn_weight: float = 0.15  # weight of UNICORN's metric; it must fit the rewards

    # --- Networks
    q_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the Q-functions [Table 1]
    policy_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the policy [Table 1]
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden sizes of the encoder, and of psi
    decoder_hidden: tuple[int, ...] = (64, 64)  # hidden sizes of UNICORN's decoder [Table 1]
    # PAPER: mostly z of 20 to 40 numbers, 16 tasks a batch, 100 to 1024 transitions a
    # history, 65,000 steps and more (code). CODE: SMAC's sizes, so that all methods have the same.
    latent_dim: int = 5  # size of z [Table 1]
    num_critics: Literal[1, 2] = 2  # one Q-function (paper), or the smaller of two (authors' code)
    # PAPER: UNICORN's encoder sees s' everywhere (code). CODE: on Hopper and Walker, where the
    # dynamics differ, as in FOCAL's and CSRO's code. SMAC's encoder never does.
    next_obs_in_context: bool = False  # the encoder sees s'

    # --- Gradient step
    rl_batch: int = 256  # transitions a task for critic and actor [Table 1]
    context_batch: int = 64  # transitions of a history h; there are two of each task
    meta_batch: int = 4  # tasks a gradient step [Table 1]
    gamma: float = 0.99  # discount [Table 1]
    tau: float = 0.005  # soft target update [Table 1, "eta"]
    lr: float = 3e-4  # Adam's learning rate, all networks [Table 1]
    reward_scale: float = 5.0  # factor on the reward in the Bellman target [Table 2]
    awr_lambda: float = 100.0  # lambda of Eq. 2 [Table 2, "AWR beta"]
    awr_weights: Literal["softmax", "exp"] = "softmax"  # Eq. 2: exp scaled to mean 1, or exp
    actor_ablation: bool = False  # PEARL's actor loss in place of Eq. 2, as UNICORN's code has it

    # --- Evaluation
    explore: Literal["prior", "random", "task", "idaq"] = "task"  # how it explores, see `explore`
    explore_episodes: int = 2  # exploration episodes before the scored one


# --- What differs from these defaults. Later rows win: "short" (with --preset short), that of the
# environment, "ENVIRONMENT short".
SMALL = dict(q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), lr=1e-3)
DYNAMICS = dict(next_obs_in_context=True, unicorn_weight=1.5)  # their dynamics differ by task
PRESETS = {
    "HopperParam": DYNAMICS,
    "WalkerParam": DYNAMICS,
    "CheetahVelocity": dict(csro_weight=2.0),
    "HumanoidDirection": dict(csro_weight=10.0),
    "AntDirection": dict(csro_weight=10.0, eval_every=8_000),
    "SawyerManipulation": dict(
        num_critics=1,
        reward_scale=1.0,
        awr_lambda=0.3,
        awr_weights="exp",
        eval_every=8_000,
    ),
    "PointDirection": SMALL  # a point mass, which is not in the paper
    | dict(
        rl_batch=128,
        unicorn_weight=0.0015,  # its rewards are of size .3
        offline_steps=3_000,
        eval_every=1_200,
    ),
    "short": SMALL | dict(rl_batch=64, offline_steps=15_000, eval_every=5_000),
    "CheetahVelocity short": dict(  # small networks learned nothing here
        q_hidden=(300, 300, 300),
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


class Psi(nn.Module):
    """CSRO's psi(z | s, a): what states and actions alone tell about z, a Gaussian."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + action_dim, *hidden, 2 * latent_dim])

    def forward(self, obs, actions):
        """obs (..., o), actions (..., a) -> mean and variance of z, (..., dz) each."""
        inputs = torch.cat([obs, actions], dim=-1)
        mean, raw = self.net(inputs).chunk(2, dim=-1)
        # As in the authors' code the variance stays within 0.31 and 1.31: CLUB divides by it.
        return mean, F.softplus(torch.tanh(raw))


class TransitionDecoder(nn.Module):
    """UNICORN's p_theta(r, s' - s | s, a, z), a Gaussian of deviation 1."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + action_dim + latent_dim, *hidden, 1 + obs_dim])

    def forward(self, obs, actions, z):
        """obs (N, o), actions (N, a), z (N, dz) -> mean of (r, s' - s), (N, 1 + o)."""
        inputs = torch.cat([obs, actions, z], dim=-1)
        return self.net(inputs)


class Agent(nn.Module):
    """All networks, for one optimizer and one checkpoint."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        dz = args.latent_dim
        context_dim = obs_dim + action_dim + 1
        if args.next_obs_in_context:
            context_dim += obs_dim
        self.encoder = Encoder(context_dim, args.encoder_hidden, dz)
        if args.context_loss == "csro":
            self.psi = Psi(obs_dim, action_dim, args.encoder_hidden, dz)
        if args.context_loss == "unicorn":
            self.decoder = TransitionDecoder(obs_dim, action_dim, args.decoder_hidden, dz)
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


# ===== Losses of the encoder


def metric_loss(z, tasks):
    """L_dml of FOCAL: the z of one task attract each other, those of two tasks repel each other.

    z (H, dz) of H histories, tasks (H,) the numbers of their tasks -> scalar.
    """
    distance = (z[:, None] - z[None]).square().mean(-1)  # (H, H), mean over the dimensions of z
    same_task = tasks[:, None] == tasks[None]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = same_task & ~itself
    negative = ~same_task
    # PAPER: |z_i - z_j|^2, and beta / (|z_i - z_j|^n + eps). CODE: a root and n = 2, of the mean
    # over the dimensions, with these numbers, and a mean over the pairs of each kind, as in the
    # authors' code: neither kind drowns the other.
    attraction = (distance + 1e-3).sqrt()
    repulsion = 1 / (distance + 0.1)
    pull = torch.where(positive, attraction, 0.0).sum() / positive.sum()
    # All tasks of a batch may be the same one: then there is no pair to push apart.
    push = torch.where(negative, repulsion, 0.0).sum() / negative.sum().clamp(min=1)
    return pull + push


def club_losses(agent, context, obs_dim, action_dim):
    """CSRO's losses: L_CLUB of the encoder, and the loss of the network psi that it needs.

    context: H histories (H, C, in_dim) -> two scalars. z_i is the z of one transition alone.
    """
    single = context.flatten(0, 1)[:, None]  # (H * C, 1, in_dim): histories of one transition
    z, _ = agent.encoder(single)
    z = z.unflatten(0, context.shape[:2])  # (H, C, dz)
    obs = context[..., :obs_dim]
    actions = context[..., obs_dim : obs_dim + action_dim]
    mean, variance = agent.psi(obs, actions)  # (H, C, dz)

    # psi: -log psi(z_i | s_i, a_i), without its constant. z is data here.
    l_psi = ((z.detach() - mean).square() / (2 * variance) + variance.log() / 2).mean()

    # CLUB: mean_i log psi(z_i | s_i, a_i) - mean_ij log psi(z_j | s_i, a_i), an upper bound of the
    # information between z and (s, a). psi is fixed here. i and j are of one history, as in the
    # authors' code, which leaves out the half of the Gaussian's exponent.
    mean = mean.detach()
    variance = variance.detach()
    own = (z - mean).square()  # (H, C, dz)
    centre = z.mean(1, keepdim=True)  # (H, 1, dz)
    spread = (z - centre).square().mean(1, keepdim=True)
    every = (centre - mean).square() + spread  # the mean over j of (z_j - mean_i)^2
    l_club = ((every - own) / (2 * variance)).mean()
    return l_club, l_psi


def transition_loss(agent, batch, z):
    """UNICORN's decoder: -log p_theta(r, s' - s | s, a, z), without its constant.

    z (N, dz) -> scalar.
    """
    predicted = agent.decoder(batch["obs"], batch["actions"], z)  # (N, 1 + o)
    change = batch["next_obs"] - batch["obs"]
    target = torch.cat([batch["rewards"][:, None], change], dim=-1)
    # PAPER: the deviations are learned; in its code a mean over the dimensions, on the transitions
    # of the context. CODE: deviation 1, a sum, on the transitions of the critic. With learned
    # deviations s', which a simulator gives exactly, took all of the network, and z told nothing
    # about the rewards.
    return 0.5 * (predicted - target).square().sum(-1).mean()


# ===== One gradient step


def sample_batch(buffer, args, rng):
    """Tasks, of each two histories h and transitions for critic and actor, and all noise."""
    # PAPER: in the code of FOCAL and CSRO the tasks of a batch differ and have one history each, so
    # that no two z are of one task. CODE: two histories of each task.
    num_tasks = len(buffer.sizes["rl"])
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=rng, device=rng.device)  # (T,)

    batch = buffer.sample(tasks, args.rl_batch, rng)
    h = buffer.sample(tasks, 2 * args.context_batch, rng, "encoder")
    context = make_context(h, args)  # (T, 2C, in_dim)
    batch["context"] = context.reshape(2 * args.meta_batch, args.context_batch, -1)
    batch["context_tasks"] = tasks.repeat_interleave(2)  # (2T,)

    actions_shape = batch["actions"].flatten(0, 1).shape  # (N, a)
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(actions_shape, generator=rng, device=rng.device)
    return batch


def update(agent, optimizer, batch, args):
    """One gradient step.

    On a GPU the step is recorded once and replayed: no `.item()`, no `if` on a tensor, and all
    noise comes with the batch.

    Args:
        batch: two histories of each task, one after the other, context (2T, C, in_dim), with the
            numbers of their tasks, context_tasks (2T,); for critic and actor obs, next_obs
            (T, B, o), actions (T, B, a), rewards, terminals (T, B, 1); standard normal noise_a and
            noise_next_a (N, a).

    Returns scalars to log, as tensors.
    """
    # Here, and not before the backward pass: --compile then makes one graph of losses and gradients
    optimizer.zero_grad(set_to_none=True)

    pearl_weight = 1.0 if args.actor_ablation else 0.0

    # --- Transitions as flat rows: N = T * B
    transitions = batch["obs"].shape[1]
    obs_dim = batch["obs"].shape[-1]
    action_dim = batch["actions"].shape[-1]
    flat = dict(batch)
    for name in ("obs", "actions", "next_obs"):
        flat[name] = batch[name].flatten(0, 1)  # (N, .)
    for name in ("rewards", "terminals"):
        flat[name] = batch[name].flatten()  # (N,)

    # --- z of each history
    # PAPER: the encoder ends in tanh, z is the mean of its outputs over the transitions. CODE: the
    # mean of SMAC's q(z | h), a mean weighted by the precisions, without tanh and without noise.
    z_histories, _ = agent.encoder(batch["context"])  # (2T, dz)
    z = z_histories[::2]  # (T, dz), of the first history of each task
    z = z.repeat_interleave(transitions, dim=0)  # (N, dz)

    # --- What trains the encoder: --context-loss
    l_metric = metric_loss(z_histories, batch["context_tasks"])
    info = {"losses/metric": l_metric}
    if args.context_loss == "focal":
        l_encoder = l_metric
    elif args.context_loss == "csro":
        l_club, l_psi = club_losses(agent, batch["context"], obs_dim, action_dim)
        # PAPER: lambda of 10, 25 or 50, beside 10 times the metric and without CLUB's half (code).
        # CODE: the same weights, which are 2, 5 and 10 here.
        l_encoder = l_metric + args.csro_weight * l_club + l_psi  # (l_psi trains psi alone)
        info |= {"losses/club": l_club, "losses/psi": l_psi}
    elif args.context_loss == "unicorn":
        l_decoder = transition_loss(agent, flat, z)
        # PAPER: a weight of .15, 1.5 on Hopper and Walker. CODE: the same, less where the rewards
        # are small.
        l_encoder = args.unicorn_weight * l_metric + l_decoder
        info |= {"losses/decoder": l_decoder}

    # --- Critic and actor. A detached z keeps a loss out of the encoder.
    # PAPER: FOCAL, CSRO and IDAQ learn with BRAC: SAC, and a penalty on the divergence from the
    # actions of the data; UNICORN with SAC (code). CODE: Eq. 1 and 2 of SMAC, so that what differs
    # from SMAC is the encoder.
    z_critic = z if args.critic_to_encoder else z.detach()
    l_critic, q = critic_loss(agent, flat, z_critic, args)
    l_actor, weights = actor_loss(agent, flat, z.detach(), q, args, pearl_weight)

    # --- What is logged, detached before the backward pass (for --compile, as above)
    # The effective sample size of Eq. 2's weights, as a share of N
    ess_share = weights.mean().square() / weights.square().mean()
    info |= {
        "losses/critic": l_critic,
        "losses/actor": l_actor,
        "train/q_mean": q.mean(),
        "train/q_max": q.amax(),
        "train/z_size": z_histories.square().mean().sqrt(),
        "train/actor_weight_ess": ess_share,
    }
    info = {name: value.detach() for name, value in info.items()}

    # --- One backward pass for all
    loss = l_critic + l_actor + l_encoder
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        targets = list(agent.q_target.parameters())
        torch._foreach_lerp_(targets, list(agent.q.parameters()), args.tau)  # soft update
    return info


# ===== Acting: Section 3 of SMAC


def prior(num, args, device):
    """p(z) = N(0, 1): mean and standard deviation, (num, dz) each."""
    mu = torch.zeros(num, args.latent_dim, device=device)
    sigma = torch.ones(num, args.latent_dim, device=device)
    return mu, sigma


@torch.no_grad()
def rollout(env_list, agent, mu, sigma, rng, deterministic=False):
    """One episode in each of E environments, side by side.

    A new z_t ~ N(mu, sigma^2) is drawn at every step [Alg. 1, l. 7]; mu, sigma (E, dz).

    Returns E trajectories: obs (L+1, o), actions (L, a), terminals (L,), rewards (L,).
    """
    episodes = envs.Episodes(env_list, rng)
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
    """z of E histories, each a list of trajectories: mean and standard deviation, (E, dz) each."""
    device = next(agent.parameters()).device
    means = []
    for paths in histories:  # they differ in length, so that each is encoded alone
        h = buffers.join(paths, device)
        mu, _ = agent.encoder(make_context(h, args)[None])
        means.append(mu)
    mu = torch.cat(means)
    return mu, torch.zeros_like(mu)  # z is the mean of the posterior


def training_z(agent, buffer, args, rng):
    """The posterior means of the N training tasks, from offline data: (N, dz).

    Each is from `rl_batch` transitions: the more, the less noisy.
    """
    tasks = torch.arange(len(buffer.sizes["offline"]), device=buffer.device)
    h_offline = buffer.sample(tasks, args.rl_batch, rng, "offline")
    mu, _ = agent.encoder(make_context(h_offline, args))
    return mu


def random_z(z_train, rng):
    """The z of five random training tasks in each environment: (E, N, dz) -> (E, 5, dz)."""
    numbers = torch.randint(z_train.shape[1], (len(z_train), 5), generator=rng)  # (E, 5)
    return z_train[torch.arange(len(z_train))[:, None], numbers]


def farthest_z(z_train, played, rng):
    """IDAQ: the z of five random training tasks; of these the one farthest from all `played`.

    z_train (E, N, dz), played: a list of (E, dz); if it is empty, any of the five -> (E, dz).
    """
    candidates = random_z(z_train, rng)  # (E, 5, dz)
    if not played:
        return candidates[:, 0]
    difference = candidates[:, :, None] - torch.stack(played, 1)[:, None]  # (E, 5, played, dz)
    to_nearest = difference.square().sum(-1).amin(2)  # (E, 5)
    return candidates[torch.arange(len(candidates)), to_nearest.argmax(1).cpu()]


@torch.no_grad()
def explore_idaq(env_list, agent, args, rng, z_train):
    """IDAQ, in E environments: an episode is worth reading if its return is high.

    In the first half of the episodes, the reference phase, z are those of training tasks; the
    history is the episode of highest return. In the second half z is that of the history, and an
    episode that returns more than all before it joins the history.

    Returns as `explore`; mu is the z of the episode of highest return.
    """
    # PAPER: 10 or 20 episodes. CODE: --explore-episodes; of two one is a reference.
    num_reference = max(1, args.explore_episodes // 2)
    exploration = [[] for _ in env_list]
    histories = [[] for _ in env_list]
    best_return = torch.full((len(env_list),), -math.inf)
    best_mu = z_train[:, 0]  # (E, dz)
    played = []
    for episode in range(args.explore_episodes):
        if episode < num_reference:
            mu = farthest_z(z_train, played, rng)
            played.append(mu)
        else:
            mu, _ = encode(agent, histories, args)
        paths = rollout(env_list, agent, mu, torch.zeros_like(mu), rng)

        returns = torch.tensor([float(path["rewards"].sum()) for path in paths])
        better = returns > best_return  # (E,)
        best_return = torch.maximum(best_return, returns)
        best_mu = torch.where(better[:, None].to(mu.device), mu, best_mu)
        for e, path in enumerate(paths):
            exploration[e].append(path)
            if better[e] and episode < num_reference:
                histories[e] = [path]
            elif better[e]:
                histories[e].append(path)
    return exploration, best_mu, torch.zeros_like(best_mu)


@torch.no_grad()
def explore(env_list, agent, args, rng, z_train):
    """The exploration episodes of an evaluation in E environments, `--explore`:

    prior: z ~ N(0, 1), as in SMAC. random: uniform actions, as CSRO's first steps. task: z of a
    random training task in each episode. idaq: see `explore_idaq`.

    z_train (E, N, dz): the z of the N training tasks, once for each environment.

    Returns for each environment its trajectories; then mean and standard deviation (E, dz) of the
    z that it has from them.
    """
    # PAPER: FOCAL reads the data of the test task, CSRO explores with random actions. CODE: as
    # SMAC, it reads what it explores itself, by default with z of training tasks: N(0, 1) has no
    # meaning for the metric.
    if args.explore == "idaq":
        return explore_idaq(env_list, agent, args, rng, z_train)
    episodes = []
    for _ in range(args.explore_episodes):
        mu, sigma = prior(len(env_list), args, z_train.device)
        if args.explore == "task":
            mu = random_z(z_train, rng)[:, 0]
            sigma = torch.zeros_like(mu)
        if args.explore == "random":
            paths = envs.random_episodes(env_list, rng)
        else:
            paths = rollout(env_list, agent, mu, sigma, rng)
        episodes.append(paths)
    exploration = list(zip(*episodes))
    mu, sigma = encode(agent, exploration, args)
    return exploration, mu, sigma


@torch.no_grad()
def adapt(env_list, agent, args, rng, z_train):
    """The meta-episode: exploration episodes, then one with the z that was found in them.

    Returns for each of E environments its last trajectory, and those of exploration; then mean and
    standard deviation (E, dz) of z.
    """
    exploration, mu, sigma = explore(env_list, agent, args, rng, z_train)
    final = rollout(env_list, agent, mu, sigma, rng, deterministic=True)
    return final, exploration, mu, sigma


# ===== Evaluation


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns and diagnostics [SMAC, Section 6, Figure 2].

    The generators are its own: evaluating changes nothing in training.

    Returns what `Run.write` takes: a list of `Evaluation`, scalars to log, and the trajectories of
    the dataset in the training tasks, to be drawn.
    """
    rng = torch.Generator().manual_seed(args.seed)
    buffer_rng = torch.Generator(buffer.device).manual_seed(args.seed)
    z_train = training_z(agent, buffer, args, buffer_rng)  # (N, dz)
    evaluations = []

    # --- Own context: z from what the agent itself explores
    for split in ("test", "train"):
        tasks, env_list = eval_envs[split]
        z_each = z_train.expand(len(tasks), -1, -1)  # (E, N, dz): `on_cores` cuts it as env_list
        final, exploration, mu_own, _ = buffers.on_cores(adapt, env_list, agent, args, rng, z_each)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration))

    # --- Offline context: the same training tasks with z from h_offline, which has as many
    # transitions as were explored on average.
    tasks, env_list = eval_envs["train"]
    exploration = evaluations[-1].exploration  # the loop ends with "train"
    lengths = [sum(len(path["actions"]) for path in paths) for paths in exploration]
    mean_length = round(sum(lengths) / len(lengths))
    h_offline = buffer.sample(tasks, mean_length, buffer_rng, "offline")
    mu, _ = agent.encoder(make_context(h_offline, args))  # (E, dz)
    sigma = torch.zeros_like(mu)
    final = buffers.on_cores(rollout, env_list, agent, mu, sigma, rng, deterministic=True)
    evaluations.append(buffers.Evaluation("train", "offline", tasks, final, exploration))

    # --- The shift of context: how far z of the own context is from z of the offline context,
    # where 1 is how far tasks are from their mean. mu_own is of "train", too.
    spread = z_train.var(0).sum().sqrt()
    shift = (mu_own - mu).square().sum(-1).mean().sqrt()
    scalars = {"eval/z_spread": spread, "eval/z_shift_over_spread": shift / spread}

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
