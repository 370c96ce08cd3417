"""The command line of all scripts: what flags may be, presets, flags from a checkpoint; how a script starts."""

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
import typing
from pathlib import Path

import tyro

import envs
from envs import InputError
from plumbing.files import MAX_TEXT, read_npz

MAY_BE_ZERO = "seed task_seed offline_steps online_iterations lambda_pearl kl_coef posterior_steps policy_reg alpha"
AT_LEAST = {"rl_batch": 2, "context_batch": 2}  # a mean and a deviation are taken over them
AT_MOST = {
    "gamma": 1,
    "tau": 1,
    "tasks_per_iteration": 32,
    "seed": 2**32,
    "task_seed": 2**32 - 1,
}  # and see `bounds`
PRODUCTS = {  # for memory: a gradient step of the largest takes about 1 GB
    "meta_batch rl_batch": 2**15, "meta_batch context_batch": 2**15, "meta_batch rl_batch latent_dim": 2**24,
    "vae_tasks vae_trajectories": 2**7, "vae_tasks vae_trajectories elbo_terms elbo_terms": 2**20,
}  # fmt: skip
PATHS = (
    "dataset",
    "save_dataset",
    "run_dir",
    "resume",
)  # of the command line alone, never from a file
FREE = (*PATHS, "device", "online_iterations", "compile", "cuda_graph")


def bounds(name):
    """The least and the most that the numbers of a flag may be."""
    most = 2048 if name.endswith("_hidden") else 10_000 if name.endswith("_batch") else 2**53
    most = 1000 if name.endswith("_dim") else most
    return AT_LEAST.get(name, 0 if name in MAY_BE_ZERO.split() else math.ulp(0)), AT_MOST.get(
        name, most
    )


def check_flags(args, before=None) -> None:
    """Raise an InputError for the first flag that can not be used, or that can not change; before: those of the run."""
    values = vars(args)
    for name, kind in typing.get_type_hints(type(args)).items():
        value, flag, (low, high) = values[name], "--" + name.replace("_", "-"), bounds(name)
        if not is_a(value, kind):
            raise InputError(f"{flag} is {value!r}, which is not of its type")
        if value == "":  # as from a variable of the shell that is not set
            raise InputError(f"{flag} is empty")
        if before and name not in FREE and value != getattr(before, name):
            raise InputError(
                f"{flag} is {getattr(before, name)} in the run to resume and can not become {value}"
            )
        numbers = value if isinstance(value, tuple) else (value,)
        if (
            any(not low <= n <= high for n in numbers if type(n) in (int, float))
            or not 0 < len(numbers) <= 10
        ):
            least = "above 0" if low == math.ulp(0) else f"at least {low}"
            raise InputError(f"{flag} is {value}, it must be {least} and at most {high}")
        most = 2**18 if "value_hidden" in values else 2**22  # MACAW has weights for each task
        if name.endswith("_hidden") and sum(a * b for a, b in itertools.pairwise(value)) > most:
            raise InputError(f"{flag} is {value}, which makes more than {most} weights")
    for names, most in PRODUCTS.items():
        if (
            all(name in values for name in names.split())
            and math.prod(values[name] for name in names.split()) > most
        ):
            raise InputError(
                f"{' x '.join(names.split())} must be at most {most} (PRODUCTS in plumbing/flags.py)"
            )
    if values.get("save_dataset"):
        file = Path(os.path.expanduser(args.save_dataset)).absolute()
        try:
            if file.is_dir():
                raise IsADirectoryError
            tempfile.TemporaryFile(dir=file.parent).close()
        except OSError:
            raise InputError(
                f"--save-dataset {file} is no file in a folder that can be written to"
            ) from None
    if args.compile and not shutil.which("g++"):
        raise InputError("--compile needs a C++ compiler, and there is no g++ here")


