"""The networks and losses of SMAC against numbers worked out by hand, or a second time in NumPy
with float64.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import smac_offline_online as smac

OBS, ACTION, LATENT = 3, 2, 2
TASKS, BATCH, CONTEXT = 3, 5, 4
N = TASKS * BATCH
NETWORKS = ("encoder", "decoder", "policy", "q", "q_target")


def make_agent(**flags):
    """A small agent in float64 whose parameters are all of order 1, so that no term of a loss is
    lost in another.
    """
    sizes = dict(
        q_hidden=(8, 7),
        policy_hidden=(8,),
        encoder_hidden=(8,),
        decoder_hidden=(6,),
        latent_dim=LATENT,
    )
    args = smac.Args(**sizes | dict(reward_scale=5.0, gamma=0.9, awr_lambda=2.0) | flags)
    agent, generator = smac.Agent(OBS, ACTION, args).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.copy_(
                0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
    return agent, args


def make_batch(in_dim=OBS + ACTION + 1):
    """What `update` takes. Half of the transitions are terminal."""
    g = torch.Generator().manual_seed(1)
    batch = {
        "obs": torch.randn(TASKS, BATCH, OBS, generator=g),
        "next_obs": torch.randn(TASKS, BATCH, OBS, generator=g),
    }
    batch["actions"] = torch.rand(TASKS, BATCH, ACTION, generator=g) * 1.8 - 0.9
    batch["rewards"] = torch.randn(TASKS, BATCH, 1, generator=g)
    batch["terminals"] = (torch.arange(N) % 2).reshape(TASKS, BATCH, 1)
    batch["context"] = torch.randn(TASKS, CONTEXT, in_dim, generator=g)
    batch["noise_z"] = torch.randn(TASKS, LATENT, generator=g)
    batch["noise_a"], batch["noise_next_a"] = torch.randn(2, N, ACTION, generator=g)
    return {name: value.double() for name, value in batch.items()}


def flatten(batch):
    """(T, B, .) -> (N, .), rewards and terminals (N,): what the losses take."""
    flat = batch | {name: batch[name].reshape(N, -1) for name in ("obs", "next_obs", "actions")}
    return flat | {name: batch[name].reshape(N) for name in ("rewards", "terminals")}


def random_z():
    return torch.randn(N, LATENT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ----- The same mathematics in NumPy


def array(tensor):
    return tensor.detach().numpy()


def np_layers(weights, biases, x):
    """Weights (in, out): a ReLU network."""
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        x = x @ weight + bias
        x = np.maximum(x, 0) if i < len(weights) - 1 else x
    return x


def np_mlp(net, *inputs):
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    x = np.concatenate([array(x) if torch.is_tensor(x) else x for x in inputs], -1)
    return np_layers(
        [array(layer.weight).T for layer in linear], [array(layer.bias) for layer in linear], x
    )


def np_all_q(critics, obs, actions, z):
    x = np.concatenate([array(obs), actions, array(z)], -1)
    layers = [
        (map(array, w), map(array, b)) for w, b in zip(zip(*critics.weights), zip(*critics.biases))
    ]
    return [np_layers(list(weights), list(biases), x)[:, 0] for weights, biases in layers]


def np_min_q(critics, obs, actions, z):
    return np.min(np_all_q(critics, obs, actions, z), 0)


def np_policy(agent, obs, z, shift=0.0):
    """Mean and log standard deviation; `shift` is added to the first bias of the last layer, for
    differences.
    """
    out = np_mlp(agent.policy.net, obs, z)
    out[:, 0] += shift
    return out[:, :ACTION], np.clip(out[:, ACTION:], -20, 2)


def np_log_prob(action, mean, log_std):
    """log of N(atanh a; mean, std) / (1 - a^2), summed over the dimensions."""
    u = np.arctanh(action)
    gaussian = np.exp(-(((u - mean) / np.exp(log_std)) ** 2) / 2) / (
        np.exp(log_std) * np.sqrt(2 * np.pi)
    )
    return np.log(gaussian / (1 - action**2)).sum(-1)


# ----- Posterior, prior, density


def inverse_softplus(sigma):
    return math.log(math.exp(sigma) - 1)


def test_posterior_is_the_product_of_two_gaussians():
    encoder = smac.Encoder(2, (), 1)
    encoder.net = nn.Identity()  # a row of the context is now (mean, raw deviation) of its factor
    context = torch.tensor([
        [[1.0, inverse_softplus(1.0)], [3.0, inverse_softplus(0.5)]],  # precisions 1 and 4
        [[-2.0, inverse_softplus(2.0)], [2.0, inverse_softplus(2.0)]],  # twice 1/4
    ])  # fmt: skip
    mu, sigma = encoder(context)
    torch.testing.assert_close(
        mu, torch.tensor([[(1 * 1 + 4 * 3) / 5], [0.0]]), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(sigma, torch.tensor([[1 / math.sqrt(5)], [math.sqrt(2)]]))


def test_posterior_ignores_the_order_of_the_context_and_counts_repetitions():
    agent, _ = make_agent()
    context = make_batch()["context"]
    mu, sigma = agent.encoder(context)
    for order in ([3, 1, 0, 2], [1, 0, 3, 2]):
        torch.testing.assert_close(agent.encoder(context[:, order]), (mu, sigma))
    twice = agent.encoder(torch.cat([context, context], 1))
    torch.testing.assert_close(twice, (mu, sigma / math.sqrt(2)))
    assert not torch.allclose(agent.encoder(context[:, 1:])[0], mu)


def test_posterior_of_one_transition_is_its_factor():
    agent, _ = make_agent()
    context = make_batch()["context"][:, :1]
    out = np_mlp(agent.encoder.net, context)[:, 0]
    mu, sigma = agent.encoder(context)
    np.testing.assert_allclose(array(mu), out[:, :LATENT])
    np.testing.assert_allclose(
        array(sigma), np.log1p(np.exp(out[:, LATENT:]))
    )  # softplus = standard deviation


def test_posterior_is_finite_where_the_deviation_underflows():
    encoder = smac.Encoder(2, (), 1)
    encoder.net = nn.Identity()
    mu, sigma = encoder(torch.tensor([[[1.0, -1e4], [3.0, -1e4]]]))
    assert mu.item() == pytest.approx(2) and 0 < sigma.item() < 1e-3


@pytest.mark.parametrize("next_obs, dim", [(False, 6), (True, 9)])
def test_context_is_s_a_r_and_on_request_next_s(next_obs, dim):
    data = {
        "obs": torch.full((2, 3), 1.0),
        "actions": torch.full((2, 2), 2.0),
        "rewards": torch.full((2, 1), 3.0),
    }
    context = smac.make_context(
        data | {"next_obs": torch.full((2, 3), 4.0)}, smac.Args(next_obs_in_context=next_obs)
    )
    assert context.tolist() == [[1, 1, 1, 2, 2, 3, 4, 4, 4][:dim]] * 2


def test_kl_to_prior_by_hand_and_by_integration():
    mu, sigma = (
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(),
        torch.tensor([[2.0, 0.5], [1.0, 1.0]]).double(),
    )
    by_hand = 0.5 * (1 + 4 - 2 * math.log(2) - 1) + 0.5 * (0.25 + 2 * math.log(2) - 1)
    np.testing.assert_allclose(array(smac.kl_to_prior(mu, sigma)), [by_hand, 0])
    x, total = np.linspace(-30, 30, 200_001), 0.0
    for m, s in ((1.0, 2.0), (0.0, 0.5)):
        log_p = -(((x - m) / s) ** 2) / 2 - np.log(s * np.sqrt(2 * np.pi))
        total += np.trapezoid(np.exp(log_p) * (log_p + x**2 / 2 + np.log(2 * np.pi) / 2), x)
    assert total == pytest.approx(by_hand, rel=1e-8)


@pytest.mark.parametrize("mean, log_std", [(0.0, -1.0), (0.7, -0.5), (-1.5, -2.0)])
def test_action_density_integrates_to_one(mean, log_std):
    a = (np.arange(400_000) + 0.5) / 200_000 - 1
    u = torch.atanh(torch.as_tensor(a))[:, None]
    log_prob = smac.tanh_gaussian_log_prob(u, torch.full_like(u, mean), torch.full_like(u, log_std))
    assert array(log_prob.exp()).sum() / 200_000 == pytest.approx(1, abs=1e-6)


def test_action_density_is_that_of_the_squashed_gaussian():
    u, mean, log_std = torch.randn(
        3, 50, ACTION, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = np_log_prob(np.tanh(array(u)), array(mean), array(log_std))
    np.testing.assert_allclose(
        array(smac.tanh_gaussian_log_prob(u, mean, log_std)), expected, rtol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [-20.0, -9.0, 9.0, 20.0])
def test_action_density_is_right_where_tanh_saturates(u, dtype):
    log_derivative = math.log(4) - 2 * abs(u) - 2 * math.log1p(math.exp(-2 * abs(u)))
    expected = -((u - 1) ** 2) / (2 * 4) - math.log(2) - math.log(2 * math.pi) / 2 - log_derivative
    u = torch.tensor([[u]], dtype=dtype, requires_grad=True)
    log_prob = smac.tanh_gaussian_log_prob(u, torch.ones_like(u), torch.full_like(u, math.log(2)))
    assert log_prob.item() == pytest.approx(expected, rel=1e-5)
    log_prob.backward()
    assert u.grad.item() == pytest.approx(
        -(u.item() - 1) / 4 + 2 * math.tanh(u.item()), rel=1e-5, abs=1e-6
    )


# ----- All critics in one


def test_two_q_functions_equal_separate_networks_in_values_and_gradients():
    twin, sizes = smac.QFunctions(OBS, ACTION, (8, 7), LATENT), [OBS + ACTION + LATENT, 8, 7, 1]
    separate = []
    for k in (0, 1):
        linear = [nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes[:-1], sizes[1:])]
        with torch.no_grad():
            for layer, weight, bias in zip(linear, twin.weights, twin.biases):
                layer.weight.copy_(weight[k].T)
                layer.bias.normal_()
                bias[k].copy_(layer.bias[None])
        separate.append(nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2]))
    obs, actions, z, factor = (
        torch.randn(N, OBS),
        torch.randn(N, ACTION),
        torch.randn(N, LATENT),
        torch.randn(2, N),
    )
    ours, theirs = (actions.clone().requires_grad_() for _ in range(2))
    q = twin(obs, ours, z)
    expected = torch.stack([net(torch.cat([obs, theirs, z], -1))[:, 0] for net in separate])
    torch.testing.assert_close(q, expected)
    (q * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for k, net in enumerate(separate):
        for layer, weight, bias in zip(
            [m for m in net if isinstance(m, nn.Linear)], twin.weights, twin.biases
        ):
            torch.testing.assert_close(weight.grad[k].T, layer.weight.grad)
            torch.testing.assert_close(bias.grad[k, 0], layer.bias.grad)


def test_frozen_q_functions_have_the_same_values_and_input_gradients_and_no_gradient_of_their_own():
    agent, _ = make_agent()
    batch, z, grads, values = flatten(make_batch()), random_z(), [], []
    for frozen in (False, True):
        agent.zero_grad()
        actions = batch["actions"].clone().requires_grad_()
        values.append(agent.q(batch["obs"], actions, z, frozen=frozen))
        values[-1].sum().backward()
        grads.append(actions.grad)
        assert all((p.grad is None) == frozen for p in agent.q.parameters())
    assert torch.equal(*values)
    torch.testing.assert_close(*grads)


def test_initial_values_are_those_of_the_authors_code():
    torch.manual_seed(0)
    agent = smac.Agent(OBS, ACTION, smac.Args())
    for w, bound in zip(agent.q.weights, [300**-0.5] * 3 + [3e-3]):
        assert 0.9 * bound < w.abs().max() <= bound and not torch.equal(w[0], w[1])
    for net, last in (
        (agent.policy.net, 1e-3),
        (agent.encoder.net, 3e-3),
        (agent.decoder.net, 3e-3),
    ):
        *hidden, output = [layer for layer in net if isinstance(layer, nn.Linear)]
        for layer, bound in [(h, h.out_features**-0.5) for h in hidden] + [(output, last)]:
            assert 0.9 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(agent.q.parameters(), agent.q_target.parameters()))


def test_standard_deviation_of_the_policy_is_bounded():
    agent, _ = make_agent()
    with torch.no_grad():
        agent.policy.net[-1].bias.copy_(torch.tensor([0.0, 0.0, 1e3, -1e3]))
    _, log_std = agent.policy(torch.zeros(1, OBS).double(), torch.zeros(1, LATENT).double())
    assert log_std.tolist() == [[2, -20]]


# ----- Eq. 1


def test_critic_loss_by_hand():
    """r + gamma min Q' = (1 * 5 + .9 * 8, -2 * 5): the fall of the second one ends the sum."""
    seen = {}

    def q_target(obs, actions, z):
        seen.update(obs=obs, actions=actions, z=z)
        return torch.tensor([[10.0, 7.0], [8.0, 9.0]])

    mean, log_std = torch.tensor([[0.5], [-1.0]]), torch.tensor([[0.0], [math.log(2)]])
    agent = SimpleNamespace(
        policy=lambda obs, z: (mean, log_std),
        q_target=q_target,
        q=lambda obs, actions, z: torch.tensor([[13.2, -10.0], [12.2, -13.0]]),
    )
    batch = {name: torch.randn(2, 1) for name in ("obs", "next_obs", "actions")}
    batch |= {"rewards": torch.tensor([1.0, -2.0]), "terminals": torch.tensor([0.0, 1.0])}
    batch["noise_next_a"], z = torch.tensor([[1.0], [0.25]]), torch.randn(2, 1)
    loss, q = smac.critic_loss(agent, batch, z, smac.Args(gamma=0.9, reward_scale=5.0))
    assert loss.item() == pytest.approx((1.0**2 + 0) / 2 + (0 + 3.0**2) / 2)
    assert q.shape == (2, 2) and seen["obs"] is batch["next_obs"] and seen["z"] is z
    torch.testing.assert_close(seen["actions"], torch.tanh(torch.tensor([[1.5], [-0.5]])))


