"""The door: one sub-command a job. Parses words, calls the job, prints where its results are; no logic."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ray_pipeline.cli_data import add_data_commands
from ray_pipeline.cli_inference import add_inference_commands
from ray_pipeline.cli_submit import add_submit
from ray_pipeline.cli_words import add_config, ascii_text, config_words, counts_in_words
from ray_pipeline.errors import TRY_AGAIN, WRONG_INPUT, RunStopped, UserError
from ray_pipeline.storage import may_pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 1 for a wrong set-up, 2 for wrong input, 75 when a disk, the
    network or a service refused and may not when it is run again, 128 + the signal's number for a stop (130 for Ctrl-C,
    143 for SIGTERM)."""
    arguments = _parser().parse_args(argv)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        return arguments.job(arguments) or 0
    except UserError as error:
        print(f"error: {ascii_text(str(error))}", file=sys.stderr)
        return TRY_AGAIN if error.passing else WRONG_INPUT
    except RunStopped as stopped:
        print(ascii_text(str(stopped)), file=sys.stderr)
        return stopped.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"error: {ascii_text(str(error.filename))}: {error.strerror}; give a path that can be used", file=sys.stderr
        )
        return TRY_AGAIN if may_pass(error) else WRONG_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray-pipeline", description="Train a diffusion prior for microscopy images on Ray, and use it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_data_commands(partial(_add, commands))
    encode = _add(commands, "encode", _encode, "turn tiles and hints into latent shards, once")
    add_config(encode)
    encode.add_argument("--overwrite", action="store_true", help="replace a store of other tiles or settings")
    encode.add_argument(
        "--verify", action="store_true", help="check every stored shard's hash, encode a sample again and compare"
    )
    train = _add(commands, "train", _train, "the main job: all that is missing, then every phase")
    add_config(train)
    train.add_argument(
        "--resume", nargs="?", const=True, default=False, choices=[True, "auto"], metavar="auto",
        help="go on where the run in output_dir stopped; with --resume=auto, begin one where there is none",
    )  # fmt: skip
    train.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY",
        help="with --resume: let this key, or all of a section (optimizer, phases.1), differ from the run's config",
    )  # fmt: skip
    train.add_argument("--dry-run", action="store_true", help="print steps, memory, disk and time; write nothing")
    train.add_argument("--profile", action="store_true", help="write a torch profiler trace of a few steps a phase")
    _add_loudness(train)
    sweep = _add(commands, "sweep", _sweep, "search between the phases alone; train --resume goes on from its winner")
    add_config(sweep)
    sweep.add_argument("--resume", action="store_true", help="go on where the sweep in output_dir stopped")
    _add_loudness(sweep)
    add_submit(partial(_add, commands))
    add_inference_commands(partial(_add, commands))
    report = _add(
        commands, "report", _report, "draw a run's report.html anew, as for one that was killed",
        "ray-pipeline report demo_output/run",
    )  # fmt: skip
    report.add_argument("run", help="the run's output_dir")
    report.add_argument("--out", type=Path, help="the page (default: RUN/report.html; of a run on a URI ./report.html)")
    status = _add(commands, "status", _status, "print where a run stands", "ray-pipeline status demo_output/run")
    status.add_argument("run", help="the run's output_dir")
    status.add_argument(
        "--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS",
        help="print it anew every so many seconds (5) until the run has ended or Ctrl-C",
    )  # fmt: skip
    check = _add(commands, "check", _check, "verify the set-up: packages, device, autoencoder, Ray, a tiny step")
    add_config(check)
    check.add_argument(
        "--address", dest="overrides", action="append", type=_address, metavar="HOST:PORT",
        help="join this Ray cluster and hold the job's plan against what it has: short for --set ray.address=HOST:PORT",
    )  # fmt: skip
    return parser


def _add(commands, name: str, run: Callable, words: str, example: str | None = None) -> argparse.ArgumentParser:
    example = example or f"ray-pipeline {name} --config configs/demo.yaml"
    parser = commands.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(job=run)
    return parser


def _add_loudness(command: argparse.ArgumentParser) -> None:
    loudness = command.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="print warnings, errors and nothing else")
    loudness.add_argument("--verbose", action="store_true", help="show what Ray's workers print")


def _sayer(arguments) -> Callable[[str], None]:
    """What prints a job's words; with --quiet nothing does, nor a line of progress."""
    if arguments.quiet:
        from ray_pipeline.monitoring.progress import silence

        silence()
        return lambda words: None
    return lambda words: print(ascii_text(words), flush=True)


