"""BOReL: a belief that only looks back, the estimate of the ELBO, hyper-states, losses by hand, resuming, learning."""

import csv
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal, kl_divergence

import borel
import buffers
import envs
from plumbing.flags import parse_args

OBS, ACTION, DZ = 4, 2, 3
SMALL = "--env-id PointDirection --q-hidden 16 --policy-hidden 16 --rl-batch 8 --elbo-terms 4 --latent-dim 3 --vae-tasks 2"


@pytest.fixture
def small(quick, monkeypatch):
    """Two test tasks, three training tasks, one meta-episode each."""
    monkeypatch.setattr(
        envs, "make_evaluation", functools.partial(envs.make_evaluation, num_test=2, repeats=1)
    )


def make_agent(**flags):
    """An agent with random weights everywhere, in the last layers too."""
    torch.manual_seed(0)
    sizes = {
        "policy_hidden": (8,),
        "q_hidden": (8,),
        "latent_dim": DZ,
        "elbo_terms": 4,
        "meta_batch": 2,
        "rl_batch": 4,
    }
    args = borel.Args(env_id="PointDirection", **sizes | flags)
    agent = borel.Agent(OBS, ACTION, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return agent, args


def make_episode(length, fall=False, seed=0):
    rng = np.random.default_rng(seed)
    path = {
        "obs": rng.normal(size=(length + 1, OBS)),
        "actions": rng.uniform(-0.9, 0.9, (length, ACTION)),
    }
    path |= {
        "rewards": rng.normal(size=length),
        "terminals": np.arange(1, length + 1) == length * fall,
    }
    return {name: value.astype(np.float32) for name, value in path.items()}


def make_steps(length, seed=0):
    """One meta-trajectory of random steps, (1, L, .) each."""
    return {
        name: x[None] for name, x in buffers.join([make_episode(length, seed=seed)], "cpu").items()
    }


def test_the_belief_uses_nothing_of_what_comes_later():
    agent, _ = make_agent()
    steps, changed = make_steps(6), {name: x.clone() for name, x in make_steps(6).items()}
    for x in changed.values():
        x[:, 4:] += 1.0  # steps 5 and 6
    before, after = (
        agent.encoder.belief(agent.encoder(s, torch.zeros(1, 128)))[0] for s in (steps, changed)
    )
    assert torch.equal(before[:5], after[:5]) and (before[5:] != after[5:]).all()
    assert torch.equal(
        before[0], agent.encoder.belief.bias
    )  # before the first step: the learned prior


def test_the_belief_is_the_same_step_by_step():
    agent, _ = make_agent()
    steps, memory = make_steps(5), torch.zeros(1, 128)
    whole = agent.encoder(steps, memory)
    for i in range(5):
        memory = agent.encoder({name: x[:, i : i + 1] for name, x in steps.items()}, memory)[:, -1]
        assert torch.allclose(memory, whole[:, i + 1], atol=1e-6)


def all_terms(agent, steps, length):
    """Sum over t = 0..length of the mean over k of the squared error, z being the belief's mean: pair by pair."""
    mu = agent.encoder.belief(agent.encoder(steps, torch.zeros(1, 128)))[0, :, :DZ]  # (L+1, dz)
    total, d = 0.0, agent.decoder
    for t in range(length + 1):
        for k in range(length):
            obs, action, next_obs = (steps[name][0, k] for name in ("obs", "actions", "next_obs"))
            x = torch.cat(
                [mu[t], *(e.relu() for e in (d.obs(next_obs), d.actions(action), d.obs(obs)))]
            )
            error = d.last(d.second(d.first(x).relu()).relu()) - steps["rewards"][0, k]
            total += error.item() ** 2 / length
    return total


def test_the_reconstruction_term_over_all_pairs():
    agent, _ = make_agent()
    steps, t, k = (
        make_steps(5),
        torch.arange(5)[None],
        torch.arange(4)[None],
    )  # the fifth step is not real
    with torch.no_grad():
        loss, _ = borel.vae_loss(agent, steps, torch.tensor([4]), t, k, torch.zeros(1, 5, DZ))
    assert loss.item() == pytest.approx(all_terms(agent, steps, 4), rel=1e-4)


def test_the_estimate_of_the_reconstruction_term_is_unbiased():
    agent, args = make_agent(vae_tasks=8, vae_trajectories=1000, elbo_terms=2)
    trajectories = [
        [[make_episode(2, seed=1), make_episode(3, seed=2)]],
        [[make_episode(9, seed=3)]],
    ]
    stacked = borel.stack(trajectories, "cpu")
    generator = torch.Generator().manual_seed(1)
    batch = borel.sample_vae_batch(stacked, args, generator)
    batch["noise"].zero_()  # z is the belief's mean
    with torch.no_grad():
        loss, _ = borel.vae_loss(agent, **batch)
    for row, length in enumerate((5, 9)):
        draws = loss[batch["lengths"] == length]
        full = all_terms(agent, {name: x[row : row + 1] for name, x in stacked[0].items()}, length)
        error = draws.std().item() / math.sqrt(len(draws))
        assert error < 0.05 * full and abs(draws.mean().item() - full) < 2.5 * error


def test_the_kl_term_chains_the_beliefs():
    agent, _ = make_agent()
    steps, index = make_steps(5), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        mu, log_var = agent.encoder.belief(agent.encoder(steps, torch.zeros(1, 128)))[0].chunk(
            2, dim=-1
        )
        _, kl = borel.vae_loss(agent, steps, torch.tensor([3]), index, index, torch.zeros(1, 1, DZ))
    q = [Normal(torch.zeros(DZ), torch.ones(DZ))] + [
        Normal(m, (0.5 * v).exp()) for m, v in zip(mu, log_var)
    ]
    expected = sum(
        kl_divergence(q[i + 1], q[i]).sum().item() for i in range(4)
    )  # the prior and q_0 to q_3
    assert kl.item() == pytest.approx(expected, rel=1e-4)


def test_hyper_states_at_the_starts_and_ends_of_episodes():
    agent, _ = make_agent()
    episodes = [
        make_episode(3, fall=True, seed=1),
        make_episode(2, seed=2),
        make_episode(4, seed=3),
    ]
    alone = make_episode(2, seed=4)  # a fourth episode, a meta-trajectory of its own
    buffer = borel.make_hyper_buffer(agent, [[episodes, [alone]]], OBS, ACTION)
    obs, next_obs = buffer.fields["obs"].numpy(), buffer.fields["next_obs"].numpy()

    steps = {name: x[None] for name, x in buffers.join(episodes, "cpu").items()}
    with torch.no_grad():
        belief = agent.encoder.belief(agent.encoder(steps, torch.zeros(1, 128)))[
            0
        ].numpy()  # (10, 2 dz)
    prior = agent.encoder.belief.bias.detach().numpy()
    starts = np.concatenate([path["obs"][:-1] for path in [*episodes, alone]])
    assert np.array_equal(obs[:, :OBS], starts)
    assert np.allclose(
        obs[:9, OBS:], belief[:9], atol=1e-6
    )  # neither the fall nor an episode's end resets it
    assert np.allclose(obs[0, OBS:], prior) and np.allclose(
        obs[9, OBS:], prior
    )  # but the next meta-trajectory does
    assert np.array_equal(
        next_obs[:8], obs[1:9]
    )  # the last step of an episode leads to the first state of the next
    assert np.allclose(next_obs[8], np.concatenate([episodes[2]["obs"][-1], belief[9]]), atol=1e-6)
    assert np.array_equal(next_obs[10, :OBS], alone["obs"][-1])
    assert buffer.fields["terminals"].flatten().tolist() == [0, 0, 1] + 8 * [0]
    assert np.array_equal(
        episodes[0]["obs"], make_episode(3, fall=True, seed=1)["obs"]
    )  # the dataset is as it was


def make_flat_batch(noise_a, noise_next_a):
    """Two transitions, the second a fall, as the losses of stage 2 get them."""
    return {
        "obs": torch.zeros(2, OBS),
        "belief": torch.zeros(2, 2 * DZ),
        "next_obs": torch.zeros(2, OBS),
        "next_belief": torch.zeros(2, 2 * DZ),
        "actions": torch.zeros(2, ACTION),
        "rewards": torch.tensor([1.0, -1.0]),
        "terminals": torch.tensor([0.0, 1.0]),
        "noise_a": noise_a,
        "noise_next_a": noise_next_a,
    }


def test_sac_losses_by_hand():
    """The policy's action is (0, 0), with log density -log(2 pi)."""
    args = borel.Args(gamma=0.5, alpha=0.1)
    agent = SimpleNamespace(
        policy=lambda obs, belief: (torch.zeros(2, 2), torch.zeros(2, 2)),
        q=lambda obs, actions, belief, frozen=False: torch.tensor([[1.0, 2.0], [3.0, 5.0]]),
        q_target=lambda obs, actions, belief: torch.tensor([[4.0, 9.0], [6.0, 9.0]]),
    )
    batch = make_flat_batch(torch.zeros(2, 2), torch.zeros(2, 2))
    log_prob = -math.log(2 * math.pi)
    y = [1 + 0.5 * (4 - 0.1 * log_prob), -1.0]
    critic, _ = borel.sac_critic_loss(agent, batch, args)
    actor, _ = borel.sac_actor_loss(agent, batch, args)
    errors = [1 - y[0], 2 - y[1], 3 - y[0], 5 - y[1]]
    assert critic.item() == pytest.approx(sum(error**2 for error in errors) / 2)
    assert actor.item() == pytest.approx(0.1 * log_prob - (1 + 2) / 2)


def test_the_actor_and_the_target_draw_actions_with_noise_of_their_own():
    """Each loss passes on the action of its own noise, at its own state: a, and a' for the target."""
    seen = {}

    def policy(obs, belief):
        return torch.cat([obs[:, :1], belief[:, :1]], dim=1), torch.full((2, 2), math.log(0.5))

    def q(name):
        def values(obs, actions, belief, frozen=False):
            seen[name] = actions
            return torch.zeros(2, 2)

        return values

    noise_a, noise_next_a = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = make_flat_batch(noise_a, noise_next_a)
    for i, name in enumerate(("obs", "belief", "next_obs", "next_belief")):
        batch[name] += 0.1 * (i + 1)
    agent = SimpleNamespace(policy=policy, q=q("q"), q_target=q("target"))
    borel.sac_critic_loss(agent, batch, borel.Args())
    assert torch.equal(seen["q"], batch["actions"])
    borel.sac_actor_loss(agent, batch, borel.Args())
    expected = torch.tanh(torch.tensor([0.1, 0.2]) + 0.5 * noise_a)
    expected_next = torch.tanh(torch.tensor([0.3, 0.4]) + 0.5 * noise_next_a)
    torch.testing.assert_close(seen["q"], expected)
    torch.testing.assert_close(seen["target"], expected_next)


def test_the_noises_of_an_update_are_independent():
    """Both standard normal, and nothing in common."""
    agent, args = make_agent(rl_batch=1000)
    buffer = borel.make_hyper_buffer(agent, [[[make_episode(5)]]], OBS, ACTION)
    batch = borel.sample_batch(buffer, args, torch.Generator().manual_seed(0))
    pair = torch.stack([batch["noise_a"].flatten(), batch["noise_next_a"].flatten()])
    assert pair.shape == (2, args.meta_batch * args.rl_batch * ACTION)
    assert pair.mean(1).abs().max() < 0.06 and (pair.std(1) - 1).abs().max() < 0.06
    assert torch.corrcoef(pair)[0, 1].abs() < 0.06


def test_a_meta_trajectory_is_three_episodes_of_a_task_in_the_order_of_the_dataset():
    paths = [{"number": number} for number in range(9)]
    tasks = [1, 0, 1, 1, 1, 0, 1, 1, 1]
    dataset = {"train_tasks": np.zeros((3, 1)), "rl": list(zip(tasks, paths))}
    numbers = [
        [[path["number"] for path in episodes] for episodes in of_task]
        for of_task in borel.meta_trajectories(dataset)
    ]
    assert numbers == [[[1, 5]], [[0, 2, 3], [4, 6, 7], [8]], []]


def test_each_stage_trains_its_own_networks():
    agent, args = make_agent()
    trajectories = [[[make_episode(3, seed=i), make_episode(4, seed=i + 9)]] for i in range(3)]
    optimizer, generator = (
        torch.optim.Adam(agent.parameters(), lr=0.01),
        torch.Generator().manual_seed(0),
    )

    def changed(step):
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        step()
        after = agent.state_dict()
        return {
            name.split(".")[0]
            for name, value in before.items()
            if not torch.equal(value, after[name])
        }

    stacked = borel.stack(trajectories, "cpu")
    batch = borel.sample_vae_batch(stacked, args, generator)
    assert changed(lambda: borel.update_vae(agent, optimizer, batch, args)) == {
        "encoder",
        "decoder",
    }
    buffer = borel.make_hyper_buffer(agent, trajectories, OBS, ACTION)
    batch = borel.sample_batch(buffer, args, generator)
    assert changed(lambda: borel.update(agent, optimizer, batch, args)) == {
        "policy",
        "q",
        "q_target",
    }


def test_the_belief_runs_on_through_the_meta_episode(monkeypatch):
    agent, _ = make_agent()
    calls, rollout = [], borel.rollout_belief

    def record(env_list, agent, memory, rng, deterministic=False):
        calls.append((memory, deterministic, *rollout(env_list, agent, memory, rng, deterministic)))
        return calls[-1][2:]

    monkeypatch.setattr(borel, "rollout_belief", record)
    _, env_list = envs.make_evaluation(
        "PointDirection", np.array([[0.0]]), np.array([[1.0], [2.0]]), repeats=1
    )["test"]
    final, exploration, memory = borel.adapt_belief(
        env_list, agent, torch.Generator().manual_seed(0)
    )
    assert len(final) == 2 and [len(episodes) for episodes in exploration] == [2, 2]
    for i, episodes in enumerate(exploration):
        steps = {name: x[None] for name, x in buffers.join(episodes, "cpu").items()}
        with torch.no_grad():
            assert torch.allclose(
                memory[i], agent.encoder(steps, torch.zeros(1, 128))[0, -1], atol=1e-5
            )
    assert (calls[0][0] == 0).all() and torch.equal(calls[1][0], calls[0][3])
    assert (
        torch.equal(calls[2][0], memory)
        and torch.equal(memory, calls[1][3])
        and final == calls[2][2]
    )
    assert [deterministic for _, deterministic, _, _ in calls] == [False, False, True]


def test_an_evaluation_plays_each_split_and_reads_two_episodes_of_each_tasks_own_data(monkeypatch):
    """Episodes of different lengths, of which the shorter ones are padded; a task's last ones may be one only."""
    agent, args = make_agent()
    trajectories = [
        [[make_episode(length, seed=10 * task + i) for i, length in enumerate(lengths)]]
        for task, lengths in enumerate([(3, 5, 4), (9, 2, 6), (4,)])
    ]
    eval_envs = envs.make_evaluation(
        "PointDirection", np.array([[0.1], [0.2], [0.3]]), np.array([[1.0]]), 3, 1, 1
    )
    calls, returns, rollout = [], [], borel.rollout_belief

    def record(env_list, agent, memory, *rest, **flags):
        paths, after = rollout(env_list, agent, memory, *rest, **flags)
        if flags.get("frozen"):
            assert torch.equal(after, memory) and torch.equal(
                memory, calls[2][0]
            )  # what it was after two episodes
            assert [env.unwrapped.task[0] for env in env_list] == [1.0]
            returns.append(np.mean([path["rewards"].sum() for path in paths]))
        else:
            calls.append((memory, [env.unwrapped.task[0] for env in env_list]))
        return paths, after

    monkeypatch.setattr(borel, "rollout_belief", record)
    evaluations, scalars, paths = borel.evaluate(agent, trajectories, eval_envs, args)
    assert [scalars["charts/test/frozen_belief_return"]] == returns
    groups = [(evaluation.split, evaluation.context) for evaluation in evaluations]
    assert groups == [("test", "own"), ("train", "own"), ("train", "offline")]
    assert [evaluation.tasks for evaluation in evaluations] == [[0], [0, 1, 2], [0, 1, 2]]
    assert [angles for _, angles in calls] == 3 * [[1.0]] + 4 * [[0.1, 0.2, 0.3]]
    for task in range(3):
        steps = buffers.join(trajectories[task][0][:2], "cpu")
        with torch.no_grad():
            memory = agent.encoder(
                {name: x[None] for name, x in steps.items()}, torch.zeros(1, 128)
            )[0, -1]
            mu, log_var = agent.encoder.belief(memory).double().chunk(2)
        assert torch.allclose(calls[-1][0][task], memory, atol=1e-5)
        kl = (
            kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(torch.zeros(DZ), 1.0))
            .sum()
            .item()
        )
        assert evaluations[2].kl[task].item() == pytest.approx(kl, rel=1e-3)
    assert [len(path["actions"]) for path in paths] == [3, 5, 4, 9, 2, 6, 4]


