"""PEARL with true rewards: the Online Oracle of Figure 5, and the source of some offline datasets.

PEARL is the meta-RL algorithm of Rakelly, Zhou, Quillen, Finn, Levine, "Efficient Off-Policy
Meta-Reinforcement Learning via Probabilistic Context Variables", ICML 2019,
https://arxiv.org/abs/1903.08254. SMAC's paper (https://arxiv.org/abs/2107.03974) describes it in
Section 3; where the two papers name different sizes, SMAC's Table 1 holds.

Start at the end: `main` collects data and trains on them in turns. What it calls stands before it,
in the order of smac_offline_online.py, with the same networks.

Run: python pearl_online_oracle.py --env-id HopperParam
Its dataset: the same with --online-iterations 50 --save-dataset datasets/HopperParam.npz
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
    task_seed: int = 1337  # seed of the tasks; 1337 gives the published ones of Cheetah and Ant
    save_dataset: Optional[str] = None  # write an offline dataset to this file
    dataset_iteration: int = 40  # the iteration after which it is written [C.2; authors' forks]
    online_iterations: int = 100  # iterations of collecting data and training on them
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
    latent_dim: int = 5  # size of z [Table 1]
    next_obs_in_context: bool = False  # the encoder sees s' (PEARL: where dynamics differ)

    # --- Gradient step
    rl_batch: int = 256  # transitions a task for critic and actor [Table 1]
    context_batch: int = 64  # transitions a task in a history h [Table 1, encoder batch size]
    meta_batch: int = 4  # tasks a gradient step [Table 1]
    gamma: float = 0.99  # discount [Table 1]
    tau: float = 0.005  # soft target update [Table 1, "eta"]
    lr: float = 3e-4  # Adam's learning rate, all networks [Table 1]
    reward_scale: float = 5.0  # factor on the reward in the target [Table 2]; the entropy has 1
    policy_reg: float = 1e-3  # weight of the squares of the policy's outputs [PEARL's code]
    kl_coef: float = 0.4  # weight of the KL term, a mean over tasks (PEARL: 0.1 on their sum)

    # --- Online phase
    initial_steps: int = 2_000  # transitions of each task before training, z from the prior [PEARL]
    tasks_per_iteration: int = 5  # tasks that collect data in one iteration, side by side
    prior_steps: int = 400  # new transitions a task with z from the prior [PEARL]
    posterior_steps: int = 600  # new transitions a task with z from the posterior [PEARL]
    updates_per_iteration: int = 4_000  # gradient steps an iteration [PEARL's code]


# --- What differs from these defaults. Later rows win: "short" (with --preset short), that of the
# environment, "ENVIRONMENT short".
SMALL = dict(q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), lr=1e-3)
PRESETS = {
    "HopperParam": dict(next_obs_in_context=True),
    "WalkerParam": dict(next_obs_in_context=True),
    "CheetahVelocity": dict(dataset_iteration=50),
    "AntDirection": dict(dataset_iteration=100, eval_every=8_000),
    "HumanoidDirection": dict(dataset_iteration=100),
    "SawyerManipulation": dict(reward_scale=1.0, eval_every=8_000),
    "PointDirection": SMALL  # a point mass, which is not in the paper
    | dict(
        rl_batch=128,
        kl_coef=0.002,  # its rewards are of size .3
        dataset_iteration=10,
        online_iterations=24,
        updates_per_iteration=400,
        initial_steps=300,
        prior_steps=150,
        posterior_steps=250,
        eval_every=1_200,
    ),
    "short": SMALL
    | dict(
        rl_batch=64,
        online_iterations=35,
        updates_per_iteration=1_000,
        eval_every=5_000,
    ),
    "CheetahVelocity short": dict(  # with small networks SMAC learned nothing here
        q_hidden=(300, 300, 300),
        policy_hidden=(300, 300, 300),
        encoder_hidden=(200, 200, 200),
        lr=3e-4,
        online_iterations=30,
    ),
}
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]

# --- The transitions of each task that become the dataset, those of the RL buffer and those of the
# encoder buffer [C.2]. None: those of the RL buffer serve as both.
# PAPER: Ant has an encoder part of 400, Humanoid 1200 transitions. CODE: one buffer, and of
# Humanoid 400, since 1200 of its 376 numbers take 64 MB. The paper does not say which transitions
# for Walker, Hopper, Humanoid.
DATASET_SLICES = {  # (of the RL buffer, of the encoder buffer)
    "CheetahVelocity": (("first", 1200), ("last", 400)),
    "HumanoidDirection": (("last", 400), None),
}
DEFAULT_SLICES = (("last", 1200), None)


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


class Agent(nn.Module):
    """All networks, for one optimizer and one checkpoint."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        dz = args.latent_dim
        context_dim = obs_dim + action_dim + 1
        if args.next_obs_in_context:
            context_dim += obs_dim
        self.encoder = Encoder(context_dim, args.encoder_hidden, dz)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, dz)
        self.q = QFunctions(obs_dim, action_dim, args.q_hidden, dz)
        self.q_target = QFunctions(obs_dim, action_dim, args.q_hidden, dz)
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


