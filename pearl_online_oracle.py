"""PEARL with true rewards: the Online Oracle of Figure 5, and the source of the offline datasets.

PEARL: Rakelly et al., "Efficient Off-Policy Meta-RL via Probabilistic Context Variables", ICML 2019 (arXiv:1903.08254).
Paper: Pong et al., "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022 (arXiv:2107.03974), Section 3.

Run:           python pearl_online_oracle.py --env-id HopperParam
Make a dataset: python pearl_online_oracle.py --env-id HopperParam --tasks-per-iteration 5 --save-dataset HopperParam.npz
"""

import csv
import dataclasses
import difflib
import json
import math
import os
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from buffers import InputError, ReplayBuffer, save_dataset


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"
    """one of envs.SPECS"""
    seed: int = 1
    """seed of networks, exploration and sampling; the tasks have their own (--task-seed)"""
    task_seed: int = 1337
    """seed of the task list; 1337 gives the published Cheetah and Ant tasks"""
    online_iterations: int = 100
    """iterations of collecting data and training on it"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live"""
    run_dir: str = "runs"
    """results go to RUN_DIR/{env_id}__{script}__{seed}/"""
    resume: Optional[str] = None
    """a run's folder: continue it from its checkpoint, with its flags"""
    eval_every: int = 8_000
    """gradient steps between two evaluations"""
    checkpoint_every: int = 8_000
    """gradient steps between two checkpoints"""
    save_dataset: Optional[str] = None
    """write the offline dataset to this file after --dataset-iteration iterations"""
    dataset_iteration: int = 40
    """iteration at which the dataset is taken (the paper's are in PRESETS)"""

    # --- Algorithm: Table 1 of the SMAC paper where it names a value, else the published PEARL code
    rl_batch: int = 256
    """transitions a task for critic and actor [Table 1]"""
    context_batch: int = 64
    """transitions a task in a history h [Table 1, encoder batch size]"""
    meta_batch: int = 4
    """tasks a gradient step [Table 1]"""
    q_hidden: tuple[int, ...] = (300, 300, 300)
    """hidden sizes of the Q-functions [Table 1]"""
    policy_hidden: tuple[int, ...] = (300, 300, 300)
    """hidden sizes of the policy [Table 1]"""
    encoder_hidden: tuple[int, ...] = (200, 200, 200)
    """hidden sizes of the encoder [Table 1]"""
    latent_dim: int = 5
    """size of z [Table 1]"""
    gamma: float = 0.99
    """discount [Table 1]"""
    tau: float = 0.005
    """soft target update [Table 1]"""
    lr: float = 3e-4
    """Adam's learning rate, all networks [Table 1]"""
    reward_scale: float = 5.0
    """factor on the reward in the Bellman target [Table 2]; with it, the entropy weight is 1"""
    kl_coef: float = 0.4
    """weight of the KL term, a mean over tasks (PEARL: 0.1 on the sum over the meta batch)"""
    policy_reg: float = 1e-3
    """weight of the squares of the policy's mean and log standard deviation (PEARL)"""
    next_obs_in_context: bool = False
    """the encoder sees s' as well (PEARL: for tasks that differ in their dynamics)"""
    z_resample: Literal["step", "episode"] = "episode"
    """how often exploration draws a new z (PEARL: each episode; SMAC's Algorithm 1: each step)"""
    initial_steps: int = 2_000
    """transitions collected in each task before training (PEARL)"""
    tasks_per_iteration: int = 1
    """tasks that collect data in one iteration (PEARL: 5)"""
    prior_steps: int = 400
    """transitions a task and iteration with z from the prior, into both buffers (PEARL)"""
    posterior_steps: int = 600
    """transitions a task and iteration with z from the posterior, into the RL buffer (PEARL)"""
    updates_per_iteration: int = 4_000
    """gradient steps an iteration [Table 1: 4 for each of 1000 transitions]"""


