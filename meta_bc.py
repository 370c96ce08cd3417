"""Meta behaviour cloning: SMAC's offline phase with imitation in place of reinforcement learning (Figure 5's baseline).

Paper: Pong, Nair, Smith, Huang, Levine, "Offline Meta-Reinforcement Learning with Online Self-Supervision", ICML 2022,
https://arxiv.org/abs/2107.03974, Section 6: "replaces the actor update in Equation (2) with simply maximizing
log pi(a | s, z)". Encoder and reward decoder train as in SMAC (Eq. 3); there is no critic and no second phase.
It explores as SMAC does, with z from the prior, and adapts as SMAC does, with z from q(z | h).

Run: python meta_bc.py --env-id HopperParam
"""

import ctypes
import dataclasses
import math
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
from buffers import InputError, ReplayBuffer, fill_from_dataset, load_dataset  # D and its file
from buffers import check_flags, claim, load_checkpoint, log_evaluation, print_csv, print_rows  # files of a run
from buffers import restore, save_checkpoint, writing_to


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"
    """a key of envs.SPECS; its row in PRESETS replaces the defaults below"""
    seed: int = 1
    """seed of the networks, of exploration and of sampling"""
    dataset: Optional[str] = None
    """offline dataset; default datasets/{env_id}.npz beside this file"""
    offline_steps: int = 50_000
    """gradient steps [C.3]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and buffers live"""
    run_dir: str = "runs"
    """results go to RUN_DIR/{env_id}__{script}__{seed}/"""
    resume: Optional[str] = None
    """folder of a run: continue it from its checkpoint, with its flags"""
    eval_every: int = 4_000
    """gradient steps between two evaluations"""
    checkpoint_every: int = 4_000
    """gradient steps between two checkpoints"""
    eval_only: bool = False
    """with --resume: evaluate the checkpoint, print the return on each task, write nothing else"""
    capture_video: bool = False
    """at the end (or with --eval-only) film the three episodes on the first test task: RUN/video.gif"""
    compile: bool = False
    """torch.compile the gradient step; needs a C++ compiler"""
    cuda_graph: bool = True
    """on a GPU, record the gradient step once and replay it"""

    # --- Algorithm
    rl_batch: int = 256
    """transitions a task for policy and decoder [Table 1]"""
    context_batch: int = 64
    """transitions a task in a history h [Table 1, encoder batch size]"""
    meta_batch: int = 4
    """tasks a gradient step [Table 1]"""
    policy_hidden: tuple[int, ...] = (300, 300, 300)
    """hidden sizes of the policy [Table 1]"""
    encoder_hidden: tuple[int, ...] = (200, 200, 200)
    """hidden sizes of the encoder [Table 1]"""
    decoder_hidden: tuple[int, ...] = (64, 64)
    """hidden sizes of the reward decoder [Table 1]"""
    latent_dim: int = 5
    """size of z [Table 1]"""
    lr: float = 3e-4
    """Adam's learning rate, all networks [Table 1]"""
    kl_coef: float = 0.1
    """weight of the KL term of Eq. 3 (the authors' code; it must fit the size of the rewards)"""
    next_obs_in_context: bool = False
    """the encoder sees s' as well (Section 3 lists it in h, C.3 does not)"""
    z_resample: Literal["step", "episode"] = "step"
    """how often acting draws a new z [Algorithm 1, line 7: z_t ~ p(z)]"""


# What differs from the defaults above. The KL weight must fit the rewards, as in smac_offline_online.py. PointDirection
# is not in the paper: small networks and a short run.
PRESETS = {
    "HopperParam": {}, "WalkerParam": {}, "CheetahVelocity": {}, "AntDirection": {}, "HumanoidDirection": {},
    "SawyerManipulation": dict(kl_coef=1 / 256), "SawyerManipulation8": dict(kl_coef=1 / 256),
    "PointDirection": dict(
        policy_hidden=(128, 128), encoder_hidden=(128, 128), rl_batch=128, lr=1e-3, kl_coef=0.002, offline_steps=3_000,
        eval_every=1_200, checkpoint_every=1_200,
    ),
}  # fmt: skip
MAY_BE_ZERO = "seed offline_steps kl_coef".split()
FREE = "resume device eval_only capture_video compile cuda_graph".split()  # of --resume
AT_MOST = {"seed": 2**32}
AT_MOST |= {name: 10_000 for name in vars(Args()) if name.endswith(("_batch", "_hidden", "_dim"))}  # sizes, for memory
EVAL_REPEATS, TRAIN_EVAL_TASKS = 4, 10  # meta-episodes a task in an evaluation; training tasks in it
LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves


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
        """context h (T, C, in_dim) -> mean and standard deviation of z, (T, dz) each."""
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
    gaussian = -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
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
    """The squared error of L_reward (Eq. 3), on unscaled rewards; `update` adds the KL. z (N, dz) -> scalar."""
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
    return {"losses/actor": l_actor.detach(), "losses/reward": l_reward.detach(), "losses/kl": kl.detach()}


