"""MACAW, meta-actor critic with advantage weighting: one gradient step adapts it to a task (a baseline of Figure 5).

Paper: Mitchell, Rafailov, Peng, Levine, Finn, "Offline Meta-Reinforcement Learning with Advantage Weighting",
ICML 2021, https://arxiv.org/abs/2008.06043: this is what PAPER means below. SMAC's Section 6 and C.3 compare with it.
To adapt is a gradient step on a value function, then one on a policy, both on the same few transitions of the task (the
inner steps). Meta-training differentiates through them (the outer losses).

Run: python macaw.py --env-id HopperParam [--preset matched]
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
    offline_steps: int = 25_000
    """gradient steps; of 5 x (256 + 256) transitions, in all a quarter more than in SMAC's offline phase"""
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

    # --- Algorithm. [M]: the authors' configuration of their published results
    preset: Literal["original", "matched"] = "original"
    """MACAW's own hyperparameters, or SMAC's network size, learning rate and batch size (MATCHED)"""
    rl_batch: int = 256
    """transitions a task for the outer losses [M]"""
    context_batch: int = 256
    """transitions a task for the inner steps [M]"""
    meta_batch: int = 5
    """tasks a gradient step [M]"""
    policy_hidden: tuple[int, ...] = (100, 100, 100)
    """hidden sizes of the policy [M]"""
    value_hidden: tuple[int, ...] = (100, 100, 100)
    """hidden sizes of the value function [M]"""
    weight_transform: bool = True
    """make the layers of weight transforms [M]"""
    policy_lr: float = 1e-4
    """Adam's learning rate, policy [M]"""
    value_lr: float = 1e-5
    """Adam's learning rate, value function [M]"""
    inner_lr: float = 1e-3
    """initial learning rate of the inner steps; every tensor learns its own [M]"""
    lr_lr: float = 1e-3
    """Adam's learning rate, inner learning rates and weight of L_ADV [M]"""
    adv_coef: float = 0.01
    """initial weight of L_ADV; it is learned as well [M]"""
    gamma: float = 0.99
    """discount [M]"""


# What differs from the defaults above. PointDirection is not in the papers: small networks, a short run.
PRESETS = {
    "HopperParam": {}, "WalkerParam": {}, "CheetahVelocity": {}, "AntDirection": {}, "HumanoidDirection": {},
    "SawyerManipulation": {}, "SawyerManipulation8": {},
    "PointDirection": dict(
        policy_hidden=(64, 64), value_hidden=(64, 64), offline_steps=3_000, eval_every=1_000, checkpoint_every=1_000,
    ),
}  # fmt: skip
# What --preset matched stands for: SMAC's network sizes, learning rate and RL batch (also of the inner steps).
# PAPER: weight transforms. CODE: plain layers in this preset; at width 300 a weight transform would take 19 million
# parameters a network.
MATCHED = dict.fromkeys(
    PRESETS,
    "--no-weight-transform --policy-hidden 300 300 300 --value-hidden 300 300 300 --policy-lr 3e-4 --value-lr 3e-4 "
    "--rl-batch 256 --context-batch 256 --meta-batch 4",
) | {
    "PointDirection": "--no-weight-transform --policy-hidden 128 128 --value-hidden 128 128 --policy-lr 1e-3 "
    "--value-lr 1e-3 --rl-batch 128 --context-batch 128 --meta-batch 4",
}
MAY_BE_ZERO = "seed offline_steps".split()
FREE = "resume device eval_only capture_video compile cuda_graph".split()  # of --resume
AT_MOST = {"seed": 2**32, "gamma": 1}
AT_MOST |= {name: 10_000 for name in vars(Args()) if name.endswith(("_batch", "_hidden", "_dim"))}  # sizes, for memory
EVAL_REPEATS, TRAIN_EVAL_TASKS = 4, 10  # meta-episodes a task in an evaluation; training tasks in it
LOG_EVERY = 200  # gradient steps averaged into one point of the loss curves
LATENT_DIM, HEAD_HIDDEN = 100, 32  # size of a weight transform's latent; hidden size of the advantage head [M]
SIGMA, MAX_WEIGHT = 0.2, 20.0  # standard deviation of an action; largest weight in L_AWR [M]