@pytest.mark.parametrize("num_critics", [2, 1])
def test_critic_loss_of_real_networks(num_critics):
    agent, args = make_agent(num_critics=num_critics)
    batch, z = flatten(make_batch()), random_z()
    mean, log_std = np_policy(agent, batch["next_obs"], z)
    next_actions = np.tanh(mean + np.exp(log_std) * array(batch["noise_next_a"]))
    next_q = np_min_q(agent.q_target, batch["next_obs"], next_actions, z)
    target = 5 * array(batch["rewards"]) + 0.9 * np.where(array(batch["terminals"]) == 1, 0, next_q)
    all_q = np_all_q(agent.q, batch["obs"], array(batch["actions"]), z)
    assert len(all_q) == num_critics
    expected = sum(((q - target) ** 2).mean() for q in all_q)
    assert smac.critic_loss(agent, batch, z, args)[0].item() == pytest.approx(expected, rel=1e-9)


# ----- Eq. 2 and C.3


def actor_setting(lambda_pearl, **flags):
    agent, args = make_agent(**flags)
    batch, z = flatten(make_batch()), random_z()
    q = agent.q(batch["obs"], batch["actions"], z)
    loss, weights = smac.actor_loss(agent, batch, z, q, args, lambda_pearl)
    return agent, batch, z, q, loss, weights


