"""MACAW: meta-actor critic with advantage weighting, an offline baseline of Figure 5.

Mitchell, Rafailov, Peng, Levine, Finn, "Offline Meta-Reinforcement Learning with Advantage
Weighting", ICML 2021, https://arxiv.org/abs/2008.06043. PAPER below means this paper; SMAC's
Section 6 and C.3 compare with MACAW.

MACAW adapts to a task by one gradient step on its value function and then one on its policy, both
on the same few transitions of the task (the inner steps). Meta-training differentiates through
these steps (the outer losses). The code follows the paper's Algorithm 1 and keeps its symbols:
phi are the weights of the value function, theta those of the policy, D_tr the transitions of the
inner steps and D_ts those of the outer losses.

Start at the end: `main` is meta-training. What it calls stands before it: networks, losses in the
order of Algorithm 1, one gradient step, acting, evaluation. Where the code departs from the
published algorithm a comment says `PAPER: ... CODE: ...`; PAPER.md lists all departures.

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


# [M] marks the values of the configuration that the authors published their results with.
@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "HopperParam"  # a key of envs.SPECS, or module:key of your own
    preset: Literal["original", "matched", "short"] = "original"  # [M], SMAC's sizes, or few steps
    seed: int = 1  # seed of the networks, of exploration and of sampling
    dataset: Optional[str] = None  # offline dataset; by default datasets/{env_id}.npz
    # PAPER: 1,000,000 steps (code; SMAC's authors' fork 100,000). CODE: about as many transitions
    # as SMAC draws offline, and with --preset short the same learning rates with fewer steps.
    offline_steps: int = 25_000  # gradient steps: 64 million transitions (SMAC offline: 51 + 13)
    eval_every: int = 4_000  # gradient steps between two evaluations, each with a checkpoint
    keep_agents: bool = False  # keep the agent of every evaluation, agent_{step}.npz
    run_dir: str = "runs"  # results go to RUN_DIR/{env_id}__{script}__{seed}/
    resume: Optional[str] = None  # folder of a run: continue it from its checkpoint
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and buffers live
    compile: bool = False  # torch.compile the gradient step; needs a C++ compiler
    cuda_graph: bool = True  # on a GPU, record the gradient step once and replay it

    # --- Networks
    policy_hidden: tuple[int, ...] = (100, 100, 100)  # hidden sizes of the policy [M]
    value_hidden: tuple[int, ...] = (100, 100, 100)  # hidden sizes of the value function [M]
    weight_transform: bool = True  # make the weights of each layer by a weight transform [M]

    # --- Gradient step
    rl_batch: int = 256  # transitions a task for the outer losses, D_ts [M]
    context_batch: int = 256  # transitions a task for the inner steps, D_tr [M]
    meta_batch: int = 5  # tasks a gradient step, or all if there are fewer [M]
    gamma: float = 0.99  # discount [M]
    policy_lr: float = 1e-4  # alpha_2: Adam's learning rate, policy [M]
    value_lr: float = 1e-5  # eta_2: Adam's learning rate, value function [M]
    inner_lr: float = 1e-3  # alpha_1 and eta_1 at the start: every tensor learns its own [M]
    lr_lr: float = 1e-3  # Adam's learning rate, alpha_1, eta_1 and lambda [M]
    adv_coef: float = 0.01  # lambda, the weight of L_ADV, at the start: it is learned too [M]


# --- What differs from these defaults. Later rows win: the preset's, that of the environment,
# "ENVIRONMENT PRESET".
# `matched` has SMAC's network sizes, learning rate and batch.
PRESETS = {
    "AntDirection": dict(eval_every=8_000),
    "PointDirection": dict(  # a point mass, which is not in the papers
        policy_hidden=(64, 64),
        value_hidden=(64, 64),
        offline_steps=3_000,
        eval_every=1_000,
    ),
    "matched": dict(
        policy_hidden=(300, 300, 300),
        value_hidden=(300, 300, 300),
        # PAPER: weight transforms. CODE: plain layers in this preset; at width 300 a weight
        # transform would take 19 million parameters a network.
        weight_transform=False,
        policy_lr=3e-4,
        value_lr=3e-4,
        meta_batch=4,
    ),
    "short": dict(offline_steps=10_000, eval_every=5_000),
    "PointDirection matched": dict(
        policy_hidden=(128, 128),
        value_hidden=(128, 128),
        policy_lr=1e-3,
        value_lr=1e-3,
        rl_batch=128,
        context_batch=128,
    ),
}

# --- What no flag changes
LATENT_DIM = 100  # size of a weight transform's latent vector z [M]
HEAD_HIDDEN = 32  # hidden size of the advantage head [M]
SIGMA = 0.2  # standard deviation of an action [M]
MAX_WEIGHT = 20.0  # largest weight in L_AWR [M]


# ===== Layers. After an inner step each of T tasks has weights of its own, so that weights are
# data here: (T, P), one row for each task, is a matrix (n_in, n_out), flattened, and a bias
# (n_out,). A network is a list of these, one for each layer. An nn.Module of a layer holds what
# is meta-learned and makes the weights before adaptation and those after it.


class WeightTransform(nn.Module):
    """Weights as a linear function of a latent vector z: W z + b (weight transform layer).

    z, W and b are all meta-learned, and the inner step adapts all three.

    Args:
        n_in, n_out: sizes of the layer, hence P = (n_in + 1) * n_out.
        inner_lr: first value of the inner learning rate of each of the three.
    """

    def __init__(self, n_in, n_out, inner_lr):
        super().__init__()
        self.latent = nn.Parameter(torch.randn(LATENT_DIM) / n_out)
        self.generate = nn.Linear(LATENT_DIM, (n_in + 1) * n_out)
        # softplus(log x) = log(1 + x), as in the authors' code: nearly x, if x is small
        self.raw_lr = nn.Parameter(torch.full((3,), math.log(inner_lr)))

    def forward(self):
        """The weights before adaptation, (P,)."""
        # PAPER: W z. CODE: W z + b, as in the authors' code.
        return self.generate(self.latent)

    def step(self, grad):
        """The weights after a gradient step on z, W and b.

        grad: the gradient of each task's loss with respect to the weights. (T, P) -> (T, P).
        """
        lr_latent, lr_matrix, lr_bias = F.softplus(self.raw_lr)
        latent = self.latent - lr_latent * grad @ self.generate.weight  # (T, LATENT_DIM)
        # W moves by -lr_matrix * outer(grad, old z). Times the new z this is a multiple of grad,
        # so that no task needs a matrix of its own. b moves by -lr_bias * grad.
        moved = lr_matrix * latent @ self.latent + lr_bias  # (T,)
        return self.generate(latent) - moved[:, None] * grad


class Plain(nn.Module):
    """An ordinary layer with the methods of WeightTransform."""

    def __init__(self, n_in, n_out, inner_lr):
        super().__init__()
        layer = nn.Linear(n_in, n_out)  # for its initial values
        self.weight = nn.Parameter(layer.weight.detach().t().flatten())
        self.bias = layer.bias
        self.raw_lr = nn.Parameter(torch.full((2,), math.log(inner_lr)))

    def forward(self):
        return torch.cat([self.weight, self.bias])

    def step(self, grad):
        lr_weight, lr_bias = F.softplus(self.raw_lr)
        lr_weight = lr_weight.expand(len(self.weight))
        lr_bias = lr_bias.expand(len(self.bias))
        lr = torch.cat([lr_weight, lr_bias])  # (P,)
        return self() - lr * grad


def linear(x, weights):
    """One layer: x (T, B, n_in), weights (T, P) -> (T, B, n_out)."""
    n_in = x.shape[-1]
    n_out = weights.shape[-1] // (n_in + 1)
    matrix, bias = weights.split([n_in * n_out, n_out], dim=-1)
    matrix = matrix.unflatten(-1, (n_in, n_out))  # (T, n_in, n_out)
    return torch.baddbmm(bias[:, None], x, matrix)


# ===== Networks


def mlp_of(network, x):
    """ReLU network: list of (T, P), x (T, B, n_in) -> (T, B, n_out).

    The value function is such a network: mlp_of(phi, obs) is V_phi(s), (T, B, 1).
    """
    *hidden, last = network
    for weights in hidden:
        x = F.relu(linear(x, weights))
    return linear(x, last)


def policy_of(theta, obs):
    """pi_theta(a | s) = N(mean, SIGMA^2).

    obs (T, B, o) -> mean (T, B, a), and the last hidden layer after its ReLU, h (T, B, n).
    """
    *hidden, last, _, _ = theta  # without the two layers of the advantage head
    h = F.relu(mlp_of(hidden, obs))
    mean = torch.tanh(linear(h, last))
    return mean, h


def advantage_of(theta, h, actions):
    """The advantage head A_theta(s, a).

    h (T, B, n) of `policy_of`, actions (T, B, a) -> (T, B, 1).
    """
    # PAPER: a ReLU on the actions too, which cuts off what is below 0 (code). CODE: on h alone.
    inputs = torch.cat([h, actions], dim=-1)
    return mlp_of(theta[-2:], inputs)


class Agent(nn.Module):
    """Everything that is meta-learned, for one optimizer and one checkpoint."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        layer = WeightTransform if args.weight_transform else Plain

        def layers(*sizes):
            pairs = zip(sizes[:-1], sizes[1:])
            return nn.ModuleList(layer(n_in, n_out, args.inner_lr) for n_in, n_out in pairs)

        self.value = layers(obs_dim, *args.value_hidden, 1)  # phi
        self.policy = layers(obs_dim, *args.policy_hidden, action_dim)  # theta
        head = layers(args.policy_hidden[-1] + action_dim, HEAD_HIDDEN, 1)  # A_theta
        self.policy += head
        self.raw_adv_coef = nn.Parameter(torch.tensor(math.log(args.adv_coef)))  # lambda


