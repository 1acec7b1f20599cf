"""The application ``starkv`` and the one place where errors become messages and exit codes."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from starkv_cli.commands import analyze, bench, calibrate, chat, eval, quantize
from starkv_cli.console import Interrupted, note
from starkv_core import __version__
from starkv_core.errors import StarkvError


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        # Before Typer sees it: what it does with Ctrl-C differs between its versions.
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None


app = typer.Typer(
    rich_markup_mode=None,  # rich help costs more than half of the start-up time
    name="starkv",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"starkv {__version__}")
        raise typer.Exit


@app.callback()
def starkv(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Low-rank key-value caches with learned ranks (STAR-KV).

    Example: starkv calibrate --recipe tiny && starkv eval runs/tiny-embedded
    """


for _command in (analyze, calibrate, quantize, eval, chat, bench):
    _command.register(app)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: run a command and exit.

    0 success, 1 a failed run or a defect, 2 bad input or too little GPU memory, 130 Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    sys.exit(_run(args, debug=debug))


def _run(args: list[str], *, debug: bool) -> int:
    try:
        return int(app(args, prog_name="starkv", standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # the help of a group named alone
        else:
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "starkv"
            note(f"starkv: {error.format_message().rstrip('.')}; see {where} --help")
        return 2
    except typer.Abort:
        note("starkv: interrupted")
        return Interrupted.exit_code
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        code, message = _explain(error, debug=debug)
        note(f"starkv: {message}")
        return code


# Typer brings its own copy of click or uses the real one, depending on its version.
_USAGE_ERROR: Final[Any] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def _explain(error: Exception, *, debug: bool) -> tuple[int, str]:
    """Exit code and message of an error."""
    if isinstance(error, StarkvError):
        return error.exit_code, str(error)
    if (memory := _out_of_memory(error)) is not None:
        return 2, memory
    hint = "" if debug else "; --debug shows where"
    return 1, f"internal error: {type(error).__name__}: {' '.join(str(error).split())}{hint}"


def _out_of_memory(error: Exception) -> str | None:
    """What was needed, what there was, what to change; None for any other error.

    torch.OutOfMemoryError is matched by name, because torch need not be imported here; on the CPU
    torch raises a plain RuntimeError.
    """
    text = " ".join(str(error).split())
    on_gpu = type(error).__name__ == "OutOfMemoryError"
    if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in text:
        return None
    needed = re.search(r"(?i)tried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    message = f"out of {'GPU ' if on_gpu else ''}memory"
    if needed:
        message += f": {needed[1]} more were needed"
    if free:
        message += f", {free[2]} of {free[1]} were free"
    return (
        f"{message}; lower batch or length, keep optim.checkpointing on, or spread the model over "
        "several devices with model.device_map"
    )


if __name__ == "__main__":
    main()
