"""SMAC runs, on PointDirection with small networks: what they write, train, read, resume and refuse; and they learn."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import buffers
import envs
import smac_offline_online as smac
from buffers import InputError

SCRIPT = Path(smac.__file__)
TRAIN_TASKS, TEST_TASKS, EPISODES, HORIZON = 4, 2, 2, 50
OFFLINE, ITERATIONS, UPDATES = 14, 2, 8  # 30 gradient steps
SMALL = [
    *"--env-id PointDirection --q-hidden 16 16 --policy-hidden 16 16 --encoder-hidden 16 --decoder-hidden 8".split(),
    *"--rl-batch 16 --context-batch 8 --latent-dim 3 --eval-every 10 --checkpoint-every 10 --device cpu".split(),
    *f"--offline-steps {OFFLINE} --online-iterations {ITERATIONS} --updates-per-iteration {UPDATES}".split(),
    *"--tasks-per-iteration 2 --prior-steps 50 --posterior-steps 60".split(),  # the latter are two whole episodes
]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Random actions: 4 training tasks with 2 episodes each, 2 test tasks."""
    env, rng, entries = envs.make("PointDirection"), np.random.default_rng(0), []
    tasks = envs.sample_tasks("PointDirection", TRAIN_TASKS + TEST_TASKS)
    for task in range(TRAIN_TASKS):
        env.unwrapped.set_task(tasks[task])
        for episode in range(EPISODES):
            path = {"obs": [env.reset(seed=10 * task + episode)[0]], "actions": [], "rewards": [], "terminals": []}
            for _ in range(HORIZON):
                path["actions"].append(rng.uniform(-1, 1, 2).astype(np.float32))
                obs, reward, terminated, _, _ = env.step(path["actions"][-1])
                for name, value in (("obs", obs), ("rewards", reward), ("terminals", terminated)):
                    path[name].append(value)
            entries.append((task, {name: np.array(values) for name, values in path.items()}))
    file = tmp_path_factory.mktemp("data") / "small.npz"
    buffers.save_dataset(file, "PointDirection", tasks[:TRAIN_TASKS], tasks[TRAIN_TASKS:], entries, [], "python test")
    return file


@pytest.fixture
def quick(monkeypatch):
    """Small evaluations, and loss curves with a point every 5 steps."""
    for name, value in (("EVAL_REPEATS", 2), ("TRAIN_EVAL_TASKS", 3), ("LOG_EVERY", 5)):
        monkeypatch.setattr(smac, name, value)


def start(dataset, folder, *flags):
    """A small run in `folder`: its directory and the trained agent."""
    arguments = [*SMALL, "--dataset", str(dataset), "--run-dir", str(folder), *(str(flag) for flag in flags)]
    agent = smac.main(smac.parse_args(arguments))
    return Path(folder) / "PointDirection__smac_offline_online__1", agent


def resume(run, *flags):
    return smac.main(smac.parse_args(["--env-id", "PointDirection", "--resume", str(run), *flags]))


def stop_at(step, monkeypatch):
    """Send SIGTERM to this process during gradient step number `step`."""
    update, calls = smac.update, []

    def update_and_stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    monkeypatch.setattr(smac, "update", update_and_stop)
    return lambda: monkeypatch.setattr(smac, "update", update)