# What differs from the defaults above. Dataset iterations: Appendix C.2 and the authors' scripts.
PRESETS = {
    "HopperParam": dict(next_obs_in_context=True),
    "WalkerParam": dict(next_obs_in_context=True),
    "CheetahVelocity": dict(dataset_iteration=50),
    "AntDirection": dict(dataset_iteration=100),
    "HumanoidDirection": dict(dataset_iteration=100),
    "PointDirection": dict(
        q_hidden=(128, 128), policy_hidden=(128, 128), encoder_hidden=(128, 128), rl_batch=128, initial_steps=200, prior_steps=150,
        posterior_steps=250, tasks_per_iteration=5, updates_per_iteration=400, online_iterations=24, eval_every=2_400,
        kl_coef=0.008, dataset_iteration=10,
    ),
}  # fmt: skip
# Which transitions of each task become the dataset: (RL buffer, encoder buffer), Appendix C.2; None: the RL transitions serve as both.
DATASET_SLICES = {"CheetahVelocity": ("first 1200", "last 400")}
EVAL_REPEATS, TRAIN_EVAL_TASKS = 4, 10


# ===== Networks (Table 1; identical in every script, so that one file can be copied)


def mlp(sizes, last_init=3e-3) -> nn.Sequential:
    """ReLU network of the given layer sizes, with the initialisation of the authors' code (hidden U(+-1/sqrt(out)), biases 0)."""
    layers = []
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        linear = nn.Linear(n_in, n_out)
        bound = last_init if i == len(sizes) - 2 else 1 / math.sqrt(n_out)
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q(z | h), the product of one Gaussian factor Phi(z | s, a, r) for each transition of h (C.3)."""

    def __init__(self, in_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([in_dim, *hidden, 2 * latent_dim])

    def forward(self, context):
        """context (T, C, in_dim) -> mean and standard deviation of z, (T, dz) each."""
        mu, raw = self.net(context).chunk(2, dim=-1)  # (T, C, dz) each
        # PAPER: softplus gives the standard deviation. CODE: the variance.
        precision = F.softplus(raw).square().clamp(min=1e-7).reciprocal()  # (T, C, dz)
        variance = precision.sum(1).reciprocal()  # (T, dz)
        return variance * (precision * mu).sum(1), variance.sqrt()


class Policy(nn.Module):
    """pi(a | s, z), a Gaussian squashed by tanh."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        self.net = mlp([obs_dim + latent_dim, *hidden, 2 * action_dim], last_init=1e-3)

    def forward(self, obs, z):
        """obs (N, o), z (N, dz) -> mean and log standard deviation before tanh, (N, a) each."""
        mean, log_std = self.net(torch.cat([obs, z], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)


class TwinQ(nn.Module):
    """Two Q-functions Q_w(s, a, z), their weights stacked so that both take one batched product a layer."""

    def __init__(self, obs_dim, action_dim, hidden, latent_dim):
        super().__init__()
        sizes = [obs_dim + action_dim + latent_dim, *hidden, 1]
        nets = [mlp(sizes), mlp(sizes)]
        linears = [[layer for layer in net if isinstance(layer, nn.Linear)] for net in nets]
        self.weights = nn.ParameterList(torch.stack([a.weight.T, b.weight.T]).detach() for a, b in zip(*linears))  # (2, in, out)
        self.biases = nn.ParameterList(torch.stack([a.bias, b.bias]).detach()[:, None] for a, b in zip(*linears))  # (2, 1, out)

    def forward(self, obs, actions, z, frozen=False):
        """obs (N, o), actions (N, a), z (N, dz) -> (2, N). frozen: gradients reach the inputs, but not the weights."""
        x = torch.cat([obs, actions, z], dim=-1).expand(2, -1, -1)  # (2, N, o + a + dz)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias.detach() if frozen else bias, x, weight.detach() if frozen else weight)
            x = x if i == len(self.weights) - 1 else x.relu_()
        return x.squeeze(-1)


def sample_action(mean, log_std, noise):
    """Reparameterised a = tanh(mean + std * noise) and log pi(a | s, z): (N, a), (N,)."""
    u = mean + log_std.exp() * noise
    return torch.tanh(u), tanh_gaussian_log_prob(u, mean, log_std)


def tanh_gaussian_log_prob(u, mean, log_std):
    """log density of tanh(u) with u ~ N(mean, std): (N, a) each -> (N,)."""
    gaussian = -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)  # log(1 - tanh(u)^2), exact for any u


