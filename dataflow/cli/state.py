"""`dataflow state`."""

from __future__ import annotations

import json
import operator
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from connectors.errors import BadInputError, NotFoundError

__all__ = ["state"]

_OF_LOADER = {"version", "batch_size", "drop_last"}
_OF_SAMPLER = {"version", "fingerprint", "epoch", "position", "step"}
# Frameworks keep a loader's state some levels down in their checkpoints.
_MAX_DEPTH = 6
_MAX_TEXT = 60


@click.group()
def state() -> None:
    """Read where a loader stands, from a JSON file or from a checkpoint of torch that holds its state."""


@state.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The state itself, as one JSON object.")
def show(*, file: Path, as_json: bool) -> None:
    """Show where the loader stood when it gave the state in FILE."""
    found = _read(file)
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
        return
    leaves = {name: value for name, value in _flatten(found) if value not in (None, [], {})}
    width = max(map(len, leaves))
    click.echo(f"{'stands at':<{width}}  {_where(_place(found))}")
    for name, value in leaves.items():
        click.echo(f"{name:<{width}}  {_short(value)}")


@state.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def diff(*, first: Path, second: Path) -> None:
    """Name what differs between the states in FIRST and SECOND. Exit code 1 if anything does."""
    left, right = (dict(_flatten(_read(file))) for file in (first, second))
    names = [name for name in {**left, **right} if left.get(name, _ABSENT) != right.get(name, _ABSENT)]
    for name in names:
        click.echo(f"{name}: {_short(left.get(name, _ABSENT))} -> {_short(right.get(name, _ABSENT))}")
    if names:
        click.get_current_context().exit(1)
    click.echo("the states are equal")


@state.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dataset", "url", help="The dataset that a loader is to go on with.")
def check(*, file: Path, url: str | None) -> None:
    """Check that this release can go on from the state in FILE.

    The state has to be whole, of a version that this release reads, and of the dataset, if one is named.
    """
    found = _read(file)
    place = _place(found)
    _check_versions(found, place, file)
    _check_whole(found, place, file)
    of_dataset = "" if url is None else f" of {_check_dataset(place, file, url):,} in {url}"
    click.echo(f"ok: {_where(place)}{of_dataset}")


def _check_versions(found: Mapping[str, Any], place: Mapping[str, Any], file: Path) -> None:
    from dataflow.loaders import schedule_sampler
    from dataflow.loaders import state as loader_state

    of_loader = [(found, loader_state.STATE_VERSION)] if found.keys() >= _OF_LOADER else []
    of_sampler = [(place, schedule_sampler.STATE_VERSION)] if place.keys() >= _OF_SAMPLER else []
    for part, version in of_loader + of_sampler:
        if part["version"] != version:
            raise BadInputError(
                f"the state in {file} has version {part['version']!r} and this release reads {version}: use the "
                "release that wrote it"
            )


def _check_whole(found: Mapping[str, Any], place: Mapping[str, Any], file: Path) -> None:
    from dataflow.loaders.state import read_state

    try:
        if found is place and not found.keys() >= _OF_SAMPLER:
            read_state(found)
        else:
            _read_place(place, found.get("ahead", ()))
    except (LookupError, TypeError, ValueError) as error:
        raise BadInputError(f"the state in {file} is damaged: {error!r} while reading it") from error


def _read_place(place: Mapping[str, Any], ahead: Iterable[Any]) -> None:
    for number in (place["epoch"], *ahead):
        operator.index(number)
    if min(operator.index(place[name]) for name in ("position", "step")) < 0:
        raise ValueError("a number is out of range")


def _check_dataset(place: Mapping[str, Any], file: Path, url: str) -> int:
    """Return the length of the dataset that a state belongs to."""
    from dataflow.dataset import open_dataset

    dataset = open_dataset(url, cache=None)
    try:
        fingerprint, length = dataset.fingerprint, len(dataset)
    finally:
        dataset.reader.close()
    if place.get("fingerprint") is None:
        raise BadInputError(f"the state in {file} does not name its dataset, so that cannot be checked")
    if place["fingerprint"] != fingerprint:
        raise BadInputError(
            f"the state in {file} belongs to another dataset: it has fingerprint {place['fingerprint']}, and {url} "
            f"has {fingerprint}"
        )
    return length


_ABSENT = object()


def _read(file: Path) -> dict[str, Any]:
    """Return the only loader state in a file."""
    try:
        data = file.read_bytes()
    except FileNotFoundError as missing:
        raise NotFoundError(f"no file at {file}") from missing
    except OSError as error:
        raise BadInputError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = _load_checkpoint(file)
    found = list(_find(content, ""))
    if not found:
        raise BadInputError(f"{file} holds no state of a loader: save what loader.state_dict() returned")
    if len(found) > 1:
        names = ", ".join(name or "the whole file" for name, _ in found)
        raise BadInputError(f"{file} holds {len(found)} states of loaders ({names}): save one of them to a file")
    return dict(found[0][1])


def _load_checkpoint(file: Path) -> Any:
    from dataflow.loaders.checkpoint import read_checkpoint

    try:
        return read_checkpoint(file)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        if not zipfile.is_zipfile(file):
            raise BadInputError(f"{file} is neither JSON nor a checkpoint of torch") from error
        raise BadInputError(
            f"{file} cannot be read: it is damaged, or holds objects of classes that torch does not know; save the "
            "loader's state to a file of its own, with json or torch.save"
        ) from error


def _find(content: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the states of loaders and samplers inside a checkpoint, with the names of where they are."""
    if isinstance(content, Mapping):
        if (content.keys() >= _OF_LOADER and content.keys() & {"sampler", "epoch"}) or content.keys() >= _OF_SAMPLER:
            yield name, content
            return
        children = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, (list, tuple)):
        children = [(str(number), value) for number, value in enumerate(content)]
    else:
        return
    for key, value in children if depth < _MAX_DEPTH else []:
        yield from _find(value, f"{name}.{key}" if name else key, depth + 1)


def _place(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what says where a state stands: the sampler's part, if it has one."""
    sampler = found.get("sampler")
    return sampler if isinstance(sampler, Mapping) else found


def _where(place: Mapping[str, Any]) -> str:
    try:
        return _describe(place)
    except (LookupError, TypeError, ValueError):
        return "no place that can be read: the state is damaged"


def _describe(place: Mapping[str, Any]) -> str:
    if place.keys() >= _OF_SAMPLER:
        return f"epoch {place['epoch']}, step {place['step']:,}, {place['position']:,} samples"
    epoch = place["epoch"]
    if isinstance(epoch, Mapping):
        return f"epoch {epoch.get('epoch', 0)}, {epoch.get('batches', 0):,} batches"
    return f"the beginning of epoch {place.get('next_epoch', 0)}"


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings under their dotted names."""
    if not isinstance(value, Mapping) or not value:
        yield name, value
        return
    for key, item in value.items():
        yield from _flatten(item, f"{name}.{key}" if name else str(key))


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
