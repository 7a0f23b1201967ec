"""privet protect: real images in, protected images out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from privet.cli.options import FILES, MACHINE, Files, Machine, split
from privet.cli.screen import say
from privet.errors import UsageError

if TYPE_CHECKING:  # they import torch, which takes seconds
    from privet.images import ImageSet
    from privet.learning import Publication


def protect(
    source: str,
    /,
    *,
    out: Path,
    method: str = "sem",
    preset: str | None = None,
    epsilon: float | None = None,
    set: Annotated[list[str], Parameter(name="--set", negative="")] | None = None,
    surrogate: Path | None = None,
    seed: int = 0,
    files: Files = FILES,
    machine: Machine = MACHINE,
) -> int:
    """Add noise to images, from which plain training learns little.

    A killed run goes on when the same command is given again, and ends with the same bytes.

    Parameters
    ----------
    source
        A folder of class folders, a .csv or .jsonl of paths and labels, Parquet, or a hub id.
    out
        New folder for the protected images, manifest.jsonl, run.json and the surrogate.
    method
        em, sem, rem, tap, pil (noise that nobody sees); ucl, tue (likewise, against learners without labels); lsp, ar,
        ops, cuda (seconds, but visible); or random (the control, which does not protect). keyed-em, lock and uge, which
        need a key, have their own verb: privet license protect.
    preset
        paper (the published settings; needs a GPU) or cpu (small and short).
        Default: paper where there is a GPU, else cpu.
    epsilon
        Budget, in the norm of the method: for most, no channel of a pixel changes by more, in 1/255.
        Default: 8; for lsp a length of 1.304, for ar of 1, for ops 1 pixel.
    set
        Any other setting of the method, as NAME=VALUE; may be repeated. docs/methods.md lists them.
    surrogate
        A surrogate.safetensors of an earlier run on these classes (it may know more): protect further images without
        training.
    seed
        The same seed gives the same bytes.
    files
        How images are read and written.
    machine
        Where it runs.
    """
    from privet.protection import METHODS, publish
    from privet.protection.surrogate import FILE

    if method not in METHODS:
        raise UsageError(f"Unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    here, kind = machine.find(), METHODS[method]
    settings = parse_settings(kind, set or [], epsilon=epsilon)
    chosen = kind.preset(preset or ("paper" if here.device.type == "cuda" else "cpu"), **settings)

    def change(images: ImageSet, **writing: Any) -> Publication:
        return publish(images, chosen, out, runtime=here, seed=seed, surrogate=surrogate, **writing)

    code = files.change(source, out, change, rank=here.rank, what=f"protected with {method}")
    if here.rank == 0 and (out / FILE).exists():
        say(
            f"{escape(str(out / FILE))} is private: it helps to undo the protection. Do not publish it with the images."
        )
    return code


def parse_settings(
    kind: type[Any], assignments: list[str], *, epsilon: float | None = None
) -> dict[str, Any]:
    """Turn NAME=VALUE into a method's settings, by the types of its fields.

    Args:
        kind: the method.
        assignments: as they were given; of two for one setting the last counts.
        epsilon: one more setting, which has an option of its own, or None if that was left out.

    Raises:
        UsageError: not an assignment, no such setting, a value of another type, or two budgets.
    """
    # What is not shown is secret, and no argument, which other users of the machine could see.
    types = {field.name: str(field.type) for field in dataclasses.fields(kind) if field.repr}
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in types:
            raise UsageError(
                f"Expected --set NAME=VALUE with NAME one of {', '.join(types)}; got {assignment!r}."
            )
        try:
            settings[name] = _convert(types[name], value.strip())
        except ValueError as error:
            raise UsageError(f"Expected {name} as {types[name]}, got {value!r}.") from error
    if epsilon is not None:
        if "epsilon" in settings:
            raise UsageError("The budget is given twice: leave out --epsilon or --set epsilon.")
        settings["epsilon"] = int(epsilon) if float(epsilon).is_integer() else epsilon
    return settings


def _convert(kind: str, value: str) -> Any:
    kind, _, optional = kind.partition(" | ")
    if optional and value.lower() == "none":
        return None
    if kind == "bool":
        if value.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise ValueError(value)
        return value.lower() in ("true", "yes", "1")
    if kind.startswith("tuple"):
        return split(value)
    return {"int": int, "float": float}.get(kind, str)(value)