def kl_to_prior(mu, sigma):
    """KL(N(mu, sigma^2) || N(0, 1)), summed over the dimensions of z: (T, dz) each -> (T,)."""
    return 0.5 * (mu.square() + sigma.square() - 2 * sigma.log() - 1).sum(-1)


def make_context(data, args):
    """What the encoder reads of each transition: (..., n, o + a + 1), or with s' (..., n, 2o + a + 1)."""
    names = ["obs", "actions", "rewards"] + ["next_obs"] * args.next_obs_in_context
    return torch.cat([data[name] for name in names], dim=-1)


class Agent(nn.Module):
    """All networks: what a checkpoint holds."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        context_dim = obs_dim + action_dim + 1 + obs_dim * args.next_obs_in_context
        self.encoder = Encoder(context_dim, args.encoder_hidden, args.latent_dim)
        self.policy = Policy(obs_dim, action_dim, args.policy_hidden, args.latent_dim)
        self.q = TwinQ(obs_dim, action_dim, args.q_hidden, args.latent_dim)
        self.q_target = TwinQ(obs_dim, action_dim, args.q_hidden, args.latent_dim)
        self.q_target.load_state_dict(self.q.state_dict())
        self.q_target.requires_grad_(False)


# ===== One gradient step


def update(agent, optimizer, batch, args):
    """One step of every PEARL loss. T tasks, B transitions a task, N = T * B.

    Args:
        batch: context (T, C, .), obs, next_obs (T, B, o), actions (T, B, a), rewards, terminals (T, B, 1), and standard
            normal noise: noise_z (T, dz), noise_a, noise_next_a (N, a).
    Returns:
        scalars to log, as tensors.
    """
    size = batch["obs"].shape[1]
    obs, actions, next_obs = (batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs"))  # (N, .)
    rewards, terminals = batch["rewards"].flatten(), batch["terminals"].flatten()  # (N,)

    # --- z ~ q(z | h), one for each task; critic loss and KL train the encoder
    mu, sigma = agent.encoder(batch["context"])  # (T, dz)
    z = (mu + sigma * batch["noise_z"]).repeat_interleave(size, dim=0)  # (N, dz)
    z_fixed = z.detach()
    kl = kl_to_prior(mu, sigma).mean()

    # --- Critic: y = r + gamma (min Q_target(s', a', z) - log pi(a' | s', z))
    with torch.no_grad():
        next_actions, next_log_prob = sample_action(*agent.policy(next_obs, z_fixed), batch["noise_next_a"])
        next_value = agent.q_target(next_obs, next_actions, z_fixed).amin(0) - next_log_prob  # (N,)
        target = args.reward_scale * rewards + args.gamma * (1 - terminals) * next_value
    q = agent.q(obs, actions, z)  # (2, N)
    critic_loss = (q - target).square().mean(1).sum()

    # --- Actor: KL(pi || exp(Q) / Z), the PEARL actor loss of C.3
    mean, log_std = agent.policy(obs, z_fixed)
    new_actions, log_prob = sample_action(mean, log_std, batch["noise_a"])
    actor_loss = (log_prob - agent.q(obs, new_actions, z_fixed, frozen=True).amin(0)).mean()
    regulariser = args.policy_reg * (mean.square().mean() + log_std.square().mean())

    # One backward pass: detach() above lets each loss reach its own networks only.
    optimizer.zero_grad(set_to_none=True)
    (critic_loss + args.kl_coef * kl + actor_loss + regulariser).backward()
    optimizer.step()
    torch._foreach_lerp_(list(agent.q_target.parameters()), list(agent.q.parameters()), args.tau)
    with torch.no_grad():
        return {
            "losses/critic": critic_loss.detach(), "losses/actor": actor_loss.detach(), "losses/kl": kl.detach(),
            "train/q_mean": q.mean(), "train/q_max": q.amax(), "train/policy_entropy": -log_prob.mean(),
        }  # fmt: skip


def sample_batch(buffer, num_tasks, args, action_dim, generator):
    """Draw tasks D_i ~ D, a history h and RL transitions h' for each, and all noise of one update."""
    device = buffer.sizes["rl"].device
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=generator, device=device)
    batch = buffer.sample(tasks, args.rl_batch, generator)
    batch["context"] = make_context(buffer.sample(tasks, args.context_batch, generator, "context"), args)
    n = args.meta_batch * args.rl_batch
    for name, shape in (("z", (args.meta_batch, args.latent_dim)), ("a", (n, action_dim)), ("next_a", (n, action_dim))):
        batch[f"noise_{name}"] = torch.randn(shape, generator=generator, device=device)
    return batch


