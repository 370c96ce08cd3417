"""MACAW: its layers and losses by hand, inner step and outer gradient, resuming, and that adaptation helps."""

import copy
import csv
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import buffers
import envs
import macaw
from plumbing.flags import parse_args

OBS, ACTION, T, B = 4, 2, 2, 5
DATA = Path(macaw.__file__).parent / "datasets" / "PointDirection.npz"
SMALL = "--env-id PointDirection --policy-hidden 16 --value-hidden 16 --rl-batch 16 --context-batch 16".split()


@pytest.fixture
def small(quick, monkeypatch):
    """Two test tasks, three training tasks, one meta-episode each."""
    monkeypatch.setattr(
        envs, "make_evaluation", functools.partial(envs.make_evaluation, num_test=2, repeats=1)
    )


@pytest.fixture
def tiny(monkeypatch):
    """Small sizes, and learning rates that make the inner steps visible."""
    monkeypatch.setattr(macaw, "LATENT_DIM", 3)
    monkeypatch.setattr(macaw, "HEAD_HIDDEN", 4)

    def make(weight_transform=True):
        torch.manual_seed(0)
        sizes = {
            "policy_hidden": (6, 6),
            "value_hidden": (6,),
            "weight_transform": weight_transform,
        }
        agent = macaw.Agent(OBS, ACTION, macaw.Args(inner_lr=0.05, adv_coef=0.3, **sizes)).double()
        with torch.no_grad():
            for name, parameter in agent.named_parameters():
                if name.endswith("raw_lr"):  # another rate for each tensor
                    parameter += torch.linspace(0, 1, len(parameter))
        return agent, draw(), draw()

    def draw():
        batch = {
            "obs": torch.randn(T, B, OBS),
            "actions": torch.rand(T, B, ACTION),
            "returns": torch.randn(T, B, 1),
        }
        return {name: value.double() for name, value in batch.items()}

    return make


def start(folder, *flags):
    agent = macaw.main(parse([*SMALL, "--device", "cpu", "--run-dir", str(folder), *flags]))
    return Path(folder) / "PointDirection__macaw__1", agent


def parse(arguments):
    return parse_args(macaw.Args, macaw.PRESETS, arguments)