def load(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def read_csv(run):
    with open(run / "eval.csv", newline="") as file:
        return list(csv.reader(file))


def same(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def contents(buffer_state):
    """A buffer's state without what lies beyond the used part of its index tables."""
    tables, sizes = buffer_state["tables"], buffer_state["sizes"]
    return buffer_state | {
        "tables": {name: [row[:size] for row, size in zip(tables[name], sizes[name].tolist())] for name in tables}
    }


def snapshots(monkeypatch):
    """The agent's parameters at the start, at the switch of phases and at the end, filled in while a run goes on."""
    states, update = [], smac.update

    def update_and_copy(agent, optimizer, batch, args, online):
        if len(states) == int(online):
            states.append({name: value.clone() for name, value in agent.state_dict().items()})
        return update(agent, optimizer, batch, args, online)

    monkeypatch.setattr(smac, "update", update_and_copy)
    return states


# ----- What a run writes

TAGS = {"charts/SPS", "losses/critic", "losses/actor", "losses/reward", "losses/kl"}
TAGS |= {"train/q_mean", "train/q_max", "train/actor_weight_ess"}
TAGS |= {"eval/test/online_context_return", "eval/train/online_context_return", "eval/train/offline_context_return"}
TAGS |= {"eval/test/exploration_return", "eval/train/exploration_return"}
TAGS |= {"eval/decoder_loss", "eval/decoder_loss_over_reward_variance"}
TAGS |= {"eval/generated_reward_mse", "eval/generated_reward_mse_over_reward_variance"}
KL_TAGS = {"eval/kl_test_online_context", "eval/kl_train_online_context", "eval/kl_train_offline_context"}


def test_a_run_writes_its_flags_evaluations_events_and_checkpoint(dataset, tmp_path, quick, capsys):
    run, agent = start(dataset, tmp_path)
    assert sorted(file.name.split(".")[0] for file in run.iterdir()) == ["args", "checkpoint", "eval", "events"] + [
        f"figures_{step}" for step in (OFFLINE, 30)
    ]

    flags = json.loads((run / "args.json").read_text())
    assert flags["offline_steps"] == OFFLINE and flags["kl_coef"] == 0.002 and flags["q_hidden"] == [16, 16]
    assert flags["versions"].keys() == {"torch", "numpy", "gymnasium", "mujoco", "pybullet"}

    header, *rows = read_csv(run)
    assert header == ["gradient_step", "env_steps", "split", "context", "task", "return", "exploration_return"]
    new = 2 * (50 + 100)  # transitions an iteration: two tasks, whole episodes
    points = [(10, 0), (OFFLINE, 0), (20, new), (30, 2 * new)]  # every 10 steps, and at the end of each phase
    spaced = sorted({int(row[4]) for row in rows if row[2] == "train"})
    assert len(spaced) == 3 and max(spaced) < TRAIN_TASKS
    groups = [("test", "online", [0, 1]), ("train", "online", spaced), ("train", "offline", spaced)]
    expected = [[str(s), str(e), *g[:2], str(t)] for s, e in points for g in groups for t in g[2]]
    assert [row[:5] for row in rows] == expected
    assert np.isfinite(np.array([row[5:] for row in rows], float)).all()

    checkpoint = load(run)
    assert (checkpoint["step"], checkpoint["env_steps"]) == (30, 2 * new)
    assert same(checkpoint["agent"], agent.state_dict())

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == TAGS | KL_TAGS
    assert set(events.Tags()["histograms"]) == KL_TAGS
    for tag in TAGS | KL_TAGS:
        points = events.Scalars(tag)
        steps = [10, 14, 20, 30] if tag.startswith("eval/") else [5, 10, 14, 15, 20, 25, 30]
        assert [point.step for point in points] == steps, tag
        assert np.isfinite([point.value for point in points]).all(), tag
    assert all(0 < point.value <= 1 + 1e-6 for point in events.Scalars("train/actor_weight_ess"))
    for tag in KL_TAGS:  # the scalar is the mean of the histogram's values
        for scalar, histogram in zip(events.Scalars(tag), events.Histograms(tag)):
            value = histogram.histogram_value
            assert scalar.step == histogram.step and scalar.value == pytest.approx(value.sum / value.num, rel=1e-4)
    for tag, group in (("test/online", groups[0]), ("train/online", groups[1]), ("train/offline", groups[2])):
        last = [float(row[5]) for row in rows if row[0] == "30" and row[2:4] == list(group[:2])]
        logged = events.Scalars(f"eval/{tag}_context_return")[-1].value
        assert logged == pytest.approx(np.mean(last), abs=1e-3)

    output = capsys.readouterr().out
    assert "step 14, 0 new transitions | return: test (online context)" in output
    assert output.split("Post-adaptation return")[1].splitlines()[-1].split()[:2] == ["30", str(2 * new)]


def test_curves_are_means_over_the_steps_since_the_last_point(dataset, tmp_path, quick, monkeypatch):
    calls, update = [], smac.update

    def numbered(*args, **kwargs):
        calls.append(1)
        return update(*args, **kwargs) | {"losses/critic": torch.tensor(float(len(calls)))}

    monkeypatch.setattr(smac, "update", numbered)
    run, _ = start(dataset, tmp_path, "--online-iterations", 0)
    events = EventAccumulator(str(run))
    events.Reload()
    found = [(point.step, point.value) for point in events.Scalars("losses/critic")]
    assert found == [(5, 3), (10, 8), (14, 12.5)]


def test_a_phase_may_be_left_out(dataset, tmp_path, quick):
    for name, flags, steps in (("offline", ["--online-iterations", 0], 14), ("online", ["--offline-steps", 0], 16)):
        run, _ = start(dataset, tmp_path / name, *flags)
        assert load(run)["step"] == steps and read_csv(run)[-1][0] == str(steps)


# ----- What trains, what is read


@pytest.mark.parametrize("oracle", [False, True])
def test_what_trains_in_each_phase(dataset, tmp_path, quick, monkeypatch, oracle):
    states = snapshots(monkeypatch)
    _, agent = start(dataset, tmp_path, *["--oracle-rewards"] * oracle)
    before, between, after = (*states, agent.state_dict())
    for name, value in after.items():
        assert not torch.equal(before[name], between[name]), name
        frozen = name.split(".")[0] in ("encoder", "decoder") and not oracle
        assert torch.equal(between[name], value) == frozen, name


def forbid(*_, **__):
    raise AssertionError("a reward was used")


USES = "float int index bool complex array len iter getitem repr str format hash abs neg pos round trunc"
USES += " add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv pow rpow matmul rmatmul eq ne lt le gt ge"
ForbiddenReward = type("ForbiddenReward", (), {f"__{use}__": forbid for use in USES.split()})


def forbid_rewards(monkeypatch):
    """The first environment of a run, the one that collects, returns rewards that must not be touched."""
    made, make, counts = [], envs.make, SimpleNamespace(steps=0)

    class Forbidding(gym.Wrapper):
        def step(self, action):
            obs, _, *rest = self.env.step(action)
            counts.steps += 1
            return obs, ForbiddenReward(), *rest

    def make_env(env_id):
        made.append(make(env_id) if made else Forbidding(make(env_id)))
        return made[-1]

    monkeypatch.setattr(smac.envs, "make", make_env)
    return counts


def test_the_self_supervised_phase_never_reads_a_reward(dataset, tmp_path, quick, monkeypatch):
    counts = forbid_rewards(monkeypatch)
    run, _ = start(dataset, tmp_path)
    assert counts.steps == load(run)["env_steps"] == 600
    counts = forbid_rewards(monkeypatch)
    with pytest.raises(AssertionError, match="a reward was used"):  # so the test above can fail
        start(dataset, tmp_path / "oracle", "--oracle-rewards")


def table(checkpoint, task, name):
    return checkpoint["buffer"]["tables"][name][task, : int(checkpoint["buffer"]["sizes"][name][task])].long()


def test_generated_rewards_enter_the_buffer(dataset, tmp_path, quick, monkeypatch):
    """Each new trajectory's rewards are decoder(s, a, z), one z from offline data of the same task (Eq. 4)."""
    labels, generate = [], smac.generate_rewards

    def record(agent, obs, actions, context, noise_z):
        labels.append((obs, actions, context, noise_z, generate(agent, obs, actions, context, noise_z)))
        return labels[-1][-1]

    monkeypatch.setattr(smac, "generate_rewards", record)
    run, agent = start(dataset, tmp_path)
    checkpoint, offline = load(run), TRAIN_TASKS * EPISODES * HORIZON
    fields = checkpoint["buffer"]["fields"]
    assert fields["rewards"].isfinite().all() and len(fields["rewards"]) == offline + 600 == offline + 50 * len(labels)
    owner = {int(i): task for task in range(TRAIN_TASKS) for i in table(checkpoint, task, "rl")}
    z_seen = []
    for number, (obs, actions, context, noise_z, rewards) in enumerate(labels):
        rows = slice(offline + 50 * number, offline + 50 * (number + 1))
        torch.testing.assert_close(fields["rewards"][rows, 0], rewards, rtol=0, atol=0)
        torch.testing.assert_close((fields["obs"][rows], fields["actions"][rows]), (obs, actions), rtol=0, atol=0)
        with torch.no_grad():  # encoder and decoder have not changed since
            factors, raw = agent.encoder.net(context[0]).double().chunk(2, -1)
            precision = raw.exp().log1p() ** -2
            z = (precision * factors).sum(0) / precision.sum(0) + noise_z[0] / precision.sum(0).sqrt()
            expected = agent.decoder.net(torch.cat([obs, actions, z.float().expand(50, -1)], -1))[:, 0]
        torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-6)
        z_seen.append(z)
        # The context: offline transitions of the task that was explored, with their true rewards
        task = owner[rows.start]
        mine = table(checkpoint, task, "rl")[: EPISODES * HORIZON]
        known = torch.cat([fields[name][mine] for name in ("obs", "actions", "rewards")], -1)
        assert {row.numpy().tobytes() for row in context[0]} <= {row.numpy().tobytes() for row in known}
    assert len({tuple(z.tolist()) for z in z_seen}) == len(labels)  # a new z for each trajectory


def test_true_rewards_enter_the_buffer_of_the_oracle(dataset, tmp_path, quick):
    run, _ = start(dataset, tmp_path, "--oracle-rewards")
    checkpoint, tasks = load(run), envs.sample_tasks("PointDirection", TRAIN_TASKS)
    fields = checkpoint["buffer"]["fields"]
    for task in range(TRAIN_TASKS):
        rows = table(checkpoint, task, "rl")
        direction = torch.tensor([np.cos(tasks[task, 0]), np.sin(tasks[task, 0])]).float()
        torch.testing.assert_close(fields["rewards"][rows, 0], fields["next_obs"][rows, 2:] @ direction)


@pytest.mark.parametrize("encoder_buffer, share", [("prior", 50), ("all", 150), ("frozen", 0)])
def test_which_new_data_enter_the_encoder_buffer(dataset, tmp_path, quick, encoder_buffer, share):
    run, _ = start(dataset, tmp_path, "--encoder-buffer", encoder_buffer)
    state, initial = load(run)["buffer"], EPISODES * HORIZON
    rl, context = state["sizes"]["rl"] - initial, state["sizes"]["context"] - initial
    assert rl.sum() == 600 and (rl % 150 == 0).all()  # visits of 50 + 100 transitions
    assert context.tolist() == (rl // 150 * share).tolist()
    assert state["sizes"]["offline"].tolist() == [initial] * TRAIN_TASKS
    for task in range(TRAIN_TASKS):  # h_offline is what it was
        assert torch.equal(state["tables"]["context"][task, :initial], state["tables"]["rl"][task, :initial])
        assert state["tables"]["rl"][task, :initial].max() < TRAIN_TASKS * initial


def test_an_iteration_explores_with_the_prior_then_the_posterior_and_then_trains(dataset, tmp_path, quick, monkeypatch):
    events, in_evaluation = [], []
    rollout, evaluate, update = smac.rollout, smac.evaluate, smac.update

    def record(env_list, agent, mu, sigma, args, generator, **kwargs):
        if not in_evaluation:
            events.append((len(env_list), bool((mu == 0).all() and (sigma == 1).all()), kwargs))
        return rollout(env_list, agent, mu, sigma, args, generator, **kwargs)

    def mark(*args):
        in_evaluation.append(1)
        result = evaluate(*args)
        in_evaluation.pop()
        return result

    sample = buffers.ReplayBuffer.sample

    def record_sample(self, tasks, n, generator, source="rl"):
        if len(tasks) == 1 and not in_evaluation:
            events.append(source)
        return sample(self, tasks, n, generator, source)

    monkeypatch.setattr(buffers.ReplayBuffer, "sample", record_sample)
    monkeypatch.setattr(smac, "rollout", record)
    monkeypatch.setattr(smac, "evaluate", mark)
    monkeypatch.setattr(smac, "update", lambda *args, online: (events.append(online), update(*args, online))[1])
    start(dataset, tmp_path)
    # One episode with z from the prior, two from the posterior; actions are sampled, rewards not read but generated
    episodes = [(1, is_prior, {"read_rewards": False}) for is_prior in (True, False, False)]
    visit = [event for e in episodes for event in (["context"] * (not e[1]) + [e, "offline"])]
    assert events == [False] * OFFLINE + ITERATIONS * (2 * visit + [True] * UPDATES)


# ----- Acting


class Recorder:
    """In place of an agent: acts with mean 0.3 and standard deviation exp(-1), remembers the z it was given."""

    def __init__(self):
        self.seen = []

    def policy(self, obs, z):
        self.seen.append(z.clone())
        return torch.full((len(obs), 2), 0.3), torch.full((len(obs), 2), -1.0)


def roll(z_resample="step", num=2, **kwargs):
    agent, env_list = Recorder(), [envs.make("PointDirection") for _ in range(num)]
    mu, sigma = torch.tensor([[5.0], [-5.0]])[:num], torch.full((num, 1), 0.1)
    generator = torch.Generator().manual_seed(0)
    args = smac.Args(latent_dim=1, z_resample=z_resample)
    return smac.rollout(env_list, agent, mu, sigma, args, generator, **kwargs), torch.stack(agent.seen)


@pytest.mark.parametrize("z_resample, different", [("step", HORIZON), ("episode", 1)])
def test_how_often_acting_draws_a_new_z(z_resample, different):
    paths, z = roll(z_resample)
    assert z.shape == (HORIZON, 2, 1) and len(z[:, 0].unique()) == len(z[:, 1].unique()) == different
    assert (abs(z[:, 0] - 5) < 0.6).all() and (abs(z[:, 1] + 5) < 0.6).all()  # each environment has its posterior
    if different > 1:
        assert 0.05 < z[:, 0].std() < 0.2
    assert [path["obs"].shape for path in paths] == [(HORIZON + 1, 4)] * 2


def test_actions_of_the_policys_mean_or_a_sample():
    (path, _), _ = roll(deterministic=True)
    np.testing.assert_allclose(path["actions"], np.tanh(0.3), rtol=1e-6)
    (path, _), _ = roll()
    u = np.arctanh(path["actions"])
    assert 0.2 < u.mean() < 0.4 and 0.25 < u.std() < 0.5
    np.testing.assert_allclose(path["rewards"], path["obs"][1:, 2], rtol=1e-6)  # the nominal direction is x
    assert "rewards" not in roll(read_rewards=False)[0][0]


def test_a_rollout_goes_on_until_the_last_environment_ends():
    class Fall(gym.Wrapper):
        def step(self, action):
            obs, reward, _, truncated, info = self.env.step(action)
            self.left -= 1
            assert self.left >= 0, "stepped after its end"
            return obs, reward, self.left == 0, truncated, info

    env_list, agent = [envs.make("PointDirection"), Fall(envs.make("PointDirection"))], Recorder()
    env_list[1].left = 7
    prior = smac.prior(2, smac.Args(latent_dim=1), "cpu")
    paths = smac.rollout(env_list, agent, *prior, smac.Args(latent_dim=1), torch.Generator().manual_seed(0))
    assert [len(path["actions"]) for path in paths] == [HORIZON, 7]
    assert [path["terminals"].sum() for path in paths] == [0, 1] and paths[1]["terminals"][-1] == 1
    assert [len(z) for z in agent.seen] == [2] * 7 + [1] * (HORIZON - 7)


def test_adaptation_reads_two_episodes_and_measures_the_third(monkeypatch):
    """The encoder sees both exploration episodes with true rewards; the third is deterministic, with z from it."""
    args = smac.Args(latent_dim=2, encoder_hidden=(8,), policy_hidden=(8,), q_hidden=(8,), decoder_hidden=(8,))
    torch.manual_seed(0)
    agent, calls, contexts = smac.Agent(4, 2, args), [], []
    rollout, encode = smac.rollout, agent.encoder.forward

    def record(env_list, agent, mu, sigma, args, generator, **kwargs):
        calls.append((mu, sigma, kwargs, rollout(env_list, agent, mu, sigma, args, generator, **kwargs)))
        return calls[-1][-1]

    monkeypatch.setattr(smac, "rollout", record)
    monkeypatch.setattr(agent.encoder, "forward", lambda context: (contexts.append(context), encode(context))[1])
    env_list = [envs.make("PointDirection") for _ in range(3)]
    final, exploration, kl = smac.adapt(env_list, agent, args, torch.Generator().manual_seed(0))
    (mu1, sigma1, how1, first), (mu2, sigma2, how2, second), (mu, sigma, how3, third) = calls
    assert (mu1 == 0).all() and (mu2 == 0).all() and (sigma1 == 1).all() and (sigma2 == 1).all()
    assert (how1, how2, how3) == ({}, {}, {"deterministic": True})
    for i in range(3):
        rows = [
            np.concatenate([p[i]["obs"][:-1], p[i]["actions"], p[i]["rewards"][:, None]], 1) for p in (first, second)
        ]
        np.testing.assert_array_equal(contexts[i][0], np.concatenate(rows))
        assert final[i] is third[i] and exploration[i] == (first[i], second[i])
        expected = 0.5 * (mu[i] ** 2 + sigma[i] ** 2 - 1 - 2 * sigma[i].log()).sum()
        assert kl[i] == pytest.approx(expected.item(), rel=1e-4) and kl[i] > 0


def test_evaluation_pairs_each_environment_with_its_task_and_offline_data(quick, monkeypatch):
    args = smac.Args(env_id="PointDirection", latent_dim=2, encoder_hidden=(8,), policy_hidden=(8,), q_hidden=(8,))
    tasks, buffer, asked = envs.sample_tasks("PointDirection", 12), buffers.ReplayBuffer(10, 4, 2, 30), []
    eval_envs = envs.make_evaluation("PointDirection", tasks[:10], tasks[10:], num_train=3, repeats=2)
    numbers = {split: [number for number, _ in pairs] for split, pairs in eval_envs.items()}
    chosen = numbers["train"][::2]
    assert numbers == {"test": [0, 0, 1, 1], "train": [n for n in chosen for _ in range(2)]}
    assert len(set(chosen)) == 3 and chosen == sorted(chosen)
    for split, rows in (("test", tasks[10:]), ("train", tasks[:10])):
        assert all((env.unwrapped.task == rows[number]).all() for number, env in eval_envs[split])
    for task in range(10):
        path = {"obs": torch.randn(4, 4), "actions": torch.zeros(3, 2), "rewards": torch.randn(3)}
        buffer.add(task, path | {"terminals": torch.zeros(3)})
    buffer.mark_offline()
    sample, rollout, acted, given = buffer.sample, smac.rollout, [], []

    def record(env_list, *args, **kwargs):
        acted.append((env_list, kwargs, rollout(env_list, *args, **kwargs)))
        return acted[-1][-1]

    def record_sample(tasks, n, generator, source):
        asked.append((tasks, n, source))
        given.append(sample(tasks, n, generator, source))
        return given[-1]

    monkeypatch.setattr(buffer, "sample", record_sample)
    monkeypatch.setattr(smac, "rollout", record)
    agent = smac.Agent(4, 2, args)
    with torch.no_grad():
        agent.decoder.net[-1].weight.zero_()
        agent.decoder.net[-1].bias.fill_(0.5)  # it always says 0.5
    rows, scalars, arrays = smac.evaluate(agent, buffer, eval_envs, args)
    sizes = (2 * HORIZON, args.rl_batch)  # a context as long as two episodes; the decoder's data
    assert [(t.tolist(), n, source) for t, n, source in asked] == [(numbers["train"], n, "offline") for n in sizes]
    test, train = (tuple(env for _, env in eval_envs[split]) for split in ("test", "train"))
    explore, measure = {}, {"deterministic": True}
    expected = [(e, how) for e in (test, train) for how in (explore, explore, measure)] + [(train, measure)]
    assert [call[:2] for call in acted] == expected
    explored = np.concatenate([path["rewards"] for _, _, paths in acted[3:5] for path in paths])
    for name, rewards in (("decoder_loss", given[-1]["rewards"].numpy()), ("generated_reward_mse", explored)):
        error = np.mean((0.5 - rewards) ** 2)
        assert scalars[f"eval/{name}"] == pytest.approx(error, rel=1e-4)
        ratio = error / np.var(rewards, ddof=1)
        assert scalars[f"eval/{name}_over_reward_variance"] == pytest.approx(ratio, rel=1e-4)


def test_success_is_the_behaviour_achieved_in_the_last_step(drawers):
    args = smac.Args(env_id="SawyerManipulation", latent_dim=2, encoder_hidden=(8,), policy_hidden=(8,), q_hidden=(8,))
    buffer = buffers.ReplayBuffer(1, 13, 4, 3)
    path = {"obs": torch.randn(4, 13), "actions": torch.zeros(3, 4), "rewards": -torch.ones(3)}
    buffer.add(0, path | {"terminals": torch.zeros(3)})
    buffer.mark_offline()
    rows, scalars, _ = smac.evaluate(smac.Agent(13, 4, args), buffer, drawers, args)
    assert [(split, context, returns.tolist()) for split, context, _, returns, _ in rows] == [
        ("test", "online", [-50]), ("train", "online", [0]), ("train", "offline", [0])
    ]  # fmt: skip
    success = {name: value for name, value in scalars.items() if name.endswith("success")}
    assert success == {
        "eval/test/online_context_success": 0, "eval/train/online_context_success": 1,
        "eval/train/offline_context_success": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ["--next-obs-in-context"], ["--z-resample", "episode"], ["--lambda-pearl", 0], ["--actor-ablation"],
        ["--encoder-loss", "q"], ["--encoder-loss", "reward_then_q"],
    ],
)  # fmt: skip
def test_variants_run(dataset, tmp_path, quick, flags):
    _, plain = start(dataset, tmp_path / "plain")
    run, agent = start(dataset, tmp_path / "variant", *flags)
    assert load(run)["step"] == 30 and all(p.isfinite().all() for p in agent.parameters())
    assert agent.encoder.net[0].in_features == (11 if "--next-obs-in-context" in flags else 7)
    assert not torch.equal(agent.policy.net[-1].weight, plain.policy.net[-1].weight)  # the flag has an effect


@pytest.mark.parametrize("oracle", [False, True])
def test_exploring_test_tasks(dataset, tmp_path, quick, monkeypatch, oracle):
    """Figure 9. Without rewards the data go to the D_i that labels them; with them to a D_i for each test task."""
    visited, set_task = [], envs.PointDirection.set_task
    monkeypatch.setattr(envs.PointDirection, "set_task", lambda env, t: (visited.append(t[0]), set_task(env, t))[1])
    run, agent = start(dataset, tmp_path, "--explore-tasks", "test", *["--oracle-rewards"] * oracle)
    test_angles = buffers.load_dataset(dataset, "PointDirection", envs.SPECS["PointDirection"])["test_tasks"][:, 0]
    assert set(visited[-8:]) <= set(test_angles)  # two iterations of two tasks, twice each
    sizes = load(run)["buffer"]["sizes"]
    assert len(sizes["rl"]) == TRAIN_TASKS + TEST_TASKS * oracle and (sizes["rl"] > 0).all()
    new = sizes["rl"][:TRAIN_TASKS] - EPISODES * HORIZON
    assert new.sum() == (0 if oracle else 600)
    if oracle:
        assert (sizes["context"][TRAIN_TASKS:] > 0).all() and sizes["offline"][TRAIN_TASKS:].sum() == 0


def test_pictures_hold_what_the_evaluation_saw(dataset, tmp_path, quick):
    run, _ = start(dataset, tmp_path, "--online-iterations", 0)
    with np.load(run / f"figures_{OFFLINE}.npz") as file:
        arrays = dict(file)
    kls = {name: values for name, values in arrays.items() if name.startswith("kl_")}
    assert {name: len(values) for name, values in kls.items()} == {
        "kl_test_online_context": 4, "kl_train_online_context": 6, "kl_train_offline_context": 6
    }  # fmt: skip
    shapes = {name: values.shape for name, values in arrays.items() if name not in kls}
    ends = (HORIZON + 1, 2)
    assert shapes == {
        "offline data": (3 * EPISODES, *ends), "exploration": (12, *ends), "offline context": (6, *ends),
        "online context": (6, *ends),
    }  # fmt: skip
    data = buffers.load_dataset(dataset, "PointDirection", envs.SPECS["PointDirection"])["rl"]
    walked = np.stack([path["obs"][:, :2] - path["obs"][0, :2] for _, path in data])  # the point observes where it is
    for drawn in arrays["offline data"]:
        assert np.abs(walked - drawn).max((1, 2)).min() < 1e-4
    events = EventAccumulator(str(run))
    events.Reload()
    assert events.Tags()["images"] == ["eval/paths"]
    axes = Figure().subplots()
    buffers.draw_paths(axes, {"exploration": arrays["exploration"]})
    for line, drawn in zip(axes.lines, arrays["exploration"], strict=True):
        np.testing.assert_array_equal(line.get_xydata(), drawn)


def test_a_finished_run_can_be_looked_at(dataset, tmp_path, quick, capsys):
    run, _ = start(dataset, tmp_path)
    with open(run / "eval.csv", "a", newline="") as file:
        file.write("31,9,test,online,0,1.0,2.0\r\n")  # of a run that goes on, and is ahead of its checkpoint
    before = {file: file.read_bytes() for file in run.iterdir()}
    last = [row for row in read_csv(run) if row[0] == "30"]
    capsys.readouterr()
    resume(run, "--eval-only", "--capture-video")
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["split", "context", "task", "return", "exploration"]
    assert [line.split()[:3] for line in lines] == [row[2:5] for row in last]
    for line, row in zip(lines, last):
        assert float(line.split()[3]) == pytest.approx(float(row[5]), abs=0.06)
    video = run / "video.gif"
    assert before == {file: file.read_bytes() for file in run.iterdir() if file != video}
    assert len(imageio.mimread(video)) > 20  # frames; equal neighbours are merged
    with pytest.raises(InputError, match="--eval-only looks at a run"):
        smac.parse_args(["--eval-only"])


def test_a_machine_that_can_not_render_says_so(dataset, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(envs.PointDirection, "render", forbid)
    with pytest.raises(OSError, match="can not be rendered here .* MUJOCO_GL=egl"):
        start(dataset, tmp_path, "--capture-video")
    assert load(tmp_path / "PointDirection__smac_offline_online__1")["step"] == 30  # after the training, which is safe


# ----- Stop and resume


@pytest.mark.parametrize("step", [3, OFFLINE, 19, OFFLINE + UPDATES])
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(dataset, tmp_path, quick, monkeypatch, step):
    whole, _ = start(dataset, tmp_path / "whole")
    undo = stop_at(step, monkeypatch)
    with pytest.raises(SystemExit, match=f"stopped after step {step}; continue with: .* --resume") as stop:
        start(dataset, tmp_path / "parts")
    assert str(stop.value).count("\n") == 0
    undo()
    run = tmp_path / "parts" / whole.name
    assert load(run)["step"] == step
    resume(run)
    assert_equal_runs(whole, run)


def test_a_signal_during_an_evaluation_loses_nothing(dataset, tmp_path, quick, monkeypatch):
    whole, _ = start(dataset, tmp_path / "whole", "--checkpoint-every", 1000)
    evaluate, calls = smac.evaluate, []

    def evaluate_and_stop(*args):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(smac, "evaluate", evaluate_and_stop)
    with pytest.raises(SystemExit) as stop:
        start(dataset, tmp_path / "parts", "--checkpoint-every", 1000)
    run = tmp_path / "parts" / whole.name
    assert (run / "checkpoint.pt").exists(), "stopped without a checkpoint"
    assert f"stopped after step {load(run)['step']};" in str(stop.value)
    resume(run)
    assert_equal_runs(whole, run)


def assert_equal_runs(whole, run):
    expected, found = load(whole), load(run)
    assert expected["args"].pop("run_dir") != found["args"].pop("run_dir")
    expected["buffer"], found["buffer"] = contents(expected["buffer"]), contents(found["buffer"])
    for name in expected:
        assert same(expected[name], found[name]), name
    assert (whole / "eval.csv").read_bytes() == (run / "eval.csv").read_bytes()


def test_rows_after_the_last_checkpoint_are_written_again_and_not_twice(dataset, tmp_path, quick):
    """As if the machine had failed after an evaluation, before the next checkpoint."""
    whole, _ = start(dataset, tmp_path / "whole", "--checkpoint-every", 1000)
    copies, save = [], smac.save_checkpoint

    def keep_first(run, *args):
        if not copies:
            copies.append(save(run, *args))

    smac.save_checkpoint = keep_first
    try:
        run, _ = start(dataset, tmp_path / "parts", "--checkpoint-every", 1000)
    finally:
        smac.save_checkpoint = save
    assert load(run)["step"] == OFFLINE and read_csv(run)[-1][0] == "30"
    resume(run)
    assert_equal_runs(whole, run)


def test_a_finished_run_can_be_made_longer(dataset, tmp_path, quick):
    run, _ = start(dataset, tmp_path)
    resume(run, "--online-iterations", "3")
    assert load(run)["step"] == 38 and load(run)["env_steps"] == 900
    assert list(dict.fromkeys(row[0] for row in read_csv(run)[1:])) == ["10", "14", "20", "30", "38"]


def test_evaluations_leave_no_trace_in_training(dataset, tmp_path, quick):
    often, _ = start(dataset, tmp_path / "often", "--eval-every", 3)
    seldom, _ = start(dataset, tmp_path / "seldom", "--eval-every", 1000)
    assert len(read_csv(often)) > 2 * len(read_csv(seldom))
    a, b = load(often), load(seldom)
    a["buffer"], b["buffer"] = contents(a["buffer"]), contents(b["buffer"])
    for name in ("agent", "optimizer", "buffer", "rng", "act_rng", "env_steps"):
        assert same(a[name], b[name]), name


def test_the_seed_decides(dataset, tmp_path, quick):
    runs = [start(dataset, tmp_path / str(i), "--seed", seed)[1] for i, seed in enumerate((1, 1))]
    assert same(*(agent.state_dict() for agent in runs))
    smac.main(smac.parse_args([*SMALL, "--dataset", str(dataset), "--run-dir", str(tmp_path), "--seed", "2"]))
    other = load(tmp_path / "PointDirection__smac_offline_online__2")["agent"]
    assert not torch.equal(other["policy.net.0.weight"], runs[0].policy.net[0].weight)


def in_a_process(arguments):
    path = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], env=path, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_sigterm_to_a_real_process_then_resume(dataset, tmp_path):
    flags = ["--offline-steps", 500, "--eval-every", 100, "--checkpoint-every", 100_000]
    run = tmp_path / "parts" / "PointDirection__smac_offline_online__1"
    process = in_a_process([*SMALL, "--dataset", dataset, "--run-dir", tmp_path / "parts", *flags])
    deadline = time.time() + 60
    while not ((run / "eval.csv").exists() and len((run / "eval.csv").read_text().splitlines()) > 1):
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in stderr
    assert "stopped after step" in stderr.splitlines()[-1] and f"--resume {run}" in stderr.splitlines()[-1]
    assert 100 <= load(run)["step"] < 500
    resume(run)
    whole, _ = start(dataset, tmp_path / "whole", *flags)
    assert_equal_runs(whole, run)


# ----- What a run refuses: always one sentence


def refused(message, function, *args):
    with pytest.raises(InputError, match=message) as error:
        function(*args)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("flags, message", [
    (["--env-id", "PointDirektion"], "--env-id PointDirektion: there is no such environment, the nearest are PointDir"),
    (["--lr", "0"], "--lr is 0.0, it must be above 0"),
    (["--lr", "nan"], "--lr is nan"),
    (["--gamma", "inf"], "--gamma is inf"),
    (["--meta-batch", "-1"], "--meta-batch is -1, it must be above 0"),
    (["--q-hidden", "16", "0"], r"--q-hidden is \(16, 0\), it must be above 0"),
    (["--offline-steps", "-1"], "--offline-steps is -1, it must be at least 0"),
    (["--kl-coef", "-0.1"], "--kl-coef is -0.1, it must be at least 0"),
    (["--eval-every", "0"], "--eval-every is 0, it must be above 0"),
    (["--resume", "nowhere"], "there is no checkpoint at nowhere"),
])  # fmt: skip
def test_refused_flags(flags, message):
    refused(message, smac.parse_args, [*SMALL, *flags])


def test_zero_is_a_value_where_it_means_something():
    args = smac.parse_args([*SMALL, *"--lambda-pearl 0 --offline-steps 0 --online-iterations 0 --kl-coef 0".split()])
    assert args.lambda_pearl == args.offline_steps == args.online_iterations == args.kl_coef == 0


def test_presets_hold_for_their_environment_and_flags_override_them():
    assert smac.PRESETS.keys() == envs.SPECS.keys()
    assert smac.parse_args([]) == smac.Args()
    assert smac.parse_args(["--env-id", "CheetahVelocity"]).encoder_buffer == "frozen"
    assert smac.parse_args(["--env-id", "CheetahVelocity", "--encoder-buffer", "all"]).encoder_buffer == "all"
    args = smac.parse_args(["--env-id", "PointDirection", "--lr", "0.5"])
    assert (args.lr, args.kl_coef, args.q_hidden) == (0.5, 0.002, (128, 128))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_gpu_that_is_not_there():
    refused("--device cuda: PyTorch finds no GPU", smac.parse_args, ["--device", "cuda"])


def test_refuses_a_missing_dataset_and_that_of_another_environment(dataset, tmp_path):
    refused("there is no dataset at .*absent.npz", start, tmp_path / "absent.npz", tmp_path)
    refused("env_id is PointDirection, expected HopperParam", start, dataset, tmp_path, "--env-id", "HopperParam")
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_overwrite_a_run_and_to_resume_with_other_flags(dataset, tmp_path, quick):
    run, _ = start(dataset, tmp_path)
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    refused("holds a run: continue it with --resume", start, dataset, tmp_path)
    refused("--lr is 0.001 in the run to resume and can not become 0.5", resume, run, "--lr", "0.5")
    refused("--seed is 1 in the run to resume", resume, run, "--seed", "2")
    assert before == {file.name: file.read_bytes() for file in run.iterdir()}


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_refuses_damaged_and_hostile_checkpoints(dataset, tmp_path, quick):
    run, _ = start(dataset, tmp_path)
    file = run / "checkpoint.pt"
    good = file.read_bytes()
    contents = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "a bare pickle": pickle.dumps({"args": Hostile(tmp_path / "created")}, protocol=2),
    }
    for name, value in {"code": Hostile(tmp_path / "created"), "list": [1, 2], "no flags": {"step": 1}}.items():
        torch.save({"args": {}, "more": value} if name == "code" else value, tmp_path / "other.pt")
        contents[name] = (tmp_path / "other.pt").read_bytes()
    for name, content in contents.items():
        file.write_bytes(content)
        refused("can not be read as a checkpoint of this script", resume, run)
    assert not (tmp_path / "created").exists()

    file.write_bytes(good)
    checkpoint = load(run)
    for name in ("agent", "optimizer", "buffer", "rng", "step", "eval_csv"):
        torch.save({key: value for key, value in checkpoint.items() if key != name}, file)
        refused(f"checkpoint.pt does not fit this run: .*{name}.* is missing", resume, run)
    torch.save(checkpoint | {"agent": checkpoint["agent"] | {"q.weights.0": torch.zeros(2)}}, file)
    message = r"agent.q.weights.0 is torch.float32 \(2,\), expected torch.float32 \(2, 9, 16\)"
    refused(f"checkpoint.pt does not fit this run: .*{message}", resume, run)