# ===== Acting


@torch.no_grad()
def rollout(env_list, agent, mu, sigma, args, generator, deterministic=False, read_rewards=True):
    """One episode in each environment, all in lockstep with one policy call a step.

    Args:
        mu, sigma: (E, dz), z ~ N(mu, sigma^2) is drawn anew every step or once, see --z-resample.
        deterministic: act with the policy's mean instead of a sample.
        read_rewards: False leaves the environment's reward unread (the trajectory then has none).
    Returns:
        E trajectories: obs (T+1, o), actions (T, a), terminals (T,), rewards (T,).
    """
    seeds = torch.randint(2**31 - 1, (len(env_list),), generator=generator).tolist()
    paths = [{"obs": [env.reset(seed=seed)[0]], "actions": [], "rewards": [], "terminals": []} for env, seed in zip(env_list, seeds)]
    live, z, device = list(range(len(env_list))), None, next(agent.parameters()).device
    while live:
        if z is None or args.z_resample == "step":
            z = (mu.cpu() + sigma.cpu() * torch.randn(mu.shape, generator=generator)).to(device)
        obs = torch.as_tensor(np.stack([paths[i]["obs"][-1] for i in live]), device=device)
        mean, log_std = agent.policy(obs, z[live])
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=generator)
        actions, still_live = torch.tanh(mean + log_std.exp() * noise.to(device)).cpu().numpy(), []
        for i, action in zip(live, actions):
            next_obs, reward, terminated, truncated, _ = env_list[i].step(action)
            paths[i]["obs"].append(next_obs)
            paths[i]["actions"].append(action)
            paths[i]["terminals"].append(terminated)
            if read_rewards:
                paths[i]["rewards"].append(reward)
            if not (terminated or truncated):
                still_live.append(i)
        live = still_live
    return [{k: np.asarray(v, bool if k == "terminals" else np.float32) for k, v in path.items() if v} for path in paths]


def infer_posterior(agent, paths, args):
    """q(z | h) with h = all transitions of some trajectories: mean and standard deviation, (dz,) each."""
    columns = {"obs": [p["obs"][:-1] for p in paths], "next_obs": [p["obs"][1:] for p in paths]}
    columns |= {"actions": [p["actions"] for p in paths], "rewards": [p["rewards"][:, None] for p in paths]}
    data = {name: torch.as_tensor(np.concatenate(parts)) for name, parts in columns.items()}
    with torch.no_grad():
        mu, sigma = agent.encoder(make_context(data, args)[None].to(next(agent.parameters()).device))
    return mu[0], sigma[0]


