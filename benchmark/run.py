"""Run a benchmark and keep its evidence: python benchmark/run.py point_direction

Starts the runs of one row of BENCHMARKS with one thread each, --parallel at a time. Copies
eval.csv, args.json and the diagnostics in TensorBoard's files of each into
benchmark/results/{name}/, of a run that was stopped as well. Called again, it goes on with runs
that have a checkpoint. It does not make results again that are there already, and says so where
they are of a run that did not end. With --ray the runs are tasks of a Ray cluster, see
benchmark/README.md.
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
GOAL_DATA = f"{POINT} --dataset datasets/PointDirectionGoal.npz"
FOCAL_POINT = "focal.py --env-id PointDirection"
FOCAL_GOAL = f"{FOCAL_POINT} --dataset datasets/PointDirectionGoal.npz --offline-steps 12600"
HOPPER = "--env-id HopperParam"
ONE_TASK = "--tasks-per-iteration 1"
FIVE_TASKS = "--tasks-per-iteration 5"
SMALL_PEARL = "--rl-batch 64 --updates-per-iteration 2000"
SAWYER = "--env-id SawyerManipulation"
SMALL_SAWYER = f"smac_offline_online.py {SAWYER} --rl-batch 128"
ONE = (1,)
TWO = (1, 2)
THREE = (1, 2, 3)
FOUR = (1, 2, 3, 4)
EIGHT = tuple(range(1, 9))
TEN = tuple(range(1, 11))


def control(smac, steps):
    """As many gradient steps as SMAC makes in both phases, all of them offline, no new data."""
    return f"{smac} --offline-steps {steps} --online-iterations 0"


def control_losses(smac):
    """The second phase, PEARL's actor loss included, on the old data alone: nothing is collected."""
    return f"{smac} --prior-steps 0 --posterior-steps 0"


def smaller_lambda(smac, steps):
    """Eq. 2 with weights that differ by more, and its control: lambda is 100 in the paper.

    Then the second phase without PEARL's loss, with and without new data.
    """
    smac = f"{smac} --awr-lambda 10"
    no_pearl = f"{smac} --lambda-pearl 0"
    return {
        "smac_lambda_10": (smac, FOUR),
        "smac_lambda_10_no_pearl": (no_pearl, FOUR),
        "smac_lambda_10_no_pearl_no_new_data": (control_losses(no_pearl), FOUR),
        "smac_lambda_10_more_offline": (control(smac, steps), FOUR),
    }


def text_kl(smac, steps):
    """Eq. 3 as the text has it: a sum over h', which has 64 transitions with --preset short.

    So a mean with KL weight 1/64.
    """
    smac = f"{smac} --kl-coef 0.015625"
    return {
        "smac_text_kl": (smac, FOUR),
        "smac_text_kl_more_offline": (control(smac, steps), FOUR),
    }


def small(env_id, every, pearl, smac_seeds=THREE, pearl_seeds=ONE):
    """Methods with a quarter of the paper's batch, an hour or two a run: {label: (command, seeds)}.

    Args:
        every: gradient steps between two evaluations.
        pearl: further flags of the Online Oracle, whose run makes the dataset.
    """
    flags = f"--env-id {env_id} --rl-batch 64 --eval-every {every}"
    offline = f"smac_offline_online.py {flags} --updates-per-iteration 2000"
    smac = f"{offline} --online-iterations 50"
    return {
        "smac": (smac, smac_seeds),
        "smac_more_offline": (control(offline, 150_000), TWO),
        "smac_actor_ablation": (f"{smac} --actor-ablation", ONE),
        "meta_bc": (f"meta_bc.py {flags}", ONE),
        "pearl": (f"pearl_online_oracle.py --env-id {env_id} {SMALL_PEARL} {pearl}", pearl_seeds),
    }


def baselines(env_id, flags=""):
    """The two published baselines, at their own budget."""
    names = "macaw", "borel"
    return {name: (f"{name}.py --env-id {env_id} {flags}".strip(), ONE) for name in names}


