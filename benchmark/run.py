"""Run a benchmark and keep its evidence: python benchmark/run.py point_direction

Starts the runs of one row of BENCHMARKS with one thread each, --parallel at a time, and copies eval.csv, args.json and
the diagnostics in TensorBoard's files of each into benchmark/results/{name}/, of a run that was stopped as well. Called
again, it goes on with runs that have a checkpoint, and does not make results again that are there already; it says so
where they are of a run that did not end. With --ray the runs are tasks of a Ray cluster, see benchmark/README.md.
"""

import contextlib
import csv
import ctypes
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Optional

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import buffers
import envs
from benchmark import agents
from plumbing.flags import launch_tool, print_safely

POINT = "smac_offline_online.py --env-id PointDirection"
HOPPER = "--env-id HopperParam"
ONE_TASK = "--tasks-per-iteration 1"
SHORT = "--rl-batch 64 --updates-per-iteration 2000"
SAWYER = "--env-id SawyerManipulation"
FOUR = (1, 2, 3, 4)
SMALL_SAWYER = f"{SAWYER} --rl-batch 128"


def small(env_id, every, pearl, seeds=(1,)):
    """Methods with a quarter of the paper's batch, one to two hours a run: {label: (command, seeds)}.

    Args:
        every: gradient steps between two evaluations.
        pearl: further flags of the Online Oracle, whose run makes the dataset.
        seeds: of the Online Oracle.
    """
    flags = f"--env-id {env_id} --rl-batch 64 --eval-every {every}"
    smac = f"smac_offline_online.py {flags} --updates-per-iteration 2000 --online-iterations 50"
    return {
        "smac": (smac, (1, 2, 3)),
        "smac_actor_ablation": (f"{smac} --actor-ablation", (1,)),
        "meta_bc": (f"meta_bc.py {flags}", (1,)),
        "pearl": (f"pearl_online_oracle.py --env-id {env_id} {SHORT} {pearl}", seeds),
    }


def baselines(env_id, flags=""):
    """The two published baselines, at their own budget."""
    return {
        name: (f"{name}.py --env-id {env_id} {flags}".strip(), (1,)) for name in ("macaw", "borel")
    }


def encoder_ablations(rows):
    """The two of Figure 7, of a table with a row "smac"."""
    losses = ("q", "reward_then_q")
    return {
        f"smac_encoder_{loss}": (f"{rows['smac'][0]} --encoder-loss {loss}", FOUR)
        for loss in losses
    }


def short(env_id):
    """All methods with --preset short."""
    flags = f"--env-id {env_id} --preset short"
    smac = f"smac_offline_online.py {flags}" + " --tasks-per-iteration 5" * env_id.startswith(
        "Sawyer"
    )  # its row: one
    steps = 30_000 if env_id == "CheetahVelocity" else 35_000  # as many as both phases have
    control = f"{smac} --offline-steps {steps} --online-iterations 0"
    rows = {"smac": (smac, FOUR), "smac_more_offline": (control, FOUR)}
    if (
        env_id == "PointDirection"
    ):  # of the rest there is a benchmark of its own: its sizes are short anyway
        return {"smac": (smac, (1, 2, 3))}
    if env_id.startswith("Sawyer"):  # fifty scenes: Figure 9; the other methods with 200
        test, two = f"{smac} --explore-tasks test", (1, 2)
        return {
            "smac": (smac, two), "smac_one_task": (f"smac_offline_online.py {flags}", (1,)),
            "smac_test_tasks": (test, two), "smac_test_tasks_oracle_rewards": (f"{test} --oracle-rewards", two),
        }  # fmt: skip
    rows |= others(smac, flags) | {"pearl": (f"pearl_online_oracle.py {flags}", FOUR)}
    return rows | (
        encoder_ablations(rows)
        if env_id in ("HopperParam", "WalkerParam", "HumanoidDirection")
        else {}
    )


def others(smac, flags):
    """The actor ablation and the methods without a second phase."""
    rows = {name: (f"{name}.py {flags}", FOUR) for name in ("meta_bc", "macaw", "borel")}
    return {"smac_actor_ablation": (f"{smac} --actor-ablation", FOUR), **rows}


