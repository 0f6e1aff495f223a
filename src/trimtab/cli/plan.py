"""`trimtab plan`: what a method would train on a model, and every place there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.console import Grid, count_text, new_head_text, note, show, show_json
from trimtab.cli.options import AsJson
from trimtab.cli.settings import method_from, read_config
from trimtab.errors import SettingError, suggestion
from trimtab.planning import Plan, bytes_text
from trimtab.planning import plan as make_plan
from trimtab.structure import Structure
from trimtab.targets import ROLES
from trimtab.training.architectures import Skeleton, make_skeleton
from trimtab.training.causal_lm import CausalLM
from trimtab.training.classification import Classification
from trimtab.training.heads import head_numbers, with_fresh_head
from trimtab.training.seq2seq import Seq2Seq
from trimtab.training.tasks import TASKS, AnyTask

MODEL_HELP = "A model folder, a hub id, or 'minilm', the embedded model."


def plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    method: Annotated[str | None, typer.Option(help="Name of the method; `trimtab methods` lists them.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method: name=value.")] = None,
    targets: Annotated[str | None, typer.Option(help="Roles, names or patterns: 'attention | mlp-output'.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with the section [method].")] = None,
    task: Annotated[str | None, typer.Option(help=f"Plan on the model of this task: {', '.join(TASKS)}.")] = None,
    labels: Annotated[int, typer.Option(min=2, help="Number of classes of a new head.")] = 2,
    sites: Annotated[bool, typer.Option("--sites", help="List every place of the model and its roles.")] = False,
    json: AsJson = False,
) -> None:
    """Show what a method would train, its memory and what it does not reach; nothing is trained or changed."""
    described = read_config(config).get("method", {}) if config is not None else {}
    wanted = method is not None or bool(described)
    if not wanted and not sites:
        raise SettingError("nothing to plan: give --method LoRA, for example, or --sites to list the model's places.")
    chosen = method_from(method, settings or [], targets, described) if wanted else None
    skeleton = make_skeleton(model, None if task is None else example_task(task, labels))
    if not skeleton.on_meta:
        note("this model cannot be built without numbers; it was built with random ones")
    document: dict[str, object] = {"model": model, "model_class": type(skeleton.model).__name__}
    if sites:
        _show_sites(skeleton, document, json)
    if chosen is not None:
        composed = with_fresh_head(skeleton.model, chosen, skeleton.fresh)
        _show_plan(make_plan(skeleton.model, composed), skeleton, document, json)
        if task is None and not json:
            show("The model is as its checkpoint names it; with --task its head is that of `trimtab train`.")
    if json:
        show_json(document)


def example_task(name: str, labels: int) -> AnyTask:
    """Return a task that stands for all of its name: a model depends on the number of classes alone."""
    examples: dict[str, AnyTask] = {
        Classification.name: Classification("text", "label", tuple(str(number) for number in range(labels))),
        CausalLM.name: CausalLM(text="text"),
        Seq2Seq.name: Seq2Seq("source", "target"),
    }
    if name not in examples:
        raise SettingError(f"there is no task {name!r}." + suggestion(name, examples))
    return examples[name]


def _show_plan(found: Plan, skeleton: Skeleton, document: dict[str, object], json: bool) -> None:
    head = head_numbers(skeleton.model, skeleton.fresh)
    document["plan"] = dataclasses.asdict(found)
    document["new_head_numbers"] = head
    if json:
        return
    rows = tuple((row.site, row.method, row.size, count_text(row.trainable)) for row in found.rows)
    reach = tuple((entry.group, count_text(entry.numbers), f"{entry.share:.1%}") for entry in found.coverage)
    show(
        Grid(("site", "method", "size", "trainable"), rows),
        "",
        Grid(("weights", "numbers", "reached"), reach),
        f"\n{found.trainable:,} of {found.base:,} numbers are trained{new_head_text(head)} "
        f"({found.trainable / max(found.base, 1):.3%}). "
        f"Adapter {bytes_text(found.adapter_bytes)}; with gradients and Adam {bytes_text(found.training_bytes)}, "
        "activations on top.",
    )
    if skeleton.fresh:
        names = ", ".join(skeleton.fresh)
        show(f"The checkpoint has no head for this task: a new one is trained with the adapter ({names}).")


def _show_sites(skeleton: Skeleton, document: dict[str, object], json: bool) -> None:
    structure = Structure(skeleton.model)
    roles = {role: [str(item) for item in find(structure)] for role, find in ROLES.items()}
    places: dict[str, list[str]] = {}
    for role, names in roles.items():
        for name in names if role not in ("all", "bias") else ():  # these name parameters: too many to list
            places.setdefault(name, []).append(role)
    entries = [(name, *_facts(structure, name), places[name]) for name in _in_order(structure, places)]
    document["roles"] = roles
    document["places"] = [
        {"place": name, "type": kind, "shape": shape, "roles": own} for name, kind, shape, own in entries
    ]
    if json:
        return
    rows = tuple((name, kind, shape, ", ".join(own)) for name, kind, shape, own in entries)
    counts = tuple((role, str(len(names)), names[0] if names else "–") for role, names in roles.items())
    show(Grid(("place", "type", "shape", "roles"), rows), "", Grid(("role", "places", "first"), counts), "")


def _in_order(structure: Structure, places: dict[str, list[str]]) -> list[str]:
    order = {path: index for index, path in enumerate(structure.modules)}
    return sorted(places, key=lambda name: (order[name.partition(":")[0]], name))


def _facts(structure: Structure, name: str) -> tuple[str, str]:
    path, _, parameter = name.partition(":")
    module = structure.modules[path]
    tensor = module._parameters.get(parameter or "weight")
    return type(module).__name__, "×".join(map(str, tensor.shape)) if tensor is not None else "–"