def test_success_is_the_behaviour_achieved_in_the_last_step(drawers, tmp_path):
    path = {"obs": np.zeros((4, 13), np.float32), "actions": np.zeros((3, 4), np.float32)}
    path |= {"rewards": -np.ones(3, np.float32), "terminals": np.zeros(3, np.float32)}
    sizes = {"policy_hidden": (8,), "q_hidden": (8,), "latent_dim": DZ}
    args = borel.Args(env_id="SawyerManipulation", device="cpu", run_dir=str(tmp_path), **sizes)
    torch.manual_seed(0)
    agent = borel.Agent(13, 4, args)
    with buffers.Run(
        args, borel.__file__, agent=agent, optimizer=torch.optim.Adam(agent.parameters())
    ) as run:
        for _ in run.steps(1, "VAE"):
            run.write(*borel.evaluate(agent, [[[path, path]]], drawers, args))
    events = EventAccumulator(str(run.folder))
    events.Reload()
    found = {
        tag: events.Scalars(tag)[0].value
        for tag in events.Tags()["scalars"]
        if tag.endswith("success")
    }
    assert found == {
        "charts/test/own_context_success": 0, "charts/train/own_context_success": 1,
        "charts/train/offline_context_success": 1,
    }  # fmt: skip


def test_the_vae_descends_both_terms():
    agent, args = make_agent(kl_coef=3.0)
    stacked = borel.stack([[[make_episode(4, seed=1)]], [[make_episode(6, seed=2)]]], "cpu")
    batch = borel.sample_vae_batch(stacked, args, torch.Generator().manual_seed(0))

    def loss():
        reconstruction, kl = borel.vae_loss(agent, **batch)
        return reconstruction.mean().item() + 3.0 * kl.mean().item()

    bias, at = agent.encoder.belief.bias, []
    with torch.no_grad():
        for step in (1e-2, -2e-2, 1e-2):
            bias[0] += step
            at.append(loss())
    borel.update_vae(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, args)
    assert bias.grad[0].item() == pytest.approx((at[0] - at[1]) / 2e-2, rel=1e-2)