def context_methods(flags, steps, seeds, every):
    """FOCAL, CSRO and UNICORN, with the gradient steps of both phases of SMAC.

    What they are after SMAC's offline phase is read from the same runs: an evaluation falls on it.

    Args:
        flags: environment, preset and data.
        steps: gradient steps of both phases of SMAC.
        every: gradient steps between two evaluations.
    """
    rows = {}
    for name in ("focal", "csro", "unicorn"):
        command = f"focal.py {flags} --context-loss {name}"
        longer = f"--offline-steps {steps} --eval-every {every}"
        rows[f"{name}_more_offline"] = (f"{command} {longer}", seeds)
    return rows


def context_methods_lambda_10():
    """The same on the point mass, with weights of Eq. 2 that differ by more."""
    rows = context_methods("--env-id PointDirection --awr-lambda 10", 12_600, FOUR, 600)
    return {label.replace("_more", "_lambda_10_more"): command for label, command in rows.items()}


def encoder_ablations(smac):
    """The two of Figure 7, of a command of SMAC."""
    return {
        "smac_encoder_q": (f"{smac} --encoder-loss q", FOUR),
        "smac_encoder_reward_then_q": (f"{smac} --encoder-loss reward_then_q", FOUR),
    }


def short(env_id):
    """All methods with --preset short."""
    flags = f"--env-id {env_id} --preset short"
    smac = f"smac_offline_online.py {flags}"
    # With four seeds no difference from the control could be told on these two
    seeds = EIGHT if env_id in ("HopperParam", "WalkerParam") else FOUR
    rows = {
        "smac": (smac, seeds),
        "smac_more_offline": (control(smac, short_steps(env_id)), seeds),
        "smac_no_new_data": (control_losses(smac), seeds),
    }
    rows |= others(smac, flags)
    every = 7_500 if env_id == "AntDirection" else 5_000
    rows |= context_methods(flags, short_steps(env_id), FOUR, every)
    rows["pearl"] = (f"pearl_online_oracle.py {flags}", FOUR)
    if env_id in ("HopperParam", "WalkerParam", "HumanoidDirection"):
        rows |= encoder_ablations(smac)
    if env_id != "HumanoidDirection":
        rows |= smaller_lambda(smac, short_steps(env_id))
    if env_id in ("HopperParam", "WalkerParam", "AntDirection"):
        rows |= text_kl(smac, short_steps(env_id))
    if env_id == "WalkerParam":  # why is FOCAL's offline phase better there: has z too much noise?
        command = f"{control(smac, short_steps(env_id))} --kl-coef 0.0001 --eval-every 5000"
        rows["smac_tiny_kl_more_offline"] = (command, FOUR)
    return rows


def short_steps(env_id):
    """Gradient steps of both phases of SMAC."""
    return 30_000 if env_id == "CheetahVelocity" else 35_000


def others(smac, flags):
    """The actor ablation and the methods without a second phase."""
    rows = {"smac_actor_ablation": (f"{smac} --actor-ablation", FOUR)}
    for name in ("meta_bc", "macaw", "borel"):
        rows[name] = (f"{name}.py {flags}", FOUR)
    return rows


def fifty_tasks():
    """Sawyer with fifty training tasks, as in the paper."""
    flags = "--env-id SawyerManipulation --preset short"
    smac = f"smac_offline_online.py {flags}"
    return {
        "smac": (smac, FOUR),
        "smac_more_offline": (control(smac, 35_000), FOUR),
        "smac_five_tasks": (f"{smac} {FIVE_TASKS}", TWO),
    }


def eight_behaviours():
    """Sawyer with Figure 9's eight behaviours: does it matter where the second phase explores?

    One task an iteration, as the preset has it, and five, as elsewhere.
    """
    flags = "--env-id SawyerManipulation8 --preset short"
    smac = f"smac_offline_online.py {flags}"
    five_tasks = f"{smac} {FIVE_TASKS}"
    test, oracle = "--explore-tasks test", "--explore-tasks test --oracle-rewards"
    return {
        "smac": (smac, FOUR),
        "smac_more_offline": (control(smac, 35_000), FOUR),
        "smac_test_tasks": (f"{smac} {test}", FOUR),
        "smac_test_tasks_oracle_rewards": (f"{smac} {oracle}", FOUR),
        "smac_five_tasks": (five_tasks, TWO),
        "smac_test_tasks_five_tasks": (f"{five_tasks} {test}", TWO),
        "smac_test_tasks_oracle_rewards_five_tasks": (f"{five_tasks} {oracle}", TWO),
    }


