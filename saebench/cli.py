"""The `saebench` command: parse, call, print. Every command is a function of another module.

Exit status: 0 done, 1 a unit or a check failed, 2 usage, 130 interrupted. What a command needs is
imported when it runs, so that `ls` does not wait for torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

import tyro

from saebench.allocation import keep_freed_memory
from saebench.errors import SaebenchError, UsageError
from saebench.registry import Registry
from saebench.runconfig import RunConfig
from saebench.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

Positional = tyro.conf.Positional
Flat = tyro.conf.OmitArgPrefixes
Kind = Literal["backbones", "saes", "tasks", "datasets", "leaderboards"]


@dataclass(frozen=True)
class Ls:
    """List what can be measured, and how. Runs no task file."""

    kind: Positional[Kind | None] = None  # one kind; all when left out
    glob: Positional[str] = "*"  # names to list
    registry: tuple[str, ...] = ()  # content folders searched before all others


@dataclass(frozen=True)
class Show:
    """Show an entry: where it comes from, what it says, and what of it is on this machine."""

    name: Positional[str]  # of a backbone, SAE, dataset, task or leaderboard
    data_root: str | None = None  # the folder of datasets, by name; none: $SAEBENCH_DATA
    registry: tuple[str, ...] = ()  # content folders searched before all others


@dataclass(frozen=True)
class Fetch:
    """Download what runs will need, ahead of time, and lock what came."""

    names: Positional[tuple[str, ...]]  # names or globs of backbones, SAEs, datasets; hf-hub:…
    registry: tuple[str, ...] = ()  # content folders searched before all others
    data_root: str | None = None  # the folder of datasets, by name; none: $SAEBENCH_DATA
    update: bool = False  # ask anew for what is locked, and lock what comes now


@dataclass(frozen=True)
class Check:
    """Check a new SAE, backbone or task on real activations before you trust its numbers."""

    kind: Positional[Literal["sae", "backbone", "task"]]  # what it is
    name: Positional[str]  # its name in the registry
    data_root: str | None = None  # the folder of datasets, by name; none: $SAEBENCH_DATA
    registry: tuple[str, ...] = ()  # content folders searched before all others


@dataclass(frozen=True)
class New:
    """Write a commented entry or task file that passes `saebench check`."""

    kind: Positional[Literal["sae", "backbone", "dataset", "task"]]  # what it is
    name: Positional[str] = ""  # its name; an SAE's: BACKBONE/NAME, by default after its file
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """sae: its checkpoint, a file, a folder or hf-hub:OWNER/NAME[@REVISION][/PATH];
    backbone: a model as timm:NAME.TAG, open_clip:NAME/TAG or hf-hub:OWNER/NAME"""
    weights: str | None = None  # backbone: its weights file
    loader: Literal["timm", "open_clip"] | None = None  # backbone: of a repository of both forms
    backbone: str | None = None  # sae: what it was trained on; by default as NAME or the file says
    site: str | None = None  # sae: where; by default as the file says, or the backbone's own
    tokens: str | None = None  # sae: on which tokens; by default as the file says, or all
    format: str | None = None  # sae: its checkpoint format, where the file alone does not tell
    set_: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """sae: facts that the file does not say, as NAME=VALUE"""
    out: str = "."  # the content folder to write into; give it to --registry afterwards
    registry: tuple[str, ...] = ()  # content folders searched before all others


@dataclass(frozen=True)
class Estimate:
    """Estimate from train activations what an SAE's file and entry do not say."""

    name: Positional[str]  # of the SAE in the registry
    k: int | None = None  # of a threshold: the latents a row that it shall keep, if not known
    dataset: str | None = None  # whose train split; by default the backbone's dataset
    images: int = 2048  # of the train split, the first so many
    out: str | None = None  # a content folder for a copy of the entry; by default it is edited
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    data_root: str | None = None  # the folder of datasets, by name; none: $SAEBENCH_DATA
    registry: tuple[str, ...] = ()  # content folders searched before all others


@dataclass(frozen=True)
class Status:
    """What of a run is done, failed (and why) or missing. Takes the options of `run`."""

    config: Flat[RunConfig] = field(default_factory=RunConfig)
    why: str | None = None  # a unit's id: which field differs between it and this run


