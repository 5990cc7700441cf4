"""The `jserve` command. Results go to stdout, everything else to stderr; an error is one line, and exit code 2.

Ctrl-C ends any command with exit code 130, SIGTERM with 143; for a server SIGTERM is the usual end, and its code 0.
JAX is imported only by the commands that run a model in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jserve import __version__
from jserve.config import CacheConfig, EngineConfig, SchedConfig, ServerConfig
from jserve.errors import JserveError
from jserve.interrupts import Interrupts
from jserve.settings import Setting, build, settings_of

if TYPE_CHECKING:
    from jserve.progress import Progress
    from jserve.result import Result, ResultStream

Conversation = list[dict[str, str]]
Chat = Callable[[Conversation], "ResultStream"]

_DEFAULT_PORT = ServerConfig().port


def main(argv: list[str] | None = None) -> int:
    with Interrupts("jserve") as interrupts:
        args = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = args.run
        if run is _serve:
            interrupts.statuses[signal.SIGTERM] = 0
        try:
            return run(args)
        except BrokenPipeError:  # whoever read our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (JserveError, OSError) as error:
            print(f"jserve: {error}", file=sys.stderr)
            return 2


# --- the commands -----------------------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    from jserve.server.frontend import serve

    return serve(build(EngineConfig, vars(args)), build(ServerConfig, vars(args)))


def _chat(args: argparse.Namespace) -> int:
    with _chat_door(args) as chat:
        conversation: Conversation = [{"role": "system", "content": args.system}] if args.system else []
        for text in _ask() if args.message is None else args.message:
            conversation.append({"role": "user", "content": text})
            answer = _show(chat(conversation), as_json=args.json)
            conversation.append({"role": "assistant", "content": answer.text})
    return 0


def _explain(args: argparse.Namespace) -> int:
    from jserve.explain import as_json, explained, listing, save_trace
    from jserve.server.client import Client

    with Client(args.target) as client:
        history = client.history(args.request_id, timeout_s=args.timeout)
    if args.trace is not None:
        save_trace(history, args.trace)
    if args.json:
        print(as_json(history))
    elif args.trace is not None:
        print(args.trace)
    else:
        print(listing(history) if args.request_id is None else explained(history))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from jserve import checkpoints
    from jserve.console import RichProgress
    from jserve.pull import resolve_model
    from jserve.runner import make_mesh, resolve_dtype

    config, progress = build(EngineConfig, vars(args)), RichProgress()
    source, mesh = resolve_model(config.model, progress), make_mesh(config.tp)
    loaded = checkpoints.load(source, mesh=mesh, dtype=resolve_dtype(config.dtype, mesh), progress=progress)
    checkpoints.save(loaded.model, args.output, tokenizer_from=source)
    print(args.output)
    return 0


def _pull(args: argparse.Namespace) -> int:
    from jserve.console import RichProgress
    from jserve.pull import resolve_model

    print(resolve_model(args.model, RichProgress()))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from jserve.calibrate import calibrate
    from jserve.console import RichProgress
    from jserve.cost_report import as_json, table
    from jserve.runner import Runner
    from jserve.tiers import open_disk
    from jserve.transfer import JaxTransfer

    # As a server with a host tier has it; how large that is changes no cost.
    config, progress = build(EngineConfig, vars(args) | {"host_gib": args.host_gib or 1.0}), RichProgress()
    runner = Runner.from_config(config, progress)
    transfer = JaxTransfer(runner, open_disk(config, runner))
    try:
        cost = calibrate(config, runner, transfer, progress)
    finally:
        transfer.close()
    print(as_json(cost, runner.info, config) if args.json else table(cost, runner.info, config))
    return 0


def _simulate(args: argparse.Namespace) -> int:
    from jserve.console import RichProgress
    from jserve.simulation import command

    print(command.run(args, RichProgress()))
    return 0


def _plan(args: argparse.Namespace) -> int:
    from jserve.console import RichProgress
    from jserve.simulation import plan

    print(plan.run(args, RichProgress()))
    return 0


def _export_session(args: argparse.Namespace) -> int:
    from jserve.session import KVLayout, export_session
    from jserve.tokenizer import Tokenizer

    messages = _messages(args.messages)
    config, progress = _session_config(args)
    token_ids = Tokenizer.load(Path(config.model or "")).encode_chat(messages)
    layout = KVLayout.of(config, args.directory, progress)
    held = export_session(layout, args.directory, token_ids, args.snapshot, args.cache_salt)
    print(f"{args.snapshot}: the KV of {held} of {len(token_ids)} tokens")
    return 0


def _import_session(args: argparse.Namespace) -> int:
    from jserve.session import KVLayout, import_session

    config, progress = _session_config(args)
    layout = KVLayout.of(config, args.directory, progress)
    held = import_session(layout, args.directory, args.snapshot, args.cache_salt)
    print(f"{args.directory}: the KV of {held} tokens")
    return 0


def _session_config(args: argparse.Namespace) -> tuple[EngineConfig, Progress]:
    """With the model's path instead of its name."""
    from jserve.console import RichProgress
    from jserve.pull import resolve_model

    config, progress = build(EngineConfig, vars(args)), RichProgress()
    return replace(config, model=str(resolve_model(config.model, progress))), progress


