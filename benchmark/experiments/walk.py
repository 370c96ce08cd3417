"""Does PEARL learn where to go? python benchmark/experiments/walk.py RUN

Of all that a PEARL run of AntDirection or HumanoidDirection has collected up to its checkpoint, in the order in which
it was collected: the reward, the velocity along the task's direction, the speed, and the squared actions, each a mean
over so many transitions. Prints a table in Markdown.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import buffers
import envs
import pearl_online_oracle as pearl
from benchmark.speed import speed
from plumbing.files import read_npz
from plumbing.flags import launch_tool, read_flags


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of a PEARL run
    every: int = 20_000  # transitions a line


def main(cli):
    """Print the table. Raises InputError."""
    if cli.every < 1:
        raise buffers.InputError(f"--every is {cli.every}, expected 1 at least")
    file = cli.run / "checkpoint.npz"
    args = read_flags(pearl.Args, pearl.PRESETS, file)
    spec = envs.lookup(args.env_id)
    if not issubclass(spec.env_class, envs.Direction):
        raise buffers.InputError(f"the tasks of {args.env_id} are no directions")
    names = (
        "fields/next_obs",
        "fields/rewards",
        "fields/actions",
        "fields/terminals",
        "index/rl",
        "sizes/rl",
    )
    data = read_npz(file, lambda name, *_: name.removeprefix("buffer/") in names)
    data = {name.split("/", 1)[1]: array for name, array in data.items()}
    tasks = envs.sample_tasks(
        args.env_id, spec.num_train_tasks + spec.num_test_tasks, args.task_seed
    )
    owners = np.empty(len(data["index/rl"]), int)  # the task of each transition
    owners[data["index/rl"]] = np.repeat(np.arange(spec.num_train_tasks), data["sizes/rl"])
    first, _ = spec.env_class.ground_velocity
    velocity = data["fields/next_obs"][:, first : first + 2]
    direction = np.stack([np.cos(tasks[owners, 0]), np.sin(tasks[owners, 0])], axis=1)
    columns = {
        "reward": data["fields/rewards"][:, 0],
        "along the direction (m/s)": (velocity * direction).sum(1),
        "speed (m/s)": np.linalg.norm(velocity, axis=1),
        "sum of squared actions": (data["fields/actions"] ** 2).sum(1),
        "falls": data["fields/terminals"][:, 0],
    }
    rows = []
    for start in range(0, len(owners), cli.every):
        part = slice(start, start + cli.every)
        rows.append([start, *(f"{column[part].mean():.3f}" for column in columns.values())])
    print(speed.table(["from transition", *columns], rows), end="")


if __name__ == "__main__":
    launch_tool(main, Args)
