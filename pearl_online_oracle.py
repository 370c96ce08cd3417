"""PEARL with true rewards: the Online Oracle of Figure 5, and the source of the offline datasets.

PEARL: Rakelly, Zhou, Quillen, Finn, Levine, "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context
Variables", ICML 2019, https://arxiv.org/abs/1903.08254. SMAC: https://arxiv.org/abs/2107.03974 (PEARL: Section 3).
Where the two papers name different sizes, SMAC's Table 1 holds. Networks and helpers are smac_offline_online.py's.

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
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of one's own; its PRESETS replace what follows
    preset: Literal["paper", "short"] = (
        "paper"  # the paper's sizes, or small ones: 8 to 20 minutes of one core
    )
    seed: int = 1  # seed of the networks, of exploration and of sampling
    task_seed: int = (
        1337  # seed of the task list; 1337 gives the published tasks of Cheetah and Ant
    )
    online_iterations: int = 100  # iterations of collecting data and training on them
    save_dataset: Optional[str] = (
        None  # write the offline dataset to this file after --dataset-iteration iterations
    )
    dataset_iteration: int = (
        40  # iteration at which the dataset is taken [C.2 and the authors' scripts]
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint, with its flags
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Algorithm
    rl_batch: int = 256  # transitions a task for critic and actor [Table 1]
    context_batch: int = 64  # transitions a task in a history h [Table 1, encoder batch size]
    meta_batch: int = 4  # tasks a gradient step [Table 1]
    q_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the Q-functions [Table 1]
    policy_hidden: tuple[int, ...] = (300, 300, 300)  # hidden sizes of the policy [Table 1]
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden sizes of the encoder [Table 1]
    latent_dim: int = 5  # size of z [Table 1]
    gamma: float = 0.99  # discount [Table 1]
    tau: float = 0.005  # soft target update [Table 1, "eta"]
    lr: float = 3e-4  # Adam's learning rate, all networks [Table 1]
    reward_scale: float = (
        5.0  # factor on the reward in the Bellman target [Table 2]; the entropy has weight 1
    )
    kl_coef: float = (
        0.4  # weight of the KL term, a mean over tasks (PEARL: 0.1 on the sum over 4 tasks)
    )
    policy_reg: float = (
        1e-3  # weight of the squares of the policy's mean and log standard deviation (PEARL's code)
    )
    next_obs_in_context: bool = (
        False  # the encoder sees s' as well (PEARL: where tasks differ in their dynamics)
    )
    initial_steps: int = 2_000  # transitions of each task before training, z from the prior (PEARL)
    tasks_per_iteration: int = (
        5  # tasks that collect data in one iteration, side by side (authors: in turn)
    )
    prior_steps: int = 400  # new transitions a task with z from the prior (PEARL)
    posterior_steps: int = 600  # new transitions a task with z from the posterior (PEARL)
    updates_per_iteration: int = (
        4_000  # gradient steps an iteration [Table 1 asks for 4 per new transition]
    )


SMALL = dict(q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), lr=1e-3)
# What differs from the defaults above. PointDirection is not in the paper: small networks and a short run.
PRESETS = {
    "HopperParam": dict(next_obs_in_context=True), "WalkerParam": dict(next_obs_in_context=True),
    "CheetahVelocity": dict(dataset_iteration=50),
    "AntDirection": dict(dataset_iteration=100, eval_every=8_000), "HumanoidDirection": dict(dataset_iteration=100),
    "SawyerManipulation": dict(reward_scale=1.0, eval_every=8_000),
    "PointDirection": SMALL | dict(
        rl_batch=128, kl_coef=0.002, online_iterations=24, tasks_per_iteration=5, initial_steps=300, prior_steps=150,
        posterior_steps=250, updates_per_iteration=400, eval_every=1_200, dataset_iteration=10),
    "short": SMALL | dict(
        rl_batch=64, online_iterations=35, updates_per_iteration=1_000, eval_every=5_000),
    "CheetahVelocity short": dict(  # with small networks SMAC learned nothing here
        q_hidden=(300, 300, 300), policy_hidden=(300, 300, 300), encoder_hidden=(200, 200, 200), lr=3e-4,
        online_iterations=30),
}  # fmt: skip
PRESETS["SawyerManipulation8"] = PRESETS["SawyerManipulation"]
# The transitions of each task that become the dataset, (RL buffer, encoder buffer) [C.2]; None: RL's serve as both.
# PAPER: Ant has an encoder part of 400, Humanoid 1200 transitions. CODE: one buffer, and of Humanoid 400, since 1200 of
# its 376 numbers take 64 MB. The paper does not say which transitions for Walker, Hopper, Humanoid.
DATASET_SLICES = {
    "CheetahVelocity": (("first", 1200), ("last", 400)), "HumanoidDirection": (("last", 400), None),
}  # fmt: skip
DEFAULT_SLICES = (("last", 1200), None)


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
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, args.latent_dim)
        self.q = QFunctions(obs_dim, action_dim, args.q_hidden, args.latent_dim)
        self.q_target = QFunctions(obs_dim, action_dim, args.q_hidden, args.latent_dim)
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


# ===== Losses. T tasks, B transitions a task, N = T * B; all pure functions of networks and data


def sample_action(agent, obs, z, noise):
    """Reparameterised a ~ pi(a | s, z): (N, a), log pi (N,), and mean and log standard deviation before tanh (N, a)."""
    mean, log_std = agent.policy(obs, z)
    u = mean + log_std.exp() * noise
    return torch.tanh(u), tanh_gaussian_log_prob(u, mean, log_std), mean, log_std


def soft_critic_loss(agent, batch, z, args):
    """Soft Bellman error; its gradient trains the encoder too, through z (N, dz). -> loss, Q of both critics (2, N)."""
    with torch.no_grad():
        # y = r + gamma (Q_target(s', a', z) - log pi(a' | s', z)); a fall ends the sum, the time limit does not
        next_actions, next_log_prob, _, _ = sample_action(
            agent, batch["next_obs"], z, batch["noise_next_a"]
        )
        # PEARL learns V(s, z) and its target network; as in later SAC, target Q-functions take their place.
        next_v = agent.q_target(batch["next_obs"], next_actions, z).amin(0) - next_log_prob  # (N,)
        target = (
            args.reward_scale * batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_v
        )
    q = agent.q(batch["obs"], batch["actions"], z)  # (2, N)
    return (q - target).square().mean(1).sum(), q


def pearl_actor_loss(agent, batch, z, args):
    """L_actor^PEARL: D_KL(pi(a | s, z) || exp Q / Z) up to a constant (C.3). z (N, dz) -> loss, log pi (N,)."""
    actions, log_prob, mean, log_std = sample_action(agent, batch["obs"], z, batch["noise_a"])
    loss = (log_prob - agent.q(batch["obs"], actions, z, frozen=True).amin(0)).mean()
    return loss + args.policy_reg * (mean.square().mean() + log_std.square().mean()), log_prob


def update(agent, optimizer, batch, args):
    """One gradient step of PEARL.

    Args:
        batch: context h (T, C, in_dim); of the second history h': obs, next_obs (T, B, o), actions (T, B, a), rewards,
            terminals (T, B, 1); standard normal noise_z (T, dz), noise_a and noise_next_a (N, a).
    Returns:
        scalars to log, as tensors.
    """
    repeat = batch["obs"].shape[1]
    batch = batch | {
        name: batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")
    }  # (N, .)
    batch |= {name: batch[name].flatten() for name in ("rewards", "terminals")}  # (N,)

    # One backward pass: the detached z keeps the actor's loss out of the encoder.
    mu, sigma = agent.encoder(batch["context"])  # (T, dz)
    z = (mu + sigma * batch["noise_z"]).repeat_interleave(repeat, dim=0)  # (N, dz)
    kl = kl_to_prior(mu, sigma).mean()
    l_critic, q = soft_critic_loss(agent, batch, z, args)
    l_actor, log_prob = pearl_actor_loss(agent, batch, z.detach(), args)

    optimizer.zero_grad(set_to_none=True)
    (l_critic + l_actor + args.kl_coef * kl).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(
            list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau
        )  # soft update
        info = {"losses/critic": l_critic, "losses/actor": l_actor, "losses/kl": kl}
        info |= {
            "train/q_mean": q.mean(),
            "train/q_max": q.amax(),
            "train/policy_entropy": -log_prob.mean(),
        }
        return {name: value.detach() for name, value in info.items()}


def sample_batch(buffer, args, rng):
    """Buffers D_i ~ D, two histories h, h' of each (lines 3, 10 of SMAC's Alg. 1), and all the noise of one update."""
    tasks = torch.randint(
        len(buffer.sizes["rl"]), (args.meta_batch,), generator=rng, device=rng.device
    )
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


# ===== Acting: Section 3


@torch.no_grad()
def rollout(env_list, agent, mu, sigma, rng, deterministic=False):
    """One episode in each of E environments, side by side; z ~ N(mu, sigma^2), (E, dz), is drawn once (PEARL).

    Returns E trajectories: obs (L+1, o), actions (L, a), terminals (L,), rewards (L,).
    """
    episodes = envs.Episodes(env_list, rng)
    z = mu + sigma * torch.randn(mu.shape, generator=rng).to(mu.device)
    while episodes.live:
        mean, log_std = agent.policy(episodes.obs().to(mu.device), z[episodes.live])
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=rng)
        episodes.step(torch.tanh(mean + log_std.exp() * noise.to(mu.device)))
    return episodes.paths()


def prior(num, args, device):
    """p(z) = N(0, 1): mean and standard deviation, (num, dz) each."""
    return torch.zeros(num, args.latent_dim, device=device), torch.ones(
        num, args.latent_dim, device=device
    )


def collect(env_list, tasks, num_steps, agent, buffer, args, act_rng, rng, explore):
    """Add whole episodes of E training tasks side by side, each in its environment: with z ~ p(z) to both buffers, or
    with z ~ q(z | h) to the RL buffer. Returns how many transitions."""
    missing = [num_steps] * len(tasks)
    while live := [e for e, steps in enumerate(missing) if steps > 0]:
        mu, sigma = prior(len(live), args, rng.device)  # (live, dz)
        if not explore:
            with torch.no_grad():
                h = buffer.sample([tasks[e] for e in live], args.context_batch, rng, "encoder")
                mu, sigma = agent.encoder(make_context(h, args))
        for e, path in zip(live, rollout([env_list[e] for e in live], agent, mu, sigma, act_rng)):
            buffer.add(tasks[e], path, encoder=explore)
            missing[e] -= len(path["actions"])
    return len(tasks) * num_steps - sum(missing)


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
def evaluate(agent, eval_envs, args):
    """Post-adaptation episodes, with a generator of its own: evaluating changes nothing in training.

    Returns what Run.write takes: a list of evaluations, "test" first; no scalars.
    """
    rng = torch.Generator().manual_seed(args.seed)
    evaluations = []
    for split, (tasks, env_list) in eval_envs.items():
        final, exploration, mu, sigma = buffers.on_cores(adapt, env_list, agent, args, rng)
        kl = kl_to_prior(mu, sigma)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration, kl))
    return evaluations, {}


def write_dataset(buffer, train_tasks, test_tasks, args):
    """Write the offline dataset of C.2: of each task a few transitions, from early in the run."""
    parts = ([], [])  # trajectories for the RL buffer, for the encoder buffer
    slices = DATASET_SLICES.get(envs.short_name(args.env_id), DEFAULT_SLICES)
    for part, source, piece in zip(parts, ("rl", "encoder"), slices):
        if piece:
            part += [
                (task, path)
                for task in range(len(train_tasks))
                for path in buffer.paths(task, *piece, source)
            ]
    command = buffers.command_line(args, __file__, PRESETS)
    buffers.save_dataset(args.save_dataset, args.env_id, train_tasks, test_tasks, *parts, command)


# ===== PEARL: collect and train in turns


def main(args):
    """Train PEARL. Returns the trained agent. Raises InputError."""
    spec, device = envs.lookup(args.env_id), buffers.choose_device(args)
    act_rng, rng = (
        torch.Generator().manual_seed(args.seed),
        torch.Generator(device).manual_seed(args.seed),
    )
    torch.manual_seed(args.seed)
    if args.save_dataset and args.dataset_iteration > args.online_iterations:
        raise buffers.InputError(
            f"--save-dataset: --dataset-iteration {args.dataset_iteration} comes after the last"
        )

    tasks = envs.sample_tasks(
        args.env_id, spec.num_train_tasks + spec.num_test_tasks, args.task_seed
    )
    train_tasks, test_tasks = tasks[: spec.num_train_tasks], tasks[spec.num_train_tasks :]
    visit = (
        args.prior_steps + args.posterior_steps + 2 * spec.horizon
    )  # new transitions of one visit, at most
    capacity = len(train_tasks) * (args.initial_steps + spec.horizon)
    capacity += args.online_iterations * args.tasks_per_iteration * visit
    buffer = buffers.ReplayBuffer(len(train_tasks), spec.obs_dim, spec.action_dim, capacity, device)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.lr, fused=True, capturable=device.type == "cuda"
    )

    env_list = [envs.make(args.env_id) for _ in range(args.tasks_per_iteration)]
    eval_envs = envs.make_evaluation(args.env_id, train_tasks, test_tasks)
    parts = dict(agent=agent, optimizer=optimizer, buffer=buffer, act_rng=act_rng, rng=rng)
    with buffers.Run(args, __file__, **parts) as run:
        if args.save_dataset and run.step >= args.dataset_iteration * args.updates_per_iteration:
            raise buffers.InputError(
                f"--save-dataset: iteration {args.dataset_iteration} of this run is over"
            )
        sample, learn = run.fast(sample_batch), run.fast(update, args.compile)

        num_tasks, side_by_side = len(train_tasks), args.tasks_per_iteration
        for first in run.count(
            "initial data", range(0, num_tasks if run.step == 0 else 0, side_by_side)
        ):
            visited = list(range(first, min(first + side_by_side, num_tasks)))
            for env, task in zip(env_list, visited):
                env.unwrapped.set_task(train_tasks[task])
            run.env_steps += collect(
                env_list, visited, args.initial_steps, agent, buffer, args, act_rng, rng, True
            )

        for step in run.steps(args.online_iterations * args.updates_per_iteration, "PEARL"):
            if step % args.updates_per_iteration == 0:
                # PAPER: 1000 new transitions an iteration, 4 gradient steps for each. CODE: 1000 on each of five tasks,
                # 0.8 gradient steps for each, after 2000 on every task before training.
                visited = torch.randint(num_tasks, (side_by_side,), generator=act_rng).tolist()
                for env, task in zip(env_list, visited):
                    env.unwrapped.set_task(train_tasks[task])
                    buffer.clear_encoder(task)  # h is what the present policy explores
                for num_steps, explore in ((args.prior_steps, True), (args.posterior_steps, False)):
                    run.env_steps += collect(
                        env_list, visited, num_steps, agent, buffer, args, act_rng, rng, explore
                    )
            run.log(learn(agent, optimizer, sample(buffer, args, rng), args))
            if run.evaluation_due:
                run.write(*evaluate(agent, eval_envs, args))
            if (
                args.save_dataset
                and step + 1 == args.dataset_iteration * args.updates_per_iteration
            ):
                write_dataset(buffer, train_tasks, test_tasks, args)
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