def more_tasks():
    """All methods with --preset short on Sawyer with 200 tasks; true rewards are the oracle."""
    flags = (
        "--env-id SawyerManipulation --preset short --dataset datasets/SawyerManipulation200.npz"
    )
    smac = f"smac_offline_online.py {flags}"
    return {
        "smac": (smac, FOUR),
        "smac_more_offline": (control(smac, 35_000), FOUR),
        "smac_no_new_data": (control_losses(smac), FOUR),
        "smac_oracle_rewards": (f"{smac} --oracle-rewards", FOUR),
        **others(smac, flags),
        **context_methods(flags, 35_000, FOUR, 7_500),
    }


def told(transitions):
    """SMAC and its control on data of a Humanoid that was told its task. The data are made first:

    python datasets/make_told.py --run-dir datasets/told --transitions N --out runs/ToldN.npz
    """
    dataset = f"--dataset runs/Told{transitions}.npz"
    smac = f"smac_offline_online.py --env-id HumanoidDirection --preset short {dataset}"
    small_kl = f"{smac} --kl-coef 0.004"
    lambda_10 = f"{small_kl} --awr-lambda 10"
    wide = f"{smac} --kl-coef 0.001 --policy-hidden 300 300 300"
    return {
        "smac": (smac, FOUR),
        "smac_more_offline": (control(smac, 35_000), FOUR),
        "smac_small_kl": (small_kl, FOUR),
        "smac_small_kl_more_offline": (control(small_kl, 35_000), FOUR),
        "smac_small_kl_lambda_10": (lambda_10, FOUR),
        "smac_small_kl_lambda_10_more_offline": (control(lambda_10, 35_000), FOUR),
        "smac_wide_more_offline": (control(wide, 50_000), FOUR),  # as told/scaled has it
    }


def told_scaled(data):
    """The same of an observation of 45 scaled numbers, with a larger policy and more steps.

    python benchmark/experiments/humanoid_scaled.py runs/ToldN.npz runs/ScaledN.npz
    """
    family = "benchmark.experiments.humanoid_scaled:HumanoidScaled"
    flags = f"--env-id {family} --dataset runs/Scaled{data}.npz --preset short"
    offline = f"smac_offline_online.py {flags} --kl-coef 0.001 --policy-hidden 300 300 300"
    smac = f"{offline} --offline-steps 50000"
    return {
        "smac": (smac, FOUR),
        "smac_no_pearl": (f"{smac} --lambda-pearl 0", FOUR),
        "smac_more_offline": (control(offline, 70_000), FOUR),
    }


def own_share(dataset=""):
    """When does the second phase help? The Ant, by the share of the data that know their task.

    With labels; with true rewards, encoder and decoder trained on; and with true rewards, encoder
    and decoder frozen, which tells bad labels from a bad encoder. In the repository's data 60 % of
    the trajectories head for their own task. The others are made first, for X of 0 and 1:

        python datasets/make_ant.py --own-share X --out runs/AntDirectionX.npz
    """
    smac = f"smac_offline_online.py --env-id AntDirection --preset short {dataset}".strip()
    return {
        "smac": (smac, THREE),
        "smac_oracle_rewards": (f"{smac} --oracle-rewards", THREE),
        "smac_oracle_rewards_frozen": (f"{smac} --oracle-rewards --oracle-frozen", THREE),
    }


SHORT_BENCHMARKS = {
    "short/SawyerManipulation": fifty_tasks(),
    "short/SawyerManipulation8": eight_behaviours(),
    "short/SawyerManipulation200": more_tasks(),
}
for _env_id in envs.SHIPPED:
    # The sizes of PointDirection, see point_direction, are short anyway
    if _env_id != "PointDirection" and f"short/{_env_id}" not in SHORT_BENCHMARKS:
        SHORT_BENCHMARKS[f"short/{_env_id}"] = short(_env_id)

