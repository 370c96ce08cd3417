"""The command line of all scripts: what flags may be, presets, flags of a checkpoint; launching."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import traceback
import typing
from pathlib import Path

import tyro

import envs
from plumbing.errors import InputError, called_exit
from plumbing.files import MAX_TEXT, check_array, check_replaceable, read_npz
from plumbing.provenance import description_file

# ----- What flags may be

MAY_BE_ZERO = {
    "seed",
    "task_seed",
    "offline_steps",
    "online_iterations",
    "lambda_pearl",
    "kl_coef",
    "prior_steps",  # of SMAC; with posterior_steps 0 as well no data are collected
    "posterior_steps",
    "policy_reg",
    "alpha",
    "csro_weight",
    "unicorn_weight",
}
AT_LEAST = {"rl_batch": 2, "context_batch": 2}  # a mean and a deviation are taken over them
AT_MOST = {
    "gamma": 1,
    "tau": 1,
    "tasks_per_iteration": 32,
    "explore_episodes": 100,
    "seed": 2**32,
    "task_seed": 2**32 - 1,
}
PRODUCTS = {  # for memory: a gradient step of the largest takes about 1 GB
    "meta_batch rl_batch": 2**15,
    "meta_batch context_batch": 2**15,
    "meta_batch rl_batch latent_dim": 2**24,
    "vae_tasks vae_trajectories": 2**7,
    "vae_tasks vae_trajectories elbo_terms elbo_terms": 2**20,
}
MAX_WEIGHTS = 2**22  # of a network
MAX_TASK_WEIGHTS = 2**18  # of a network that has weights for each task, as MACAW's
ABOVE_ZERO = math.ulp(0)  # the smallest number above 0
# Flags that name files stand on the command line and are never taken from a file.
PATHS = ("dataset", "save_dataset", "run_dir", "resume")
# Flags that a resumed run may change.
FREE = (*PATHS, "device", "online_iterations", "compile", "cuda_graph")


def flag_of(name):
    """A flag as it is written: "rl_batch" -> "--rl-batch"."""
    return "--" + name.replace("_", "-")


def shown(value):
    """A value for a message. Python prints no whole numbers of more than 4,300 digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def bounds(name):
    """The least and the most that the numbers of a flag may be."""
    low = 0 if name in MAY_BE_ZERO else ABOVE_ZERO
    high = 2**53
    if name.endswith("_hidden"):
        high = 2048
    if name.endswith("_batch"):
        high = 10_000
    if name.endswith("_dim"):
        high = 1000
    return AT_LEAST.get(name, low), AT_MOST.get(name, high)