def _messages(file: Path) -> Conversation:
    from jserve.chat_template import check_messages
    from jserve.errors import InvalidRequest

    try:
        messages: Conversation = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(
            f"{file} is no JSON ({error}): give a list of messages, each with role and content"
        ) from None
    if not isinstance(messages, list):
        raise InvalidRequest(f"{file} holds no list: give a list of messages, each with role and content")
    check_messages(messages)
    return messages


# --- chat -------------------------------------------------------------------------------------------------------------


@contextmanager
def _chat_door(args: argparse.Namespace) -> Iterator[Chat]:
    """A server's answers, or those of a model in this process."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    sampling = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.target is not None:
        from jserve.server.client import Client

        with Client(args.target) as client:
            yield lambda conversation: client.chat(conversation, stream=True, **sampling)
    else:
        from jserve.console import RichProgress
        from jserve.llm import LLM

        with LLM.from_config(build(EngineConfig, vars(args)), RichProgress()) as llm:
            yield lambda conversation: llm.chat(conversation, stream=True, **sampling)


def _ask() -> Iterable[str]:
    """What the user types, until the end of input."""
    import readline  # noqa: F401  (gives input() its line editing)

    print("Type a message; Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            text = input("\n> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if text.strip():
            yield text


def _show(stream: ResultStream, as_json: bool) -> Result:
    """The answer as it comes, or as one JSON line at its end."""
    with stream:
        if not as_json:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
            print(flush=True)
        answer = stream.result()
    numbers = {
        "request_id": answer.request_id,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "output_tokens": answer.output_tokens,
        "ttft_s": round(answer.ttft_s, 4),
    }
    if as_json:
        print(json.dumps({"text": answer.text, **numbers}, ensure_ascii=False), flush=True)
    else:
        print("  ".join(f"{name} {value}" for name, value in numbers.items()), file=sys.stderr)
    return answer


# --- the flags --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jserve", description="A serving runtime for multi-turn LLM conversations.")
    parser.add_argument("--version", action="version", version=f"jserve {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = _command(commands, "serve", _serve, "serve a model over gRPC")
    _add_settings(serve, "engine", EngineConfig)
    _add_settings(serve, "server", ServerConfig)

    chat = _command(commands, "chat", _chat, "talk to a model: in this process, or a server's with --target")
    chat.add_argument("-m", "--message", action="append", metavar="TEXT", help="a turn of yours; repeat it for more")
    chat.add_argument("--json", action="store_true", help="one JSON line for each turn, instead of the text")
    chat.add_argument("--target", metavar="HOST:PORT", help=f"a running server, such as localhost:{_DEFAULT_PORT}")
    chat.add_argument("--system", metavar="TEXT", help="a system message before the first turn")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="tokens of an answer at most (up to the context)")
    chat.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    chat.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    chat.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that reach P together")
    chat.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    chat.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; repeat it for more")
    _add_settings(chat, "engine (without --target)", EngineConfig)

    explain = _command(commands, "explain", _explain, "tell what happened to a request of a running server, and why")
    explain.add_argument(
        "request_id", nargs="?", metavar="REQUEST_ID", help="as chat tells it; all that are remembered, if left out"
    )
    target = f"localhost:{_DEFAULT_PORT}"
    explain.add_argument("--target", default=target, metavar="HOST:PORT", help=f"the server (default: {target})")
    explain.add_argument("--json", action="store_true", help="one line of JSON, with the steps of that time")
    explain.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing"
    )
    explain.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="for the answer (default: 10)")

    convert = _command(commands, "convert", _convert, "write a model as a checkpoint that loads fast onto any mesh")
    convert.add_argument("output", type=Path, metavar="DIRECTORY", help="where to write it; must not exist")
    _add_settings(convert, "source", EngineConfig, only=("model", "dtype", "tp"))

    calibrate = _command(commands, "calibrate", _calibrate, "measure what the KV tiers decide by, and keep it")
    calibrate.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    _add_settings(calibrate, "engine, as for serve", EngineConfig)

    _add_simulations(commands)

    session = commands.add_parser("session", help="move a conversation's KV between servers with disk tiers")
    moves = session.add_subparsers(title="commands", required=True, metavar="COMMAND")
    export = _command(moves, "export", _export_session, "write a conversation's KV from a disk tier as a snapshot")
    export.add_argument("--messages", type=Path, required=True, metavar="FILE", help="the conversation: a JSON list")
    _add_session_flags(export, "where to write it; must not exist")
    _add_session_flags(
        _command(moves, "import", _import_session, "put a snapshot into a disk tier; a server finds it when it starts"),
        "what session export wrote",
    )

    pull = _command(commands, "pull", _pull, "fetch a model and print where it is")
    pull.add_argument("model", nargs="?", help="a hub id; the embedded default, SmolLM2-135M-Instruct, if left out")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_simulations(commands: Any) -> None:
    from jserve.simulation import command, plan

    simulate = _command(commands, "simulate", _simulate, "tell what a trace would do on hardware that is not at hand")
    command.add_flags(simulate)
    capacity = _command(commands, "plan", _plan, "tell whether a model fits, what it can hold and how fast it would be")
    plan.add_flags(capacity)
    for parser in (simulate, capacity):
        parser.add_argument("--no-disk", action="store_true", help="no disk tier")
        _add_settings(parser, "cache", CacheConfig, only=command.SIZES)
        _add_settings(parser, "scheduler", SchedConfig, only=command.LIMITS)


def _add_session_flags(parser: argparse.ArgumentParser, snapshot: str) -> None:
    parser.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help=snapshot)
    # not the setting disk_dir: no server is configured here
    parser.add_argument(
        "--disk-dir", dest="directory", required=True, metavar="DIRECTORY", help="the server's --disk-dir"
    )
    parser.add_argument("--cache-salt", default="", metavar="TEXT", help="the conversation's, if it has one")
    _add_settings(parser, "model, as for serve", EngineConfig, only=("model", "dtype", "tp", "block_size"))


def _add_settings(parser: argparse.ArgumentParser, title: str, config: type, only: tuple[str, ...] = ()) -> None:
    """A flag for each setting: --block-size, --no-overlap, --drain-timeout."""
    group = parser.add_argument_group(title)
    for setting in settings_of(config):
        if not only or setting.name in only:
            _add_flag(group, setting)


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    flag = setting.name.removesuffix("_s").replace("_", "-")
    text = setting.help.replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(
            f"--{'no-' if setting.default else ''}{flag}",
            dest=setting.name,
            action="store_false" if setting.default else "store_true",
            help=f"{'turn off: ' if setting.default else ''}{text}",
        )
        return
    group.add_argument(
        f"--{flag}",
        dest=setting.name,
        type=_many_of(setting.kind) if setting.many else setting.kind,
        choices=setting.choices,
        default=setting.default,
        metavar=None if setting.choices else _metavar(setting),
        help=f"{text} (default: {'none' if setting.default is None else setting.default})",
    )


def _metavar(setting: Setting) -> str:
    if setting.many:
        return "N,N,..." if setting.kind is int else "NAME=X,..."
    unit = "SECONDS" if setting.name.endswith("_s") else None
    return unit or {int: "N", float: "X", Path: "DIRECTORY"}.get(setting.kind, setting.name.upper())


def _many_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    values.__name__ = f"{kind.__name__},{kind.__name__},..."  # as argparse tells of a wrong one
    return values


if __name__ == "__main__":
    sys.exit(main())