def sample_batch(buffer, args, generator):
    """Buffers D_i ~ D, two histories h, h' of each, and the noise of one update."""
    num_tasks, device = len(buffer.sizes["rl"]), buffer.sizes["rl"].device
    tasks = torch.randint(num_tasks, (args.meta_batch,), generator=generator, device=device)
    batch = buffer.sample(tasks, args.rl_batch, generator)
    batch["context"] = make_context(buffer.sample(tasks, args.context_batch, generator, "context"), args)
    batch["noise_z"] = torch.randn(args.meta_batch, args.latent_dim, generator=generator, device=device)
    return batch


# ===== Acting: Section 3


@torch.no_grad()
def rollout(env_list, agent, mu, sigma, args, generator, deterministic=False, read_rewards=True):
    """One episode in each environment, in lockstep with one policy call a step.

    Args:
        mu, sigma: (E, dz); z ~ N(mu, sigma^2) is drawn at every step or once (--z-resample).
        deterministic: act with the policy's mean instead of a sample.
        read_rewards: if False the environment's reward is dropped unread, and the trajectories have none.
    Returns:
        E trajectories: obs (L+1, o), actions (L, a), terminals (L,), rewards (L,).
    """
    seeds = torch.randint(2**31 - 1, (len(env_list),), generator=generator).tolist()
    paths = [{"obs": [env.reset(seed=seed)[0]], "actions": [], "terminals": []} for env, seed in zip(env_list, seeds)]
    rewards, live, z, device = [[] for _ in env_list], list(range(len(env_list))), None, mu.device
    while live:
        if z is None or args.z_resample == "step":
            z = mu + sigma * torch.randn(mu.shape, generator=generator).to(device)
        obs = torch.as_tensor(np.stack([paths[i]["obs"][-1] for i in live])).to(device)
        mean, log_std = agent.policy(obs, z[live])
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=generator)
        actions = torch.tanh(mean + log_std.exp() * noise.to(device)).cpu().numpy()
        running = []
        for i, action in zip(live, actions):
            next_obs, reward, terminated, truncated, _ = env_list[i].step(action)
            for name, value in (("obs", next_obs), ("actions", action), ("terminals", terminated)):
                paths[i][name].append(value)
            if read_rewards:
                rewards[i].append(reward)
            if not (terminated or truncated):
                running.append(i)
        live = running
    paths = [{name: np.array(values, np.float32) for name, values in path.items()} for path in paths]
    return [path | {"rewards": np.array(r, np.float32)} for path, r in zip(paths, rewards)] if read_rewards else paths


def concatenate(paths, device):
    """All transitions of some trajectories, as `ReplayBuffer.sample` gives them: obs (L, o), ..., rewards (L, 1)."""
    columns = {"obs": [p["obs"][:-1] for p in paths], "next_obs": [p["obs"][1:] for p in paths]}
    columns |= {"actions": [p["actions"] for p in paths], "rewards": [p["rewards"][:, None] for p in paths]}
    return {name: torch.as_tensor(np.concatenate(parts)).to(device) for name, parts in columns.items()}


def prior(num, args, device):
    """p(z) = N(0, 1): mean and standard deviation, (num, dz) each."""
    return torch.zeros(num, args.latent_dim, device=device), torch.ones(num, args.latent_dim, device=device)


@torch.no_grad()
def adapt(env_list, agent, args, generator):
    """The meta-episode of Section 3, T = 3: two exploration episodes with z ~ p(z), then one with z ~ q(z | both).

    Returns:
        for each of E environments the third trajectory, the two of exploration, and the KL of the posterior (E,).
    """
    # PAPER: adapts between all episodes. CODE: once, before the third, as the authors' code does.
    device = next(agent.parameters()).device
    mu, sigma = prior(len(env_list), args, device)
    exploration = list(zip(*(rollout(env_list, agent, mu, sigma, args, generator) for _ in range(2))))
    contexts = [make_context(concatenate(paths, device), args)[None] for paths in exploration]  # (1, L, in_dim) each
    mu, sigma = (torch.cat(part) for part in zip(*(agent.encoder(context) for context in contexts)))  # (E, dz)
    final = rollout(env_list, agent, mu, sigma, args, generator, deterministic=True)
    return final, exploration, kl_to_prior(mu, sigma).cpu().numpy()


