"""What does z say of a task? python benchmark/experiments/z_of_tasks.py RUN [RUN ...]

For runs of SMAC or focal.py on PointDirection, with z from the offline data of training tasks:

- names: the share of histories whose z is nearest to the mean z of their own task;
- neighbours: the cosine between a task and the task of the nearest mean z. At 1 z is in order: what
  is close in z is close in direction. At 0 z tells tasks apart and says nothing of what they are;
- linear map: the cosine between a task and the direction that a linear map of z gives, a map fitted to
  the other tasks;
- Q: the mean of Q for an action along the task minus that for the opposite one, in states of the data;
- policy: the mean action along the task.

Writes a table in Markdown, benchmark/results/context/z_of_tasks.md.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import buffers
import envs
from benchmark import watch
from plumbing.files import read_npz
from plumbing.flags import launch_tool

HISTORIES = 8  # of each training task
STATES = 64  # of each training task
COLUMNS = "run", "gradient steps", "names", "neighbours", "linear map", "Q", "policy"


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs; agent files have no Q-functions
    dataset: Optional[Path] = None  # of the runs; by default datasets/PointDirection.npz
    out: Path = ROOT / "benchmark" / "results" / "context" / "z_of_tasks.md"


def whole_agent(script, args, run):
    """The agent of a run with its Q-functions, which watch.load leaves out."""
    spec = envs.lookup(args.env_id)
    agent = script.Agent(spec.obs_dim, spec.action_dim, args)
    arrays = read_npz(run / "checkpoint.npz", lambda name, *_: name.startswith("agent/"))
    weights = {name.removeprefix("agent/"): torch.from_numpy(x) for name, x in arrays.items()}
    agent.load_state_dict(weights)
    return agent


def order(z, directions):
    """Names, neighbours and linear map of z (HISTORIES, T, dz) of tasks with directions (T, 2)."""
    mean = z.mean(0)  # (T, dz)
    tasks = torch.arange(len(mean))
    names = (torch.cdist(z, mean.expand_as(z)).argmin(-1) == tasks).float().mean()

    distances = torch.cdist(mean, mean).fill_diagonal_(torch.inf)
    neighbours = (directions * directions[distances.argmin(1)]).sum(1).mean()

    with_one = torch.cat([mean, torch.ones(len(mean), 1)], dim=1)
    cosines = []
    for task in tasks:
        others = tasks != task
        linear_map = torch.linalg.lstsq(with_one[others], directions[others]).solution
        guess = with_one[task] @ linear_map
        cosines.append(torch.cosine_similarity(guess, directions[task], dim=0))
    return names, neighbours, torch.stack(cosines).mean()


def use(agent, z, states, directions):
    """Q and policy for z (T, dz), states (T, STATES, s), directions (T, 2)."""
    z = z.repeat_interleave(STATES, 0)
    along = directions.repeat_interleave(STATES, 0)
    states = states.flatten(0, 1)
    action = 0.9 * along
    q = agent.q(states, action, z).amin(0) - agent.q(states, -action, z).amin(0)
    mean, _ = agent.policy(states, z)
    return q.mean(), (torch.tanh(mean) * along).sum(1).mean()


@torch.no_grad()
def main(cli):
    """Write the table. Raises InputError."""
    lines = [
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        "What z says of a task, and what critic and policy make of it. The columns are explained in",
        "benchmark/experiments/z_of_tasks.py.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    if not cli.runs:
        raise buffers.InputError("name at least one folder of a run")
    for run in cli.runs:
        script, args, _, agents = watch.load(run)
        if script.__name__ not in ("smac_offline_online", "focal"):
            raise buffers.InputError(f"{run} is of {script.__name__}.py, expected SMAC or focal.py")
        if args.env_id != "PointDirection":
            raise buffers.InputError(f"{run} is of {args.env_id}, expected PointDirection")
        agent = whole_agent(script, args, run)
        dataset = watch.load_dataset(run, args.env_id, cli.dataset)
        buffer = buffers.from_dataset(dataset, args.env_id)
        angles = dataset["train_tasks"][:, 0]
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        directions = torch.from_numpy(directions).float()
        tasks, rng = torch.arange(len(angles)), torch.Generator().manual_seed(args.seed)
        z = []
        for _ in range(HISTORIES):
            history = buffer.sample(tasks, args.context_batch, rng, "offline")
            z.append(agent.encoder(script.make_context(history, args))[0])
        z = torch.stack(z)
        states = buffer.sample(tasks, STATES, rng, "offline")["obs"]
        numbers = [*order(z, directions), *use(agent, z[0], states, directions)]
        cells = ["/".join(run.resolve().parts[-2:]), str(max(agents))]
        cells += [f"{number:.2f}" for number in numbers]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    cli.out.parent.mkdir(parents=True, exist_ok=True)
    cli.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    launch_tool(main, Args)