# ===== Losses, one for each of T tasks. A batch D has B transitions of each: obs (T, B, o), actions
# (T, B, a), returns (T, B, 1). The returns are R_D(s, a), the discounted sum of rewards to the end
# of the trajectory, as in the paper. The authors' code adds the discounted value of the
# trajectory's last observation, but not in the inner L_V; with the matched flags that diverges.


def value_loss(phi, batch):
    """L_V(phi, D) = mean of (V_phi(s) - R_D(s, a))^2: (T,)."""
    value = mlp_of(phi, batch["obs"])  # (T, B, 1)
    return (value - batch["returns"]).square().mean((1, 2))


def advantages(phi, batch):
    """R_D(s, a) - V_phi(s), a constant to the losses that use it: (T, B, 1)."""
    value = mlp_of(phi, batch["obs"])
    return (batch["returns"] - value).detach()


def awr_loss(mean, batch, adv):
    """L_AWR(theta, phi', D) = mean of -log pi_theta(a | s) exp(A / temperature): (T,).

    mean (T, B, a) of pi_theta; adv (T, B, 1), the advantages A = R_D(s, a) - V_phi'(s).
    """
    # PAPER: exp(A / temperature). CODE: A with mean 0 and standard deviation 1 over a task's batch,
    # and exp(A) at most MAX_WEIGHT, as in the authors' code.
    deviation = adv - adv.mean(1, keepdim=True)
    adv = deviation / (adv.std(1, keepdim=True) + 1e-6)
    weight = adv.clamp(max=math.log(MAX_WEIGHT)).exp()  # (T, B, 1)

    standardised = (batch["actions"] - mean) / SIGMA  # (T, B, a)
    log_prob = -0.5 * standardised.square() - math.log(SIGMA * math.sqrt(2 * math.pi))
    log_prob = log_prob.sum(-1, keepdim=True)  # (T, B, 1)
    return -(weight * log_prob).mean((1, 2))


