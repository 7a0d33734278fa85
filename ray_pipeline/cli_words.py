"""What the commands share: the words --config and --set, counts and ASCII."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

#: adds a sub-command: its name, what runs it, words, and an example
Add = Callable[..., argparse.ArgumentParser]


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config and --set."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file, such as configs/microscopy.yaml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="set one key of the config"
    )


def config_words(arguments: argparse.Namespace) -> str:
    """--config and every --set as they were typed, for a shell."""
    words = ["--config", str(arguments.config)]
    words += [word for override in arguments.overrides for word in ("--set", override)]
    return ascii_text(shlex.join(words))


def ascii_text(text: str) -> str:
    """Text as ASCII; other letters become escapes."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def local_path(text: str) -> Path:
    """A path, as argparse takes it; a URI is refused."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is a URI, expected a local or mounted folder: write to one, copy it there (such as `aws s3 cp "
            "--recursive FOLDER URI`) and set data.root to the URI"
        )
    return Path(text)


def counts_in_words(counts: Mapping[str, int]) -> str:
    """train 10, val 2"""
    return ", ".join(f"{split} {count}" for split, count in counts.items())