def sample_action(agent, obs, z, noise):
    """A reparameterised action a ~ pi(a | s, z).

    obs (N, o), z (N, dz), noise (N, a) -> actions (N, a), log pi (N,), and mean and log standard
    deviation before tanh, (N, a) each.
    """
    mean, log_std = agent.policy(obs, z)
    u = mean + log_std.exp() * noise
    return torch.tanh(u), tanh_gaussian_log_prob(u, mean, log_std), mean, log_std


def soft_critic_loss(agent, batch, z, args):
    """The soft Bellman error. Its gradient trains the encoder too, through z.

    z (N, dz) -> loss, and Q of the batch (2, N).
    """
    with torch.no_grad():
        # V_target(s', z) = Q_target(s', a', z) - log pi(a' | s', z)
        next_actions, next_log_prob, _, _ = sample_action(
            agent, batch["next_obs"], z, batch["noise_next_a"]
        )
        next_q = agent.q_target(batch["next_obs"], next_actions, z).amin(0)  # (N,)
        # PEARL learns V(s, z) and its target network. Here, as in later SAC, target Q-functions
        # take their place.
        next_v = next_q - next_log_prob
        # y = r + gamma V_target(s', z). A fall ends the sum, the time limit does not.
        rewards = args.reward_scale * batch["rewards"]
        target = rewards + args.gamma * (1 - batch["terminals"]) * next_v
    q = agent.q(batch["obs"], batch["actions"], z)  # (2, N)
    return (q - target).square().mean(1).sum(), q


def pearl_actor_loss(agent, batch, z, args):
    """L_actor^PEARL: D_KL(pi(a | s, z) || exp Q / Z) up to a constant (C.3).

    z (N, dz) -> loss, and log pi (N,) of the new actions.
    """
    actions, log_prob, mean, log_std = sample_action(agent, batch["obs"], z, batch["noise_a"])
    q_new = agent.q(batch["obs"], actions, z, frozen=True).amin(0)  # (N,)
    loss = (log_prob - q_new).mean()
    # As in PEARL's code, mean and log standard deviation before tanh are kept small.
    squares = mean.square().mean() + log_std.square().mean()
    return loss + args.policy_reg * squares, log_prob


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
    actions_shape = batch["actions"].flatten(0, 1).shape  # (N, a)
    for name in ("noise_a", "noise_next_a"):
        batch[name] = torch.randn(actions_shape, generator=rng, device=rng.device)
    return batch


