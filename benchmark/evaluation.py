"""How long an evaluation takes, in one process and on several cores: python benchmark/evaluation.py, ten minutes

SMAC's `evaluate` with an agent of agents/, trained with --preset short, in one process and in as many as --cores, in
turn, so that what disturbs one disturbs the other. Appends the medians to benchmark/results/speed/evaluation.md.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import buffers
import envs
import smac_offline_online as smac
from benchmark import speed, watch
from plumbing.machine import versions


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(name for name in envs.SPECS if name != "SawyerManipulation8")
    cores: tuple[int, ...] = (1, 2)
    rounds: int = 3  # evaluations of each kind
    condition: str = "otherwise idle"  # of the machine, for the table
    file: Path = ROOT / "benchmark" / "results" / "speed" / "evaluation.md"


def measure(env_id, cli):
    """The environments of an evaluation, its environment steps, and for each number of cores its seconds."""
    _, args, _, agents = watch.load(ROOT / "agents" / f"{env_id}.npz")
    spec, dataset = envs.lookup(env_id), buffers.load_dataset(env_id)
    agent, buffer = (
        smac.Agent(spec.obs_dim, spec.action_dim, args),
        buffers.from_dataset(dataset, env_id),
    )
    acts = {
        name: value for name, value in agents[max(agents)].state_dict().items() if not value.is_meta
    }
    agent.load_state_dict(
        acts, strict=False
    )  # decoder and Q-functions are not in the file, and nothing here
    eval_envs = envs.make_evaluation(env_id, dataset["train_tasks"], dataset["test_tasks"])
    seconds, steps = {cores: [] for cores in cli.cores}, []
    for _ in range(cli.rounds):
        for cores, taken in seconds.items():
            torch.set_num_threads(cores)
            start = time.perf_counter()
            evaluations, _, _ = smac.evaluate(agent, buffer, eval_envs, args)
            taken.append(time.perf_counter() - start)
            played = [path for evaluation in evaluations for path in evaluation.final]
            played += [
                path
                for evaluation in evaluations
                if evaluation.context == "own"
                for pair in evaluation.exploration
                for path in pair
            ]
            steps.append(sum(len(path["actions"]) for path in played))
    return (
        sum(len(env_list) for _, env_list in eval_envs.values()),
        statistics.median(steps),
        seconds,
    )


def main(cli):
    rows = []
    for env_id in cli.env_ids:
        num, steps, seconds = measure(env_id, cli)
        medians = {cores: statistics.median(taken) for cores, taken in seconds.items()}
        rows.append(
            [env_id, num, f"{steps:.0f}", *(f"{second:.2f}" for second in medians.values())]
        )
        rows[-1] += [f"{medians[cli.cores[0]] / medians[cores]:.2f}" for cores in cli.cores[1:]]
        print(*rows[-1], sep="  ", flush=True)
    head = [
        "environment",
        "environments",
        "steps",
        *(f"s, {cores} core" + "s" * (cores > 1) for cores in cli.cores),
    ]
    head += [f"ratio, {cores} cores" for cores in cli.cores[1:]]
    text = f"{versions()['cpu']}, {cli.condition}, PyTorch {torch.__version__}; medians of {cli.rounds} evaluations.\n\n"
    with open(cli.file, "a") as file:
        file.write(text + speed.table(head, rows) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