def sum_rewards(paths):
    """Undiscounted returns of E trajectories: (E,)."""
    return np.array([path["rewards"].sum() for path in paths])


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns and diagnostics, with generators of their own: evaluating changes nothing in training.

    Args:
        eval_envs: {"test": pairs, "train": pairs}, a pair being (task number, environment), E of them.
    Returns:
        rows (split, context, task numbers, returns, exploration returns: (E,) each), scalars to log, arrays to draw: KL
        values (E,) for Figure 2 and, of the Direction families, paths over ground (., L+1, 2) for Figures 6 and 8.
    """
    device = buffer.sizes["rl"].device
    rng, buffer_rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    rows, scalars, arrays, scored = [], {}, {}, {}
    for split, pairs in eval_envs.items():  # "train" comes last, and is used below
        numbers, env_list = zip(*pairs)
        final, exploration, arrays[f"kl_{split}_online_context"] = adapt(env_list, agent, args, rng)
        explored = np.mean([sum_rewards(paths) for paths in zip(*exploration)], axis=0)  # (E,)
        rows.append((split, "online", numbers, sum_rewards(final), explored))
        scored[f"{split}/online"] = final

    # The same training tasks with z ~ q(z | h_offline) instead (Figure 2), h as long as it is online, on average: each
    # transition more makes the posterior narrower.
    tasks = torch.tensor(numbers, device=device)  # (E,)
    lengths = torch.tensor([sum(len(path["actions"]) for path in pair) for pair in exploration], device=device)  # (E,)
    h_offline = make_context(buffer.sample(tasks, round(lengths.float().mean().item()), buffer_rng, "offline"), args)
    mu, sigma = agent.encoder(h_offline)  # (E, dz)
    arrays["kl_train_offline_context"] = kl_to_prior(mu, sigma).cpu().numpy()
    final_offline = rollout(env_list, agent, mu, sigma, args, rng, deterministic=True)
    rows.append(("train", "offline", numbers, sum_rewards(final_offline), explored))
    scored["train/offline"] = final_offline

    # Decoder against true rewards, on offline data and on this exploration: for us to read, never for training
    offline = buffer.sample(tasks, args.rl_batch, buffer_rng, "offline")
    explored_paths = [path for pair in exploration for path in pair]
    for name, batch, z in (
        ("decoder_loss", {k: v.flatten(0, 1) for k, v in offline.items()}, mu.repeat_interleave(args.rl_batch, 0)),
        ("generated_reward_mse", concatenate(explored_paths, device), mu.repeat_interleave(lengths, 0)),
    ):
        error = agent.decoder(batch["obs"], batch["actions"], z) - batch["rewards"].squeeze(-1)
        scalars[f"eval/{name}"] = error.square().mean().item()
        scalars[f"eval/{name}_over_reward_variance"] = (error.square().mean() / batch["rewards"].var()).item()

    if args.env_id in envs.SPARSE:
        for name, paths in scored.items():
            scalars[f"eval/{name}_context_success"] = np.mean([path["rewards"][-1] == 0 for path in paths])
    if args.env_id in envs.GROUND_VELOCITY:
        data = [path for task in set(numbers) for path in buffer.offline_paths(task)]
        groups = {"offline data": data, "exploration": explored_paths, "offline context": final_offline}
        for name, paths in (groups | {"online context": final}).items():
            arrays[name] = envs.ground_paths(args.env_id, paths)
    return rows, scalars, arrays


# ===== The run


def parse_args(argv=None):
    """The flags, over the environment's PRESETS row or over the flags of the run to resume. Raises InputError."""
    known, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    defaults = Args(**{"env_id": known.env_id} | PRESETS.get(known.env_id, {}))
    if known.resume:
        defaults = load_checkpoint(known.resume, Args)["args"]
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__)
    check_flags(args, defaults, PRESETS, MAY_BE_ZERO, AT_MOST, FREE)
    return args


def speed_up(device):
    """Make gradient steps on a CPU faster; returns the precision to set for their matrix products, as exact as fp32."""
    # "medium" has faster kernels, on most CPUs true fp32 as well; not where they are less exact.
    torch.set_float32_matmul_precision("medium")
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    exact = x.double() @ x.double()
    error = ((x @ x - exact).norm() / exact.norm()).item()
    torch.set_float32_matmul_precision("highest")
    # glibc gives large freed blocks back to the system: thousands of page faults in a step. Let it keep them.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD
        for option, size in ((-3, 1 << 25), (-2, 1 << 26), (-1, (1 << 31) - 1)):
            mallopt(option, size)
    return "medium" if error < 1e-5 else "highest"


def cuda_graph(take_step, generator):
    """`take_step` recorded on its fourth call and replayed from then on: one launch in place of hundreds.

    Its tensors must keep their shapes and places, and so do those it returns: each call overwrites them.
    """
    graph, stream, info, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), {}, 0

    def replay():
        nonlocal calls, info
        calls += 1
        if calls <= 3:  # as they are, on a stream of their own, so that libraries allocate what they need
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                info = take_step()
            torch.cuda.current_stream().wait_stream(stream)
            return info
        if calls == 4:
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph):  # records, computes nothing
                info = take_step()
        graph.replay()
        return info

    return replay