def np_actor(agent, batch, z, shift=0.0, weights=None):
    """AWAC part of the loss, PEARL part, weights; the policy's first bias moved by `shift`."""
    mean, log_std = np_policy(agent, batch["obs"], z, shift)
    new = np.tanh(mean + np.exp(log_std) * array(batch["noise_a"]))
    new_q = np_min_q(agent.q, batch["obs"], new, z)
    if weights is None:
        a_over_lambda = (np_min_q(agent.q, batch["obs"], array(batch["actions"]), z) - new_q) / 2.0
        weights = np.exp(a_over_lambda) / np.exp(a_over_lambda).sum() * N
    awac = -(weights * np_log_prob(array(batch["actions"]), mean, log_std)).mean()
    return awac, (np_log_prob(new, mean, log_std) - new_q).mean(), weights


def test_actor_weights_by_hand():
    """Advantages 0 and lambda * ln 3: weights 1 : 3, scaled to mean 1."""
    lam = 7.0
    batch = {
        "obs": torch.zeros(2, 1),
        "actions": torch.tensor([[0.5], [-0.2]]),
        "noise_a": torch.zeros(2, 1),
    }
    agent = SimpleNamespace(
        policy=lambda obs, z: (torch.zeros(2, 1), torch.zeros(2, 1)),
        q=lambda obs, actions, z, frozen: torch.tensor([[4.0, 1.0], [2.0, 9.0]]),  # V = (2, 1)
    )
    q = torch.tensor([[2.0, 50.0], [3.0, 1 + lam * math.log(3)]])  # Q = (2, 1 + lambda ln 3)
    loss, weights = smac.actor_loss(
        agent, batch, torch.zeros(2, 1), q, smac.Args(awr_lambda=lam), 0.0
    )
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5]))
    log_probs = [
        -(math.atanh(a) ** 2) / 2 - math.log(2 * math.pi) / 2 - math.log(1 - a * a)
        for a in (0.5, -0.2)
    ]
    assert loss.item() == pytest.approx(-(0.5 * log_probs[0] + 1.5 * log_probs[1]) / 2, rel=1e-5)