def is_a(value, kind) -> bool:
    """Whether a value is of a flag's type: plain, Optional, Literal or tuple[int, ...]."""
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and all(type(number) is int for number in value)
    if typing.get_origin(kind) is typing.Union:
        return any(is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return type(value) in (str, int) and value in typing.get_args(kind)
    if kind is float:
        return type(value) in (float, int)
    return type(value) is kind


def check_type(name, value, kind):
    """Raise an InputError unless a value is of its flag's type."""
    if not is_a(value, kind):
        raise InputError(f"{flag_of(name)} is {shown(value)}, which is not of its type")
    if value == "":  # as from a variable of the shell that is not set
        raise InputError(f"{flag_of(name)} is empty")


def check_size(name, value, max_weights):
    """Raise an InputError unless the numbers of a flag are within their bounds."""
    values = value if isinstance(value, tuple) else (value,)
    numbers = [number for number in values if type(number) in (int, float)]
    low, high = bounds(name)
    within = all(low <= number <= high for number in numbers)  # false for NaN
    if not within or not 0 < len(values) <= 10:
        least = "above 0" if low == ABOVE_ZERO else f"at least {low}"
        words = shown(value).strip("'")
        raise InputError(f"{flag_of(name)} is {words}, it must be {least} and at most {high}")
    if name.endswith("_hidden"):
        weights = sum(a * b for a, b in itertools.pairwise(value))
        if weights > max_weights:
            raise InputError(
                f"{flag_of(name)} is {value}, which makes more than {max_weights} weights"
            )


def check_products(values):
    """Raise an InputError if flags that are small alone are too large together."""
    for text, most in PRODUCTS.items():
        names = text.split()
        if not all(name in values for name in names):
            continue
        if math.prod(values[name] for name in names) > most:
            product = " x ".join(names)
            raise InputError(f"{product} must be at most {most} (PRODUCTS in plumbing/flags.py)")


def check_together(values):
    """Raise an InputError for flags that are right alone and mean nothing together."""
    if values.get("oracle_frozen") and not values["oracle_rewards"]:
        raise InputError("--oracle-frozen needs --oracle-rewards")
    no_prior = values.get("prior_steps") == 0
    if no_prior and "initial_steps" in values:  # PEARL empties its encoder buffers before
        raise InputError("--prior-steps must be above 0: what z is inferred from is collected so")
    in_empty_buffers = values.get("explore_tasks") == "test" and values["oracle_rewards"]
    if no_prior and in_empty_buffers and values["posterior_steps"] > 0:
        raise InputError(
            "--prior-steps 0 with --explore-tasks test --oracle-rewards: the test tasks have no "
            "data from which z could be inferred"
        )


def check_writable(flag, path):
    """Raise an InputError unless a file of this name can be written, or replaced."""
    file = Path(os.path.expanduser(path)).absolute()
    try:
        check_replaceable(file)
    except InputError as error:
        raise InputError(f"{flag} {error}") from None
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError:
        raise InputError(f"{flag} {file} is no file in a folder that can be written to") from None


def may_change(name, value, resumed):
    """Whether a run that goes on may change a flag.

    It may make more offline steps if no second phase depends on their number.
    """
    has_second_phase = getattr(resumed, "online_iterations", 0) > 0
    more_steps = name == "offline_steps" and value > resumed.offline_steps
    return name in FREE or (more_steps and not has_second_phase)


def check_flags(args, resumed=None) -> None:
    """Raise an InputError for the first flag that cannot be used, or that cannot change.

    resumed: the flags of the run that goes on.
    """
    values = vars(args)
    max_weights = MAX_TASK_WEIGHTS if "value_hidden" in values else MAX_WEIGHTS
    for name, kind in typing.get_type_hints(type(args)).items():
        value = values[name]
        check_type(name, value, kind)
        changed = resumed and value != getattr(resumed, name)
        if changed and not may_change(name, value, resumed):
            was = f"{flag_of(name)} is {getattr(resumed, name)} in the run to resume"
            raise InputError(f"{was} and cannot become {shown(value)}")
        check_size(name, value, max_weights)
    check_products(values)
    check_together(values)
    if values.get("save_dataset"):
        check_writable("--save-dataset", args.save_dataset)
        check_writable("--save-dataset", description_file(args.save_dataset))
    if args.compile and not shutil.which("g++"):
        raise InputError("--compile needs a C++ compiler, and there is no g++ here")


# ----- Presets, flags of a run to resume, the command line of a run


def preset(args_class, presets, env_id, variant=""):
    """The flags of an environment.

    The defaults, replaced by the row of --preset, then by those of the environment, in the script
    and in its family's own `presets`, then by the row of environment and --preset together.
    """
    name = envs.short_name(env_id)
    script = Path(sys.modules[args_class.__module__].__file__).stem
    row = {"env_id": env_id}
    if variant:
        row["preset"] = variant
    row |= presets.get(variant, {})
    row |= presets.get(name, {})
    row |= envs.lookup(env_id).presets.get(script, {})
    row |= presets.get(f"{name} {variant}", {})
    unknown = sorted(set(row) - set(vars(args_class())))
    if unknown:
        raise InputError(f"a preset of {env_id} names {unknown[0]}, and {script} has no such flag")
    return dataclasses.replace(args_class(), **row)


def read_flags(args_class, presets, path):
    """The flags in a checkpoint or an agent file; one that is missing there has its default.

    Raises InputError.
    """

    def is_flags(name, dtype, _):
        return name == "flags" and dtype.itemsize < 4 * MAX_TEXT

    text = read_npz(path, is_flags).get("flags", "")
    try:
        flags = json.loads(text)
        for name, value in list(flags.items()):
            if isinstance(value, list):  # JSON has no tuples
                flags[name] = tuple(value)
            if name in PATHS:
                del flags[name]
        expected = args_class()
        if ":" not in flags["env_id"]:  # a file must not run code, and importing a module does
            expected = preset(args_class, presets, flags["env_id"], flags.get("preset", ""))
        args = dataclasses.replace(expected, **flags)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} does not fit this script: {error}") from None
    check_flags(args)
    return args


