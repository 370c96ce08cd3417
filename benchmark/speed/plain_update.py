"""The same gradient step as `update` in smac_offline_online.py, written plainly: the yardstick of benchmark/speed/speed.py.

Two separate Q-functions, several optimizers, one backward pass for each loss, a loop over parameters for the target
update. A test (tests/runs/test_speed.py) checks that it ends at the same parameters.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from smac_offline_online import tanh_gaussian_log_prob


class PlainAgent:
    """The networks of an `Agent` of smac_offline_online.py, copied; its QFunctions as two ordinary networks."""

    def __init__(self, agent, lr):
        self.encoder, self.decoder, self.policy = (
            copy.deepcopy(getattr(agent, n)) for n in NETWORKS
        )
        self.q, self.q_target = (
            [unstack(twin, i) for i in range(2)] for twin in (agent.q, agent.q_target)
        )
        groups = (
            [*self.encoder.parameters(), *self.decoder.parameters()],
            self.policy.parameters(),
        )
        groups += tuple(q.parameters() for q in self.q)
        self.encoder_optimizer, self.policy_optimizer, *self.q_optimizers = (
            torch.optim.Adam(g, lr=lr) for g in groups
        )


NETWORKS = ("encoder", "decoder", "policy")


def unstack(twin, i):
    """Q-function number i of a QFunctions, as an nn.Sequential."""
    layers = []
    for weight, bias in zip(twin.weights, twin.biases):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data.copy_(weight[i].T)
        linear.bias.data.copy_(bias[i, 0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def plain_update(agent, batch, args, online):
    """One gradient step on a PlainAgent; batch as `sample_batch` returns it."""
    size = batch["obs"].shape[1]
    obs, actions, next_obs = (
        batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")
    )  # (N, .)
    rewards, terminals = (
        batch["rewards"].reshape(-1, 1),
        batch["terminals"].reshape(-1, 1),
    )  # (N, 1)

    mu, sigma = agent.encoder(batch["context"])  # (T, dz)
    z = (mu + sigma * batch["noise_z"]).repeat_interleave(size, dim=0)  # (N, dz)
    if not online:
        error = F.mse_loss(agent.decoder(obs, actions, z), rewards.squeeze(1))
        kl = 0.5 * (mu**2 + sigma**2 - 2 * sigma.log() - 1).sum(1).mean()
    z_fixed = z.detach()

    with torch.no_grad():
        next_mean, next_log_std = agent.policy(next_obs, z_fixed)
        next_actions = torch.tanh(next_mean + next_log_std.exp() * batch["noise_next_a"])
        x = torch.cat([next_obs, next_actions, z_fixed], dim=1)
        next_q = torch.min(agent.q_target[0](x), agent.q_target[1](x))  # (N, 1)
        target = args.reward_scale * rewards + args.gamma * (1 - terminals) * next_q
    predictions = [q(torch.cat([obs, actions, z_fixed], dim=1)) for q in agent.q]
    critic_losses = [F.mse_loss(prediction, target) for prediction in predictions]

    mean, log_std = agent.policy(obs, z_fixed)
    u = mean + log_std.exp() * batch["noise_a"]
    x = torch.cat([obs, torch.tanh(u), z_fixed], dim=1)
    q_new = torch.min(agent.q[0](x), agent.q[1](x)).squeeze(1)
    advantage = (torch.min(*predictions).squeeze(1) - q_new).detach()
    weights = len(advantage) * F.softmax(advantage / args.awr_lambda, dim=0)
    data_u = torch.atanh(actions.clamp(-1 + 1e-6, 1 - 1e-6))
    policy_loss = -(weights * tanh_gaussian_log_prob(data_u, mean, log_std)).mean()
    if online:
        policy_loss = (
            policy_loss
            + args.lambda_pearl * (tanh_gaussian_log_prob(u, mean, log_std) - q_new).mean()
        )

    agent.policy_optimizer.zero_grad()
    policy_loss.backward()
    for optimizer, loss in zip(agent.q_optimizers, critic_losses):
        optimizer.zero_grad()  # also of what the policy's loss left there
        loss.backward()
    if not online:
        agent.encoder_optimizer.zero_grad()
        (error + args.kl_coef * kl).backward()
        agent.encoder_optimizer.step()
    agent.policy_optimizer.step()
    for optimizer in agent.q_optimizers:
        optimizer.step()
    for q, q_target in zip(agent.q, agent.q_target):
        for parameter, target_parameter in zip(q.parameters(), q_target.parameters()):
            target_parameter.data.copy_(
                (1 - args.tau) * target_parameter.data + args.tau * parameter.data
            )