def scenes():
    """All methods with --preset short on Sawyer with 200 scenes; true rewards stand for the Online Oracle."""
    flags = (
        "--env-id SawyerManipulation --preset short --dataset datasets/SawyerManipulation200.npz"
    )
    smac = f"smac_offline_online.py {flags}"
    return {
        "smac": (smac, FOUR), "smac_more_offline": (f"{smac} --offline-steps 35000 --online-iterations 0", FOUR),
        "smac_oracle_rewards": (f"{smac} --oracle-rewards", FOUR), **others(smac, flags),
        "smac_five_tasks": (f"{smac} --tasks-per-iteration 5", (3,)),
        "smac_lambda_pearl": (f"{smac} --lambda-pearl 1", (1,)),
    }  # fmt: skip


HOPPER_SMALL = small("HopperParam", 5000, "--online-iterations 50", (1, 2, 3))
CHEETAH_SMALL = small(
    "CheetahVelocity", 5000, "--online-iterations 50 --save-dataset datasets/CheetahVelocity.npz"
)  # fmt: skip
CHEETAH_SMAC = CHEETAH_SMALL["smac"][0]
# The oracles of Walker and Humanoid also make their datasets, after 40 or 100 iterations.
WALKER_SMALL, ANT_SMALL, HUMANOID_SMALL = (
    small(env_id, every, f"--online-iterations {end} --eval-every 10000{save}")
    for env_id, every, end, save in (
        ("WalkerParam", 5000, 40, " --save-dataset datasets/WalkerParam.npz"),
        ("AntDirection", 10_000, 100, ""),
        ("HumanoidDirection", 5000, 100, " --save-dataset datasets/HumanoidDirection.npz"),
    )
)
TEN = tuple(range(1, 11))
BENCHMARKS = {
    # name: {label: (command, seeds)}
    "point_direction": {
        "smac": (POINT, TEN), "smac_more_offline": (f"{POINT} --offline-steps 12600 --online-iterations 0", TEN),
        "smac_oracle_rewards": (f"{POINT} --oracle-rewards", TEN),
        "meta_bc": ("meta_bc.py --env-id PointDirection", TEN),
        "pearl": ("pearl_online_oracle.py --env-id PointDirection", TEN),
        "smac_actor_ablation": (f"{POINT} --actor-ablation", TEN),
        "smac_encoder_q": (f"{POINT} --encoder-loss q", (1, 2, 3)),
        "smac_encoder_reward_then_q": (f"{POINT} --encoder-loss reward_then_q", (1, 2, 3)),
        "smac_test_tasks": (f"{POINT} --explore-tasks test", (1, 2, 3)),
        "smac_test_tasks_oracle_rewards": (f"{POINT} --explore-tasks test --oracle-rewards", (1, 2, 3)),
        "smac_goal_data": (f"{POINT} --dataset datasets/PointDirectionGoal.npz", (1, 2, 3)),
        "smac_goal_data_slow": (f"{POINT} --dataset datasets/PointDirectionGoal.npz --lr 3e-4", (1, 2, 3)),
        "smac_goal_data_oracle_rewards": (
            f"{POINT} --dataset datasets/PointDirectionGoal.npz --oracle-rewards", (1, 2, 3)
        ),
        "macaw": ("macaw.py --env-id PointDirection", TEN),
        "macaw_matched": ("macaw.py --env-id PointDirection --preset matched", TEN),
        "borel": ("borel.py --env-id PointDirection", TEN),
        "borel_matched": ("borel.py --env-id PointDirection --preset matched", (1, 2, 3)),
    },
    "hopper_param": {
        "smac": (f"smac_offline_online.py {HOPPER}", (1, 2, 3)),
        "smac_one_task": (f"smac_offline_online.py {HOPPER} {ONE_TASK}", (1,)),
        "pearl": (
            f"pearl_online_oracle.py {HOPPER} --online-iterations 50 --eval-every 16000 "
            "--save-dataset datasets/HopperParam.npz",
            (1,),
        ),
        "meta_bc": (f"meta_bc.py {HOPPER}", (1,)),
        **baselines("HopperParam"),
    },
    "hopper_small": {
        **HOPPER_SMALL,
        "smac_one_task": (
            f"smac_offline_online.py {HOPPER} --rl-batch 64 --eval-every 5000 {ONE_TASK} --online-iterations 25",
            (1,),
        ),
        **encoder_ablations(HOPPER_SMALL),
    },
    "walker_small": {**WALKER_SMALL, **baselines("WalkerParam"), **encoder_ablations(WALKER_SMALL)},
    "cheetah_small": {
        **CHEETAH_SMALL,
        **baselines("CheetahVelocity"),
        "smac_encoder_prior": (f"{CHEETAH_SMAC} --encoder-buffer prior", (1,)),
        "smac_oracle_rewards": (CHEETAH_SMAC.replace("iterations 50", "iterations 25") + " --oracle-rewards", (1,)),
    },
    "ant_small": {**ANT_SMALL, **baselines("AntDirection", "--eval-every 10000")},
    "humanoid_small": {
        **HUMANOID_SMALL, **baselines("HumanoidDirection"), **encoder_ablations(HUMANOID_SMALL),
    },
    **{f"short/{env_id}": short(env_id) for env_id in envs.SPECS}, "short/SawyerManipulation200": scenes(),
    "sawyer": {
        "smac": (f"smac_offline_online.py {SAWYER} --online-iterations 20", (1,)),
        "meta_bc": (f"meta_bc.py {SAWYER}", (1,)),
    },
    "sawyer_small": {
        "smac": (f"smac_offline_online.py {SMALL_SAWYER} --online-iterations 12", (1,)),
        "smac_two_critics": (f"smac_offline_online.py {SMALL_SAWYER} --online-iterations 20 --num-critics 2", (1,)),
        "smac_test_tasks": (f"smac_offline_online.py {SMALL_SAWYER} --online-iterations 12 --explore-tasks test", (1,)),
        "meta_bc": (f"meta_bc.py {SMALL_SAWYER}", (1,)),
    },
}  # fmt: skip