def command_line(args, script, presets) -> str:
    """The command that starts a run with these flags.

    It is made from the flags and not from sys.argv, which has few of them in a resumed run.
    """
    defaults_of_run = vars(preset(type(args), presets, args.env_id, args.preset))
    words = ["python", Path(script).name, "--env-id", args.env_id]
    if args.preset != type(args)().preset:
        words += ["--preset", args.preset]
    for name, value in vars(args).items():
        if value == defaults_of_run[name] or name == "resume":
            continue
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of(f"no_{name}"))
        elif isinstance(value, tuple):
            words += [flag_of(name), *map(str, value)]
        elif str(value).startswith("-"):  # else it would be read as another flag
            words.append(f"{flag_of(name)}={value}")
        else:
            words += [flag_of(name), str(value)]
    return shlex.join(words)


def parse_args(args_class, presets, argv=None, description=None):
    """The flags of a command line, over the presets or over those of the run to resume.

    Raises InputError.
    """
    try:
        named, _ = tyro.cli(args_class, args=argv, return_unknown_args=True, add_help=False)
        default, resumed = defaults(args_class, presets, named)
        args = tyro.cli(args_class, args=argv, default=default, description=description)
    except AssertionError as error:  # --tyro-write-completion for a shell that tyro does not know
        raise InputError(error) from None
    check_flags(args, resumed)
    return without_written_dataset(args)


def defaults(args_class, presets, named):
    """What flags are where nothing names them, and the flags of the run to resume, or None.

    Args:
        named: flags, of which only env_id, preset and resume are looked at.
    Raises:
        InputError, also if the run's environment is of a module that --env-id does not name: a
        file must not run code.
    """
    kinds = typing.get_type_hints(args_class)
    for name in ("env_id", "preset", "resume"):
        check_type(name, getattr(named, name), kinds[name])
    with exit_is_an_error():
        if not named.resume:
            return preset(args_class, presets, named.env_id, named.preset), None
        checkpoint = Path(os.path.expanduser(named.resume), "checkpoint.npz")
        resumed = read_flags(args_class, presets, checkpoint)
        if ":" in resumed.env_id and named.env_id != resumed.env_id:
            where = "the run's environment is of a module"
            raise InputError(f"{where}: give --env-id {resumed.env_id} as well")
        envs.lookup(resumed.env_id)
    return resumed, resumed


def without_written_dataset(args):
    """Flags without --save-dataset, if the run to resume has written its dataset already.

    So the command that continues a run works before and after --dataset-iteration. Raises
    InputError: the iteration is over, and there is no such file. Nothing is written before that.
    """
    if not args.resume or not getattr(args, "save_dataset", None):
        return args

    def is_step(name, dtype, shape):
        return name == "step" and check_array("step", dtype, shape, "i8", ())

    checkpoint = Path(os.path.expanduser(args.resume), "checkpoint.npz")
    step = int(read_npz(checkpoint, is_step).get("step", 0))
    if step < args.dataset_iteration * args.updates_per_iteration:
        return args
    over = f"--save-dataset: iteration {args.dataset_iteration} of this run is over"
    if not os.path.isfile(os.path.expanduser(args.save_dataset)):
        raise InputError(f"{over}, and there is no file {args.save_dataset}")
    print_safely(f"{over}, and {args.save_dataset} stays as it is", "stderr")
    return dataclasses.replace(args, save_dataset=None)