COMMANDS: dict[str, type] = {
    "run": RunConfig,
    "ls": Ls,
    "show": Show,
    "fetch": Fetch,
    "check": Check,
    "status": Status,
    "new": New,
    "estimate": Estimate,
    "train": TrainConfig,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command line. Always ends in SystemExit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _plain_warning
    try:
        if arguments in (["--version"], ["-V"]):
            from saebench import __version__

            print(f"saebench {__version__}")
            code = 0
        else:
            code = execute(parse(arguments))
    except SaebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _plain_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Ours as a sentence: whoever types a command has no use for the line of code it came from."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def parse(arguments: Sequence[str]) -> object:
    """A command line as one of the command dataclasses. Usage errors exit with status 2."""
    _refuse_repeated(arguments)
    config = (tyro.conf.FlagCreatePairsOff,)
    if arguments and arguments[0] in COMMANDS:  # a parser of one command is made in less time
        name = arguments[0]
        return tyro.cli(COMMANDS[name], prog=f"saebench {name}", args=arguments[1:], config=config)
    every = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
    return tyro.cli(
        Union[*every],  # type: ignore[arg-type]
        prog="saebench",
        description="How good is this sparse autoencoder, on which vision backbone?",
        args=list(arguments) or ["--help"],
        config=config,
    )


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Errors: UsageError for an option that is given twice: the parser would keep only the last."""
    seen: set[str] = set()
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name in seen:
            raise UsageError(
                f"{name} is given twice",
                f"give it once; where it takes several values, they follow:  {name} A B",
            )
        seen.add(name)


def execute(command: object) -> int:
    """Run a parsed command and return its exit status. Errors: SaebenchError."""
    match command:
        case RunConfig():
            from saebench.progress import run_with_progress

            keep_freed_memory()
            return run_with_progress(command, _console(), _console(stderr=True))
        case Ls():
            from saebench.listing import print_ls

            return print_ls(Registry.load(command.registry), command.kind, command.glob, _console())
        case Show():
            from saebench.data.access import Access
            from saebench.showing import print_show

            access = Access.of(command.data_root)
            return print_show(Registry.load(command.registry), command.name, _console(), access)
        case Fetch():
            from saebench.data import Access
            from saebench.fetch import fetch

            registry, access = Registry.load(command.registry), Access.of(command.data_root)
            return fetch(registry, command.names, _console(), access=access, update=command.update)
        case Status():
            from saebench.status import print_status

            return print_status(command.config, command.why, _console())
        case Check():
            from saebench.data.access import Access
            from saebench.testing import print_check

            registry = Registry.load(command.registry)
            access = Access.of(command.data_root)
            return print_check(registry, command.kind, command.name, _console(), access)
        case New():
            return _new(command)
        case Estimate():
            from saebench.estimate import print_estimate

            keep_freed_memory()
            registry = Registry.load(command.registry)
            return print_estimate(
                registry,
                command.name,
                _console(),
                k=command.k,
                dataset=command.dataset,
                images=command.images,
                out=command.out,
                device=command.device,
                data_root=command.data_root,
            )
        case TrainConfig():
            from saebench.train import train_with_progress

            keep_freed_memory()
            return train_with_progress(command, _console())
    raise AssertionError(command)


def _new(command: New) -> int:
    registry = Registry.load((*filter(os.path.isdir, [command.out]), *command.registry))
    if command.kind == "sae":
        from saebench.scaffold.sae import print_new_sae

        if command.weights or command.loader:
            raise UsageError("--weights and --loader are of a backbone", "an SAE: --from FILE")
        return print_new_sae(
            registry,
            command.name or None,
            command.from_,
            command.set_,
            interactive=sys.stdin.isatty(),
            out=command.out,
            backbone=command.backbone,
            site=command.site,
            tokens=command.tokens,
            format=command.format,
        )
    if not command.name:
        raise UsageError(f"a {command.kind} needs a name", f"saebench new {command.kind} NAME")
    if command.backbone or command.site or command.tokens or command.format or command.set_:
        raise UsageError(
            f"--backbone, --site, --tokens, --format and --set are not of a {command.kind}"
        )
    from saebench.scaffold import write_new

    path = write_new(
        registry,
        command.kind,
        command.name,
        out=command.out,
        weights=command.weights,
        source=command.from_,
        loader=command.loader,
    )
    print(f"wrote {path}")
    if command.kind != "dataset":
        print(f"next: saebench check {command.kind} {command.name} --registry {command.out}")
    return 0


def _console(*, stderr: bool = False) -> Console:
    """A rich console that never wraps at 80 columns when its output is piped to a file."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)