@dataclasses.dataclass
class Args:
    name: tyro.conf.Positional[str]  # a key of BENCHMARKS, or what several begin with: short
    only: tuple[str, ...] = ()  # labels of the runs to make, in place of all of them
    parallel: int = 2  # runs side by side, one thread each
    run_dir: str = (
        "runs/benchmark"  # where the runs write; a run that was stopped goes on from its checkpoint
    )
    agents: bool = False  # of runs that end keep what acting needs, too: results/{name}/agents/{label}__{seed}.npz
    results: str = "benchmark/results"  # where the evidence goes
    ray: Optional[str] = (
        None  # address of a Ray cluster, "auto" from one of its machines, "local" for this one alone
    )
    gpus_per_run: float = 0.0  # with --ray: share of a GPU for each run


def diagnostics(result, file):
    """Write what a run logged beside returns and losses, if anything, as a small CSV: a line for each evaluation."""
    events = EventAccumulator(str(result), size_guidance={"scalars": 0})
    events.Reload()
    tags = [
        tag for tag in events.Tags()["scalars"] if tag.startswith(("charts/", "eval/", "train/"))
    ]
    left_out = "context_return", "exploration_return", "SPS"  # the returns are in eval.csv
    tags = sorted(tag for tag in tags if not tag.endswith(left_out))
    curves = {
        tag: {point.step: f"{point.value:.4g}" for point in events.Scalars(tag)} for tag in tags
    }
    if curves:
        with open(result / "eval.csv", newline="") as lines:
            steps = sorted({int(row["gradient_step"]) for row in csv.DictReader(lines)})
        rows = [[step, *(curve.get(step, "") for curve in curves.values())] for step in steps]
        file.parent.mkdir(exist_ok=True)
        with open(file, "w", newline="") as lines:
            csv.writer(lines).writerows([["gradient_step", *curves], *rows])


def is_finished(results):
    """Whether the last evaluation in eval.csv is that of the run's last gradient step, by args.json beside it."""
    flags = json.loads(results.with_suffix(".json").read_text())
    planned = flags.get("vae_steps", 0) + flags.get("offline_steps", 0)
    planned += flags.get("online_iterations", 0) * flags.get("updates_per_iteration", 0)
    return results.read_text().splitlines()[-1].startswith(f"{planned},")