def test_actor_weights_as_in_the_text():
    """Advantages lambda * ln 3, -lambda * ln 2 and lambda * 1000: weights 3, 1/2, and 20 in place
    of infinity.
    """
    lam, zeros = 0.3, torch.zeros(3, 1)
    batch = {"obs": zeros, "actions": zeros, "noise_a": zeros}
    agent = SimpleNamespace(
        policy=lambda obs, z: (zeros, zeros), q=lambda obs, actions, z, frozen: torch.zeros(2, 3)
    )
    q = torch.tensor([[math.log(3), -math.log(2), 1000.0]]).expand(2, 3) * lam
    args = smac.Args(awr_lambda=lam, awr_weights="exp")
    loss, weights = smac.actor_loss(agent, batch, zeros, q, args, 0.0)
    torch.testing.assert_close(weights, torch.tensor([3.0, 0.5, 20.0]))
    assert loss.item() == pytest.approx(23.5 / 3 * math.log(2 * math.pi) / 2, rel=1e-6)


def test_actor_weights_cannot_overflow():
    batch = {"obs": torch.zeros(2, 1), "actions": torch.zeros(2, 1), "noise_a": torch.zeros(2, 1)}
    agent = SimpleNamespace(
        policy=lambda obs, z: (torch.zeros(2, 1), torch.zeros(2, 1)),
        q=lambda obs, actions, z, frozen: torch.zeros(2, 2),
    )
    q = torch.tensor([[1e6, -1e6]]).expand(2, 2)
    _, weights = smac.actor_loss(agent, batch, torch.zeros(2, 1), q, smac.Args(awr_lambda=0.3), 0.0)
    assert weights.tolist() == [2, 0]


