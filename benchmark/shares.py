"""Where the time of a SMAC run goes: python benchmark/shares.py

Measures for each environment, at the default flags: gradient steps of the second phase, the steps of an iteration's
exploration (its tasks side by side, and in turn) and of an evaluation's episodes, by an agent of initial weights, and
a line of the log. Computes the shares in a run's second phase, with episodes to the time limit, so that evaluation is
an upper bound, for this machine and for a GPU that makes 800 gradient steps a second beside the same environments.
Appends to benchmark/results/speed/shares.md.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import envs
import smac_offline_online as smac
from benchmark import speed
from plumbing.flags import preset
from plumbing.machine import keep_freed_memory, matmul_precision, versions

GPU_STEPS = 800  # gradient steps a second: results/speed/gpu.md


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(name for name in envs.SPECS if name != "SawyerManipulation8")
    threads: int = 1  # with one, processor time is measured, which other processes disturb less
    env_steps: int = 4_000  # of each measurement of environments, at least
    seconds: float = 4.0  # of each measurement of the gradient step


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def env_rate(groups, agent, args, env_steps):
    """Steps a second of episodes with z from the prior, the environments of a group side by side."""
    rng, done, start = torch.Generator().manual_seed(0), 0, clock()
    while done < env_steps:
        for group in groups:
            paths = smac.rollout(
                group, agent, *smac.prior(len(group), args, "cpu"), rng, read_rewards=False
            )
            done += sum(len(path["actions"]) for path in paths)
    return done / (clock() - start)


def measure(env_id, cli):
    """Rates, and the seconds of an iteration's parts."""
    args, spec = preset(smac.Args, smac.PRESETS, env_id), envs.lookup(env_id)
    agent, _, steps, sample = speed.make(spec, args)
    keep_freed_memory()
    precision = matmul_precision(
        torch.device("cpu"), args.meta_batch * args.rl_batch, args.policy_hidden[0]
    )
    torch.set_float32_matmul_precision(precision)
    updates = 1 / (
        1 / speed.rate(steps[True], cli.seconds, clock=clock)
        + 1 / speed.rate(sample, 1.0, clock=clock)
    )
    torch.set_float32_matmul_precision("highest")
    tasks = envs.sample_tasks(env_id, spec.num_train_tasks + spec.num_test_tasks)
    eval_envs = envs.make_evaluation(
        env_id, tasks[: spec.num_train_tasks], tasks[spec.num_train_tasks :]
    )
    test, train = (env_list for _, env_list in eval_envs.values())
    explored = train[:: max(1, len(train) // args.tasks_per_iteration)][: args.tasks_per_iteration]
    in_turn = env_rate([[env] for env in explored], agent, args, cli.env_steps)
    side_by_side = env_rate([explored], agent, args, cli.env_steps)
    evaluated = env_rate([test + train], agent, args, cli.env_steps)
    info, totals = steps[True](), {}
    log = speed.rate(
        lambda: {name: totals.get(name, 0) + value for name, value in info.items()},
        1.0,
        clock=clock,
    )

    count, per_evaluation = (
        args.updates_per_iteration,
        (3 * len(test) + 4 * len(train)) * spec.horizon,
    )
    seconds = {
        "update": count / updates,
        "collection": args.tasks_per_iteration
        * (args.prior_steps + args.posterior_steps)
        / side_by_side,
        "evaluation": per_evaluation / evaluated * count / args.eval_every,
        "logging": count / log,
    }
    return [updates, in_turn, side_by_side, evaluated], args.eval_every, seconds


def main(cli):
    torch.set_num_threads(cli.threads)
    rows = []
    for env_id in cli.env_ids:
        rates, eval_every, seconds = measure(env_id, cli)
        row = [
            env_id,
            f"{rates[0]:.1f}",
            *(f"{rate:.0f}" for rate in rates[1:]),
            f"{rates[2] / rates[1]:.2f}",
            eval_every,
        ]
        for update in (seconds["update"], seconds["update"] * rates[0] / GPU_STEPS):
            parts = seconds | {"update": update}
            row.append(
                " / ".join(f"{100 * part / sum(parts.values()):.1f}" for part in parts.values())
            )
        rows.append(row)
        print(*row, sep="  ", flush=True)
    text = f"{versions()['cpu']}, PyTorch {torch.__version__}, {cli.threads} thread(s). Shares in %: update / "
    text += f"collection / evaluation / logging; GPU: computed for {GPU_STEPS} gradient steps a second.\n\n"
    header = "environment, gradient steps/s, env steps/s in turn, side by side, in an evaluation, side by side / in turn"
    text += (
        speed.table(
            [*header.split(", "), "`eval_every`", "share of the second phase", "the same, GPU"],
            rows,
        )
        + "\n"
    )
    with open(ROOT / "benchmark" / "results" / "speed" / "shares.md", "a") as file:
        file.write(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
