"""focal.py: losses by hand, what trains what, the ways to explore, and runs that stop and go on."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import envs
import focal
from plumbing.flags import parse_args

OBS, ACTION, LATENT = 3, 2, 2
TASKS, BATCH, CONTEXT = 2, 5, 4
N = TASKS * BATCH


def setting(**flags):
    """A small agent in float64, all of its parameters of order 1, and a batch of `update`."""
    torch.manual_seed(0)
    sizes = dict(q_hidden=(8,), policy_hidden=(8,), encoder_hidden=(8,), decoder_hidden=(8,))
    args = focal.Args(latent_dim=LATENT, **sizes | flags)
    agent = focal.Agent(OBS, ACTION, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    batch = {
        "obs": torch.randn(TASKS, BATCH, OBS),
        "next_obs": torch.randn(TASKS, BATCH, OBS),
        "actions": torch.rand(TASKS, BATCH, ACTION) - 0.5,
        "rewards": torch.randn(TASKS, BATCH, 1),
        "terminals": torch.zeros(TASKS, BATCH, 1),
        "context": torch.randn(2 * TASKS, CONTEXT, OBS + ACTION + 1),
        "noise_a": torch.randn(N, ACTION),
        "noise_next_a": torch.randn(N, ACTION),
    }
    batch = {name: value.double() for name, value in batch.items()}
    batch["context_tasks"] = torch.tensor([7, 7, 3, 3])
    return agent, batch, args


# ----- Losses against numbers computed by hand


def test_the_metric_pulls_the_histories_of_a_task_together_and_pushes_tasks_apart():
    z = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    # Squared distances, as means over the two dimensions: 25 / 2, 4 / 2, (9 + 4) / 2
    pull = math.sqrt(12.5 + 1e-3)
    push = (1 / (2 + 0.1) + 1 / (6.5 + 0.1)) / 2
    loss = focal.metric_loss(z, torch.tensor([5, 5, 9]))
    assert loss.item() == pytest.approx(pull + push)


def test_the_metric_knows_a_task_that_is_drawn_twice():
    z = torch.tensor([[0.0], [1.0], [2.0], [4.0]], dtype=torch.float64)
    squares = [1, 4, 16, 1, 9, 4]  # of all pairs
    pull = np.mean([math.sqrt(square + 1e-3) for square in squares])
    loss = focal.metric_loss(z, torch.tensor([1, 1, 1, 1]))
    assert loss.item() == pytest.approx(pull)  # and there is no pair to push apart


def test_the_gradient_of_the_metric_is_finite_where_all_z_are_the_same():
    z = torch.zeros(4, 2, requires_grad=True)
    focal.metric_loss(z, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(z.grad).all()


def test_club_and_the_loss_of_psi_are_those_of_all_pairs_of_a_history():
    agent, batch, _ = setting(context_loss="csro")
    context = batch["context"]
    with torch.no_grad():
        l_club, l_psi = focal.club_losses(agent, context, OBS, ACTION)
        z = agent.encoder.net(context)[..., :LATENT].numpy()
        out = agent.psi.net(context[..., : OBS + ACTION])
    mean = out[..., :LATENT].numpy()
    variance = np.log1p(np.exp(np.tanh(out[..., LATENT:].numpy())))

    def log_density(h, i, j):
        """log psi(z_j | s_i, a_i) of history h: a mean over the dimensions, without constants."""
        square = (z[h, j] - mean[h, i]) ** 2
        return np.mean(-square / (2 * variance[h, i]) - np.log(np.sqrt(variance[h, i])))

    club, psi = [], []
    for h in range(2 * TASKS):
        for i in range(CONTEXT):
            others = [log_density(h, i, j) for j in range(CONTEXT)]
            club.append(log_density(h, i, i) - np.mean(others))
            psi.append(-log_density(h, i, i))
    assert l_club.item() == pytest.approx(np.mean(club))
    assert l_psi.item() == pytest.approx(np.mean(psi))


def test_the_decoder_of_unicorn_has_a_gaussian_of_reward_and_change_of_state():
    agent, batch, _ = setting(context_loss="unicorn")
    flat = {name: batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")}
    flat["rewards"] = batch["rewards"].flatten()
    z = torch.randn(N, LATENT, dtype=torch.float64)
    with torch.no_grad():
        loss = focal.transition_loss(agent, flat, z)
        mean = agent.decoder.net(torch.cat([flat["obs"], flat["actions"], z], -1)).numpy()
    change = (flat["next_obs"] - flat["obs"]).numpy()
    target = np.concatenate([flat["rewards"][:, None], change], 1)
    assert mean.shape == (N, 1 + OBS)
    expected = np.mean([sum((x - m) ** 2 / 2) for x, m in zip(target, mean)])
    assert loss.item() == pytest.approx(expected)


# ----- Who trains on what


def gradients(loss, agent):
    """The gradients of a loss alone, by the names of the parameters that it reaches."""
    agent.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in agent.named_parameters()
        if parameter.grad is not None
    }


def step(agent, batch, args):
    """The gradients that `update` makes; nothing moves but the target."""
    focal.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, args)
    return {
        name: parameter.grad.clone()
        for name, parameter in agent.named_parameters()
        if parameter.grad is not None
    }


def assert_same(found, expected, network):
    names = [name for name in expected if name.startswith(f"{network}.")]
    assert names
    for name in names:
        assert expected[name].abs().sum() > 0, name
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_the_encoder_of_focal_follows_the_metric_alone():
    agent, batch, args = setting()
    z, _ = agent.encoder(batch["context"])
    alone = gradients(focal.metric_loss(z, batch["context_tasks"]), agent)
    assert {name.split(".")[0] for name in alone} == {"encoder"}
    found = step(agent, batch, args)
    assert_same(found, alone, "encoder")
    assert {name.split(".")[0] for name in found} == {"encoder", "policy", "q"}


def test_psi_trains_on_its_own_loss_alone_and_the_encoder_on_club_and_the_metric():
    agent, batch, args = setting(context_loss="csro", csro_weight=3.0)
    l_club, l_psi = focal.club_losses(agent, batch["context"], OBS, ACTION)
    of_psi = gradients(l_psi, agent)
    assert {name.split(".")[0] for name in of_psi} == {"psi"}
    l_club, _ = focal.club_losses(agent, batch["context"], OBS, ACTION)
    of_club = gradients(l_club, agent)
    assert {name.split(".")[0] for name in of_club} == {"encoder"}
    z, _ = agent.encoder(batch["context"])
    of_metric = gradients(focal.metric_loss(z, batch["context_tasks"]), agent)

    found = step(agent, batch, args)
    assert_same(found, of_psi, "psi")
    names = [name for name in of_club if name in of_metric]
    both = {name: of_metric[name] + 3.0 * of_club[name] for name in names}
    assert_same(found, both, "encoder")


def test_psi_learns_what_z_is_and_club_falls_if_the_encoder_follows_it():
    agent, batch, _ = setting(context_loss="csro")
    before = [loss.item() for loss in focal.club_losses(agent, batch["context"], OBS, ACTION)]
    optimizer = torch.optim.Adam(agent.psi.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        focal.club_losses(agent, batch["context"], OBS, ACTION)[1].backward()
        optimizer.step()
    club, psi = (loss.item() for loss in focal.club_losses(agent, batch["context"], OBS, ACTION))
    assert psi < before[1]
    optimizer = torch.optim.Adam(agent.encoder.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        focal.club_losses(agent, batch["context"], OBS, ACTION)[0].backward()
        optimizer.step()
    assert focal.club_losses(agent, batch["context"], OBS, ACTION)[0].item() < 0.1 * club


def test_the_encoder_of_unicorn_follows_its_decoder_and_the_weighted_metric():
    agent, batch, args = setting(context_loss="unicorn", unicorn_weight=0.3)
    z, _ = agent.encoder(batch["context"])
    flat = {name: batch[name].flatten(0, 1) for name in ("obs", "actions", "next_obs")}
    flat["rewards"] = batch["rewards"].flatten()
    first = z[[0, 2]].repeat_interleave(BATCH, 0)  # the first history of each task
    loss = focal.transition_loss(agent, flat, first)
    loss = loss + 0.3 * focal.metric_loss(z, batch["context_tasks"])
    alone = gradients(loss, agent)
    found = step(agent, batch, args)
    assert_same(found, alone, "encoder")
    assert_same(found, alone, "decoder")


@pytest.mark.parametrize("loss", ["focal", "csro", "unicorn"])
def test_critic_and_actor_have_the_same_gradients_whatever_trains_the_encoder(loss):
    plain, batch, args = setting()
    agent, _, other_args = setting(context_loss=loss)
    agent.load_state_dict(plain.state_dict(), strict=False)
    expected = step(plain, batch, args)
    found = step(agent, batch, other_args)
    assert_same(found, expected, "policy")
    assert_same(found, expected, "q")


def test_the_critics_loss_trains_the_encoder_on_request():
    agent, batch, args = setting(critic_to_encoder=True, reward_scale=1.0)
    flat = dict(batch)
    for name in ("obs", "actions", "next_obs"):
        flat[name] = batch[name].flatten(0, 1)
    for name in ("rewards", "terminals"):
        flat[name] = batch[name].flatten()
    z, _ = agent.encoder(batch["context"])
    first = z[[0, 2]].repeat_interleave(BATCH, 0)
    loss, _ = focal.critic_loss(agent, flat, first, args)
    loss = loss + focal.metric_loss(z, batch["context_tasks"])
    both = gradients(loss, agent)
    assert_same(step(agent, batch, args), both, "encoder")


def test_the_actors_ablation_is_pearls_loss_in_place_of_eq_2():
    agent, batch, args = setting(actor_ablation=True)
    data = {**batch, "actions": -batch["actions"]}
    agent.q.requires_grad_(False)
    found = step(agent, batch, args)
    assert_same(step(agent, data, args), found, "policy")  # it does not read the data's actions


# ----- Batches


def test_a_batch_has_two_histories_of_each_task_from_the_encoder_buffer():
    buffer = buffers.ReplayBuffer(3, 1, 1, 100)
    for task in range(3):
        for sign, where in ((1, {"encoder": False}), (-1, {"rl": False})):
            path = {
                "obs": torch.full((6, 1), sign * (task + 1.0)),
                "actions": torch.zeros(5, 1),
                "rewards": torch.full((5,), 9.0),
                "terminals": torch.zeros(5),
            }
            buffer.extend([(task, path)], **where)
    args = focal.Args(rl_batch=3, context_batch=2, meta_batch=4)
    seen = set()
    for seed in range(8):
        batch = focal.sample_batch(buffer, args, torch.Generator().manual_seed(seed))
        tasks = batch["context_tasks"]
        assert batch["context"].shape == (8, 2, 3) and batch["obs"].shape == (4, 3, 1)
        assert torch.equal(tasks[::2], tasks[1::2])
        assert (batch["context"][..., 0] == -(tasks[:, None] + 1.0)).all()
        assert (batch["obs"][..., 0] == tasks[::2, None] + 1.0).all()
        assert not torch.equal(batch["noise_a"], batch["noise_next_a"])
        seen |= set(tasks.tolist())
    assert seen == {0, 1, 2}


def test_the_two_histories_of_a_task_are_drawn_independently():
    buffer = buffers.ReplayBuffer(1, 1, 1, 1000)
    path = {
        "obs": torch.arange(501.0)[:, None],
        "actions": torch.zeros(500, 1),
        "rewards": torch.zeros(500),
        "terminals": torch.zeros(500),
    }
    buffer.add(0, path)
    args = focal.Args(rl_batch=2, context_batch=50, meta_batch=1)
    batch = focal.sample_batch(buffer, args, torch.Generator().manual_seed(0))
    first, second = batch["context"][..., 0]
    assert len(set(first.tolist()) & set(second.tolist())) < 25


# ----- How an evaluation explores


class Episodes:
    """In place of `rollout`: it notes the z that were played; returns are given."""

    def __init__(self, returns):
        self.returns = returns  # of each episode, those of the environments
        self.played = []

    def __call__(self, env_list, agent, mu, sigma, rng, deterministic=False):
        number = len(self.played)
        self.played.append((mu.clone(), sigma.clone()))
        paths = []
        for e in range(len(env_list)):
            path = {"obs": np.full((3, OBS), number, np.float32)}
            path |= {"actions": np.zeros((2, ACTION), np.float32), "terminals": np.zeros(2)}
            paths.append(path | {"rewards": np.array([0.0, self.returns[number][e]], np.float32)})
        return paths


def numbers(paths):
    """Which episodes these are."""
    return [int(path["obs"][0, 0]) for path in paths]


def explore(monkeypatch, returns, z_train, **flags):
    """The z that were played, what `explore` returns as z, the agent and the flags."""
    agent, _, args = setting(explore_episodes=len(returns), **flags)
    agent = agent.float()
    episodes = Episodes(returns)
    monkeypatch.setattr(focal, "rollout", episodes)
    env_list = [None] * len(returns[0])
    rng = torch.Generator().manual_seed(0)
    z_each = z_train.expand(len(env_list), -1, -1)
    exploration, mu, sigma = focal.explore(env_list, agent, args, rng, z_each)
    assert [numbers(paths) for paths in exploration] == [[*range(len(returns))]] * len(env_list)
    assert mu.shape == (len(env_list), LATENT) and (sigma == 0).all()
    return episodes.played, mu, agent, args


def z_of(agent, args, returns, episodes):
    """What the encoder makes of these episodes of the first environment."""
    play = Episodes(returns)
    paths = [play([None], None, torch.zeros(1), torch.zeros(1), None)[0] for _ in returns]
    return focal.encode(agent, [[paths[number] for number in episodes]], args)[0]


def test_of_candidates_idaq_takes_the_one_farthest_from_all_that_was_played():
    z_train = torch.tensor([[0.0], [1.0], [5.0], [9.0]]).expand(1, -1, -1)  # (E, N, dz)
    played = [torch.tensor([[0.0]]), torch.tensor([[9.0]])]
    taken = set()
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        five = torch.randint(4, (1, 5), generator=rng)[0].tolist()
        z = focal.farthest_z(z_train, played, torch.Generator().manual_seed(seed))
        to_nearest = {0: 0.0, 1: 1.0, 2: 4.0, 3: 0.0}
        expected = max(five, key=lambda task: to_nearest[task])
        assert z.item() == z_train[0, expected].item()
        taken.add(z.item())
    assert 5.0 in taken


def test_each_environment_has_candidates_of_its_own():
    z_train = torch.arange(50.0)[:, None].expand(30, -1, -1)
    z = focal.farthest_z(z_train, [], torch.Generator().manual_seed(0))
    assert z.shape == (30, 1) and len(set(z.flatten().tolist())) > 10


def test_idaqs_first_history_is_the_reference_episode_of_highest_return(monkeypatch):
    returns = [[1.0], [3.0], [2.0], [0.0], [0.0], [0.0]]  # 3 of 6 are reference episodes
    z_train = torch.randn(9, LATENT)
    played, mu, agent, args = explore(monkeypatch, returns, z_train, explore="idaq")
    references = [z for z, _ in played[:3]]
    assert all((sigma == 0).all() for _, sigma in played)
    for z in references:
        assert (z_train == z).all(1).any()
    assert len({tuple(z.flatten().tolist()) for z in references}) == 3
    for z, _ in played[3:]:  # none of these returned more, so that the history stays
        torch.testing.assert_close(z, z_of(agent, args, returns, [1]))
    assert torch.equal(mu, references[1])  # the last episode has the z of the highest return


def test_each_reference_of_idaq_is_far_from_all_before_it(monkeypatch):
    known = []
    farthest_z = focal.farthest_z

    def note(z_train, played, rng):
        known.append(list(played))
        return farthest_z(z_train, played, rng)

    monkeypatch.setattr(focal, "farthest_z", note)
    returns = [[0.0]] * 6  # three of them are references
    played, *_ = explore(monkeypatch, returns, torch.randn(9, LATENT), explore="idaq")
    assert [len(before) for before in known] == [0, 1, 2]
    for before in known:
        for z, (mu, _) in zip(before, played):
            assert torch.equal(z, mu)


def test_in_its_second_half_idaq_plays_what_it_infers_and_keeps_what_is_better(monkeypatch):
    returns = [[1.0], [3.0], [9.0], [2.0], [4.0]]  # 2 of 5 are reference episodes
    z_train = torch.randn(6, LATENT)
    played, mu, agent, args = explore(monkeypatch, returns, z_train, explore="idaq")
    torch.testing.assert_close(played[2][0], z_of(agent, args, returns, [1]))
    torch.testing.assert_close(played[3][0], z_of(agent, args, returns, [1, 2]))
    torch.testing.assert_close(played[4][0], z_of(agent, args, returns, [1, 2]))
    assert torch.equal(mu, played[2][0])


def test_idaq_decides_for_each_environment_alone(monkeypatch):
    returns = [[1.0, 4.0], [3.0, 2.0]]  # one reference episode, one with what it told
    played, mu, _, _ = explore(monkeypatch, returns, torch.randn(6, LATENT), explore="idaq")
    assert torch.equal(mu[0], played[1][0][0]) and torch.equal(mu[1], played[0][0][1])


@pytest.mark.parametrize("way", ["prior", "task"])
def test_else_all_episodes_are_the_history(monkeypatch, way):
    z_train = torch.randn(6, LATENT)
    returns = [[1.0, 4.0], [3.0, 2.0], [0.0, 0.0]]
    played, mu, agent, args = explore(monkeypatch, returns, z_train, explore=way)
    torch.testing.assert_close(mu[:1], z_of(agent, args, returns, [0, 1, 2]))
    for z, sigma in played:
        if way == "prior":
            assert (z == 0).all() and (sigma == 1).all()
        else:
            assert (sigma == 0).all()
            assert all((z_train == row).all(1).any() for row in z)


def test_random_exploration_has_uniform_actions_and_asks_no_policy(short, monkeypatch):
    agent, _, args = setting(explore="random", explore_episodes=40)
    monkeypatch.setattr(focal, "rollout", None)
    env_list = [envs.make("PointDirection") for _ in range(3)]
    for env in env_list:
        env.unwrapped.set_task([0.0])
    rng = torch.Generator().manual_seed(0)
    monkeypatch.setattr(focal, "encode", lambda *_: (None, None))
    exploration, *_ = focal.explore(env_list, agent, args, rng, torch.zeros(3, 1, LATENT))
    assert [len(paths) for paths in exploration] == [40] * 3
    actions = np.concatenate([path["actions"] for paths in exploration for path in paths])
    assert actions.shape == (3 * 40 * 10, 2) and actions.min() < -0.98 and actions.max() > 0.98
    np.testing.assert_allclose(actions.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(actions.std(0), 1 / math.sqrt(3), atol=0.03)


def test_z_is_the_mean_of_the_posterior_without_noise():
    agent, _, args = setting()
    agent = agent.float()
    paths = [
        {
            "obs": np.random.default_rng(length).normal(size=(length + 1, OBS)),
            "actions": np.zeros((length, ACTION)),
            "rewards": np.ones(length),
            "terminals": np.zeros(length),
        }
        for length in (2, 5)
    ]
    mu, sigma = focal.encode(agent, [paths, paths[:1]], args)
    assert mu.shape == (2, LATENT) and (sigma == 0).all()
    context = focal.make_context(buffers.join(paths), args)
    torch.testing.assert_close(mu[0], agent.encoder(context[None])[0][0])


def test_the_offline_context_of_an_evaluation_is_as_long_as_the_own_one(short, monkeypatch):
    _, _, args = setting(explore_episodes=3, context_batch=8, rl_batch=5)
    data = buffers.load_dataset("PointDirection")
    buffer = buffers.from_dataset(data, "PointDirection")
    agent = focal.Agent(4, 2, args)
    eval_envs = envs.make_evaluation("PointDirection", data["train_tasks"], data["test_tasks"])
    drawn, played = [], []
    sample, rollout = buffer.sample, focal.rollout

    def note_sample(tasks, n, generator, source="rl"):
        batch = sample(tasks, n, generator, source)
        drawn.append((list(tasks), n, source, batch))
        return batch

    def note_rollout(env_list, agent, mu, sigma, rng, **flags):
        played.append((env_list, mu, sigma))
        return rollout(env_list, agent, mu, sigma, rng, **flags)

    monkeypatch.setattr(buffer, "sample", note_sample)
    monkeypatch.setattr(focal, "rollout", note_rollout)
    evaluations, _, _ = focal.evaluate(agent, buffer, eval_envs, args)

    tasks, env_list = eval_envs["train"]
    offline = evaluations[-1]
    assert (offline.split, offline.context, offline.tasks) == ("train", "offline", tasks)
    # Three episodes of ten steps were explored.
    *what, batch = drawn[-1]
    assert what == [tasks, 30, "offline"]
    mu, _ = agent.encoder(focal.make_context(batch, args))
    assert played[-1][0] is env_list and torch.equal(played[-1][1], mu)
    assert (played[-1][2] == 0).all()


# ----- Runs

FLAGS = [
    *"--env-id PointDirection --q-hidden 16 --policy-hidden 16 --encoder-hidden 16".split(),
    *"--decoder-hidden 8 --rl-batch 16 --context-batch 8 --latent-dim 3 --device cpu".split(),
    *"--offline-steps 12 --eval-every 5".split(),
]


def run(folder, *flags):
    """A small run: its folder, and the arrays of its checkpoint."""
    words = [str(word) for word in (*FLAGS, "--run-dir", folder, *flags)]
    focal.main(parse_args(focal.Args, focal.PRESETS, words))
    return load(folder)


def load(folder):
    with np.load(Path(folder) / "PointDirection__focal__1/checkpoint.npz") as file:
        return dict(file)


def trained(arrays):
    """What training has made: parameters, moments and generators."""
    begins = ("agent/", "optimizer/", "rng")
    return {name: array for name, array in arrays.items() if name.startswith(begins)}


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one) > 20
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("way", ["random", "idaq", "prior"])
def test_how_it_explores_and_how_often_it_is_evaluated_changes_nothing_in_training(
    way, short, tmp_path
):
    as_usual = run(tmp_path / "as usual")
    flags = ["--explore", way, "--explore-episodes", 4, "--eval-every", 3]
    otherwise = run(tmp_path / "otherwise", *flags)
    assert_equal(trained(as_usual), trained(otherwise))


@pytest.mark.parametrize("loss", ["focal", "csro"])  # UNICORN's is in test_resume.py
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(loss, short, tmp_path, monkeypatch):
    flags = ["--context-loss", loss, "--explore", "idaq", "--explore-episodes", 4]
    whole = run(tmp_path / "whole", *flags)
    update = focal.update
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(focal, "update", stop)
    with pytest.raises(SystemExit, match="stopped after step 7"):
        run(tmp_path / "stopped", *flags)
    monkeypatch.setattr(focal, "update", update)
    words = ["--resume", str(tmp_path / "stopped/PointDirection__focal__1")]
    focal.main(parse_args(focal.Args, focal.PRESETS, words))
    resumed = load(tmp_path / "stopped")
    assert_equal(trained(whole), trained(resumed))
    tables = [
        tmp_path / name / "PointDirection__focal__1/eval.csv" for name in ("whole", "stopped")
    ]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_every_network_but_the_target_has_learned_after_a_few_steps(short, tmp_path):
    for loss in ("csro", "unicorn"):
        torch.manual_seed(1)
        words = [str(word) for word in (*FLAGS, "--context-loss", loss)]
        args = parse_args(focal.Args, focal.PRESETS, words)
        before = focal.Agent(4, 2, args).state_dict()
        after = run(tmp_path / loss, "--context-loss", loss)
        for name, value in before.items():
            assert not np.array_equal(after[f"agent/{name}"], value), name


def test_the_metric_tells_tasks_apart(short, tmp_path):
    """Two histories of a task are nearer to each other than those of two tasks."""
    flags = ["--offline-steps", 300, "--eval-every", 300, "--context-batch", 64, "--lr", 0.001]
    flags += ["--encoder-hidden", 64, "--meta-batch", 8, "--rl-batch", 128]
    run(tmp_path, *flags)
    words = [str(word) for word in (*FLAGS, *flags)]
    args = parse_args(focal.Args, focal.PRESETS, words)
    agent = focal.Agent(4, 2, args)
    arrays = {k[6:]: torch.from_numpy(v) for k, v in load(tmp_path).items() if k[:6] == "agent/"}
    agent.load_state_dict(arrays)
    buffer = buffers.from_dataset(buffers.load_dataset("PointDirection"), "PointDirection")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        first = focal.training_z(agent, buffer, args, rng)
        second = focal.training_z(agent, buffer, args, rng)
    distance = torch.cdist(first, second)
    of_one_task = distance.diag().mean()
    assert of_one_task < 0.3 * distance.mean()