@pytest.mark.parametrize("lambda_pearl", [0.0, 1.0, 0.3])
def test_actor_loss_of_real_networks(lambda_pearl):
    agent, batch, z, _, loss, weights = actor_setting(lambda_pearl)
    awac, pearl, expected_weights = np_actor(agent, batch, z)
    np.testing.assert_allclose(array(weights), expected_weights, rtol=1e-9)
    assert weights.mean().item() == pytest.approx(1) and weights.std() > 0.1
    assert loss.item() == pytest.approx(awac + lambda_pearl * pearl, rel=1e-9)


@pytest.mark.parametrize("lambda_pearl", [0.0, 1.0])
def test_actor_gradient_is_that_of_fixed_weights_and_goes_through_the_new_action_only_for_pearl(
    lambda_pearl,
):
    agent, batch, z, q, loss, weights = actor_setting(lambda_pearl)
    assert not weights.requires_grad
    loss.backward()
    h, fixed = 1e-5, np_actor(agent, batch, z)[2]
    (awac_up, pearl_up, _), (awac_down, pearl_down, _) = (
        np_actor(agent, batch, z, s, fixed) for s in (h, -h)
    )
    expected = (awac_up - awac_down + lambda_pearl * (pearl_up - pearl_down)) / (2 * h)
    assert abs(pearl_up - pearl_down) / (2 * h) > 1e-3
    assert agent.policy.net[-1].bias.grad[0].item() == pytest.approx(expected, rel=1e-4)
    assert all(
        p.grad is None
        for name in NETWORKS
        if name != "policy"
        for p in getattr(agent, name).parameters()
    )


@pytest.mark.parametrize("lambda_pearl", [0.0, 1.0])
def test_actor_loss_is_finite_for_saturated_actions_in_the_data(lambda_pearl):
    args = smac.Args(
        q_hidden=(8,),
        policy_hidden=(8,),
        encoder_hidden=(8,),
        decoder_hidden=(8,),
        latent_dim=LATENT,
    )
    agent = smac.Agent(OBS, ACTION, args)  # float32, as in training
    batch = {name: value.float() for name, value in flatten(make_batch()).items()}
    batch["actions"] = torch.where(batch["actions"] > 0, 1.0, -1.0)
    z = random_z().float()
    q = agent.q(batch["obs"], batch["actions"], z)
    with torch.no_grad():
        agent.policy.net[
            -1
        ].weight.zero_()  # mean 0, standard deviation 1: log pi is that of u = atanh(1 - 1e-6)
    loss, _ = smac.actor_loss(agent, batch, z, q, args, lambda_pearl)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in agent.policy.parameters())
    if not lambda_pearl:
        log_prob = np_log_prob(np.array([[1 - 1e-6] * ACTION]), 0.0, np.zeros(1))
        assert loss.item() == pytest.approx(-log_prob.item(), rel=1e-2)


