"""The command line: its commands, and how it ends: a result, one clear error, or an interruption."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

from trimtab.cli.console import note, show, show_error
from trimtab.cli.demo import demo
from trimtab.cli.exchange import export_adapter, import_adapter
from trimtab.cli.flags import with_flags
from trimtab.cli.inspect import inspect
from trimtab.cli.merge import merge
from trimtab.cli.methods import methods
from trimtab.cli.plan import plan
from trimtab.cli.predict import predict
from trimtab.cli.train import train
from trimtab.errors import TrimtabError, suggestion
from trimtab.method import methods as catalogue
from trimtab.training.errors import Interrupted
from trimtab.version import __version__

FAILED, INTERRUPTED = 2, 130
# Base class of what typer raises for a wrong command line; typer's own name for it changes with its version.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="trimtab",
    help="Parameter-efficient fine-tuning: plan, train, inspect, use, merge and exchange adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        show(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """The options of trimtab itself."""


app.command()(demo)
app.command()(methods)
app.command()(plan)
app.command()(train)
app.command()(predict)
app.command()(inspect)
app.command()(merge)
app.command("export")(export_adapter)
app.command("import")(import_adapter)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return its exit status.

    0: done; 2: a TrimtabError or a wrong command line, printed as one error; 130: interrupted. Anything else is a
    mistake in Trimtab and keeps its traceback (status 1).
    """
    silence_other_packages()
    _print_any_character()
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(args=given, prog_name="trimtab", standalone_mode=False)
        sys.stdout.flush()
    except Interrupted as error:
        note(str(error))
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return INTERRUPTED
    except TrimtabError as error:
        show_error(_in_flags(str(error), given))
        return FAILED
    except _UsageError as error:
        return _wrong_usage(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        show_error(f"not enough memory. {_first_line(error)} Give a smaller --batch-size or --max-length.".strip())
        return FAILED
    except OSError as error:
        show_error(f"{error.filename or 'the operating system'}: {error.strerror or error}.")
        return FAILED
    if status == INTERRUPTED:  # typer's own answer to Ctrl-C
        note("interrupted")
    return status if isinstance(status, int) else 0


def silence_other_packages() -> None:
    """Keep notices of other packages, on which no user of the command line can act, off the terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(torch|torchao|transformers|accelerate|datasets|huggingface_hub)(\.|$)")


def _print_any_character() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out: torch has a class for that on a GPU, but none on the processor."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _in_flags(text: str, arguments: Sequence[str]) -> str:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    command = commands.get(next((each for each in arguments if not each.startswith("-")), ""))
    return text if command is None else with_flags(text, command, arguments)


def _wrong_usage(error: Any) -> int:
    if error.ctx is not None and type(error).__name__ == "NoArgsIsHelpError":
        print(error.ctx.get_help(), file=sys.stderr)
        return FAILED
    command = "trimtab" if error.ctx is None else error.ctx.command_path
    known = type(error).__name__ == "NoSuchOption" and error.ctx is not None
    text = _no_such_option(error) if known else error.format_message().rstrip()
    show_error(f"{text}\nSee: {command} --help")
    return FAILED


def _no_such_option(error: Any) -> str:
    known = [option for param in error.ctx.command.params for option in (*param.opts, *param.secondary_opts)]
    flags = [option for option in known if option.startswith("--")]
    takes_a_method = any("--method" in param.opts for param in error.ctx.command.params)
    hint = _method_setting_hint(error) if takes_a_method else ""
    return f"No such option: {error.option_name}.{hint or suggestion(error.option_name, [*flags, '--help'])}"


def _method_setting_hint(error: Any) -> str:
    """Say how settings of methods are given where an unknown flag is the name of one."""
    name = error.option_name.lstrip("-").replace("-", "_")
    known = any(name in cls.__dataclass_fields__ for cls in catalogue().values())
    return f" {name!r} is a setting of methods: --set {name}=…" if known else ""
