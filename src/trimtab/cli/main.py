"""The command line: its commands, and how it ends: a result, one clear error, or an interruption."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import typer

from trimtab.cli.console import note, show_error
from trimtab.cli.demo import demo
from trimtab.cli.exchange import export_adapter, import_adapter
from trimtab.cli.inspect import inspect
from trimtab.cli.merge import merge
from trimtab.cli.methods import methods
from trimtab.cli.plan import plan
from trimtab.cli.predict import predict
from trimtab.cli.train import train
from trimtab.errors import Interrupted, TrimtabError
from trimtab.method import methods as catalogue

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
    mistake in Trimtab and keeps its traceback.
    """
    silence_other_packages()
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="trimtab", standalone_mode=False)
    except Interrupted as error:
        note(str(error))
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted")
        return INTERRUPTED
    except TrimtabError as error:
        show_error(str(error))
        return FAILED
    except _UsageError as error:
        return _wrong_usage(error)
    except torch.OutOfMemoryError as error:
        show_error(f"not enough memory: {str(error).splitlines()[0]} Give a smaller --batch-size or --max-length.")
        return FAILED
    except OSError as error:
        show_error(f"{error.filename or 'the operating system'}: {error.strerror or error}.")
        return FAILED
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


def _wrong_usage(error: Any) -> int:
    if error.ctx is not None and type(error).__name__ == "NoArgsIsHelpError":
        print(error.ctx.get_help(), file=sys.stderr)
        return FAILED
    command = "trimtab" if error.ctx is None else error.ctx.command_path
    show_error(f"{error.format_message().rstrip()}{_method_setting_hint(error)}\nSee: {command} --help")
    return FAILED


def _method_setting_hint(error: Any) -> str:
    """Say how settings of methods are given where an unknown flag is the name of one."""
    if type(error).__name__ != "NoSuchOption":
        return ""
    name = error.option_name.lstrip("-").replace("-", "_")
    owner = next((cls.__name__ for cls in catalogue().values() if name in cls.__dataclass_fields__), None)
    return "" if owner is None else f" {name!r} is a setting of {owner}, for example: --method {owner} --set {name}=…"
