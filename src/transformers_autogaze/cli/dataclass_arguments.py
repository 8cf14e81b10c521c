"""Dataclasses as command-line arguments: every field is an argument of the same name."""

import argparse
import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from ..utils.output_files import check_folder, check_not_inputs


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def dataclass_arguments(*types: type) -> argparse.ArgumentParser:
    """
    Makes a parent parser with an argument for every field of the dataclasses.

    Fields that a dataclass defines itself come first, in one group for each dataclass; fields inherited from
    [`~transformers.TrainingArguments`] come last.
    """
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - {"output_dir"}
    own_groups, inherited_groups = [], []
    for settings in types:
        names = {field.name for field in dataclasses.fields(settings) if field.init}
        inherited_names = names & inherited if issubclass(settings, TrainingArguments) else set()
        own_groups.append(_select_fields(settings, names - inherited_names, f"{settings.__name__}, of this package"))
        inherited_groups.append(_select_fields(settings, inherited_names, "TrainingArguments, of transformers"))
    groups: Any = [group for group in (*own_groups, *inherited_groups) if dataclasses.fields(group)]
    return HfArgumentParser(groups, add_help=False)


def _select_fields(settings: type, names: Collection[str], title: str) -> type:
    """Makes a dataclass with some fields of another one, whose arguments form a group with a title."""
    hints = get_type_hints(settings)
    fields = []
    for field in dataclasses.fields(settings):
        if field.name in names:
            default: dict[str, Any] = {
                "default": field.default,
                "default_factory": field.default_factory,
                "metadata": field.metadata,
            }
            default = {key: value for key, value in default.items() if value is not dataclasses.MISSING}
            if field.name == "output_dir":
                default["metadata"] = {**field.metadata, "aliases": ["-o", "--output"]}
            fields.append((field.name, hints[field.name], dataclasses.field(**default)))
    return dataclasses.make_dataclass(settings.__name__, fields, namespace={"_argument_group_name": title})


def from_arguments(settings: type[Settings], options: argparse.Namespace) -> Settings:
    """Builds a dataclass from arguments that [`dataclass_arguments`] made."""
    names = [field.name for field in dataclasses.fields(settings) if field.init]
    return settings(**{name: getattr(options, name) for name in names})


def check_output(output: str | None, *inputs: str | None) -> None:
    """Checks that a checkpoint can be written to a folder, and that the folder is not an input."""
    if not output or not output.strip():
        raise ValueError(f"`--output` must name a folder to write to, got {output!r}")
    check_folder(output)
    check_not_inputs([output], [path for path in inputs if path is not None])