def read(run):
    with open(run / "eval.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_weight_transform_is_its_definition():
    """A matrix and a bias, linear in the latent, and then the layer that they make."""
    torch.manual_seed(0)
    layer, x = macaw.WeightTransform(3, 2, 1e-3), torch.randn(1, B, 3)
    z, w, b = (
        value.detach().numpy()
        for value in (layer.latent, layer.generate.weight, layer.generate.bias)
    )
    assert z.shape == (100,) and w.shape == (3 * 2 + 2, 100)
    theta = w @ z + b
    expected = x[0].numpy() @ theta[:6].reshape(3, 2) + theta[6:]
    np.testing.assert_allclose(
        macaw.linear(x, layer()[None])[0].detach().numpy(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("weight_transform", [True, False])
def test_inner_steps_are_gradient_steps_on_every_parameter(tiny, weight_transform):
    """The closed form of a layer's `step` against plain gradient descent on a copy of the agent, task by task."""
    agent, batch, _ = tiny(weight_transform)
    policy, value = macaw.inner_steps(agent, batch)
    coef = F.softplus(agent.raw_adv_coef).detach()

    def descend(layers, loss):
        loss(macaw.unadapted(layers, 1)).sum().backward()
        with torch.no_grad():
            for layer in layers:
                parts = [p for name, p in layer.named_parameters() if name != "raw_lr"]
                for parameter, raw_lr in zip(parts, layer.raw_lr, strict=True):
                    parameter -= math.log(1 + math.exp(raw_lr)) * parameter.grad
        return macaw.unadapted(layers, 1)

    def check(task):
        by_hand, data = (
            copy.deepcopy(agent),
            {name: x[task : task + 1] for name, x in batch.items()},
        )
        new_value = descend(by_hand.value, lambda value: macaw.value_loss(value, data))
        adv = data["returns"] - macaw.mlp_of(new_value, data["obs"]).detach()
        new_policy = descend(
            by_hand.policy, lambda policy: macaw.policy_loss(policy, data, adv, coef)
        )
        before = [*macaw.unadapted(agent.value, 1), *macaw.unadapted(agent.policy, 1)]
        for old, new, ours in zip(
            before, [*new_value, *new_policy], [*value, *policy], strict=True
        ):
            torch.testing.assert_close(ours[task : task + 1], new)
            assert not torch.allclose(old, new)

    for task in range(T):
        check(task)


@pytest.mark.parametrize("weight_transform", [True, False])
def test_outer_gradient_against_finite_differences(tiny, weight_transform):
    """L_V for what the value function learns, L_AWR for the rest: the advantages have no gradient on purpose."""
    agent, inner, outer = tiny(weight_transform)
    sum(macaw.outer_losses(agent, inner, outer)).backward()
    for name, parameter in agent.named_parameters():
        if name.startswith(("policy.3", "policy.4")) and name.endswith("raw_lr"):
            assert (
                parameter.grad is None
            )  # of the advantage head only what comes before the inner step matters
            continue
        which, flat, epsilon = 0 if name.startswith("value") else 1, parameter.data.view(-1), 1e-6
        for i in {0, len(flat) // 2, len(flat) - 1}:
            ends = []
            for sign in (1, -2):
                flat[i] += sign * epsilon
                ends.append(macaw.outer_losses(agent, inner, outer)[which].item())
            flat[i] += epsilon
            expected = (ends[0] - ends[1]) / (2 * epsilon)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(
                expected, rel=1e-4, abs=1e-7
            ), (name, i)
    assert agent.raw_adv_coef.grad.abs() > 0 and agent.policy[0].raw_lr.grad.abs().min() > 0


def test_a_gradient_step_adapts_to_the_inner_batch_and_is_judged_on_the_outer_one(tiny):
    """Gradients of the losses after adaptation to `inner`, on `outer`, taken down by one step of plain descent."""
    (agent, inner, outer), args = tiny(), macaw.Args()
    outer = {name: x[:, :3] for name, x in outer.items()}  # another number of transitions
    expected, stepped = copy.deepcopy(agent), copy.deepcopy(agent)
    losses = macaw.outer_losses(expected, inner, outer)
    sum(losses).backward()
    optimizer = torch.optim.SGD(stepped.parameters(), lr=0.1)
    info = macaw.update(stepped, optimizer, {"inner": inner, "outer": outer}, args)
    assert (
        info["losses/value"].item() == losses[0].item()
        and info["losses/actor"].item() == losses[1].item()
    )
    for (name, new), old in zip(stepped.named_parameters(), expected.parameters()):
        moved = 0 if old.grad is None else 0.1 * old.grad
        torch.testing.assert_close(new.detach(), old.detach() - moved, msg=name)


@pytest.mark.parametrize("weight_transform", [True, False])
def test_outer_losses_by_hand(tiny, weight_transform):
    """The networks after adaptation to `inner`, written out in NumPy, on `outer`, which has other transitions."""
    agent, inner, outer = tiny(weight_transform)
    policy, value = (
        [theta.detach().numpy() for theta in part] for part in macaw.inner_steps(agent, inner)
    )
    obs, actions, returns = (outer[name].numpy() for name in ("obs", "actions", "returns"))

    def network(thetas, task, x):
        for number, theta in enumerate(thetas):
            split = x.shape[1] * (len(theta[task]) // (x.shape[1] + 1))
            x = x @ theta[task, :split].reshape(x.shape[1], -1) + theta[task, split:]
            x = np.maximum(x, 0) if number < len(thetas) - 1 else x
        return x

    errors, actor = [], []
    for task in range(T):
        adv = (returns[task] - network(value, task, obs[task]))[:, 0]
        errors.append((adv**2).mean())
        weight = np.minimum(np.exp((adv - adv.mean()) / adv.std(ddof=1)), 20)
        mean = np.tanh(network(policy[:3], task, obs[task]))  # without the advantage head
        log_density = -0.5 * ((actions[task] - mean) / 0.2) ** 2 - math.log(
            0.2 * math.sqrt(2 * math.pi)
        )
        actor.append(-(weight * log_density.sum(-1)).mean())
    losses = [loss.item() for loss in macaw.outer_losses(agent, inner, outer)]
    assert losses == pytest.approx([np.mean(errors), np.mean(actor)], rel=1e-4)


def test_actor_loss_by_hand():
    torch.manual_seed(0)
    mean, actions, adv = torch.randn(T, B, ACTION), torch.rand(T, B, ACTION), torch.randn(T, B, 1)
    adv[0, 0] = 1e3  # the only large one of 5: (5 - 1) / sqrt(5) = 1.79 standard deviations
    for limit in (20.0, 3.0):
        macaw.MAX_WEIGHT, before = limit, macaw.MAX_WEIGHT
        loss = macaw.awr_loss(mean, {"actions": actions}, adv)
        macaw.MAX_WEIGHT = before
        for task in range(T):
            a = adv[task, :, 0].double().numpy()
            weight = np.minimum(np.exp((a - a.mean()) / a.std(ddof=1)), limit)
            error = (actions[task] - mean[task]).double().numpy()
            density = np.exp(-0.5 * (error / 0.2) ** 2) / (0.2 * np.sqrt(2 * np.pi))
            assert loss[task].item() == pytest.approx(
                -(weight * np.log(density + 1e-300).sum(-1)).mean(), rel=1e-3
            )


def test_returns_are_discounted_within_each_trajectory():
    paths = [
        {
            "obs": np.arange(3 * OBS).reshape(3, OBS),
            "actions": np.zeros((2, ACTION)),
            "rewards": np.array([1.0, 2.0]),
        },
        {"obs": np.zeros((2, OBS)), "actions": np.ones((1, ACTION)), "rewards": np.array([5.0])},
    ]
    columns = macaw.transitions(paths, macaw.Args(gamma=0.5), "cpu")
    assert columns["returns"].tolist() == [[2.0], [2.0], [5.0]]
    assert columns["obs"][:, 0].tolist() == [0, OBS, 0] and columns["actions"].shape == (3, ACTION)


def test_the_batch_holds_the_returns_of_its_own_transitions(tmp_path, small, monkeypatch):
    """They are added to the buffer after it is filled: the order must be the buffer's."""
    seen, sample_batch = [], macaw.sample_batch

    def keep(buffer, *rest):
        seen.append(buffer)
        return sample_batch(buffer, *rest)

    monkeypatch.setattr(macaw, "sample_batch", keep)
    start(tmp_path, "--offline-steps", "1")
    buffer, expected = seen[0], {}
    with np.load(DATA) as data:  # without the reader of buffers.py
        lengths, tasks, rewards = (data[f"rl_{name}"] for name in ("lengths", "tasks", "rewards"))
        last = np.cumsum(lengths + 1) - 1
        pairs = np.concatenate(
            [np.delete(data["rl_obs"], last, axis=0), data["rl_actions"]], axis=1
        )
    for task, length, end in zip(tasks.tolist(), lengths.tolist(), lengths.cumsum().tolist()):
        for t in range(
            end - length, end
        ):  # no observation and action of this dataset is there twice
            total = sum(0.99**k * reward for k, reward in enumerate(rewards[t:end].tolist()))
            expected[pairs[t].tobytes()] = task, total
    assert len(expected) == buffer.used == 50 * 6 * 50
    batch, found = (
        sample_batch(buffer, macaw.Args(meta_batch=50), torch.Generator().manual_seed(0)),
        {},
    )
    for name, part in batch.items():
        rows = torch.cat([part["obs"], part["actions"]], dim=-1).numpy()  # (50, B, o + a)
        numbers, returns = np.moveaxis(
            [[expected[row.tobytes()] for row in of_task] for of_task in rows], -1, 0
        )
        np.testing.assert_allclose(part["returns"][..., 0], returns, rtol=1e-4, atol=1e-4)
        assert (numbers == numbers[:, :1]).all()
        found[name] = numbers[:, 0].tolist()
    assert found["inner"] == found["outer"] and sorted(found["inner"]) == list(
        range(50)
    )  # the same tasks, each once


def environments(num):
    """PointDirection in `num` test tasks."""
    train, test = np.array([[0.0]]), np.arange(1.0, num + 1)[:, None]
    eval_envs = envs.make_evaluation("PointDirection", train, test, repeats=1)
    return eval_envs["test"][1]


def test_an_episode_has_the_policys_actions_with_noise_within_the_box():
    """Means near 1 and -1, so that the noise of .2 leads out of the box; each environment has a policy of its own."""
    torch.manual_seed(0)
    weights = 0.1 * torch.randn(2, (OBS + 1) * 8)
    last = 0.1 * torch.randn(2, (8 + 1) * ACTION)
    last[:, -ACTION:] = torch.tensor([[1.5, -1.5], [-1.5, 0.0]])  # biases, before the tanh
    theta = [weights, last, torch.zeros(2, 1), torch.zeros(2, 1)]  # the head is not asked
    paths = macaw.rollout(environments(2), theta, torch.Generator().manual_seed(3))
    exact = macaw.rollout(
        environments(2), theta, torch.Generator().manual_seed(3), deterministic=True
    )

    generator = torch.Generator().manual_seed(3)
    torch.randint(2**31 - 1, (2,), generator=generator)  # the seeds of the two resets
    steps = len(paths[0]["actions"])
    noise = torch.stack([torch.randn(2, ACTION, generator=generator) for _ in range(steps)], dim=1)
    for i in range(2):
        own = [part[i : i + 1] for part in theta]
        for path, scale in ((paths[i], 0.2), (exact[i], 0.0)):
            mean, _ = macaw.policy_of(own, torch.from_numpy(path["obs"][None, :-1]))
            expected = (mean[0] + scale * noise[i]).numpy().clip(-1, 1)
            np.testing.assert_allclose(path["actions"], expected, rtol=1e-5, atol=1e-6)
        outside = np.abs(paths[i]["actions"]) >= 1
        assert outside.any() and not outside.all()


def test_the_outer_losses_have_other_draws_than_the_inner_steps():
    buffer = buffers.ReplayBuffer(3, OBS, ACTION, 300)
    for task in range(3):
        path = {"obs": np.arange(101.0)[:, None] + np.zeros(OBS), "rewards": np.zeros(100)}
        path |= {"actions": np.zeros((100, ACTION)), "terminals": np.zeros(100)}
        buffer.add(task, path)
    args = macaw.Args(meta_batch=2, context_batch=20, rl_batch=20)
    batch = macaw.sample_batch(buffer, args, torch.Generator().manual_seed(0))
    same = batch["inner"]["obs"][..., 0] == batch["outer"]["obs"][..., 0]
    assert same.shape == (2, 20) and same.float().mean() < 0.2


def test_the_third_episode_is_of_the_policy_adapted_to_the_first_two(monkeypatch):
    torch.manual_seed(0)
    sizes = {"policy_hidden": (6,), "value_hidden": (6,), "weight_transform": False}
    args = macaw.Args(env_id="PointDirection", inner_lr=0.1, **sizes)
    agent = macaw.Agent(OBS, ACTION, args)
    played = []
    rollout = macaw.rollout

    def record(env_list, theta, rng, deterministic=False):
        paths = rollout(env_list, theta, rng, deterministic)
        played.append((theta, deterministic, paths))
        return paths

    monkeypatch.setattr(macaw, "rollout", record)
    _, env_list = envs.make_evaluation(
        "PointDirection", np.array([[0.0]]), np.array([[1.0], [2.0]]), repeats=1
    )["test"]
    final, exploration = macaw.adapt(env_list, agent, args, torch.Generator().manual_seed(0))
    (first, _, one), (second, _, two), (third, _, three) = played
    assert [how for _, how, _ in played] == [False, False, True] and final == three
    for i in range(2):
        assert exploration[i] == (one[i], two[i])
        batch = macaw.transitions([one[i], two[i]], args, "cpu")
        adapted, _ = macaw.inner_steps(agent, {name: x[None] for name, x in batch.items()})
        for before, again, after, expected, layer in zip(
            first, second, third, adapted, agent.policy
        ):
            assert torch.equal(before[i], layer()) and torch.equal(again[i], layer())
            torch.testing.assert_close(after[i], expected[0])
    assert sum((before - after).abs().sum() for before, after in zip(first, third)) > 0.01


def test_an_evaluation_plays_each_split_in_its_own_environments_and_adapts_to_that_tasks_data(
    monkeypatch,
):
    """Every transition of task i has the observation i: what is adapted to shows whose data it is."""
    args = macaw.Args(
        env_id="PointDirection", policy_hidden=(8,), value_hidden=(8,), context_batch=7
    )
    torch.manual_seed(0)
    agent, buffer, asked, acted = (
        macaw.Agent(OBS, ACTION, args),
        buffers.ReplayBuffer(5, OBS, ACTION, 50),
        [],
        [],
    )
    for task in range(5):
        path = {
            "obs": np.full((11, OBS), task),
            "actions": np.zeros((10, ACTION)),
            "rewards": np.zeros(10),
        }
        buffer.add(task, path | {"terminals": np.zeros(10)})
    buffer.mark_offline()
    buffer.fields["returns"] = torch.zeros(50, 1)
    train, test = np.arange(5)[:, None] / 10.0, np.array([[3.0], [2.0]])
    eval_envs = envs.make_evaluation("PointDirection", train, test, num_train=3, repeats=2)
    inner_steps, rollout = macaw.inner_steps, macaw.rollout

    def record_steps(agent, batch):
        asked.append(batch)
        return inner_steps(agent, batch)

    def record_rollout(env_list, *rest, **flags):
        acted.append(env_list)
        return rollout(env_list, *rest, **flags)

    monkeypatch.setattr(macaw, "inner_steps", record_steps)
    monkeypatch.setattr(macaw, "rollout", record_rollout)
    evaluations, scalars, paths = macaw.evaluate(agent, buffer, eval_envs, args)
    groups = [(evaluation.split, evaluation.context) for evaluation in evaluations]
    assert groups == [("test", "own"), ("train", "own"), ("train", "offline")]
    assert scalars == {}
    test, own, offline = evaluations
    numbers = offline.tasks
    assert test.tasks == [0, 0, 1, 1] and numbers == own.tasks
    angles = [[env.unwrapped.task[0] for env in env_list] for env_list in acted]
    assert angles[:3] == 3 * [[3.0, 3.0, 2.0, 2.0]] and angles[3:] == 4 * [
        [number / 10.0 for number in numbers]
    ]
    assert len(numbers) == 6 and len(set(numbers)) == 3
    assert asked[-1]["obs"].shape == (6, 7, OBS)
    assert asked[-1]["obs"][:, :, 0].tolist() == [7 * [float(number)] for number in numbers]
    assert sorted({path["obs"][0, 0] for path in paths}) == sorted(set(numbers))
    assert offline.exploration is own.exploration and offline.kl is None


def test_success_is_the_behaviour_achieved_in_the_last_step(drawers, tmp_path):
    path = {"obs": np.zeros((4, 13), np.float32), "actions": np.zeros((3, 4), np.float32)}
    path |= {"rewards": -np.ones(3, np.float32), "terminals": np.zeros(3, np.float32)}
    sizes = {"policy_hidden": (8,), "value_hidden": (8,), "weight_transform": False}
    args = macaw.Args(env_id="SawyerManipulation", device="cpu", run_dir=str(tmp_path), **sizes)
    buffer = buffers.ReplayBuffer(1, 13, 4, 3)
    buffer.add(0, path)
    buffer.mark_offline()
    buffer.fields |= macaw.transitions([path], args, "cpu")
    torch.manual_seed(0)
    agent = macaw.Agent(13, 4, args)
    with buffers.Run(
        args, macaw.__file__, agent=agent, optimizer=torch.optim.Adam(agent.parameters())
    ) as run:
        for _ in run.steps(1, "offline"):
            run.write(*macaw.evaluate(agent, buffer, drawers, args))
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


def test_preset_stands_for_flags_that_others_override():
    given = ["--env-id", "HopperParam", "--preset", "matched", "--policy-lr", "0.01"]
    args = parse(given)
    assert (args.preset, args.policy_hidden, args.weight_transform) == (
        "matched",
        (300, 300, 300),
        False,
    )
    assert (args.policy_lr, args.value_lr, args.meta_batch) == (0.01, 3e-4, 4)
    assert parse(given[:2]).weight_transform and parse(given[:2]).meta_batch == 5
    point = parse(
        ["--env-id", "PointDirection", "--preset", "matched"]
    )  # SMAC's sizes on that environment
    assert (point.policy_hidden, point.rl_batch, point.policy_lr) == ((128, 128), 128, 1e-3)
    assert (point.meta_batch, point.weight_transform, point.offline_steps) == (4, False, 3_000)


def test_a_run_evaluates_and_says_its_flags(tmp_path, small):
    """That it resumes bit for bit is in test_resume.py."""
    flags = "--offline-steps 20 --eval-every 10 --preset matched".split()
    run, _ = start(tmp_path, *flags)
    # Two evaluations: 2 test tasks, 3 training tasks with either context
    assert len(read(run)) == 2 * (2 + 3 + 3)
    saved = json.loads((run / "args.json").read_text())
    assert (saved["preset"], saved["meta_batch"], saved["policy_hidden"]) == ("matched", 4, [16])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run: its agent, flags and folder."""
    flags = (
        "--policy-hidden 32 32 --value-hidden 32 32 --policy-lr 1e-3 --value-lr 1e-3 --rl-batch 128"
    )
    flags = [*flags.split(), *"--context-batch 128 --offline-steps 100".split()]
    run, agent = start(tmp_path_factory.mktemp("trained"), *flags)
    return agent, parse([*SMALL, *flags]), run


def test_adaptation_raises_the_return_on_training_tasks(trained):
    """With offline data by 17, 25 and 19 for seeds 1, 2, 3; before adaptation the return is about 0."""
    rows = [row for row in read(trained[2]) if row["context"] == "offline"]
    gains = [float(row["return"]) - float(row["exploration_return"]) for row in rows]
    assert np.mean(gains) > 8


def test_adaptation_raises_the_return_on_unseen_tasks_if_the_data_explore(trained):
    """Six trajectories of the dataset with the rewards of a test task bring 17, 20 and 18 for seeds 1, 2, 3."""
    (agent, args, _), returns = trained, []
    dataset = buffers.load_dataset("PointDirection")
    for i, task in enumerate(dataset["test_tasks"]):
        env = envs.make("PointDirection")
        env.unwrapped.set_task(task)
        paths = [path for _, path in dataset["rl"][i::50]]  # 6, of different training tasks
        paths = [
            path | {"rewards": path["obs"][1:, 2:] @ env.unwrapped.direction} for path in paths
        ]
        batch = {name: x[None] for name, x in macaw.transitions(paths, args, "cpu").items()}
        policy, _ = macaw.inner_steps(agent, batch)
        (path,) = macaw.rollout([env], policy, torch.Generator().manual_seed(0), deterministic=True)
        returns.append(path["rewards"].sum())
    assert np.mean(returns) > 5