# ===== Layers. Their weights are data: theta (T, P), one row for each of T tasks, is a matrix (n_in, n_out), flattened,
# and a bias (n_out,). A network is a list of thetas. A layer makes the theta before adaptation and the one after it.


class WeightTransform(nn.Module):
    """theta as a linear function of a latent vector. Latent, matrix and bias are all meta-learned, and all adapted.

    Args:
        n_in, n_out: sizes of the layer, hence P = (n_in + 1) * n_out.
        inner_lr: first value of the learning rate of each of the three.
    """

    def __init__(self, n_in, n_out, inner_lr):
        super().__init__()
        self.latent = nn.Parameter(torch.randn(LATENT_DIM) / n_out)
        # PAPER: theta = W z. CODE: W z + b, as in the authors' code.
        self.generate = nn.Linear(LATENT_DIM, (n_in + 1) * n_out)
        self.raw_lr = nn.Parameter(torch.full((3,), math.log(inner_lr)))

    def forward(self):
        """theta (P,) before adaptation."""
        return self.generate(self.latent)

    def step(self, grad):
        """theta after a gradient step on latent, matrix and bias.

        Args:
            grad: (T, P), gradient of each task's loss with respect to theta.
        """
        lr_latent, lr_matrix, lr_bias = F.softplus(self.raw_lr)
        latent = self.latent - lr_latent * grad @ self.generate.weight  # (T, LATENT_DIM)
        # The matrix moves by -lr * outer(grad, old latent). Times the new latent this is a multiple of grad, so that no
        # task needs a matrix of its own.
        moved = lr_matrix * latent @ self.latent + lr_bias  # (T,)
        return self.generate(latent) - moved[:, None] * grad


class Plain(nn.Module):
    """An ordinary layer with the methods of WeightTransform."""

    def __init__(self, n_in, n_out, inner_lr):
        super().__init__()
        layer = nn.Linear(n_in, n_out)  # for its initial values
        self.weight, self.bias = nn.Parameter(layer.weight.detach().t().flatten()), layer.bias
        self.raw_lr = nn.Parameter(torch.full((2,), math.log(inner_lr)))

    def forward(self):
        return torch.cat([self.weight, self.bias])

    def step(self, grad):
        lr = torch.cat([r.expand(len(p)) for r, p in zip(F.softplus(self.raw_lr), (self.weight, self.bias))])  # (P,)
        return self() - lr * grad


def linear(x, theta):
    """One layer: x (T, B, n_in), theta (T, P) -> (T, B, n_out)."""
    n_in = x.shape[-1]
    n_out = theta.shape[-1] // (n_in + 1)
    weight, bias = theta.split([n_in * n_out, n_out], dim=-1)
    return torch.baddbmm(bias[:, None], x, weight.unflatten(-1, (n_in, n_out)))


def mlp_of(thetas, x):
    """ReLU network: list of (T, P), x (T, B, n_in) -> (T, B, n_out)."""
    for theta in thetas[:-1]:
        x = F.relu(linear(x, theta))
    return linear(x, thetas[-1])


def policy_of(policy, obs):
    """pi = N(mean, SIGMA^2): obs (T, B, o) -> mean (T, B, a) and the last hidden layer (T, B, h)."""
    *hidden, last, _, _ = policy
    h = F.relu(mlp_of(hidden, obs))
    return torch.tanh(linear(h, last)), h


def advantage_of(policy, h, actions):
    """The advantage head A(s, a), on the policy's last hidden layer (T, B, h): (T, B, 1)."""
    # PAPER: a ReLU on the actions too, which cuts off what is below 0 (code). CODE: on h alone.
    return mlp_of(policy[-2:], torch.cat([h, actions], dim=-1))


