"""How fast a gradient step of SMAC is, against this machine's limit: python benchmark/speed.py

On the same random data, in one run: a plain version of the same step (benchmark/plain_update.py) and the shipped one
at PyTorch's defaults; then, with the settings of `matmul_precision`, the shipped step, and the matrix products
of the step alone at the better of both precisions (the ceiling). Then how the cost grows. Writes
benchmark/results/speed/{name}.md and prints it.
"""

import dataclasses
import itertools
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import buffers
import envs
import smac_offline_online as smac
from benchmark.plain_update import PlainAgent, plain_update
from plumbing.machine import keep_freed_memory, matmul_precision, versions


@dataclasses.dataclass
class Args:
    name: str = "cpu"  # name of the file of results
    seconds: float = 4.0  # time for each measurement
    env_ids: tuple[str, ...] = (
        "HopperParam",
        "CheetahVelocity",
        "HumanoidDirection",
    )  # the last line is of the first


def rate(function, seconds, rounds=4, clock=time.perf_counter):
    """Calls a second in the best of a few rounds: what disturbs a measurement only ever slows it down."""
    function()
    start = clock()
    function()
    calls, best = max(1, int(seconds / rounds / (clock() - start))), 0.0
    for _ in range(rounds):
        start = clock()
        for _ in range(calls):
            function()
        best = max(best, calls / (clock() - start))
    return best


def random_buffer(spec, num_tasks, transitions=100, device="cpu"):
    """A buffer with random transitions of each task."""
    buffer = buffers.ReplayBuffer(
        num_tasks, spec.obs_dim, spec.action_dim, num_tasks * transitions, device
    )
    rng = np.random.default_rng(0)
    for task in range(num_tasks):
        path = {
            "obs": rng.normal(size=(transitions + 1, spec.obs_dim)),
            "rewards": rng.normal(size=transitions),
        }
        path["actions"] = rng.uniform(-1, 1, (transitions, spec.action_dim))
        path = {name: values.astype(np.float32) for name, values in path.items()}
        buffer.add(task, path | {"terminals": np.zeros(transitions, bool)})
    return buffer


def make(spec, args, num_tasks=50):
    """Agent, and the shipped step as a function of the phase, on random data."""
    torch.manual_seed(0)
    agent, generator = (
        smac.Agent(spec.obs_dim, spec.action_dim, args),
        torch.Generator().manual_seed(0),
    )
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    optimizer, buffer = (
        torch.optim.Adam(trained, lr=args.lr, fused=True),
        random_buffer(spec, num_tasks),
    )
    batch = smac.sample_batch(buffer, args, generator)

    steps = {
        online: partial(smac.update, agent, optimizer, batch, args, online)
        for online in (False, True)
    }
    return agent, batch, steps, partial(smac.sample_batch, buffer, args, generator)


def set_precision(args):
    """What `Run.fast` does for the step of these flags; returns the precision."""
    keep_freed_memory()
    precision = matmul_precision(
        torch.device("cpu"), args.meta_batch * args.rl_batch, args.policy_hidden[0]
    )
    torch.set_float32_matmul_precision(precision)
    return precision


def products(spec, args, online):
    """Every matrix product of one step, as (copies, rows, inner, columns)."""
    n, context = args.meta_batch * args.rl_batch, args.meta_batch * args.context_batch
    z, o, a = args.latent_dim, spec.obs_dim, spec.action_dim
    sizes = {
        "encoder": [o + a + 1, *args.encoder_hidden, 2 * z],
        "decoder": [o + a + z, *args.decoder_hidden, 1],
        "policy": [o + z, *args.policy_hidden, 2 * a],
        "q": [o + a + z, *args.q_hidden, 1],
    }
    found = []

    def network(name, rows, copies=1, weights=False, inputs=False, first_input=False):
        """A forward pass, and the products for the gradients of weights and of layer inputs."""
        for i, (inner, columns) in enumerate(zip(sizes[name], sizes[name][1:])):
            found.append((copies, rows, inner, columns))
            if weights:
                found.append((copies, inner, rows, columns))
            if inputs and (i > 0 or first_input):
                found.append((copies, rows, columns, inner))

    network("encoder", context, weights=not online, inputs=not online)
    network("decoder", n, weights=not online, inputs=not online, first_input=True)
    network("policy", n)  # a' of Eq. 1
    network("q", n, copies=2)  # target
    network("q", n, copies=2, weights=True, inputs=True)  # Eq. 1
    network("policy", n, weights=True, inputs=True)  # Eq. 2
    network(
        "q", n, copies=2, inputs=online, first_input=True
    )  # V of Eq. 2; its gradient is the PEARL loss's
    return found