# ----- Starting a script


def launch(main, args_class, presets):
    """What a script does when it is started: unusable input gives one sentence and exit code 2."""
    description = sys.modules[main.__module__].__doc__
    with one_sentence(), no_silent_exit():
        args = parse_args(args_class, presets, description=description)
        with exit_is_an_error():
            main(args)


def launch_tool(main, args_class):
    """`launch` for a script without presets, of benchmark/ or datasets/."""
    description = sys.modules[main.__module__].__doc__
    with one_sentence(), no_silent_exit():
        try:
            args = tyro.cli(args_class, description=description)
        except AssertionError as error:  # as in `parse_args`
            raise InputError(error) from None
        with exit_is_an_error():
            main(args)


def train(script, **flags):
    """Run a script from Python, with its presets and checks.

        train(smac_offline_online, env_id="PointDirection")

    Returns what its `main` returns, the agent. Signals, hooks, threads and precision are then as
    they were. Raises InputError.
    """
    unknown = sorted(set(flags) - set(vars(script.Args())))
    if unknown:
        raise InputError(f"{script.__name__} has no flag {unknown[0]}")
    default, resumed = defaults(script.Args, script.PRESETS, script.Args(**flags))
    args = dataclasses.replace(default, **flags)
    check_flags(args, resumed)
    args = without_written_dataset(args)
    with exit_is_an_error():
        return script.main(args)


@contextlib.contextmanager
def one_sentence():
    """End the program with one sentence and exit code 2 for whatever cannot be used or fails.

    Above the sentence stands the traceback of an error that is not ours, as of an environment.
    Ctrl-C gives a sentence and exit code 130.
    """
    try:
        yield
    except Exception as error:
        tell_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        words = "stopped at once; a run goes on from its last checkpoint, if it has one"
        print_safely(words, "stderr")
        sys.exit(130)
    finally:
        try:
            print(end="", flush=True)
        except (OSError, ValueError):  # whoever read it has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tell_error(error):
    """Print one sentence of an error, with what `Run.explain` added to it.

    Above it stands the traceback of what was raised by code that is not ours.
    """
    text = str(error)
    notes = getattr(error, "__notes__", [])
    raised = error
    if isinstance(error, InputError):
        raised = error.__cause__
    elif isinstance(error, OSError):  # outside of a run: of a file that a flag names
        raised = None
    else:
        text = text.partition("\nTraceback ")[0]  # of a process, which is printed as it is
        text = f"{type(error).__name__}: {text}"
    if raised is not None:
        print_safely("".join(traceback.format_exception(raised)), "stderr")
    if notes:
        text = ", ".join([text[:200], *notes])
    print_safely(f"error: {InputError(text)}", "stderr")


@contextlib.contextmanager
def exit_is_an_error():
    """Raise an InputError where an environment, or its module, calls sys.exit.

    A run that is stopped by a signal ends with SystemExit as well, which has a text as its code.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            raise
        raise InputError(called_exit(error)) from None


@contextlib.contextmanager
def no_silent_exit():
    """Let os._exit, called by an environment, say that the run did not end; exit code not 0.

    It ends a program at once, with nothing of Python's in between, so it is replaced for a while.
    """
    exit_at_once = os._exit
    process = os.getpid()

    def tell_and_exit(code):
        if os.getpid() == process:  # a process that is forked from this one ends as it likes
            caller = sys._getframe(1)
            place = f"{caller.f_code.co_filename}, line {caller.f_lineno}"
            words = f"error: {place}, called os._exit({code}), so that the run did not end"
            print_safely(words, "stderr")
            code = code or 2
        exit_at_once(code)

    os._exit = tell_and_exit
    try:
        yield
    finally:
        os._exit = exit_at_once


# ----- Output


def print_safely(text, stream="stdout"):
    """Print a line. A closed terminal or pipe, or a word it cannot show, does not stop a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=getattr(sys, stream), flush=True)


class Screen:
    """sys.stderr for progress bars, as safe as `print_safely`."""

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