# ----- Eq. 3 and 4


def test_reward_loss_is_mean_squared_error_on_unscaled_rewards():
    agent, _ = make_agent()
    batch, z = flatten(make_batch()), random_z()
    predicted = np_mlp(agent.decoder.net, batch["obs"], batch["actions"], z)[:, 0]
    expected = ((predicted - array(batch["rewards"])) ** 2).mean()
    assert smac.reward_loss(agent, batch, z).item() == pytest.approx(expected)


def test_kl_is_a_sum_over_z_for_each_task():
    mu, sigma = (
        torch.tensor([[3.0, 3.0], [1.0, 0.0]]).double(),
        torch.tensor([[2.0, 1.0]] * 2).double(),
    )
    variance_terms = 0.5 * (4 - math.log(4) - 1)
    np.testing.assert_allclose(
        smac.kl_to_prior(mu, sigma), [9 + variance_terms, 0.5 + variance_terms]
    )


def test_generated_rewards_are_the_decoders_with_one_z_for_the_trajectory():
    agent, args = make_agent()
    batch, context = flatten(make_batch()), make_batch()["context"][:1]
    names, columns = ("obs", "actions", "rewards"), context.split([OBS, ACTION, 1], dim=-1)
    path = {
        "obs": torch.cat([batch["obs"], torch.zeros(1, OBS)]).numpy(),
        "actions": batch["actions"].numpy(),
    }
    rng = torch.Generator().manual_seed(3)
    generated = smac.generate_rewards(agent, path, dict(zip(names, columns)), args, rng)
    noise_z = torch.randn(1, LATENT, generator=rng.manual_seed(3))
    factors = np_mlp(agent.encoder.net, context)[0]
    precision = np.log1p(np.exp(factors[:, LATENT:])) ** -2.0
    mu = (precision * factors[:, :LATENT]).sum(0) / precision.sum(0)
    z = np.tile(mu + array(noise_z)[0] / np.sqrt(precision.sum(0)), (N, 1))
    expected = np_mlp(agent.decoder.net, batch["obs"], batch["actions"], z)[:, 0]
    np.testing.assert_allclose(array(generated), expected)
    assert generated.shape == (N,) and not generated.requires_grad


# ----- Which loss trains what, and the update


@pytest.mark.parametrize(
    "loss, trained",
    [
        ("critic", ["q"]),
        ("actor", ["policy"]),
        ("actor + PEARL", ["policy"]),
        ("reward", ["encoder", "decoder"]),
    ],
)
def test_each_loss_alone_reaches_only_its_networks(loss, trained):
    agent, args = make_agent()
    batch = flatten(make_batch())
    mu, sigma = agent.encoder(batch["context"])
    z = (mu + sigma * batch["noise_z"]).repeat_interleave(BATCH, 0)
    value, q = smac.critic_loss(agent, batch, z.detach(), args)
    if loss == "reward":
        value = smac.reward_loss(agent, batch, z)
    if loss.startswith("actor"):
        value, _ = smac.actor_loss(
            agent, batch, z.detach(), q, args, 1.0 if "PEARL" in loss else 0.0
        )
    value.backward()
    reached = [
        n
        for n in NETWORKS
        if any(p.grad is not None and p.grad.any() for p in getattr(agent, n).parameters())
    ]
    assert sorted(reached) == sorted(trained)


OFFLINE, SELF_SUPERVISED = False, True
Q, R = "critic", "reward"