def is_a(value, kind) -> bool:
    """Whether a value is of a flag's type: plain, Optional, Literal or tuple[int, ...]."""
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and {type(n) for n in value} <= {int}
    if typing.get_origin(kind) is typing.Union:
        return any(is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return type(value) in (str, int) and value in typing.get_args(kind)
    return type(value) in ((float, int) if kind is float else (kind,))


def preset(args_class, presets, env_id, variant=""):
    """The flags of an environment: defaults, the row of --preset, that of the environment, that of both together."""
    name, script = envs.short_name(env_id), Path(sys.modules[args_class.__module__].__file__).stem
    row = (
        presets.get(variant, {})
        | presets.get(name, {})
        | envs.lookup(env_id).presets.get(script, {})
    )
    row |= presets.get(f"{name} {variant}", {})
    unknown = sorted(set(row) - set(vars(args_class())))
    if unknown:
        raise InputError(f"a preset of {env_id} names {unknown[0]}, and {script} has no such flag")
    said = {"env_id": env_id} | ({"preset": variant} if variant else {})
    return dataclasses.replace(args_class(), **said | row)


def read_flags(args_class, presets, path):
    """The flags in a checkpoint or an agent file; one that it does not have takes its default. Raises InputError."""
    text = read_npz(
        path, lambda name, dtype, _: name == "flags" and dtype.itemsize < 4 * MAX_TEXT
    ).get("flags", "")
    try:
        flags = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in json.loads(text).items()
            if k not in PATHS
        }
        module = ":" in flags["env_id"]  # a file must not run code, and importing a module does
        known = (
            args_class()
            if module
            else preset(args_class, presets, flags["env_id"], flags.get("preset", ""))
        )
        args = dataclasses.replace(known, **flags)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} does not fit this script: {error}") from None
    check_flags(args)
    return args


def command_line(args, script, presets) -> str:
    """The command that starts a run with these flags, from the flags themselves: sys.argv has none of a resumed run."""
    default = vars(preset(type(args), presets, args.env_id))
    words = ["python", Path(script).name, "--env-id", args.env_id]
    for name, value in vars(args).items():
        if value != default[name] and name != "resume":
            said = (
                () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            )
            words += [
                f"--{'no-' if value is False else ''}{name.replace('_', '-')}",
                *map(str, said),
            ]
    return shlex.join(words)


def parse_args(args_class, presets, argv=None, description=None):
    """Flags over the presets of the environment, or over those of the run to resume. Raises InputError."""
    known, _ = tyro.cli(args_class, args=argv, return_unknown_args=True, add_help=False)
    default, before = defaults(args_class, presets, known)
    args = tyro.cli(args_class, args=argv, default=default, description=description)
    check_flags(args, before)
    return args


def defaults(args_class, presets, known):
    """What flags are where nothing says them, and those of the run to resume, or None; known: what was said. Raises
    InputError, also if the run's environment is of a module that --env-id does not name: a file must not run code."""
    if not known.resume:
        return preset(args_class, presets, known.env_id, known.preset), None
    before = read_flags(
        args_class, presets, Path(os.path.expanduser(known.resume), "checkpoint.npz")
    )
    if ":" in before.env_id and known.env_id != before.env_id:
        raise InputError(
            f"the run's environment is of a module: give --env-id {before.env_id} as well"
        )
    envs.lookup(before.env_id)
    return before, before


def launch(main, args_class, presets):
    """What a script does when it is started: an input that can not be used gives one sentence and exit code 2."""
    try:
        main(parse_args(args_class, presets, description=sys.modules[main.__module__].__doc__))
    except (InputError, OSError) as error:
        sys.exit(say(f"error: {InputError(error)}", "stderr") or 2)
    except KeyboardInterrupt:
        sys.exit(
            say("stopped at once; a run goes on from its last checkpoint, if it has one", "stderr")
            or 130
        )
    finally:
        try:
            print(end="", flush=True)
        except (OSError, ValueError):  # whoever read it has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def train(script, **flags):
    """From Python: run a script with its presets and checks, `train(smac_offline_online, env_id="PointDirection")`.

    Returns what its `main` returns, the agent. Signals, hooks, threads and precision are then as they were.
    """
    unknown = sorted(set(flags) - set(vars(script.Args())))
    if unknown:
        raise InputError(f"{script.__name__} has no flag {unknown[0]}")
    default, before = defaults(script.Args, script.PRESETS, script.Args(**flags))
    args = dataclasses.replace(default, **flags)
    check_flags(args, before)
    return script.main(args)


def say(text, stream="stdout"):
    """Print a line; a closed terminal or pipe, or a word that it can not show, does not stop a run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=getattr(sys, stream), flush=True)


class Screen:
    """sys.stderr for progress bars: as `say`."""

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