class Agent(nn.Module):
    """Everything that is meta-learned, for one optimizer and one checkpoint."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        layer = WeightTransform if args.weight_transform else Plain

        def layers(*sizes):
            return nn.ModuleList(layer(n_in, n_out, args.inner_lr) for n_in, n_out in zip(sizes[:-1], sizes[1:]))

        self.value = layers(obs_dim, *args.value_hidden, 1)
        self.policy = layers(obs_dim, *args.policy_hidden, action_dim)
        self.policy += layers(args.policy_hidden[-1] + action_dim, HEAD_HIDDEN, 1)  # advantage head
        self.raw_adv_coef = nn.Parameter(torch.tensor(math.log(args.adv_coef)))


# ===== Losses, one for each of T tasks. A batch: obs (T, B, o), actions (T, B, a), returns (T, B, 1). The returns are
# R(s, a), the discounted sum of rewards to the end of the trajectory, as in the paper. The authors' code adds the
# discounted value of its last observation, but not in the inner L_V; with the matched flags that diverges.


def value_loss(value, batch):
    """L_V: (T,)."""
    return (mlp_of(value, batch["obs"]) - batch["returns"]).square().mean((1, 2))


def advantages(value, batch):
    """R(s, a) - V(s), no gradient: (T, B, 1)."""
    return (batch["returns"] - mlp_of(value, batch["obs"])).detach()


def awr_loss(mean, batch, adv):
    """L_AWR = -log pi(a | s) exp(A): (T,)."""
    # PAPER: exp(A / temperature). CODE: A with mean 0 and standard deviation 1 over a task's batch, and exp(A) at most
    # MAX_WEIGHT, as in the authors' code.
    adv = (adv - adv.mean(1, keepdim=True)) / (adv.std(1, keepdim=True) + 1e-6)
    weight = adv.clamp(max=math.log(MAX_WEIGHT)).exp()
    log_prob = -0.5 * ((batch["actions"] - mean) / SIGMA).square() - math.log(SIGMA * math.sqrt(2 * math.pi))
    return -(weight * log_prob.sum(-1, keepdim=True)).mean((1, 2))


def inner_policy_loss(policy, batch, adv, coef):
    """L_AWR + coef * L_ADV, where L_ADV is the squared error of the advantage head: (T,)."""
    mean, h = policy_of(policy, batch["obs"])
    error = advantage_of(policy, h, batch["actions"]) - adv
    return awr_loss(mean, batch, adv) + coef * error.square().mean((1, 2))


def unadapted(layers, num_tasks):
    """The network before adaptation, for each task: list of (num_tasks, P)."""
    return [layer().expand(num_tasks, -1) for layer in layers]


def inner_step(layers, loss, num_tasks):
    """The network after a gradient step on `loss`, a function from thetas to (num_tasks,): list of (num_tasks, P)."""
    grads = torch.func.grad(lambda thetas: loss(thetas).sum())(unadapted(layers, num_tasks))
    return [layer.step(grad) for layer, grad in zip(layers, grads)]


def inner_steps(agent, batch):
    """Adapt to each of T tasks: thetas of the policy and of the value function, lists of (T, P)."""
    num_tasks, coef = len(batch["obs"]), F.softplus(agent.raw_adv_coef)
    value = inner_step(agent.value, lambda value: value_loss(value, batch), num_tasks)
    adv = advantages(value, batch)
    policy = inner_step(agent.policy, lambda policy: inner_policy_loss(policy, batch, adv, coef), num_tasks)
    return policy, value


def outer_losses(agent, inner, outer):
    """L_V and L_AWR of the adapted networks on other draws of the same tasks: scalars."""
    policy, value = inner_steps(agent, inner)
    mean, _ = policy_of(policy, outer["obs"])
    return value_loss(value, outer).mean(), awr_loss(mean, outer, advantages(value, outer)).mean()


def update(agent, optimizer, batch, args):
    """One gradient step through the inner steps. Returns scalars to log, as tensors.

    Args:
        batch: "inner" and "outer", each as described above.
    """
    # One backward pass: advantages have no gradient, so that each loss reaches its own network only.
    l_value, l_actor = outer_losses(agent, batch["inner"], batch["outer"])
    optimizer.zero_grad(set_to_none=True)
    (l_value + l_actor).backward()
    optimizer.step()
    return {"losses/value": l_value.detach(), "losses/actor": l_actor.detach()}


def transitions(paths, args, device):
    """All transitions of some trajectories: obs (L, o), actions (L, a), returns (L, 1)."""
    returns = []
    for path in paths:
        total = 0.0
        backwards = [total := reward + args.gamma * total for reward in path["rewards"][::-1].tolist()]
        returns.append(np.array(backwards[::-1], np.float32)[:, None])
    columns = {"obs": [p["obs"][:-1] for p in paths], "actions": [p["actions"] for p in paths], "returns": returns}
    return {name: torch.as_tensor(np.concatenate(parts)).to(device) for name, parts in columns.items()}


def sample_batch(buffer, args, generator):
    """Different tasks, and two independent draws from each one's data."""
    num_tasks, device = len(buffer.sizes["rl"]), buffer.sizes["rl"].device
    tasks = torch.rand(num_tasks, generator=generator, device=device).argsort()[: args.meta_batch]
    # PAPER: the inner batch is consecutive transitions (code). CODE: any, as in the fork that SMAC's authors used.
    sizes = {"inner": args.context_batch, "outer": args.rl_batch}
    return {name: buffer.sample(tasks, size, generator) for name, size in sizes.items()}