def parse(arguments):
    return parse_args(borel.Args, borel.PRESETS, arguments)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four tasks of the shipped data: two meta-trajectories each."""
    data, file = (
        buffers.load_dataset("PointDirection"),
        tmp_path_factory.mktemp("data") / "small.npz",
    )
    entries = [(task, path) for task, path in data["rl"] if task < 4]
    buffers.save_dataset(
        file, "PointDirection", data["train_tasks"][:4], data["test_tasks"], entries, [], "test"
    )
    return file


def start(dataset, folder, *flags):
    flags = [
        *SMALL.split(),
        "--device",
        "cpu",
        "--dataset",
        str(dataset),
        "--run-dir",
        str(folder),
        *flags,
    ]
    agent = borel.main(parse(flags))
    return Path(folder) / "PointDirection__borel__1", agent


def test_preset_stands_for_flags_that_others_override():
    own, matched = (
        parse(["--env-id", "HopperParam", *more]) for more in ([], ["--preset", "matched"])
    )
    assert (own.q_hidden, own.policy_hidden, own.meta_batch, own.lr) == (
        (256, 256),
        (256, 256),
        16,
        3e-4,
    )
    assert (matched.q_hidden, matched.policy_hidden, matched.meta_batch) == (
        (300,) * 3,
        (300,) * 3,
        4,
    )
    point = parse(["--env-id", "PointDirection", "--preset", "matched", "--lr", "0.5"])
    assert (point.q_hidden, point.meta_batch, point.lr, point.vae_steps) == (
        (128, 128),
        4,
        0.5,
        1_000,
    )


def test_a_run_evaluates_in_both_stages(dataset, tmp_path, small):
    """That it resumes bit for bit is in test_resume.py."""
    flags = "--vae-steps 10 --offline-steps 14 --eval-every 12 --preset matched".split()
    run, _ = start(dataset, tmp_path, *flags)
    with open(run / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # After 10, 12, 24 steps: 2 test tasks, 3 training tasks with either context
    assert len(rows) == 3 * (2 + 3 + 3) and sorted({int(row["gradient_step"]) for row in rows}) == [
        10,
        12,
        24,
    ]
    saved = json.loads((run / "args.json").read_text())
    assert saved["meta_batch"] == 4 and saved["q_hidden"] == [
        16
    ]  # SMAC's value; a flag that is given comes first


def test_it_learns_to_infer_the_task_and_to_act_on_it():
    """Two tasks, reward a and -a; episodes of 4 steps with random actions. After two episodes it knows the sign."""
    torch.manual_seed(0)
    sizes = {"policy_hidden": (32,), "q_hidden": (32,), "latent_dim": 2}
    batches = {
        "vae_tasks": 2,
        "vae_trajectories": 4,
        "elbo_terms": 8,
        "meta_batch": 2,
        "rl_batch": 32,
    }
    args, rng = borel.Args(**sizes, **batches, gamma=0.5, alpha=0.01), np.random.default_rng(0)
    agent, trajectories = borel.Agent(1, 1, args), [[], []]
    for task, sign in enumerate((1, -1)):
        for _ in range(20):
            actions = [rng.uniform(-1, 1, (4, 1)).astype(np.float32) for _ in range(3)]
            paths = [
                {"obs": np.zeros((5, 1), np.float32), "actions": a, "rewards": sign * a[:, 0]}
                for a in actions
            ]
            trajectories[task].append(
                [path | {"terminals": np.zeros(4, np.float32)} for path in paths]
            )
    optimizer, generator = (
        torch.optim.Adam(agent.parameters(), lr=3e-3),
        torch.Generator().manual_seed(0),
    )
    stacked = borel.stack(trajectories, "cpu")
    errors = []
    for _ in range(300):
        batch = borel.sample_vae_batch(stacked, args, generator)
        errors.append(borel.update_vae(agent, optimizer, batch, args)["losses/reward"].item())
    assert (
        np.mean(errors[:10]) > 0.25 and np.mean(errors[-10:]) < 0.15
    )  # the rewards' variance is 1/3
    buffer = borel.make_hyper_buffer(agent, trajectories, 1, 1)
    for _ in range(80):
        borel.update(agent, optimizer, borel.sample_batch(buffer, args, generator), args)
    for task, sign in enumerate((1, -1)):
        steps = {
            name: x[None] for name, x in buffers.join(trajectories[task][0][:2], "cpu").items()
        }
        with torch.no_grad():
            memory = agent.encoder(steps, torch.zeros(1, 128))[:, -1]
            mean, _ = agent.policy(torch.zeros(1, 1), agent.encoder.belief(memory))
        assert sign * torch.tanh(mean).item() > 0.5


def test_one_long_trajectory_among_short_ones_is_refused_before_it_is_padded():
    """800 meta-trajectories of one step and one of 25,000: padded they would be 801 x 25,000 x 12 numbers, 1 GB."""
    trajectories = [[[make_episode(length)] for length in [25_000] + 800 * [1]]]
    with pytest.raises(
        buffers.InputError, match="the longest meta-trajectory of the dataset is too long to pad"
    ):
        borel.stack(trajectories, "cpu")
    steps, lengths, _ = borel.stack([trajectories[0][1:]], "cpu")
    assert steps["obs"].shape[:2] == (800, 1) and lengths.tolist() == 800 * [1]
