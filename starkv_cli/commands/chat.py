"""``starkv chat``: talk to a model on its compressed cache."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starkv_cli.console import emit_json, note
from starkv_cli.options import Backend, BaseModel, Device, DeviceMap, Dtype, SubjectArgument
from starkv_core.errors import StarkvError, UserError

if TYPE_CHECKING:
    from starkv_core.chat import Conversation, TurnStats

_HELP = """\
/reset       forget the conversation and its cache
/stats       figures of the conversation
/save FILE   write the conversation, as JSON if FILE ends in .json, else as Markdown
/help        this list
/quit        leave, as Ctrl-D does
Ctrl-C stops an answer; a second one does not wait for the current step."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat", short_help="Talk to a run or a model.")(chat)


def chat(
    subject: SubjectArgument = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and leave: answer on stdout, figures on stderr.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    model: BaseModel = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --prompt: print answer and figures as JSON.")
    ] = False,
) -> None:
    """Talk to a model; the cache of earlier turns is kept and only new text is read.

    Example: starkv chat runs/tiny-embedded --prompt "The history of the city begins"
    """
    from starkv_core.chat import Conversation
    from starkv_core.engine import Sampler
    from starkv_core.run import open_subject

    if as_json and prompt is None:
        raise UserError("--json needs --prompt: a conversation is not one JSON document")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty")
    sampler = Sampler(temperature=temperature, top_p=top_p, seed=seed)
    conversation = Conversation(
        open_subject(
            subject,
            device=device,
            device_map=device_map,
            dtype=dtype,
            model=model,
            backend=backend,
        ),
        system=system,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
    )
    if prompt is None:
        _converse(conversation)
    elif as_json:
        answer = "".join(conversation.ask(prompt))
        emit_json({"model": conversation.subject.name, "answer": answer} | _figures(conversation))
    else:
        _answer(conversation, prompt)


def _converse(conversation: Conversation) -> None:
    """Read, answer, repeat."""
    with suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()

    note(f"{conversation.subject.name}: /help lists the commands, Ctrl-D leaves")
    # In a pipe there is nobody to prompt, and stdout is for answers.
    mark = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(mark).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\n/quit or Ctrl-D leaves")
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _command(conversation, line)
            elif line:
                with _stopping(conversation):
                    _answer(conversation, line)
        except KeyboardInterrupt:
            note("\nstopped")
        except StarkvError as error:
            note(str(error))
        except RuntimeError as error:
            # By name: torch need not be imported here. The conversation must outlive it.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            note("out of GPU memory; /save FILE keeps the conversation, /reset frees its cache")


@contextmanager
def _stopping(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C ends the answer between two steps, where the cache is whole."""

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        conversation.stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(conversation: Conversation, text: str) -> None:
    """Stream an answer to stdout, then its figures to stderr."""
    try:
        for piece in conversation.ask(text):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    stats = conversation.last
    if stats is None:
        return
    if stats.dropped:
        note(f"[the context is full: the oldest {_count(stats.dropped, 'exchange')} left out]")
    note(f"[{_line(stats)}]")


def _line(stats: TurnStats) -> str:
    parts = [f"{_count(stats.new_tokens, 'token')}, {stats.tokens_per_second:.1f} tokens/s"]
    if stats.ended == "length":
        parts[0] += ", cut at the limit"
    elif stats.ended == "stopped":
        parts[0] += ", stopped"
    parts.append(_cache_line(stats))
    if stats.reused_tokens:
        parts.append(f"{stats.reused_tokens} of {stats.prompt_tokens} prompt tokens reused")
    return "; ".join(parts)


def _cache_line(stats: TurnStats) -> str:
    return (
        f"cache {_bytes(stats.cache_bytes)} for {_count(stats.cached_tokens, 'token')}, "
        f"dense {_bytes(stats.dense_bytes)} (ratio {stats.cache_ratio:.2f})"
    )


def _command(conversation: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        note("forgotten")
    elif name == "/stats":
        note(f"{conversation.subject.name}: {_count(len(conversation.exchanges), 'exchange')}")
        if conversation.last is not None:
            note(_cache_line(conversation.last))
            note(
                f"last answer: {_count(conversation.last.prompt_tokens, 'prompt token')} read in "
                f"{conversation.last.prefill_seconds:.2f} s, {_line(conversation.last)}"
            )
    elif name == "/save":
        if not rest:
            raise UserError("/save FILE: name a file")
        _save(conversation, Path(rest))
    elif name == "/help":
        note(_HELP)
    else:
        raise UserError(f"unknown command {name}; /help lists them")


def _save(conversation: Conversation, path: Path) -> None:
    from starkv_core.artifacts import write_json_atomic, write_text_atomic

    if path.exists():
        raise UserError(f"{path} already exists; give another name")
    try:
        if path.suffix == ".json":
            figures = _figures(conversation)
            write_json_atomic(path, {"messages": conversation.messages()} | figures)
        else:
            write_text_atomic(path, conversation.transcript())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    note(f"wrote {path}")


def _figures(conversation: Conversation) -> dict[str, Any]:
    if conversation.last is None:
        return {}
    speed = {"tokens_per_second": conversation.last.tokens_per_second}
    return {"stats": asdict(conversation.last) | speed}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bytes(number: int) -> str:
    return f"{number / 2**20:.2f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"