def adv_loss(predicted, adv):
    """L_ADV(theta, phi', D) = mean of (A_theta(s, a) - (R_D(s, a) - V_phi'(s)))^2: (T,)."""
    return (predicted - adv).square().mean((1, 2))


def policy_loss(theta, batch, adv, adv_coef):
    """L_pi = L_AWR + lambda * L_ADV, the loss of the policy's inner step: (T,).

    adv (T, B, 1): the advantages of the adapted value function; adv_coef: lambda.
    """
    mean, h = policy_of(theta, batch["obs"])
    predicted = advantage_of(theta, h, batch["actions"])
    return awr_loss(mean, batch, adv) + adv_coef * adv_loss(predicted, adv)


# ===== Algorithm 1, inner loop


def unadapted(layers, num_tasks):
    """The network before adaptation, for each task: list of (num_tasks, P)."""
    return [layer().expand(num_tasks, -1) for layer in layers]


def inner_step(layers, loss, num_tasks):
    """The network after one gradient step on `loss`, for each task: list of (num_tasks, P).

    loss: a function from a network, list of (num_tasks, P), to (num_tasks,).
    """

    def summed(network):
        return loss(network).sum()  # the tasks' weights are apart, and so are their gradients

    grads = torch.func.grad(summed)(unadapted(layers, num_tasks))
    return [layer.step(grad) for layer, grad in zip(layers, grads)]


def inner_steps(agent, batch):
    """Adapt to each of T tasks: theta' of the policy and phi' of the value function.

    batch: D_tr. Returns two lists of (T, P).
    """
    num_tasks = len(batch["obs"])
    adv_coef = F.softplus(agent.raw_adv_coef)

    # phi' = phi - eta_1 grad L_V(phi, D_tr)
    def l_value(phi):
        return value_loss(phi, batch)

    phi_adapted = inner_step(agent.value, l_value, num_tasks)

    # theta' = theta - alpha_1 grad L_pi(theta, phi', D_tr)
    adv = advantages(phi_adapted, batch)

    def l_policy(theta):
        return policy_loss(theta, batch, adv, adv_coef)

    theta_adapted = inner_step(agent.policy, l_policy, num_tasks)
    return theta_adapted, phi_adapted