PEARL_50 = "--online-iterations 50"  # what the oracles of some families add to their command
HOPPER_SMALL = small("HopperParam", 5000, PEARL_50, pearl_seeds=THREE)
CHEETAH_SMALL = small(
    "CheetahVelocity", 5000, f"{PEARL_50} --save-dataset datasets/CheetahVelocity.npz"
)
# The oracles of Walker and Humanoid also make their datasets, after 40 or 100 iterations.
WALKER_SMALL = small(
    "WalkerParam",
    5000,
    "--online-iterations 40 --eval-every 10000 --save-dataset datasets/WalkerParam.npz",
    smac_seeds=TWO,
)
ANT_SMALL = small(
    "AntDirection", 10_000, "--online-iterations 100 --eval-every 10000", smac_seeds=TWO
)
HUMANOID_SMALL = small(
    "HumanoidDirection",
    5000,
    "--online-iterations 100 --eval-every 10000 --save-dataset datasets/HumanoidDirection.npz",
)
CHEETAH_SMAC = CHEETAH_SMALL["smac"][0]
BENCHMARKS = {
    # name: {label: (command, seeds)}
    "point_direction": {
        "smac": (POINT, TEN),
        "smac_more_offline": (control(POINT, 12_600), TEN),
        "smac_no_new_data": (control_losses(POINT), TEN),
        "smac_oracle_rewards": (f"{POINT} --oracle-rewards", TEN),
        **smaller_lambda(POINT, 12_600),
        "meta_bc": ("meta_bc.py --env-id PointDirection", TEN),
        "pearl": ("pearl_online_oracle.py --env-id PointDirection", TEN),
        "smac_actor_ablation": (f"{POINT} --actor-ablation", TEN),
        "smac_encoder_q": (f"{POINT} --encoder-loss q", THREE),
        "smac_encoder_reward_then_q": (f"{POINT} --encoder-loss reward_then_q", THREE),
        "smac_test_tasks": (f"{POINT} --explore-tasks test", THREE),
        "smac_test_tasks_oracle_rewards": (f"{POINT} --explore-tasks test --oracle-rewards", THREE),
        "smac_goal_data": (GOAL_DATA, THREE),
        "smac_goal_data_more_offline": (control(GOAL_DATA, 12_600), THREE),
        "smac_goal_data_slow": (f"{GOAL_DATA} --lr 3e-4", THREE),
        "smac_goal_data_oracle_rewards": (f"{GOAL_DATA} --oracle-rewards", THREE),
        "macaw": ("macaw.py --env-id PointDirection", TEN),
        "macaw_matched": ("macaw.py --env-id PointDirection --preset matched", TEN),
        "borel": ("borel.py --env-id PointDirection", TEN),
        "borel_matched": ("borel.py --env-id PointDirection --preset matched", THREE),
        **context_methods("--env-id PointDirection", 12_600, TEN, 600),
        "focal_critic_more_offline": (
            f"{FOCAL_POINT} --critic-to-encoder --offline-steps 12600 --eval-every 600",
            FOUR,
        ),
        **context_methods_lambda_10(),
        "focal_goal_data": (f"{FOCAL_GOAL} --context-loss focal", THREE),
        "csro_goal_data": (f"{FOCAL_GOAL} --context-loss csro", THREE),
        "unicorn_goal_data": (f"{FOCAL_GOAL} --context-loss unicorn", THREE),
    },
    "hopper_param": {
        "smac": (f"smac_offline_online.py {HOPPER}", THREE),
        "smac_one_task": (f"smac_offline_online.py {HOPPER} {ONE_TASK}", ONE),
        "pearl": (
            f"pearl_online_oracle.py {HOPPER} --online-iterations 50 --eval-every 16000 "
            "--save-dataset datasets/HopperParam.npz",
            ONE,
        ),
        "meta_bc": (f"meta_bc.py {HOPPER}", ONE),
        **baselines("HopperParam"),
    },
    "hopper_small": {
        **HOPPER_SMALL,
        "smac_one_task": (
            f"smac_offline_online.py {HOPPER} --rl-batch 64 --eval-every 5000 {ONE_TASK} "
            "--online-iterations 25",
            ONE,
        ),
        **encoder_ablations(HOPPER_SMALL["smac"][0]),
    },
    "walker_small": {
        **WALKER_SMALL,
        **baselines("WalkerParam"),
        **encoder_ablations(WALKER_SMALL["smac"][0]),
    },
    "cheetah_small": {
        **CHEETAH_SMALL,
        **baselines("CheetahVelocity"),
        "smac_encoder_prior": (f"{CHEETAH_SMAC} --encoder-buffer prior", ONE),
        "smac_oracle_rewards": (
            CHEETAH_SMAC.replace("iterations 50", "iterations 25") + " --oracle-rewards",
            ONE,
        ),
    },
    "ant_small": {**ANT_SMALL, **baselines("AntDirection", "--eval-every 10000")},
    "humanoid_small": {
        **HUMANOID_SMALL,
        **baselines("HumanoidDirection"),
        **encoder_ablations(HUMANOID_SMALL["smac"][0]),
    },
    **SHORT_BENCHMARKS,
    "told/450": told(450),
    "told/1200": told(1200),
    "told/scaled/1200": told_scaled("1200"),
    "told/scaled/4800": told_scaled("4800"),
    "told/scaled/4800_any": told_scaled("4800Any"),  # make_told.py --other-share 1
    "own_share/0": own_share("--dataset runs/AntDirection0.npz"),
    "own_share/60": own_share(),
    "own_share/100": own_share("--dataset runs/AntDirection1.npz"),
    "sawyer": {
        "smac": (f"smac_offline_online.py {SAWYER} --online-iterations 20", ONE),
        "meta_bc": (f"meta_bc.py {SAWYER}", ONE),
    },
    "sawyer_small": {
        "smac": (f"{SMALL_SAWYER} --online-iterations 12", ONE),
        "smac_two_critics": (f"{SMALL_SAWYER} --online-iterations 20 --num-critics 2", ONE),
        "smac_test_tasks": (f"{SMALL_SAWYER} --online-iterations 12 --explore-tasks test", ONE),
        "meta_bc": (f"meta_bc.py {SAWYER} --rl-batch 128", ONE),
    },
}


