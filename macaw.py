"""MACAW, meta-actor critic with advantage weighting: one gradient step adapts it to a task (a baseline of Figure 5).

Paper: Mitchell, Rafailov, Peng, Levine, Finn, "Offline Meta-Reinforcement Learning with Advantage Weighting",
ICML 2021, https://arxiv.org/abs/2008.06043: this is what PAPER means below. SMAC's Section 6 and C.3 compare with it.
To adapt is a gradient step on a value function, then one on a policy, both on the same few transitions of the task (the
inner steps). Meta-training differentiates through them (the outer losses).

Run: python macaw.py --env-id HopperParam [--preset matched]
"""

import dataclasses
import math
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import buffers
import envs


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of one's own; its PRESETS replace what follows
    seed: int = 1  # seed of the networks, of exploration and of sampling
    dataset: Optional[str] = None  # offline dataset; default datasets/{env_id}.npz beside this file
    offline_steps: int = 25_000  # gradient steps; of 5 x (256 + 256) transitions, 64 million, SMAC's offline phase 51
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint, with its flags
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Algorithm. [M]: the authors' configuration of their published results
    preset: Literal["original", "matched", "short"] = (
        "original"  # its values, SMAC's, or fewer steps
    )
    rl_batch: int = 256  # transitions a task for the outer losses [M]
    context_batch: int = 256  # transitions a task for the inner steps [M]
    meta_batch: int = 5  # tasks a gradient step [M]
    policy_hidden: tuple[int, ...] = (100, 100, 100)  # hidden sizes of the policy [M]
    value_hidden: tuple[int, ...] = (100, 100, 100)  # hidden sizes of the value function [M]
    weight_transform: bool = True  # make the layers of weight transforms [M]
    policy_lr: float = 1e-4  # Adam's learning rate, policy [M]
    value_lr: float = 1e-5  # Adam's learning rate, value function [M]
    inner_lr: float = (
        1e-3  # initial learning rate of the inner steps; every tensor learns its own [M]
    )
    lr_lr: float = 1e-3  # Adam's learning rate, inner learning rates and weight of L_ADV [M]
    adv_coef: float = 0.01  # initial weight of L_ADV; it is learned as well [M]
    gamma: float = 0.99  # discount [M]


# What differs from the defaults above. PointDirection is not in the papers: small networks, a short run.
# --preset matched stands for SMAC's network sizes, learning rate and RL batch (also of the inner steps).
# PAPER: weight transforms. CODE: plain layers in this preset; at width 300 a weight transform would take 19 million
# parameters a network.
PRESETS = {
    "AntDirection": dict(eval_every=8_000),
    "PointDirection": dict(policy_hidden=(64, 64), value_hidden=(64, 64), offline_steps=3_000, eval_every=1_000),
    "matched": dict(
        weight_transform=False, policy_hidden=(300, 300, 300), value_hidden=(300, 300, 300),
        policy_lr=3e-4, value_lr=3e-4, meta_batch=4,
    ),
    "short": dict(offline_steps=10_000, eval_every=5_000),
    "PointDirection matched": dict(
        policy_hidden=(128, 128), value_hidden=(128, 128), policy_lr=1e-3, value_lr=1e-3, rl_batch=128,
        context_batch=128,
    ),
}  # fmt: skip
LATENT_DIM, HEAD_HIDDEN = (
    100,
    32,
)  # size of a weight transform's latent; hidden size of the advantage head [M]
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
        lr = torch.cat(
            [r.expand(len(p)) for r, p in zip(F.softplus(self.raw_lr), (self.weight, self.bias))]
        )  # (P,)
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
            return nn.ModuleList(
                layer(n_in, n_out, args.inner_lr) for n_in, n_out in zip(sizes[:-1], sizes[1:])
            )

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
    log_prob = -0.5 * ((batch["actions"] - mean) / SIGMA).square() - math.log(
        SIGMA * math.sqrt(2 * math.pi)
    )
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
    policy = inner_step(
        agent.policy, lambda policy: inner_policy_loss(policy, batch, adv, coef), num_tasks
    )
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
        backwards = [
            total := reward + args.gamma * total for reward in path["rewards"][::-1].tolist()
        ]
        returns.append(np.array(backwards[::-1], np.float32)[:, None])
    columns = buffers.join(paths, device)
    returns = torch.from_numpy(np.concatenate(returns)).to(device)
    return {"obs": columns["obs"], "actions": columns["actions"], "returns": returns}


