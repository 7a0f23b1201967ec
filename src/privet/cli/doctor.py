"""privet doctor: what works on this machine, and how to mend what does not."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from pathlib import Path

from rich.markup import escape

from privet.cli.screen import say
from privet.errors import OK, MissingExtraError

EXTRAS = {
    "timm": ("timm", "networks by timm's names"),
    "transformers": ("transformers", "pretrained vision models from a folder"),
    "diffusers": ("diffusion", "purification by diffusion"),
    "flwr": ("federation", "federated learning on Flower"),
    "numba": ("federation", "compiled codecs of federated updates"),
    "cryptography": ("licensing", "signed releases and licences"),
    "opacus": ("opacus", "records of differentially private training"),
    "sklearn": ("demo", "the demonstration's images"),
}


def doctor() -> int:
    """Check Python, torch, the device, memory, disk and extras, each with its fix."""
    healthy = True
    for good, what, words in [*_core(), *_room(), *_extras()]:
        mark = "[green]ok[/]  " if good else "[yellow]--[/]  " if good is None else "[red]bad[/] "
        say(f"{mark} {what:<10} {escape(words)}")
        healthy = healthy and good is not False
    return OK if healthy else MissingExtraError.exit_code


def _core() -> list[tuple[bool | None, str, str]]:
    version = platform.python_version()
    checks: list[tuple[bool | None, str, str]] = [
        (
            sys.version_info >= (3, 11),
            "python",
            f"{version}" if sys.version_info >= (3, 11) else f"{version}; install 3.11 or newer",
        )
    ]
    try:
        import torch
    except ImportError as error:
        return [
            *checks,
            (False, "torch", f"does not import ({error}); install it: pip install torch"),
        ]
    from privet.learning import Runtime

    precision = Runtime.find().precision
    checks.append((True, "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"))
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        checks.append((True, "device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, {precision}"))
    else:
        built = (
            "this torch is built for CUDA but sees no GPU: check the driver"
            if torch.version.cuda
            else ("this torch is a CPU build; for a GPU install a CUDA build of torch")
        )
        checks.append(
            (
                None,
                "device",
                f"CPU only ({torch.backends.cpu.get_cpu_capability()}, {precision}); {built}. Use --preset cpu",
            )
        )
    return checks


def _room() -> list[tuple[bool | None, str, str]]:
    import psutil

    memory = psutil.virtual_memory()
    free, disk = memory.available / 2**30, shutil.disk_usage(Path.cwd()).free / 2**30
    return [
        (
            None if free < 2 else True,
            "memory",
            f"{free:.1f} GiB free of {memory.total / 2**30:.1f}"
            + ("; close other programs" if free < 2 else ""),
        ),
        (
            None if disk < 2 else True,
            "disk",
            f"{disk:.1f} GiB free here"
            + ("; protected PNG files need several times the originals' size" if disk < 2 else ""),
        ),
    ]


def _extras() -> list[tuple[bool | None, str, str]]:
    checks: list[tuple[bool | None, str, str]] = []
    for module, (extra, use) in EXTRAS.items():
        try:
            importlib.import_module(module)
            checks.append((True, extra, use))
        except (ImportError, RuntimeError):
            checks.append((None, extra, f"not installed ({use}): pip install 'privet[{extra}]'"))
    return checks