def update(agent, optimizer, batch, args):
    """One gradient step of PEARL.

    On a GPU the step is recorded once and replayed: no `.item()`, no `if` on a tensor, and all
    noise comes with the batch.

    Args:
        batch: the history h that the encoder reads, context (T, C, in_dim); the second history h':
            obs, next_obs (T, B, o), actions (T, B, a), rewards, terminals (T, B, 1); standard
            normal noise_z (T, dz), noise_a and noise_next_a (N, a).

    Returns scalars to log, as tensors.
    """
    # Here, and not before the backward pass: --compile then makes one graph of losses and gradients
    optimizer.zero_grad(set_to_none=True)

    # --- h' as flat rows: N = T * B
    transitions = batch["obs"].shape[1]
    flat = dict(batch)
    for name in ("obs", "actions", "next_obs"):
        flat[name] = batch[name].flatten(0, 1)  # (N, .)
    for name in ("rewards", "terminals"):
        flat[name] = batch[name].flatten()  # (N,)

    # --- z ~ q(z | h), one for each task
    mu, sigma = agent.encoder(batch["context"])  # (T, dz)
    z = mu + sigma * batch["noise_z"]
    z = z.repeat_interleave(transitions, dim=0)  # (N, dz)
    kl = kl_to_prior(mu, sigma).mean()

    # --- Losses. The detached z keeps the actor's loss out of the encoder.
    l_critic, q = soft_critic_loss(agent, flat, z, args)
    l_actor, log_prob = pearl_actor_loss(agent, flat, z.detach(), args)

    # --- What is logged, detached before the backward pass (for --compile, as above)
    info = {
        "losses/critic": l_critic,
        "losses/actor": l_actor,
        "losses/kl": kl,
        "train/q_mean": q.mean(),
        "train/q_max": q.amax(),
        "train/policy_entropy": -log_prob.mean(),
    }
    info = {name: value.detach() for name, value in info.items()}

    # --- One backward pass for all
    loss = l_critic + l_actor + args.kl_coef * kl
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
def rollout(env_list, agent, mu, sigma, rng, deterministic=False):
    """One episode in each of E environments, side by side.

    z ~ N(mu, sigma^2) is drawn once, for the whole episode, as PEARL does; mu, sigma (E, dz).

    Returns E trajectories: obs (L+1, o), actions (L, a), terminals (L,), rewards (L,).
    """
    episodes = envs.Episodes(env_list, rng)
    z = mu + sigma * torch.randn(mu.shape, generator=rng).to(mu.device)  # (E, dz)
    while episodes.live:  # the numbers of the episodes that have not ended
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
    """Explore, with true rewards, and store.

    Whole episodes in E environments side by side, until each has given at least `num_steps`
    transitions.

    Args:
        env_list: at least E environments, the first E already set to their tasks.
        tasks: the numbers of these E training tasks.
        from_prior: explore with z ~ p(z), and else with z ~ q(z | h), h from the encoder buffer.
            Only what is explored from the prior enters the encoder buffer.

    Returns the number of new transitions.
    """
    new_steps = [0] * len(tasks)
    while live := [e for e in range(len(tasks)) if new_steps[e] < num_steps]:
        owners = [tasks[e] for e in live]
        if from_prior:
            mu, sigma = prior(len(live), args, train_rng.device)  # (live, dz)
        else:
            h = buffer.sample(owners, args.context_batch, train_rng, "encoder")
            mu, sigma = agent.encoder(make_context(h, args))
        live_envs = [env_list[e] for e in live]
        paths = rollout(live_envs, agent, mu, sigma, act_rng)

        for e, i, path in zip(live, owners, paths):
            buffer.add(i, path, encoder=from_prior)
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
def evaluate(agent, eval_envs, args):
    """Post-adaptation returns. The generator is its own: evaluating changes nothing in training.

    Returns what `Run.write` takes: a list of `Evaluation`, and scalars to log, of which there are
    none.
    """
    rng = torch.Generator().manual_seed(args.seed)
    evaluations = []
    for split in ("test", "train"):
        tasks, env_list = eval_envs[split]
        final, exploration, mu, sigma = buffers.on_cores(adapt, env_list, agent, args, rng)
        kl = kl_to_prior(mu, sigma)  # (E,)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration, kl))
    return evaluations, {}


# ===== Data: an empty buffer, and the offline dataset of C.2


def empty_buffer(spec, args, device):
    """A replay buffer with room for all that a run collects in the training tasks."""
    # Collecting ends with a whole episode: each portion may exceed its size by almost one.
    initial = spec.num_train_tasks * (args.initial_steps + spec.horizon)
    longest_visit = args.prior_steps + args.posterior_steps + 2 * spec.horizon
    visits = args.online_iterations * args.tasks_per_iteration
    capacity = initial + visits * longest_visit
    num_tasks = spec.num_train_tasks
    return buffers.ReplayBuffer(num_tasks, spec.obs_dim, spec.action_dim, capacity, device)