def adapt(env_list, agent, args, generator):
    """Section 3's meta-episode, T = 3: two exploration episodes with z ~ p(z), then one with z ~ q(z | both episodes).

    Returns:
        return of the last episode (E,), mean return of the exploration episodes (E,), KL of the posterior to the prior (E,),
        and the exploration trajectories, 2 for each environment.
    """
    mu, sigma = torch.zeros(len(env_list), args.latent_dim), torch.ones(len(env_list), args.latent_dim)
    exploration = list(zip(*(rollout(env_list, agent, mu, sigma, args, generator) for _ in range(2))))
    posteriors = [infer_posterior(agent, paths, args) for paths in exploration]
    mu, sigma = (torch.stack(parts) for parts in zip(*posteriors))
    final = rollout(env_list, agent, mu, sigma, args, generator, deterministic=True)
    returns = np.array([path["rewards"].sum() for path in final])
    explored = np.array([np.mean([path["rewards"].sum() for path in paths]) for paths in exploration])
    return returns, explored, kl_to_prior(mu, sigma).cpu().numpy(), exploration


def collect(env, agent, mu, sigma, num_steps, args, generator, **kwargs):
    """Whole episodes in one environment until there are at least num_steps transitions."""
    paths = []
    while sum(len(path["actions"]) for path in paths) < num_steps:
        paths += rollout([env], agent, mu, sigma, args, generator, **kwargs)
    return paths


# ===== The run: flags, checkpoints, log


def parse_args(argv=None):
    """Flags over the environment's preset, or over the flags of the run to resume."""
    known, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    if known.env_id not in envs.SPECS:
        near = difflib.get_close_matches(known.env_id, envs.SPECS, n=3, cutoff=0.3) or sorted(envs.SPECS)
        raise InputError(f"there is no environment {known.env_id!r}; nearest: {', '.join(near)}")
    defaults = Args(**({"env_id": known.env_id} | PRESETS[known.env_id]))
    if known.resume:
        saved = load_checkpoint(known.resume)["args"]
        defaults = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__)
    if known.resume:
        may_change = ("resume", "run_dir", "online_iterations", "device")
        changed = [k for k, v in vars(args).items() if v != getattr(defaults, k) and k not in may_change]
        if changed:
            raise InputError(f"--{changed[0].replace('_', '-')} can not change when a run is resumed")
    for name, value in vars(args).items():
        low = 1 if name in AT_LEAST_ONE else 0
        if any(v < low or not math.isfinite(v) for v in np.atleast_1d(value) if isinstance(v, (int, float, np.number))):
            raise InputError(f"--{name.replace('_', '-')} is {value}, it must be at least {low}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here")
    return args


AT_LEAST_ONE = "rl_batch context_batch meta_batch q_hidden policy_hidden encoder_hidden latent_dim eval_every checkpoint_every".split()