def sample_batch(buffer, args, rng):
    """Different tasks, and two independent draws from each one's data."""
    tasks = torch.rand(len(buffer.sizes["rl"]), generator=rng, device=rng.device).argsort()[
        : args.meta_batch
    ]
    # PAPER: the inner batch is consecutive transitions (code). CODE: any, as in the fork that SMAC's authors used.
    sizes = {"inner": args.context_batch, "outer": args.rl_batch}
    return {name: buffer.sample(tasks, size, rng) for name, size in sizes.items()}


# ===== Acting


@torch.no_grad()
def play(env_list, policy, rng, deterministic=False):
    """One episode in each of E environments, side by side, with a policy of its own: list of (E, P).

    Returns E trajectories: obs (L+1, o), actions (L, a), terminals (L,), rewards (L,).
    """
    episodes, device = envs.Episodes(env_list, rng), policy[0].device
    while episodes.live:
        mean = policy_of(
            [theta[episodes.live] for theta in policy], episodes.obs().to(device)[:, None]
        )[0][:, 0]
        noise = torch.zeros(mean.shape) if deterministic else torch.randn(mean.shape, generator=rng)
        episodes.step((mean + SIGMA * noise.to(device)).clamp(-1, 1))
    return episodes.paths()


@torch.no_grad()
def meta_episode(env_list, agent, args, rng):
    """T = 3 episodes: two with the policy before adaptation, then a deterministic one with the policy adapted to both.

    Returns for each of E environments the third trajectory and the two of exploration.
    """
    # PAPER: adapts to offline data of the test task. CODE: to all of its own exploration, with true rewards, as C.3 of
    # SMAC evaluates every method. MACAW learns no exploration: all it has at that point is the unadapted policy.
    policy = unadapted(agent.policy, len(env_list))
    exploration = list(zip(*(buffers.on_cores(play, env_list, policy, rng) for _ in range(2))))
    batches = [
        transitions(paths, args, policy[0].device) for paths in exploration
    ]  # their lengths differ
    adapted = [
        inner_steps(agent, {name: x[None] for name, x in batch.items()})[0] for batch in batches
    ]
    policy = [torch.cat(thetas) for thetas in zip(*adapted)]
    return buffers.on_cores(play, env_list, policy, rng, deterministic=True), exploration


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation episodes, with generators of their own: evaluating changes nothing in training.

    Returns what Run.write takes: a list of evaluations, "test" first; no scalars; trajectories of the
    dataset to draw.
    """
    rng, buffer_rng = (
        torch.Generator().manual_seed(args.seed),
        torch.Generator(buffer.device).manual_seed(args.seed),
    )
    evaluations = []
    for split, (tasks, env_list) in eval_envs.items():  # "train" comes last, and is used below
        final, exploration = meta_episode(env_list, agent, args, rng)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration))
    # The same training tasks, adapted to offline data instead
    policy, _ = inner_steps(agent, buffer.sample(tasks, args.context_batch, buffer_rng))
    final = buffers.on_cores(play, env_list, policy, rng, deterministic=True)
    evaluations.append(buffers.Evaluation("train", "offline", tasks, final, exploration))
    return evaluations, {}, [path for task in set(tasks) for path in buffer.offline_paths(task)]


# ===== Meta-training on the dataset


def main(args):
    """Train. Returns the trained agent. Raises InputError."""
    spec, device = envs.lookup(args.env_id), buffers.choose_device(args)
    rng = torch.Generator(device).manual_seed(args.seed)
    torch.manual_seed(args.seed)

    dataset = buffers.load_dataset(args.env_id, args.dataset) | {
        "encoder": []
    }  # no encoder, no data for it
    buffer = buffers.from_dataset(dataset, args.env_id, device)
    buffer.fields |= transitions(
        [path for _, path in dataset["rl"]], args, device
    )  # adds the returns
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    rates = {"policy": args.policy_lr, "value": args.value_lr, "raw": args.lr_lr}
    groups = {name: {"params": [], "lr": lr} for name, lr in rates.items()}
    for name, parameter in agent.named_parameters():
        groups["raw" if "raw_" in name else name.split(".")[0]]["params"].append(parameter)
    optimizer = torch.optim.Adam(groups.values(), fused=True, capturable=device.type == "cuda")

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
