"""PEARL: its losses against numbers computed by hand, the buffers it keeps, the dataset it writes, resuming."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import buffers
import envs
import pearl_online_oracle as pearl

OBS, ACTION, T, B = 4, 2, 2, 3
SMALL = [
    *"--env-id PointDirection --q-hidden 16 16 --policy-hidden 16 16 --encoder-hidden 16 --rl-batch 16".split(),
    *"--context-batch 8 --latent-dim 3 --online-iterations 3 --updates-per-iteration 6 --eval-every 12".split(),
    *"--checkpoint-every 6 --initial-steps 50 --prior-steps 50 --posterior-steps 60 --tasks-per-iteration 2".split(),
    *"--device cpu".split(),
]


@pytest.fixture
def quick(monkeypatch):
    """Few tasks, small evaluations."""
    spec = envs.Spec(OBS, ACTION, 1, 50, 6, 2)
    monkeypatch.setitem(envs.SPECS, "PointDirection", spec)
    for name, value in (("EVAL_REPEATS", 2), ("TRAIN_EVAL_TASKS", 3), ("LOG_EVERY", 5)):
        monkeypatch.setattr(pearl, name, value)


def start(folder, *flags):
    agent = pearl.main(pearl.parse_args([*SMALL, "--run-dir", str(folder), *(str(flag) for flag in flags)]))
    return Path(folder) / "PointDirection__pearl_online_oracle__1", agent


def setting(seed=0, **flags):
    """Small networks with visible outputs, and a batch of T tasks."""
    torch.manual_seed(seed)
    sizes = {"q_hidden": (8,), "policy_hidden": (8,), "encoder_hidden": (8,), "latent_dim": 3}
    args = pearl.Args(env_id="PointDirection", **sizes, **flags)
    agent = pearl.Agent(OBS, ACTION, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    batch = {"obs": torch.randn(T, B, OBS), "next_obs": torch.randn(T, B, OBS), "actions": torch.rand(T, B, ACTION)}
    batch |= {"rewards": torch.randn(T, B, 1), "terminals": torch.tensor([0.0, 1, 0, 0, 0, 1]).reshape(T, B, 1)}
    batch |= {"context": torch.randn(T, 5, OBS + ACTION + 1), "noise_z": torch.randn(T, 3)}
    batch |= {name: torch.randn(T * B, ACTION) for name in ("noise_a", "noise_next_a")}
    return agent, batch, args


def flatten(batch):
    flat = {name: batch[name].flatten(0, 1) for name in ("obs", "next_obs", "actions")}
    return batch | flat | {name: batch[name].flatten() for name in ("rewards", "terminals")}


def log_density(actions, mean, log_std):
    """log pi of tanh actions, from the density of atanh(a) and the derivative 1 - a^2, in numpy."""
    u = np.arctanh(actions)
    gaussian = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - np.log(1 - actions**2)).sum(-1)


def trained(agent):
    """Names of the networks that have a gradient other than zero."""
    return {
        name.split(".")[0]
        for name, parameter in agent.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }


def test_soft_bellman_target_by_hand():
    agent, batch, args = setting(reward_scale=5.0, gamma=0.9)
    batch, z = flatten(batch), torch.randn(T * B, 3)
    loss, q = pearl.soft_critic_loss(agent, batch, z, args)
    with torch.no_grad():
        mean, log_std = agent.policy(batch["next_obs"], z)
        actions = torch.tanh(mean + log_std.exp() * batch["noise_next_a"])
        target_q = agent.q_target(batch["next_obs"], actions, z).numpy().min(0)
    soft = target_q - log_density(actions.double().numpy(), mean.numpy(), log_std.numpy())
    y = 5 * batch["rewards"].numpy() + 0.9 * (1 - batch["terminals"].numpy()) * soft
    errors = (q.detach().numpy() - y) ** 2
    assert loss.item() == pytest.approx(errors[0].mean() + errors[1].mean(), rel=1e-4)
    assert np.allclose(y[[1, 5]], 5 * batch["rewards"].numpy()[[1, 5]])  # a fall ends the sum


def test_actor_loss_by_hand():
    agent, batch, args = setting(policy_reg=0.1)
    batch, z = flatten(batch), torch.randn(T * B, 3)
    loss, log_prob = pearl.pearl_actor_loss(agent, batch, z, args)
    with torch.no_grad():
        mean, log_std = agent.policy(batch["obs"], z)
        actions = torch.tanh(mean + log_std.exp() * batch["noise_a"])
        q = agent.q(batch["obs"], actions, z).numpy().min(0)
    density = log_density(actions.double().numpy(), mean.numpy(), log_std.numpy())
    assert np.allclose(log_prob.detach().numpy(), density, rtol=1e-4, atol=1e-4)
    regulariser = 0.1 * (np.mean(mean.numpy() ** 2) + np.mean(log_std.numpy() ** 2))
    assert loss.item() == pytest.approx((density - q).mean() + regulariser, rel=1e-4)


def test_critic_loss_trains_critic_and_encoder_and_actor_loss_the_policy_alone():
    agent, batch, args = setting()
    mu, sigma = agent.encoder(batch["context"])
    z = (mu + sigma * batch["noise_z"]).repeat_interleave(B, 0)
    pearl.soft_critic_loss(agent, flatten(batch), z, args)[0].backward()
    assert trained(agent) == {"q", "encoder"}
    agent.zero_grad()
    pearl.pearl_actor_loss(agent, flatten(batch), z.detach(), args)[0].backward()
    assert trained(agent) == {"policy"}


def test_update_moves_every_network_and_the_target_by_tau():
    agent, batch, args = setting(tau=0.25, lr=1e-2)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=args.lr)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    pearl.update(agent, optimizer, batch, args)
    after = agent.state_dict()
    for part in ("encoder", "policy", "q"):
        assert any(not torch.equal(after[k], before[k]) for k in after if k.startswith(part + "."))
    for name in (name for name in after if name.startswith("q_target.")):
        expected = 0.75 * before[name] + 0.25 * after[name.replace("q_target", "q")]
        assert torch.allclose(after[name], expected, atol=1e-6)
        assert agent.get_parameter(name).grad_fn is None  # or the graph would grow with every step


def test_kl_weight_pulls_the_posterior_to_the_prior():
    kl = []
    for kl_coef in (0.0, 100.0):
        agent, batch, args = setting(kl_coef=kl_coef, lr=1e-2)
        optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=args.lr)
        for _ in range(30):
            info = pearl.update(agent, optimizer, batch, args)
        kl.append(info["losses/kl"].item())
    assert kl[1] < 0.5 * kl[0]


def test_a_run_writes_the_dataset_and_resumes_bit_for_bit(tmp_path, quick, monkeypatch):
    assert pearl.DEFAULT_SLICES == (("last", 1200), None)  # C.2; more than there is in this run
    monkeypatch.setattr(pearl, "DEFAULT_SLICES", (("last", 100), None))
    whole, agent = start(tmp_path / "whole", "--save-dataset", tmp_path / "d.npz", "--dataset-iteration", 2)
    start(tmp_path / "part", "--online-iterations", 2)
    part = tmp_path / "part" / whole.name
    state = torch.load(part / "checkpoint.pt", weights_only=True)["buffer"]  # after two iterations
    resumed = pearl.main(pearl.parse_args(["--resume", str(part), "--online-iterations", "3"]))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in agent.state_dict().items())
    assert (whole / "eval.csv").read_bytes() == (part / "eval.csv").read_bytes()
    with open(whole / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 3) and {row["gradient_step"] for row in rows} == {"12", "18"}

    dataset = buffers.load_dataset(tmp_path / "d.npz", "PointDirection", envs.SPECS["PointDirection"])
    tasks = envs.sample_tasks("PointDirection", 8)
    assert np.array_equal(dataset["train_tasks"], tasks[:6]) and np.array_equal(dataset["test_tasks"], tasks[6:])
    assert dataset["encoder"] == [] and {task for task, _ in dataset["rl"]} == set(range(6))
    for task, path in dataset["rl"]:  # rewards are those of the task
        direction = np.array([np.cos(tasks[task, 0]), np.sin(tasks[task, 0])])
        assert np.allclose(path["rewards"], path["obs"][1:, 2:] @ direction, atol=1e-5)
    for task in range(6):  # and the transitions are the last
        size = int(state["sizes"]["rl"][task])
        index = state["tables"]["rl"][task, max(0, size - 100) : size].long()
        actions = np.concatenate([path["actions"] for number, path in dataset["rl"] if number == task])
        assert len(actions) == min(size, 100) and np.array_equal(actions, state["fields"]["actions"][index])
    command = str(np.load(tmp_path / "d.npz")["command"])
    assert command.startswith("python pearl_online_oracle.py --env-id PointDirection ")
    args = vars(pearl.parse_args(command.split()[2:]))
    given = vars(pearl.parse_args([*SMALL, "--save-dataset", str(tmp_path / "d.npz"), "--dataset-iteration", "2"]))
    assert args == given | {"run_dir": str(tmp_path / "whole")} and "--gamma" not in command


def test_the_encoder_buffer_holds_the_last_exploration_and_the_rl_buffer_everything(tmp_path, quick):
    run, _ = start(tmp_path)
    sizes = torch.load(run / "checkpoint.pt", weights_only=True)["buffer"]["sizes"]
    visits = (sizes["rl"] - 50) / 150  # 50 steps at the start; a visit adds one episode of 50 and two of 50
    assert visits.sum() == 3 * 2 and torch.equal(visits, visits.round())
    assert torch.equal(sizes["context"], torch.full((6,), 50))


def test_cheetah_takes_the_first_of_one_buffer_and_the_last_of_the_other(tmp_path):
    spec, rng = envs.SPECS["CheetahVelocity"], np.random.default_rng(0)
    buffer, stored = buffers.ReplayBuffer(2, spec.obs_dim, spec.action_dim, 10_000), [[], []]
    for episode in range(16):
        length = 200
        path = {"obs": rng.normal(size=(length + 1, spec.obs_dim)), "actions": rng.uniform(-1, 1, (length, 6))}
        path |= {"rewards": rng.normal(size=length), "terminals": np.zeros(length, bool)}
        path = {name: value.astype(np.float32) for name, value in path.items()}
        buffer.add(episode % 2, path)
        stored[episode % 2].append(path)
    args = pearl.Args(env_id="CheetahVelocity", save_dataset=str(tmp_path / "c.npz"))
    pearl.write_dataset(buffer, np.array([[1.0], [2.0]]), np.array([[0.5]]), args)
    dataset = buffers.load_dataset(tmp_path / "c.npz", "CheetahVelocity", spec)
    for task in range(2):
        for part, wanted in (("rl", stored[task][:6]), ("encoder", stored[task][-2:])):
            found = [path for number, path in dataset[part] if number == task]
            assert all(np.array_equal(a["obs"], b["obs"]) for a, b in zip(found, wanted, strict=True))


def test_it_learns_the_point_mass(tmp_path):
    """At the end seeds 1, 2, 3 have 24, 21, 17 on test and 35, 26, 19 on train tasks; an untrained one about 0."""
    flags = "--env-id PointDirection --rl-batch 64 --online-iterations 8 --updates-per-iteration 350 --eval-every 2800"
    run = tmp_path / "PointDirection__pearl_online_oracle__1"
    pearl.main(pearl.parse_args([*flags.split(), "--run-dir", str(tmp_path)]))
    with open(run / "eval.csv", newline="") as file:
        assert np.mean([float(row["return"]) for row in csv.DictReader(file)]) > 12


def test_a_finished_run_can_be_looked_at(tmp_path, quick, capsys):
    run, _ = start(tmp_path)
    before = (run / "eval.csv").read_bytes()
    capsys.readouterr()
    pearl.main(pearl.parse_args(["--resume", str(run), "--eval-only", "--capture-video"]))
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 3
    assert (run / "video.gif").stat().st_size > 1000 and (run / "eval.csv").read_bytes() == before


def test_success_is_the_behaviour_achieved_in_the_last_step(drawers):
    args = pearl.Args(env_id="SawyerManipulation", policy_hidden=(8,), q_hidden=(8,), encoder_hidden=(8,))
    torch.manual_seed(0)
    _, scalars, _ = pearl.evaluate(pearl.Agent(13, 4, args), drawers, args)
    assert scalars == {"eval/test/online_context_success": 0, "eval/train/online_context_success": 1}