@pytest.mark.parametrize(
    "self_supervised, flags, to_encoder, decoder_trains, awac, pearl",
    # to_encoder: the losses that reach the encoder beside the KL; if empty, not even that does.
    # awac, pearl: the weights of both actor losses
    [
        (OFFLINE, {}, {R}, True, 1.0, 0.0),
        (SELF_SUPERVISED, {}, {}, False, 1.0, 0.4),
        (SELF_SUPERVISED, {"oracle_rewards": True}, {R}, True, 1.0, 0.4),
        (OFFLINE, {"actor_ablation": True}, {R}, True, 0.0, 1.0),
        (SELF_SUPERVISED, {"actor_ablation": True}, {}, False, 0.0, 1.0),
        (OFFLINE, {"encoder_loss": "q"}, {Q}, True, 1.0, 0.0),
        (SELF_SUPERVISED, {"encoder_loss": "q"}, {Q}, False, 1.0, 0.4),
        (OFFLINE, {"encoder_loss": "reward_then_q"}, {Q, R}, True, 1.0, 0.0),
        (SELF_SUPERVISED, {"encoder_loss": "reward_then_q"}, {Q}, False, 1.0, 0.4),
    ],
)
def test_update_takes_one_step_down_the_right_gradients(
    self_supervised, flags, to_encoder, decoder_trains, awac, pearl
):
    """With plain gradient descent every parameter must move by -lr times the gradient of the losses
    it belongs to.
    """
    agent, args = make_agent(lambda_pearl=0.4, kl_coef=0.25, tau=0.1, **flags)
    flat = flatten(make_batch())
    mu, sigma = agent.encoder(flat["context"])
    z = (mu + sigma * flat["noise_z"]).repeat_interleave(BATCH, 0)
    losses, kl = {R: smac.reward_loss(agent, flat, z)}, smac.kl_to_prior(mu, sigma).mean()
    losses[Q], q = smac.critic_loss(agent, flat, z, args)
    mean, log_std = agent.policy(flat["obs"], z.detach())
    u = mean + log_std.exp() * flat["noise_a"]
    q_new = agent.q(flat["obs"], torch.tanh(u), z.detach()).amin(0)
    weights = N * torch.softmax((q.amin(0) - q_new) / args.awr_lambda, 0).detach()
    data_u = torch.atanh(flat["actions"].clamp(-1 + 1e-6, 1 - 1e-6))
    l_awac = -(weights * smac.tanh_gaussian_log_prob(data_u, mean, log_std)).mean()
    l_actor = awac * l_awac + pearl * (smac.tanh_gaussian_log_prob(u, mean, log_std) - q_new).mean()
    l_encoder = sum(losses[name] for name in to_encoder) + 0.25 * kl
    gradients = {}
    for name, loss in (
        ("q", losses[Q]),
        ("policy", l_actor),
        ("encoder", l_encoder),
        ("decoder", losses[R]),
    ):
        parameters = list(getattr(agent, name).parameters())
        gradients[name] = torch.autograd.grad(loss, parameters, retain_graph=True)
    before = {
        name: [p.detach().clone() for p in getattr(agent, name).parameters()] for name in NETWORKS
    }
    optimizer = torch.optim.SGD([p for p in agent.parameters() if p.requires_grad], lr=0.01)
    info = smac.update(agent, optimizer, make_batch(), args, self_supervised)
    for name in ("q", "policy", "encoder", "decoder"):
        frozen = name == "encoder" and not to_encoder or name == "decoder" and not decoder_trains
        for parameter, old, gradient in zip(
            getattr(agent, name).parameters(), before[name], gradients[name]
        ):
            torch.testing.assert_close(parameter.detach(), old if frozen else old - 0.01 * gradient)
            assert torch.equal(parameter, old) == frozen
    expected = {
        "losses/critic": losses[Q],
        "losses/actor": l_actor,
        "losses/reward": losses[R],
        "losses/kl": kl,
    }
    expected |= {"train/q_mean": q.mean(), "train/q_max": q.max()}
    expected["train/actor_weight_ess"] = weights.sum() ** 2 / weights.square().sum() / N
    assert info.keys() == expected.keys()
    for name, value in expected.items():
        assert info[name].item() == pytest.approx(value.item()) and not info[name].requires_grad


def test_target_network_moves_by_tau_towards_the_updated_critic():
    agent, args = make_agent(tau=0.1)
    old = [p.clone() for p in agent.q_target.parameters()]
    q_before = [p.detach().clone() for p in agent.q.parameters()]
    optimizer = torch.optim.Adam(agent.q.parameters(), lr=0.1)
    smac.update(agent, optimizer, make_batch(), args, self_supervised=False)
    for target, before, q, q_old in zip(
        agent.q_target.parameters(), old, agent.q.parameters(), q_before
    ):
        np.testing.assert_allclose(array(target), 0.9 * array(before) + 0.1 * array(q))
        assert not torch.equal(q, q_old) and not target.requires_grad