# ===== Acting


@torch.no_grad()
def play(env_list, policy, generator, deterministic=False):
    """One episode in each environment, in lockstep with one policy call a step.

    Args:
        policy: list of (E, P), a network for each environment.
        deterministic: act with the policy's mean instead of a sample.
    Returns:
        E trajectories: obs (L+1, o), actions (L, a), rewards (L,).
    """
    seeds = torch.randint(2**31 - 1, (len(env_list),), generator=generator).tolist()
    paths = [{"obs": [env.reset(seed=seed)[0]], "actions": [], "rewards": []} for env, seed in zip(env_list, seeds)]
    live, device = list(range(len(env_list))), policy[0].device
    while live:
        obs = torch.as_tensor(np.stack([paths[i]["obs"][-1] for i in live])).to(device)
        mean = policy_of([theta[live] for theta in policy], obs[:, None])[0][:, 0]
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=generator)
        actions = (mean + SIGMA * noise.to(device)).clamp(-1, 1).cpu().numpy()
        running = []
        for i, action in zip(live, actions):
            next_obs, reward, terminated, truncated, _ = env_list[i].step(action)
            for name, value in (("obs", next_obs), ("actions", action), ("rewards", reward)):
                paths[i][name].append(value)
            if not (terminated or truncated):
                running.append(i)
        live = running
    return [{name: np.array(values, np.float32) for name, values in path.items()} for path in paths]


@torch.no_grad()
def meta_episode(env_list, agent, args, generator):
    """T = 3 episodes: two with the policy before adaptation, then a deterministic one with the policy adapted to both.

    Returns:
        for each of E environments the third trajectory and the two of exploration.
    """
    # PAPER: adapts to offline data of the test task. CODE: to all of its own exploration, with true rewards, as C.3 of
    # SMAC evaluates every method. MACAW learns no exploration: all it has at that point is the unadapted policy.
    policy = unadapted(agent.policy, len(env_list))
    exploration = list(zip(*(play(env_list, policy, generator) for _ in range(2))))
    batches = [transitions(paths, args, policy[0].device) for paths in exploration]  # their lengths differ
    adapted = [inner_steps(agent, {name: x[None] for name, x in batch.items()})[0] for batch in batches]
    policy = [torch.cat(thetas) for thetas in zip(*adapted)]
    return play(env_list, policy, generator, deterministic=True), exploration