def write_dataset(buffer, train_tasks, test_tasks, args):
    """Write the offline dataset: a few transitions of each task, from early in the run."""
    slices = DATASET_SLICES.get(envs.short_name(args.env_id), DEFAULT_SLICES)
    entries = dict(rl=[], encoder=[])  # lists of (task, trajectory)
    for source, part in zip(("rl", "encoder"), slices):
        if part is None:  # the RL part serves as both
            continue
        where, num_steps = part  # "first" or "last", and how many transitions
        for task in range(len(train_tasks)):
            for path in buffer.paths(task, where, num_steps, source):
                entries[source].append((task, path))
    command = buffers.command_line(args, __file__, PRESETS)
    buffers.save_dataset(
        args.save_dataset, args.env_id, train_tasks, test_tasks, **entries, command=command
    )


# ===== PEARL: collect and train in turns


def main(args):
    """Train PEARL. Returns the trained agent. Raises InputError."""
    spec = envs.lookup(args.env_id)
    device = buffers.choose_device(args)
    torch.manual_seed(args.seed)
    act_rng = torch.Generator().manual_seed(args.seed)  # for acting, on the CPU
    train_rng = torch.Generator(device).manual_seed(args.seed)
    if args.save_dataset and args.dataset_iteration > args.online_iterations:
        iteration = args.dataset_iteration
        raise buffers.InputError(
            f"--save-dataset: --dataset-iteration {iteration} is never reached"
        )

    num_train = spec.num_train_tasks
    sampled = envs.sample_tasks(args.env_id, num_train + spec.num_test_tasks, args.task_seed)
    train_tasks = sampled[:num_train]
    test_tasks = sampled[num_train:]
    buffer = empty_buffer(spec, args, device)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True, capturable=on_gpu)

    num_envs = args.tasks_per_iteration
    env_list = [envs.make(args.env_id) for _ in range(num_envs)]
    eval_envs = envs.make_evaluation(args.env_id, train_tasks, test_tasks)
    common = dict(agent=agent, buffer=buffer, args=args, act_rng=act_rng, train_rng=train_rng)
    state = dict(agent=agent, optimizer=optimizer, buffer=buffer, act_rng=act_rng, rng=train_rng)
    with buffers.Run(args, __file__, **state) as run:
        # The same functions, faster: a CUDA graph on a GPU, the best exact precision on a CPU
        sample = run.fast(sample_batch)
        learn = run.fast(update, args.compile)

        # ----- Before training: all tasks, as many at a time as there are environments
        groups = [group.tolist() for group in torch.arange(num_train).split(num_envs)]
        if run.step > 0:  # a resumed run has these data
            groups = []
        for tasks in run.count("initial data", groups):
            for env, task in zip(env_list, tasks):
                env.unwrapped.set_task(train_tasks[task])
            new = collect(env_list, tasks, args.initial_steps, from_prior=True, **common)
            run.env_steps += new

        # ----- Online phase
        dataset_step = args.dataset_iteration * args.updates_per_iteration
        for step in run.steps(args.online_iterations * args.updates_per_iteration, "online"):
            if step % args.updates_per_iteration == 0:
                # PAPER: 1000 new transitions an iteration, 4 gradient steps for each. CODE: 1000
                # on each of five tasks, 0.8 gradient steps for each, and 2000 on every task
                # before the first gradient step.
                tasks = torch.randint(num_train, (num_envs,), generator=act_rng).tolist()
                for env, task in zip(env_list, tasks):
                    env.unwrapped.set_task(train_tasks[task])
                    buffer.clear_encoder(task)  # h is what the present policy explores
                # z ~ p(z) fills the encoder buffers; z ~ q(z | h) then needs them
                new = collect(env_list, tasks, args.prior_steps, from_prior=True, **common)
                run.env_steps += new
                new = collect(env_list, tasks, args.posterior_steps, from_prior=False, **common)
                run.env_steps += new
            batch = sample(buffer, args, train_rng)
            info = learn(agent, optimizer, batch, args)
            run.log(info)
            if run.evaluation_due:
                run.write(*evaluate(agent, eval_envs, args))
            if args.save_dataset and step + 1 == dataset_step:
                write_dataset(buffer, train_tasks, test_tasks, args)
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