def _encode(arguments) -> None:
    from ray_pipeline import encoding
    from ray_pipeline.ray_session import ray_session
    from ray_pipeline.training.nodes import check_nodes
    from ray_pipeline.training.placement import await_room, encoder_resources

    config = _load(arguments)
    if arguments.verify:
        store, shards, found = encoding.verify(config)
        print(f"{shards} shards of {store} are whole")
        print(f"{found.tiles} tiles encoded again differ by at most {found.difference:.2g} of the latents' std")
        return
    encoding.prepare_data(config)
    prepared = encoding.look(config, overwrite=arguments.overwrite)
    if prepared.stored:
        print(f"latents   {prepared.job.store}: stored already, nothing to do")
    else:
        with ray_session(config.ray):
            await_room(config, encoder_resources(config), 1, "an actor that encodes")
            check_nodes(config, trains=False)
            encoding.encode(config, prepared)
        print_store(prepared.job.store)
    print(f"next      ray-pipeline train {config_words(arguments)}")


def print_store(store: str) -> None:
    """What a finished latent store holds, and what was left out of it."""
    from ray_pipeline import encoding

    tiles, rejected, partners = encoding.stored_tiles(store)
    accepted = sum(tiles.values())
    print(f"tiles     {accepted + rejected} listed = {accepted} accepted + {rejected} rejected")
    print(f"latents   {store}: {counts_in_words(tiles)}")
    for hint, count in partners.items():
        print(f"partners  {hint}: {count} tiles have one on disk, {accepted - count} have a simulated hint")


def _train(arguments) -> None:
    from ray_pipeline import pipeline
    from ray_pipeline.status import describe_run
    from ray_pipeline.storage import Folder

    config = _load(arguments)
    if arguments.dry_run:
        print(ascii_text(pipeline.dry_run(config)))
        return
    run_dir = pipeline.train(
        config,
        resume=arguments.resume,
        allow_changes=arguments.allow_change,
        verbose=arguments.verbose,
        profile=arguments.profile,
        say=_sayer(arguments),
    )
    if run_dir is None or arguments.quiet:
        return
    print(ascii_text(describe_run(run_dir)))
    print()
    at = Folder(run_dir).child
    lines = [f"pictures  {at('samples')}", f"          {at('plots')}"]
    lines.append(f"weights   {config.checkpoint.store or at('checkpoints')}")
    if config.monitoring.report:
        lines.append(f"report    {at('report.html')}")
    lines.append(f"records   tensorboard --logdir {at('logs', 'tensorboard')}")
    print(ascii_text("\n".join(lines)))


def _sweep(arguments) -> None:
    from ray_pipeline import pipeline
    from ray_pipeline.storage import Folder

    folder = pipeline.sweep(
        _load(arguments),
        resume=arguments.resume,
        verbose=arguments.verbose,
        say=_sayer(arguments),
    )
    if arguments.quiet:
        return
    at = Folder(folder).child
    print(ascii_text(f"results   {at('results.csv')}\n          {at('sweep.png')}\nwinner    {at('winner.json')}"))
    print(f"next      ray-pipeline train {config_words(arguments)} --resume")


def _report(arguments) -> None:
    from ray_pipeline.monitoring.report import write_report
    from ray_pipeline.run_copy import reading_copy
    from ray_pipeline.storage import is_uri

    here = Path("report.html") if is_uri(arguments.run) else None
    with reading_copy(arguments.run) as folder:
        print(f"report    {write_report(folder, arguments.out or here)}")


def _status(arguments) -> None:
    from ray_pipeline.status import describe_run, watch_run

    if arguments.watch is None:
        print(ascii_text(describe_run(arguments.run)))
        return
    for text in watch_run(arguments.run, arguments.watch):
        clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
        print(f"{clear}{ascii_text(text)}", end="\n" if clear else "\n\n", flush=True)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} seconds, expected 0.1 to 86400")
    return value


def _address(text: str) -> str:
    return f"ray.address={json.dumps(text)}"


def _check(arguments) -> int:
    from ray_pipeline.check import check

    failed = 0
    for what, works, words in check(_load(arguments)):
        print(f"{'ok  ' if works else 'FAIL'}  {what:<24} {ascii_text(words)}", flush=True)
        failed += not works
    print(f"{failed} problem(s)" if failed else "ready: ray-pipeline train --config FILE")
    return 1 if failed else 0


def _load(arguments):
    from ray_pipeline.config import load_config

    return load_config(arguments.config, arguments.overrides)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    # a warning of ours is for the person at the terminal; those of libraries belong to their authors
    if "ray_pipeline" in filename:
        print(f"warning: {ascii_text(str(message))}", file=sys.stderr)