def test_the_trap_in_the_hostile_checkpoint_works(tmp_path):
    torch.save({"args": Hostile(tmp_path / "created")}, tmp_path / "checkpoint.pt")
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)["args"].close()
    assert (tmp_path / "created").exists()


def test_a_real_process_prints_one_error_line_and_exits_with_code_2(tmp_path):
    torch.save({"args": Hostile(tmp_path / "created")}, tmp_path / "checkpoint.pt")
    processes = [
        in_a_process(["--env-id", "HoperParam"]),
        in_a_process(["--env-id", "PointDirection", "--resume", tmp_path]),
    ]
    for process, words in zip(processes, ("HopperParam, ", "can not be read as a checkpoint")):
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 2 and stdout == "" and len(stderr.splitlines()) == 1
        assert stderr.startswith("error: ") and words in stderr
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(dataset, tmp_path, quick, monkeypatch):
    update, calls, saved = smac.update, [], {}
    run = tmp_path / "PointDirection__smac_offline_online__1"

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 11:
            saved.update(content=(run / "checkpoint.pt").read_bytes())
        bad = {"losses/kl": torch.tensor(float("nan"))} if len(calls) == 12 else {}
        return update(*args, **kwargs) | bad

    monkeypatch.setattr(smac, "update", broken)
    message = "^losses/kl became NaN or infinite before step 14; the last good checkpoint is .*checkpoint.pt"
    refused(message, start, dataset, tmp_path)
    assert (run / "checkpoint.pt").read_bytes() == saved["content"] and load(run)["step"] == 10