def sum_rewards(paths):
    """Undiscounted returns of E trajectories: (E,)."""
    return np.array([path["rewards"].sum() for path in paths])


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns, with generators of their own: evaluating changes nothing in training.

    Args:
        eval_envs: {"test": pairs, "train": pairs}, a pair being (task number, environment), E of them.
    Returns:
        rows (split, context, task numbers, returns, exploration returns: (E,) each), no scalars, and arrays to draw: of
        the Direction families, paths over ground (., L+1, 2) for Figures 6 and 8.
    """
    device = buffer.sizes["rl"].device
    rng, buffer_rng = torch.Generator().manual_seed(args.seed), torch.Generator(device).manual_seed(args.seed)
    rows, scalars, arrays, scored = [], {}, {}, {}
    for split, pairs in eval_envs.items():  # "train" comes last, and is used below
        numbers, env_list = zip(*pairs)
        final, exploration = meta_episode(env_list, agent, args, rng)
        explored = np.mean([sum_rewards(paths) for paths in zip(*exploration)], axis=0)  # (E,)
        rows.append((split, "online", numbers, sum_rewards(final), explored))
        scored[f"{split}/online"] = final

    # The same training tasks, adapted to offline data instead
    policy, _ = inner_steps(agent, buffer.sample(torch.tensor(numbers, device=device), args.context_batch, buffer_rng))
    final_offline = play(env_list, policy, rng, deterministic=True)
    rows.append(("train", "offline", numbers, sum_rewards(final_offline), explored))
    scored["train/offline"] = final_offline

    if args.env_id in envs.SPARSE:
        for name, paths in scored.items():
            scalars[f"eval/{name}_context_success"] = np.mean([path["rewards"][-1] == 0 for path in paths])

    if args.env_id in envs.GROUND_VELOCITY:
        data = [path for task in set(numbers) for path in buffer.offline_paths(task)]
        groups = {"offline data": data, "exploration": [path for pair in exploration for path in pair]}
        for name, paths in (groups | {"offline context": final_offline, "online context": final}).items():
            arrays[name] = envs.ground_paths(args.env_id, paths)
    return rows, scalars, arrays


# ===== The run


def expand(argv):
    """The command line with the flags of its preset in front, so that flags given by hand override them."""
    known, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    matched = known.preset == "matched" and not known.resume  # a checkpoint has the flags
    return MATCHED.get(known.env_id, "").split() + argv if matched else argv


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
    dataset["encoder"] = []  # no encoder, no data for it
    train_tasks, test_tasks = dataset["train_tasks"], dataset["test_tasks"]
    torch.manual_seed(args.seed)
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    rates = {"policy": args.policy_lr, "value": args.value_lr, "raw": args.lr_lr}
    groups = {name: {"params": [], "lr": lr} for name, lr in rates.items()}
    for name, parameter in agent.named_parameters():
        groups["raw" if "raw_" in name else name.split(".")[0]]["params"].append(parameter)
    optimizer = torch.optim.Adam(groups.values(), fused=True, capturable=gpu)
    capacity = sum(len(path["actions"]) for _, path in dataset["rl"])
    buffer = ReplayBuffer(len(train_tasks), spec.obs_dim, spec.action_dim, capacity, device)
    fill_from_dataset(buffer, dataset)
    buffer.fields |= transitions([path for _, path in dataset["rl"]], args, device)  # adds the returns
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
        envs.film(args.env_id, test_tasks[0], lambda env: meta_episode([env], agent, args, film_rng), run / "video.gif")

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
        main(parse_args(expand(sys.argv[1:])))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