def ceiling(found, args, seconds):
    """Steps a second if the products were all there is, each at the best of the two precisions; and GFLOP of a step."""
    total = 0.0
    for (copies, rows, inner, columns), number in {
        shape: found.count(shape) for shape in found
    }.items():
        x, w = torch.randn(copies, rows, inner), torch.randn(copies, inner, columns)
        out, best = torch.empty(copies, rows, columns), 0.0
        for precision in ("medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            best = max(best, rate(partial(torch.bmm, x, w, out=out), seconds / 20))
        total += number / best
    set_precision(args)
    return 1 / total, sum(2 * np.prod([float(n) for n in shape]) for shape in found) / 1e9


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def main(cli):
    first, threads = cli.env_ids[0], torch.get_num_threads()
    args, spec = smac.Args(env_id=first), envs.SPECS[first]
    text = f"{versions()['cpu']}, {threads} threads, PyTorch {torch.__version__}, {args.meta_batch} tasks x "
    text += f"{args.rl_batch} transitions.\n"

    # Before any setting of ours
    agent, batch, steps, _ = make(spec, args)
    plain = PlainAgent(agent, args.lr)
    eager = {
        online: rate(partial(plain_update, plain, batch, args, online), cli.seconds)
        for online in (False, True)
    }
    default = {online: rate(steps[online], cli.seconds) for online in (False, True)}

    text += f"Precision of matrix products: {set_precision(args)}, the faster of those that are true fp32 here.\n"
    rows, ratios = [], {}
    for env_id, online in itertools.product(cli.env_ids, (False, True)):
        args, spec = smac.Args(env_id=env_id), envs.SPECS[env_id]
        _, _, steps, _ = make(spec, args)
        found = products(spec, args, online)
        shipped = rate(steps[online], cli.seconds)
        limit, gflop = ceiling(found, args, cli.seconds)
        shipped = max(shipped, rate(steps[online], cli.seconds))
        limit = max(limit, ceiling(found, args, cli.seconds)[0])
        row = [
            env_id,
            "self-supervised" if online else "offline",
            f"{shipped:.1f}",
            f"{gflop:.2f}",
            f"{limit:.1f}",
        ]
        row += [f"{shipped / limit:.2f}"]
        if env_id == first:
            ratios[online] = shipped / limit, shipped / eager[online]
            row += [
                f"{default[online]:.1f}",
                f"{eager[online]:.1f}",
                f"{shipped / eager[online]:.2f}",
            ]
        rows.append(row + [""] * (9 - len(row)))
    header = "environment, phase, steps/s, GFLOP a step, ceiling, fraction of ceiling"
    header += ", at PyTorch's defaults, plain, ratio to plain"
    text += "\n" + table(header.split(", "), rows)

    args, spec, rows = smac.Args(env_id=first), envs.SPECS[first], []
    for what, values in (
        ("tasks", (10, 100, 1000)),
        ("batch", (64, 256, 1024)),
        ("observation", (11, 100, 400)),
    ):
        for value in values:
            sizes = dataclasses.replace(spec, obs_dim=value) if what == "observation" else spec
            flags = dataclasses.replace(args, rl_batch=value) if what == "batch" else args
            _, _, steps, sample = make(sizes, flags, num_tasks=value if what == "tasks" else 50)
            step, draw = 1e3 / rate(steps[False], cli.seconds), 1e3 / rate(sample, cli.seconds)
            rows.append(
                [what, value, f"{step:.1f}", f"{draw:.2f}", f"{100 * draw / (step + draw):.1f} %"]
            )
    text += "\n" + table(["grows", "to", "ms a step", "ms a batch", "sampling's share"], rows)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text += f"\nPeak memory of this program: {peak:.0f} MB.\n"
    fraction, ratio = ratios[False]
    text += f"\nfraction of fp32 ceiling: {fraction:.2f}, ratio to eager: {ratio:.2f}\n"
    folder = ROOT / "benchmark" / "results" / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cli.name}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