def test_diverging_training_stops_the_run(dataset, tmp_path, quick):
    refused("losses/critic.* became NaN or infinite before step 5", start, dataset, tmp_path, "--lr", 1e30)
    run = tmp_path / "PointDirection__smac_offline_online__1"
    assert not (run / "checkpoint.pt").exists()
    start(dataset, tmp_path)  # a run without a checkpoint may be started again


# ----- It learns


def test_the_self_supervised_phase_improves_adaptation_to_test_tasks(tmp_path):
    """A short run on the shipped dataset. With this lambda the offline policy stays near the data (return about 3), so
    that the gain is the second phase's, which has no rewards. Measured test returns with online context, offline ->
    self-supervised: seed 1 -9.5 -> 40.6, seed 2 4.0 -> 36.6, seed 3 -1.7 -> 39.7, seed 4 -2.6 -> 19.2 (an encoder that
    needed more than 1,800 steps). Seed 1 without the PEARL loss: 4.8. The best possible is near 60."""
    flags = "--env-id PointDirection --seed 1 --device cpu --rl-batch 64 --awr-lambda 1000 --offline-steps 1800"
    flags += f" --online-iterations 3 --updates-per-iteration 200 --eval-every 10000 --run-dir {tmp_path}"
    smac.main(smac.parse_args(flags.split()))
    rows = read_csv(tmp_path / "PointDirection__smac_offline_online__1")[1:]
    offline, online = (
        np.mean([float(row[5]) for row in rows if row[0] == step and row[2:4] == ["test", "online"]])
        for step in ("1800", "2400")
    )
    assert online > 12 and online > 2 * offline