# ===== Algorithm 1, outer loop


def outer_losses(agent, inner, outer):
    """L_V(phi', D_ts) and L_AWR(theta', phi', D_ts), each the mean over tasks: two scalars.

    inner: D_tr. outer: D_ts, another draw of the same tasks.
    """
    theta_adapted, phi_adapted = inner_steps(agent, inner)
    l_value = value_loss(phi_adapted, outer).mean()

    # The adapted advantage head is not used, so that its inner learning rates stay as they are
    mean, _ = policy_of(theta_adapted, outer["obs"])
    adv = advantages(phi_adapted, outer)
    l_actor = awr_loss(mean, outer, adv).mean()
    return l_value, l_actor


def update(agent, optimizer, batch, args):
    """One gradient step on phi, theta, their inner learning rates and lambda.

    On a GPU the step is recorded once and replayed: no `.item()` and no `if` on a tensor.

    batch: "inner" (D_tr) and "outer" (D_ts). Returns scalars to log, as tensors.
    """
    # Here, and not before the backward pass: --compile then makes one graph of losses and gradients
    optimizer.zero_grad(set_to_none=True)

    # One backward pass: advantages have no gradient, so that each loss reaches its own network.
    l_value, l_actor = outer_losses(agent, batch["inner"], batch["outer"])
    info = {"losses/value": l_value.detach(), "losses/actor": l_actor.detach()}
    loss = l_value + l_actor
    loss.backward()
    optimizer.step()
    return info


# ===== Data


def discounted_returns(rewards, gamma):
    """R_D(s, a) of each step of a trajectory, the discounted rewards to its end: (L,) -> (L,)."""
    returns = np.empty(len(rewards), np.float32)
    total = 0.0
    for t in reversed(range(len(rewards))):
        total = float(rewards[t]) + gamma * total
        returns[t] = total
    return returns


def transitions(paths, args, device):
    """All transitions of some trajectories: obs (L, o), actions (L, a), returns (L, 1)."""
    columns = buffers.join(paths, device)
    returns = [discounted_returns(path["rewards"], args.gamma) for path in paths]
    returns = torch.from_numpy(np.concatenate(returns)).to(device)
    return {"obs": columns["obs"], "actions": columns["actions"], "returns": returns[:, None]}


def sample_batch(buffer, args, rng):
    """Different tasks, and of each two independent draws, D_tr and D_ts, which may overlap."""
    num_tasks = len(buffer.sizes["rl"])
    order = torch.rand(num_tasks, generator=rng, device=rng.device).argsort()
    tasks = order[: args.meta_batch]
    # PAPER: the inner batch is consecutive transitions (code). CODE: any, as in the fork that
    # SMAC's authors used.
    inner = buffer.sample(tasks, args.context_batch, rng)  # D_tr
    outer = buffer.sample(tasks, args.rl_batch, rng)  # D_ts
    return {"inner": inner, "outer": outer}


# ===== Acting


@torch.no_grad()
def rollout(env_list, theta, rng, deterministic=False):
    """One episode in each of E environments, side by side, each with a policy of its own.

    theta: list of (E, P). Returns E trajectories: obs (L+1, o), actions (L, a), terminals (L,),
    rewards (L,).
    """
    device = theta[0].device
    episodes = envs.Episodes(env_list, rng)
    while episodes.live:  # the numbers of the episodes that have not ended
        live_theta = [weights[episodes.live] for weights in theta]  # (live, P) each
        obs = episodes.obs().to(device)  # (live, o)
        mean, _ = policy_of(live_theta, obs[:, None])  # (live, 1, a)
        actions = mean[:, 0]
        if not deterministic:
            noise = torch.randn(actions.shape, generator=rng).to(device)
            actions = actions + SIGMA * noise
        episodes.step(actions.clamp(-1, 1))
    return episodes.paths()