def load_checkpoint(run):
    """The checkpoint of a run's folder. Raises InputError where it is missing or damaged; never runs code from it."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}")
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        raise InputError(f"{path} can not be read as a checkpoint: {type(error).__name__}") from None


def main(args):
    spec = envs.SPECS[args.env_id]
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu"))
    use_fast_matmul(device)
    run = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__pearl_online_oracle__{args.seed}")
    checkpoint = load_checkpoint(run) if args.resume else None
    if checkpoint is None and (run / "checkpoint.pt").exists():
        raise InputError(f"{run} holds a run already: continue it with --resume {run}, or choose another --run-dir or --seed")
    run.mkdir(parents=True, exist_ok=True)

    # --- Tasks, environments, networks, buffer, generators
    all_tasks = envs.sample_tasks(args.env_id, spec.num_train_tasks + spec.num_test_tasks, args.task_seed)
    train_tasks, test_tasks = np.split(all_tasks, [spec.num_train_tasks])
    env = envs.make(args.env_id)
    eval_envs = {"train": [], "test": []}
    for split, tasks in (("train", train_tasks[:TRAIN_EVAL_TASKS]), ("test", test_tasks)):
        for task in np.repeat(tasks, EVAL_REPEATS, axis=0):
            eval_envs[split].append(envs.make(args.env_id))
            eval_envs[split][-1].unwrapped.set_task(task)
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=args.lr, fused=True)
    per_iteration = args.tasks_per_iteration * (args.prior_steps + args.posterior_steps + 2 * spec.horizon)
    initial = len(train_tasks) * (args.initial_steps + spec.horizon)
    buffer = ReplayBuffer(len(train_tasks), spec.obs_dim, spec.action_dim, initial + args.online_iterations * per_iteration, device)
    explore_rng, update_rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    step, env_steps = 0, 0
    total_steps = args.online_iterations * args.updates_per_iteration
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        buffer.load_state_dict(checkpoint["buffer"])
        explore_rng.set_state(checkpoint["explore_rng"])
        update_rng.set_state(checkpoint["update_rng"])
        step, env_steps = checkpoint["step"], checkpoint["env_steps"]
    results = EvalLog(run, step)
    (run / "args.json").write_text(json.dumps(vars(args) | {"versions": versions()}, indent=1))
    writer = SummaryWriter(str(run), purge_step=step)

    def save():
        state = {"args": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}, "step": step, "env_steps": env_steps}
        state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "buffer": buffer.state_dict()}
        state |= {"explore_rng": explore_rng.get_state(), "update_rng": update_rng.get_state()}
        torch.save(state, run / "checkpoint.tmp")
        os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")

    def evaluate():
        """Post-adaptation returns of test and train tasks; its own generator, so that evaluating changes nothing in training."""
        generator, line = torch.Generator().manual_seed(10_000 + args.seed), []
        for split, env_list in eval_envs.items():
            returns, explored, kl, _ = adapt(env_list, agent, args, generator)
            results.add(step, env_steps, split, "online", returns, explored)
            writer.add_scalar(f"eval/{split}/online_context_return", returns.mean(), step)
            writer.add_scalar(f"eval/{split}/exploration_return", explored.mean(), step)
            writer.add_histogram(f"eval/{split}/kl_online_context", kl, step)
            line.append(f"{split} {returns.mean():.1f} (exploration {explored.mean():.1f}, KL {kl.mean():.2f})")
        tqdm.write(f"step {step}, {env_steps} transitions | post-adaptation return: {', '.join(line)}")

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))

    def collect_task(task, num_steps, prior):
        """Add num_steps new transitions of one task; z from the prior, or from the posterior of its encoder buffer."""
        nonlocal env_steps
        mu, sigma = torch.zeros(1, args.latent_dim), torch.ones(1, args.latent_dim)
        left = num_steps
        while left > 0:
            if not prior:
                tasks = torch.tensor([task], device=device)
                with torch.no_grad():
                    mu, sigma = agent.encoder(make_context(buffer.sample(tasks, args.context_batch, update_rng, "context"), args))
            (path,) = rollout([env], agent, mu, sigma, args, explore_rng)
            buffer.add(task, path, context=prior)
            left -= len(path["actions"])
            env_steps += len(path["actions"])

    # ===== Train
    if step == 0:
        evaluate()
        for task in tqdm(range(len(train_tasks)), desc="initial data"):
            env.unwrapped.set_task(train_tasks[task])
            collect_task(task, args.initial_steps, prior=True)
    totals, since = None, time.time()
    progress = tqdm(total=total_steps, initial=step, desc="PEARL", unit="step", smoothing=0.05)
    while step < total_steps and not stop:
        if step % args.updates_per_iteration == 0:
            for task in torch.randint(len(train_tasks), (args.tasks_per_iteration,), generator=explore_rng).tolist():
                env.unwrapped.set_task(train_tasks[task])
                buffer.clear_context(task)
                collect_task(task, args.prior_steps, prior=True)
                collect_task(task, args.posterior_steps, prior=False)
        info = update(agent, optimizer, sample_batch(buffer, len(train_tasks), args, spec.action_dim, update_rng), args)
        totals = info if totals is None else {k: totals[k] + v for k, v in info.items()}
        step += 1
        progress.update()
        if step % LOG_EVERY == 0:
            for name, value in totals.items():
                writer.add_scalar(name, check_finite(name, value.item() / LOG_EVERY, step, run), step)
            writer.add_scalar("charts/SPS", LOG_EVERY / (time.time() - since), step)
            totals, since = None, time.time()
        if step % args.eval_every == 0 or step == total_steps:
            evaluate()
        if args.save_dataset and step == args.dataset_iteration * args.updates_per_iteration:
            write_dataset(buffer, train_tasks, test_tasks, args)
            tqdm.write(f"dataset written to {args.save_dataset}")
        if step % args.checkpoint_every == 0 or step == total_steps:
            save()
    progress.close()
    if stop:
        save()
        sys.exit(f"stopped at step {step}; continue with: python {Path(__file__).name} --resume {run}")
    results.print_table()


def write_dataset(buffer, train_tasks, test_tasks, args):
    """Appendix C.2: a few transitions of each task's buffers, early in the run."""
    rl_slice, encoder_slice = DATASET_SLICES.get(args.env_id, ("last 1200", None))
    rl, encoder = [], []
    for task in range(len(train_tasks)):
        for source, piece, out in (("rl", rl_slice, rl), ("context", encoder_slice, encoder)):
            if piece:
                where, n = piece.split()
                out += [(task, path) for path in buffer.paths(task, where, int(n), source)]
    save_dataset(args.save_dataset, args.env_id, train_tasks, test_tasks, rl, encoder, "python " + " ".join(sys.argv))