@dataclasses.dataclass
class Args:
    name: tyro.conf.Positional[str]  # a key of BENCHMARKS, or what several begin with: short
    only: tuple[str, ...] = ()  # labels of the runs to make, in place of all of them
    parallel: int = 2  # runs side by side, one thread each
    run_dir: str = "runs/benchmark"  # where the runs write, and keep their checkpoints
    agents: bool = False  # keep what acting needs of runs that end, in results/{name}/agents/
    results: str = "benchmark/results"  # where the evidence goes
    ray: Optional[str] = (
        None  # address of a Ray cluster; "auto" from one of its machines, or "local"
    )
    gpus_per_run: float = 0.0  # with --ray: share of a GPU for each run
    compile: bool = False  # pass --compile to the runs: faster, and equal but for rounding


def diagnostics(result, file):
    """Write what a run logged beside returns and losses as a CSV, a line for each evaluation."""
    events = EventAccumulator(str(result), size_guidance={"scalars": 0})
    events.Reload()
    left_out = "context_return", "exploration_return", "SPS"  # the returns are in eval.csv
    curves = {}
    for tag in sorted(events.Tags()["scalars"]):
        if tag.startswith(("charts/", "eval/", "train/")) and not tag.endswith(left_out):
            curves[tag] = {point.step: f"{point.value:.4g}" for point in events.Scalars(tag)}
    if not curves:
        return
    with open(result / "eval.csv", newline="") as lines:
        steps = sorted({int(row["gradient_step"]) for row in csv.DictReader(lines)})
    rows = [["gradient_step", *curves]]
    for step in steps:
        rows.append([step, *(curve.get(step, "") for curve in curves.values())])
    file.parent.mkdir(exist_ok=True)
    with open(file, "w", newline="") as lines:
        csv.writer(lines).writerows(rows)