def main(args):
    """Train. Returns the trained agent. Raises InputError."""
    spec = envs.SPECS[args.env_id]
    gpu = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    precision = speed_up(device)
    run = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__{Path(__file__).stem}__{args.seed}")

    # --- Datasets D_i, networks, environments
    default_file = Path(__file__).parent / "datasets" / f"{args.env_id}.npz"
    env = envs.make(args.env_id)
    dataset = load_dataset(args.dataset or default_file, args.env_id, spec, env.unwrapped.set_task)
    train_tasks, test_tasks = dataset["train_tasks"], dataset["test_tasks"]
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, fused=True, capturable=gpu)
    capacity = sum(len(path["actions"]) for _, path in dataset["rl"] + dataset["encoder"])
    buffer = ReplayBuffer(len(train_tasks), spec.obs_dim, spec.action_dim, capacity, device)
    fill_from_dataset(buffer, dataset)
    eval_envs = envs.make_evaluation(args.env_id, train_tasks, test_tasks, TRAIN_EVAL_TASKS, EVAL_REPEATS)

    # --- State of the run: everything that a checkpoint holds
    rng = torch.Generator(device).manual_seed(args.seed)
    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer}
    generators, step = {"rng": rng}, 0
    lock = None if args.eval_only else claim(run, args)
    if args.resume:
        step, _ = restore(load_checkpoint(run, Args), parts, {} if args.eval_only else generators)

    def film():
        """The meta-episode on the first test task, as a GIF. Raises OSError if this machine can not render."""
        film_rng = torch.Generator().manual_seed(args.seed)
        envs.film(args.env_id, test_tasks[0], lambda env: adapt([env], agent, args, film_rng), run / "video.gif")

    if args.eval_only:
        print_rows(evaluate(agent, buffer, eval_envs, args)[0])
        if args.capture_video:
            film()
        return agent

    writer = SummaryWriter(str(run), purge_step=step + 1)
    stop_signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop_signals.append(number))
    totals, count, since = {}, 0, time.time()

    def make_step():
        """One gradient step as a function without arguments, the draw of its batch included."""
        fn = torch.compile(update) if args.compile else update

        def take_step():
            # Only here: the faster products keep memory for every shape they meet, and trajectories are of any length.
            torch.set_float32_matmul_precision(precision)
            info = fn(agent, optimizer, sample_batch(buffer, args, rng), args)
            torch.set_float32_matmul_precision("highest")
            return info

        return cuda_graph(take_step, rng) if gpu and args.cuda_graph else take_step

    @writing_to(run)
    def after_update(info, progress):
        """Count a gradient step; log, evaluate and save what is due after it."""
        nonlocal step, totals, count, since
        step, count, stopping = step + 1, count + 1, bool(stop_signals)
        totals = {name: totals.get(name, 0) + value for name, value in info.items()}
        progress.update()
        eval_due = step == args.offline_steps or step % args.eval_every == 0
        save_due = step == args.offline_steps or step % args.checkpoint_every == 0 or stopping
        if step % LOG_EVERY == 0 or eval_due or save_due:
            means = {name: value.item() / count for name, value in totals.items()}
            broken = ", ".join(name for name, value in means.items() if not math.isfinite(value))
            if broken:
                last = f"the last good checkpoint is {run}/checkpoint.pt, if there is one"
                raise InputError(f"{broken} became NaN or infinite before step {step}; {last}")
            for name, value in (means | {"charts/SPS": count / (time.time() - since)}).items():
                writer.add_scalar(name, value, step)
            totals, count = {}, 0
        if eval_due:
            rows, scalars, arrays = evaluate(agent, buffer, eval_envs, args)
            returns = log_evaluation(run, writer, step, 0, rows, scalars, arrays)
            tqdm.write(f"step {step} | return: {returns}")
            if step == args.offline_steps:
                np.savez_compressed(run / f"figures_{step}.npz", **arrays)  # for benchmark/figures.py
        if save_due:
            writer.flush()
            save_checkpoint(run, args, step, 0, parts, generators)
        if stopping:
            progress.close()
            raise SystemExit(f"stopped after step {step}; continue with: python {Path(__file__).name} --resume {run}")
        if count == 0:
            since = time.time()  # charts/SPS leaves out evaluations and checkpoints

    # ===== Train on the dataset
    take_step = make_step()
    with tqdm(total=args.offline_steps, initial=step, desc="offline", unit="step") as progress:
        while step < args.offline_steps:
            after_update(take_step(), progress)

    for opened in (writer, lock, env, *(env for _, env in eval_envs["test"] + eval_envs["train"])):
        opened.close()
    print_csv(run / "eval.csv")
    if args.capture_video:
        film()
    return agent


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
