"""The command `mmbackdoor`: chores that need no accelerator. Each command loads what it needs, and no more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


class _Version(argparse.Action):
    def __call__(self, *_: object) -> NoReturn:
        from mmbackdoor import __version__

        print(__version__)
        raise SystemExit(0)


def main(argv: list[str] | None = None) -> None:
    """The entry point. Exits with 2 for wrong input and 1 for a fault, with one sentence on stderr."""
    arguments, flags = _parser().parse_known_args(argv)
    if flags and arguments.act is not _validate:
        _parser().error(f"unknown argument {flags[0]!r}")
    arguments.flags = flags
    # Not at the top: `--help` answers before the first heavy import.
    from mmbackdoor.entry import guarded

    guarded(lambda: arguments.act(arguments))


def _parser() -> _Parser:
    parser = _Parser(
        prog="mmbackdoor",
        description="Chores around backdoored models; the work itself is done by the recipes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        group: argparse._SubParsersAction[_Parser], name: str, act: Callable[[argparse.Namespace], None], about: str
    ) -> _Parser:
        child = group.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False)
        child.set_defaults(act=act)
        return child

    methods = command(commands, "list", _list, "show every attack, defense, trigger and target")
    methods.add_argument("--markdown", action="store_true", help="as a Markdown table")

    validate = command(
        commands,
        "validate",
        _validate,
        "check a recipe's YAML file without running it; --KEY VALUE flags go on top, as in the recipe",
    )
    validate.add_argument("config", type=Path, metavar="CONFIG.yaml")
    validate.add_argument(
        "--recipe", help="the recipe it is for; by default what its folder (or, under smoke/, its name) says"
    )

    recipes = command(
        commands, "recipes", _recipes, "copy the recipes, their configs and the data scripts into a folder"
    )
    recipes.add_argument("folder", type=Path, metavar="DIR")
    recipes.add_argument("--force", action="store_true", help="overwrite files that are there")

    shards = commands.add_parser("shards", help="look at webdataset shards", description="Look at webdataset shards.")
    chores = shards.add_subparsers(metavar="CHORE", required=True)
    check = command(
        chores, "check", _shards_check, "read every sample and count what is wrong; exit code 2 where something is"
    )
    check.add_argument("spec", help="a folder, a tar, a glob or 'name-{000..099}.tar'")
    check.add_argument("--workers", type=int, default=1, help="how many processes read (default 1)")
    split = command(chores, "split", _shards_split, "write the same samples as another number of shards")
    split.add_argument("spec")
    split.add_argument("out", type=Path, metavar="OUT")
    split.add_argument("--count", type=int, required=True, help="how many shards to write")
    info = command(chores, "info", _shards_info, "say how many shards and samples there are, and what one looks like")
    info.add_argument("spec")

    compare = command(commands, "compare", _compare, "put the results of several runs side by side")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    compare.add_argument("--markdown", action="store_true", help="as a Markdown table")

    report = command(commands, "report", _report, "write a run's report.html anew from its results")
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--json", action="store_true", help="print the verdict and the numbers as JSON instead")
    return parser


def _list(arguments: argparse.Namespace) -> None:
    from mmbackdoor import catalogue

    print(catalogue.markdown() if arguments.markdown else catalogue.text())


def _validate(arguments: argparse.Namespace) -> None:
    from mmbackdoor import recipe_files

    name = arguments.recipe or recipe_files.recipe_of(arguments.config)
    recipe_files.validate(name, ["--config", str(arguments.config), *arguments.flags])
    print(f"OK: {arguments.config} is a valid configuration of {name}")


def _recipes(arguments: argparse.Namespace) -> None:
    from mmbackdoor import recipe_files

    files = recipe_files.copy_out(arguments.folder, force=arguments.force)
    print(f"{len(files)} files copied; next: cd {arguments.folder} && accelerate launch -q recipes/quickstart.py")


def _shards_check(arguments: argparse.Namespace) -> None:
    from mmbackdoor.shards import check
    from mmbackdoor.types import InputError

    report = check.check(arguments.spec, arguments.workers)
    print(report)
    if not report.ok:
        raise InputError(
            f"{arguments.spec!r} has the problems listed above; training skips what is bad, mend or drop it"
        )


def _shards_split(arguments: argparse.Namespace) -> None:
    from mmbackdoor.shards import check

    print(check.split(arguments.spec, arguments.out, arguments.count))


def _shards_info(arguments: argparse.Namespace) -> None:
    from mmbackdoor.shards import check

    print(check.info(arguments.spec))


def _compare(arguments: argparse.Namespace) -> None:
    from mmbackdoor.results import tables

    print(tables.compare(arguments.runs, "markdown" if arguments.markdown else "text"))


def _report(arguments: argparse.Namespace) -> None:
    from mmbackdoor.results import removal_report, report

    if removal_report.is_removal_benchmark(arguments.run) and not arguments.json:
        print(removal_report.build(arguments.run))
    elif arguments.json:
        import json

        print(json.dumps(report.summary(arguments.run), indent=1))
    else:
        print(report.build(arguments.run))


if __name__ == "__main__":
    main()