def is_finished(results):
    """Whether an eval.csv ends at the last gradient step that the args.json beside it plans."""
    flags = json.loads(results.with_suffix(".json").read_text())
    planned = flags.get("vae_steps", 0) + flags.get("offline_steps", 0)
    planned += flags.get("online_iterations", 0) * flags.get("updates_per_iteration", 0)
    return results.read_text().splitlines()[-1].startswith(f"{planned},")


def keep(result, out, name):
    """Copy what a run wrote to its folder `result` into the folder of the evidence."""
    if not (result / "eval.csv").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(result / "eval.csv", out / f"{name}.csv")
    shutil.copy(result / "args.json", out / f"{name}.json")
    diagnostics(result, out / "diagnostics" / f"{name}.csv")


def run(name, label, command, seed, args):
    """Start or continue one run, and keep what it wrote.

    Returns a line about it. Raises InputError: it failed.
    """
    out = ROOT / args.results / name
    script, *flags = shlex.split(command)
    env_id = flags[flags.index("--env-id") + 1]
    name_of_env = envs.short_name(env_id)
    folder = ROOT / args.run_dir / name / label
    result = folder / f"{name_of_env}__{Path(script).stem}__{seed}"
    if args.ray:
        wait_until_free(result / "args.json")

    line = [sys.executable, script, *flags]
    kept = out / f"{label}__{seed}.csv"
    if (result / "checkpoint.npz").exists():
        line += ["--resume", os.path.relpath(result, ROOT)]
    elif kept.exists() and is_finished(kept):
        return f"{name} {label} seed {seed} is there already"
    elif kept.exists():
        unfinished = "is unfinished and has no checkpoint here; to start anew, delete"
        return f"{name} {label} seed {seed} {unfinished} {kept}"
    else:
        line += ["--seed", str(seed), "--run-dir", os.path.relpath(folder, ROOT)]
    if args.compile:
        line.append("--compile")

    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    last = ""
    # One precision for all seeds of a label
    env = os.environ | {"OMP_NUM_THREADS": "1", "MATMUL_PRECISION": "highest"}
    end = end_with_parent if args.ray else None
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipe |= {"encoding": "utf-8", "errors": "replace"}
    with open(folder / f"{seed}.log", "a") as log:
        process = subprocess.Popen(line, cwd=ROOT, env=env, preexec_fn=end, **pipe)
        for text in process.stdout:
            log.write(text)
            log.flush()
            last = text.strip() or last
            if args.ray:  # for the dashboard
                print(text, end="", flush=True)
    keep(result, out, f"{label}__{seed}")
    if process.wait():
        raise buffers.InputError(
            f"{name} {label} seed {seed} did not end: {last or process.returncode}"
        )
    if args.agents:
        dataset = None
        if "--dataset" in flags:
            dataset = ROOT / flags[flags.index("--dataset") + 1]
        file = out / "agents" / f"{label}__{seed}.npz"
        agents.main(agents.Args(result, file, env_id=env_id, dataset=dataset))
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

        fcntl.flock(held, fcntl.LOCK_EX)  # as a run does: `lock` in plumbing/run.py


def on_ray(jobs, args):
    """Run as tasks of a cluster whose machines share this folder.

    A task whose machine is lost starts again elsewhere, and goes on from the run's checkpoint.
    Yields, as tasks end, a function that gives what `run` returned or raised.
    """
    if not importlib.util.find_spec("ray"):
        raise buffers.InputError(
            "--ray needs Ray: pip install -r benchmark/requirements-cluster.txt"
        )
    import ray

    address = None if args.ray == "local" else args.ray
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    with ray.init(address, log_to_driver=False, runtime_env=environment):
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
    if args.parallel < 1:
        raise buffers.InputError(f"--parallel is {args.parallel}, expected 1 at least")
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