LOG_EVERY = 200


def use_fast_matmul(device):
    """Let matrix products take the faster kernels ("medium"), unless these are less exact than fp32 on this machine."""
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    exact = x.double() @ x.double()
    if ((x @ x - exact).norm() / exact.norm()).item() > 1e-5:
        torch.set_float32_matmul_precision("highest")


def check_finite(name, value, step, run):
    """Stop with one sentence where a loss is no longer a number; the last checkpoint is from before."""
    if not math.isfinite(value):
        raise InputError(f"{name} became {value} before step {step}; the last good checkpoint is {run}/checkpoint.pt")
    return value


def versions():
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")} | {"python": sys.version.split()[0]}


class EvalLog:
    """eval.csv: one row for each evaluation and task, the mean over its repeats."""

    COLUMNS = ["gradient_step", "env_steps", "split", "context", "task", "return", "exploration_return"]

    def __init__(self, run, step):
        """Keep the rows up to `step`: those after it come again."""
        self.path, rows = run / "eval.csv", []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= step]
        self.rows = rows
        with open(self.path, "w", newline="") as file:
            csv.writer(file).writerows([self.COLUMNS] + rows)

    def add(self, step, env_steps, split, context, returns, explored):
        """returns, explored: (tasks * EVAL_REPEATS,)."""
        means = zip(returns.reshape(-1, EVAL_REPEATS).mean(1), explored.reshape(-1, EVAL_REPEATS).mean(1))
        rows = [[step, env_steps, split, context, task, f"{r:.4f}", f"{e:.4f}"] for task, (r, e) in enumerate(means)]
        self.rows += rows
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows(rows)

    def print_table(self):
        """Mean return of every evaluation."""
        print(f"{'step':>10} {'transitions':>12}  post-adaptation return, mean over tasks")
        for step, env_steps in dict.fromkeys((row[0], row[1]) for row in self.rows):
            groups = {}
            for row in self.rows:
                if str(row[0]) == str(step):
                    groups.setdefault(f"{row[2]} ({row[3]} context)", []).append(float(row[5]))
            print(f"{step:>10} {env_steps:>12}  " + "  ".join(f"{k} {np.mean(v):.1f}" for k, v in groups.items()))


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        sys.exit((print(f"error: {error}", file=sys.stderr), 2)[1])