def run(name, label, command, seed, args):
    """Start or continue one run; copy what it wrote. Returns a line about it. Raises InputError: it failed."""
    out = ROOT / args.results / name
    script, *flags = shlex.split(command)
    env_id = flags[flags.index("--env-id") + 1]
    folder = ROOT / args.run_dir / name / label
    result = folder / f"{env_id}__{Path(script).stem}__{seed}"
    if args.ray:
        wait_until_free(result / "args.json")
    line = [
        sys.executable,
        script,
        *flags,
        "--seed",
        str(seed),
        "--run-dir",
        os.path.relpath(folder, ROOT),
    ]
    if (result / "checkpoint.npz").exists():
        line = [sys.executable, script, *flags, "--resume", os.path.relpath(result, ROOT)]
    elif (kept := out / f"{label}__{seed}.csv").exists():
        unfinished = f" is unfinished and has no checkpoint here; to start anew, delete {kept}"
        return (
            f"{name} {label} seed {seed}{' is there already' if is_finished(kept) else unfinished}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    start, last = time.time(), ""
    with open(folder / f"{seed}.log", "a") as log:
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MATMUL_PRECISION": "highest",
        }  # one for all seeds of a label
        end = end_with_parent if args.ray else None
        pipe = dict(
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
        process = subprocess.Popen(line, cwd=ROOT, env=env, preexec_fn=end, **pipe)
        for text in process.stdout:
            log.write(text)
            log.flush()
            last = text.strip() or last
            if args.ray:  # for the dashboard
                print(text, end="", flush=True)
    if (result / "eval.csv").exists():
        out.mkdir(parents=True, exist_ok=True)
        for file, suffix in (("eval.csv", ".csv"), ("args.json", ".json")):
            shutil.copy(result / file, out / f"{label}__{seed}{suffix}")
        diagnostics(result, out / "diagnostics" / f"{label}__{seed}.csv")
    if process.wait():
        raise buffers.InputError(
            f"{name} {label} seed {seed} did not end: {last or process.returncode}"
        )
    if args.agents:
        dataset = ROOT / flags[flags.index("--dataset") + 1] if "--dataset" in flags else None
        agents.main(agents.Args(result, out / "agents" / f"{label}__{seed}.npz", dataset=dataset))
    return f"{name} {label} seed {seed}: {(time.time() - start) / 60:.1f} minutes"


# ----- On a Ray cluster


def end_with_parent():
    """In a new process, on Linux: be killed when the worker that started it is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def wait_until_free(file):
    """Wait for the lock of a run: what a lost worker started may still be ending."""
    with contextlib.suppress(ImportError, OSError), open(file, "r+") as held:
        import fcntl

        fcntl.lockf(held, fcntl.LOCK_EX)


def on_ray(jobs, args):
    """Run as tasks of a cluster whose machines share this folder; a task whose machine is lost starts again elsewhere,
    and goes on from the run's checkpoint. Yields, as tasks end, a function that gives what `run` returned or raised."""
    if not importlib.util.find_spec("ray"):
        raise buffers.InputError(
            "--ray needs Ray: pip install -r benchmark/requirements-cluster.txt"
        )
    import ray

    here = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    with ray.init(None if args.ray == "local" else args.ray, log_to_driver=False, runtime_env=here):
        task = ray.remote(num_cpus=1, num_gpus=args.gpus_per_run, max_retries=-1)(run)
        waiting = [
            task.options(name=" ".join(map(str, (*job[:2], job[3])))).remote(*job) for job in jobs
        ]
        while waiting:
            (ready,), waiting = ray.wait(waiting)
            yield partial(result_of, ray, ready)


def result_of(ray, task):
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def here(jobs, args):
    """The same on this machine, --parallel at a time."""
    with ThreadPoolExecutor(args.parallel) as pool:
        for job in as_completed([pool.submit(run, *job) for job in jobs]):
            yield job.result


def main(args):
    """Make the runs. Raises InputError: there is no such benchmark, or a run failed."""
    names, failed = [name for name in BENCHMARKS if f"{name}/".startswith(f"{args.name}/")], 0
    if not names:
        raise buffers.InputError(f"there is no benchmark {args.name}, only {', '.join(BENCHMARKS)}")
    rows = [(name, label, *BENCHMARKS[name][label]) for name in names for label in BENCHMARKS[name]]
    labels = dict.fromkeys(label for _, label, *_ in rows)
    if unknown := set(args.only) - set(labels):
        raise buffers.InputError(
            f"{args.name} has no {', '.join(sorted(unknown))}, only {', '.join(labels)}"
        )
    rows = [row for row in rows if row[1] in (args.only or labels)]
    jobs = [
        (name, label, command, seed, args) for name, label, command, seeds in rows for seed in seeds
    ]
    for result in on_ray(jobs, args) if args.ray else here(jobs, args):
        try:
            print_safely(result())
        except buffers.InputError as error:
            failed += 1
            print_safely(f"error: {error}", "stderr")
    if failed:
        raise buffers.InputError(f"{failed} of {len(jobs)} runs did not end")


if __name__ == "__main__":
    launch_tool(main, Args)