@torch.no_grad()
def adapt(env_list, agent, args, rng):
    """The meta-episode, T = 3 (SMAC's Section 6): two exploration episodes with the policy before
    adaptation, then a deterministic one with the policy that is adapted to both.

    Returns for each of E environments its third trajectory, and its two of exploration.
    """
    # PAPER: adapts to offline data of the test task. CODE: to all of its own exploration, with
    # true rewards, as C.3 of SMAC evaluates every method. MACAW learns no exploration: all it has
    # at that point is the policy before adaptation.
    theta = unadapted(agent.policy, len(env_list))
    first = buffers.on_cores(rollout, env_list, theta, rng)
    second = buffers.on_cores(rollout, env_list, theta, rng)
    exploration = list(zip(first, second))

    # Episodes differ in length, so that the policy is adapted to each environment's alone.
    adapted = []
    for pair in exploration:
        batch = transitions(pair, args, theta[0].device)
        batch = {name: values[None] for name, values in batch.items()}  # T = 1 task
        theta_adapted, _ = inner_steps(agent, batch)  # list of (1, P)
        adapted.append(theta_adapted)
    theta_adapted = [torch.cat(weights) for weights in zip(*adapted)]  # (E, P) each
    final = buffers.on_cores(rollout, env_list, theta_adapted, rng, deterministic=True)
    return final, exploration


# ===== Evaluation


@torch.no_grad()
def evaluate(agent, buffer, eval_envs, args):
    """Post-adaptation returns.

    The generators are its own: evaluating changes nothing in training.

    Returns what `Run.write` takes: a list of `Evaluation`, no scalars, and the trajectories of the
    dataset in the training tasks, to be drawn.
    """
    rng = torch.Generator().manual_seed(args.seed)
    buffer_rng = torch.Generator(buffer.device).manual_seed(args.seed)
    evaluations = []

    # --- Own context: adapted to what the agent itself explores
    for split in ("test", "train"):
        tasks, env_list = eval_envs[split]
        final, exploration = adapt(env_list, agent, args, rng)
        evaluations.append(buffers.Evaluation(split, "own", tasks, final, exploration))

    # --- Offline context: the same training tasks, adapted to data of theirs instead
    tasks, env_list = eval_envs["train"]
    exploration = evaluations[-1].exploration  # the loop ends with "train"
    batch = buffer.sample(tasks, args.context_batch, buffer_rng)
    theta_adapted, _ = inner_steps(agent, batch)
    final = buffers.on_cores(rollout, env_list, theta_adapted, rng, deterministic=True)
    evaluations.append(buffers.Evaluation("train", "offline", tasks, final, exploration))

    dataset_paths = []
    for task in set(tasks):
        dataset_paths += buffer.offline_paths(task)
    return evaluations, {}, dataset_paths


# ===== Meta-training: Algorithm 1


def main(args):
    """Meta-train on the dataset. Returns the trained agent. Raises InputError."""
    spec = envs.lookup(args.env_id)
    device = buffers.choose_device(args)
    torch.manual_seed(args.seed)
    rng = torch.Generator(device).manual_seed(args.seed)

    # The buffers D_i, with the return of each transition. MACAW has no encoder and uses no data
    # that are for one (Cheetah).
    dataset = buffers.load_dataset(args.env_id, args.dataset)
    dataset["encoder"] = []
    buffer = buffers.from_dataset(dataset, args.env_id, device)
    paths = [path for _, path in dataset["rl"]]  # in the order in which the buffer has them
    buffer.fields["returns"] = transitions(paths, args, device)["returns"]

    # theta, phi, their inner learning rates and lambda: three learning rates, one Adam
    agent = Agent(spec.obs_dim, spec.action_dim, args).to(device)
    policy = {"params": [], "lr": args.policy_lr}
    value = {"params": [], "lr": args.value_lr}
    rates = {"params": [], "lr": args.lr_lr}
    for name, parameter in agent.named_parameters():
        if "raw_" in name:
            rates["params"].append(parameter)
        elif name.startswith("policy"):
            policy["params"].append(parameter)
        else:
            value["params"].append(parameter)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam([policy, value, rates], fused=True, capturable=on_gpu)

    eval_envs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"])
    state = dict(agent=agent, optimizer=optimizer, rng=rng)
    with buffers.Run(args, __file__, dataset["sha256"], **state) as run:
        # The same functions, faster: a CUDA graph on a GPU, the best exact precision on a CPU
        sample = run.fast(sample_batch)
        learn = run.fast(update, args.compile)

        for _ in run.steps(args.offline_steps, "offline"):
            batch = sample(buffer, args, rng)  # tasks T_i; D_tr and D_ts of each
            info = learn(agent, optimizer, batch, args)  # inner loop, then outer loop
            run.log(info)
            if run.evaluation_due:
                run.write(*evaluate(agent, buffer, eval_envs, args))
    return agent


if __name__ == "__main__":
    buffers.launch(main, Args, PRESETS)
