"""What of a return is adaptation? python benchmark/adaptation.py RUN [RUN ...] --out adaptation.md

Plays the third episode of the meta-episode on the test tasks, from the checkpoints of smac_offline_online.py,
pearl_online_oracle.py or meta_bc.py, and changes one thing at a time: z from the posterior of the agent's own
exploration of the task (as in every evaluation); from the posterior of its exploration of the next test task; from the
prior; and the first with sampled actions in place of deterministic ones.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import buffers
import envs
import meta_bc
import pearl_online_oracle
import smac_offline_online

SCRIPTS = {Path(script.__file__).stem: script for script in (smac_offline_online, pearl_online_oracle, meta_bc)}


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    out: Path = Path("adaptation.md")
    """table to write"""
    episodes: int = 20
    """meta-episodes a test task"""


@torch.no_grad()
def measure(run, episodes):
    """Gradient step of the checkpoint, and the four returns: (4, test tasks, episodes). Raises InputError."""
    _, name, *_ = [*run.resolve().name.split("__"), ""]
    if name not in SCRIPTS:
        raise buffers.InputError(f"{run} is no folder of a run of {', '.join(SCRIPTS)}")
    script = SCRIPTS[name]
    checkpoint = script.load_checkpoint(run, script.Args)
    args = checkpoint["args"]
    spec, file = envs.SPECS[args.env_id], getattr(args, "dataset", None)
    dataset = buffers.load_dataset(file or ROOT / "datasets" / f"{args.env_id}.npz", args.env_id, spec)
    agent = script.Agent(spec.obs_dim, spec.action_dim, args)
    optimizer = torch.optim.Adam(parameter for parameter in agent.parameters() if parameter.requires_grad)
    step, _ = buffers.restore(checkpoint, {"agent": agent, "optimizer": optimizer}, {})
    pairs = envs.make_evaluation(args.env_id, dataset["train_tasks"], dataset["test_tasks"], 1, episodes)["test"]
    env_list, generator = [env for _, env in pairs], torch.Generator().manual_seed(args.seed)

    final, exploration, _ = script.adapt(env_list, agent, args, generator)
    contexts = [script.make_context(script.concatenate(paths, "cpu"), args)[None] for paths in exploration]
    own = [torch.cat(part) for part in zip(*(agent.encoder(context) for context in contexts))]  # mu, sigma: (E, dz)
    others = [part.roll(episodes, 0) for part in own]  # the environments of a task stand side by side
    paths = [final]
    for z, deterministic in ((others, True), (script.prior(len(env_list), args, "cpu"), True), (own, False)):
        paths.append(script.rollout(env_list, agent, *z, args, generator, deterministic=deterministic))
    returns = np.array([script.sum_rewards(path) for path in paths])
    return step, returns.reshape(len(paths), -1, episodes)


def main(args):
    if not args.runs or args.episodes < 2:
        raise buffers.InputError("name a run at least, and --episodes 2 or more")
    head = "run|gradient step|own context|another task's|prior|own context, sampled actions".split("|")
    lines = [head, ["---"] * len(head)]
    for run in args.runs:
        step, returns = measure(run, args.episodes)
        means, errors = returns.mean((1, 2)), np.sqrt(returns.var(2, ddof=1).mean(1) / returns[0].size)
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in zip(means, errors)]
        lines.append(["/".join(run.resolve().parts[-3:]), str(step), *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = f"{args.episodes} meta-episodes on each test task; ± is the standard error over them, for these tasks."
    args.out.write_text(f"{note}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (buffers.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
