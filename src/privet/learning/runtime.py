"""Where a job runs: device, precision, and its share of the work when several processes run it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from privet.errors import UsageError

PRECISIONS = ("auto", "bf16", "float32")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One process of a job.

    Attributes:
        device: where tensors live.
        precision: "bf16" (autocast; weights and budgets stay float32) or "float32".
        compile: whether networks go through torch.compile; worth it for long runs on a GPU.
        rank: this process's number, from 0.
        world: how many processes do the job together.
    """

    device: torch.device
    precision: str = "float32"
    compile: bool = False
    rank: int = 0
    world: int = 1

    @classmethod
    def find(cls, device: str = "auto", precision: str = "auto", *, compile: bool = False) -> Self:
        """Find out where this process runs, started alone or by `accelerate launch`.

        Args:
            device: "auto" (a GPU if there is one), "cpu" or "cuda".
            precision: "bf16", "float32", or "auto": bf16 if the device multiplies in it, else float32.
            compile: whether networks go through torch.compile.

        Raises:
            UsageError: an unknown device or precision, no GPU where one was asked for, or several processes that
                began on another device.
        """
        from accelerate import PartialState

        if precision not in PRECISIONS:
            raise UsageError(f"Unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}.")
        if device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"Unknown device {device!r}; expected auto, cpu or cuda.")
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("Asked for a CUDA device, but torch sees none; 'privet doctor' says more.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        state = PartialState(cpu=device == "cpu")
        steady()
        place = torch.device(device)
        if state.device.type == device:
            place = state.device  # with the number of this process's GPU
        elif state.num_processes > 1:  # what they send goes by way of the device that they began on
            raise UsageError(
                f"Asked for the device {device}, but this job's {state.num_processes} processes began on "
                f"{state.device.type}. Ask for one device throughout."
            )
        if precision == "auto":
            precision = "bf16" if multiplies_bf16(place) else "float32"
        return cls(
            device=place,
            precision=precision,
            compile=compile,
            rank=state.process_index,
            world=state.num_processes,
        )

    def autocast(self) -> torch.autocast:
        """Return the context in which networks run."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )

    def alone(self, command: str) -> None:
        """Raise UsageError if several processes do what one does by itself."""
        if self.world > 1:
            raise UsageError(
                f"{command} is one process's work, but {self.world} were started. Start it without accelerate launch; "
                "--workers trains several networks at a time where there is that option."
            )

    @contextlib.contextmanager
    def drawing(self, seed: int) -> Iterator[None]:
        """Seed torch's own random numbers for the block: networks draw from them (dropout, drop path)."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network here, channels last: with bf16 two to three times the default's speed."""
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile:
            model.compile()
        return model

    def hold(self, rows: Tensor) -> Tensor:
        """Return rows of an image set on the device, or as they are if they would fill half of it."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if rows.numel() * rows.element_size() > free / 2:
                return rows
        return rows.to(self.device)

    def take(self, held: Tensor, index: Tensor) -> Tensor:
        """Return these rows of what `hold` returned, on the device."""
        return held[index.to(held.device)].to(self.device, non_blocking=True)

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch."""
        return batch[self.rank :: self.world]

    def unshare(self, part: Tensor, count: int) -> Tensor:
        """Return the whole batch of `count` rows of which each process gives its `share`."""
        if self.world == 1:
            return part
        whole = part.new_zeros(count, *part.shape[1:])
        whole[self.rank :: self.world] = part
        return self.sum(whole)

    def distribute(self, model: nn.Module) -> nn.Module:
        """Return the network to train: wrapped for gradient averaging if there are other processes."""
        if self.world == 1:
            return model
        ids: Any = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def agree(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: each has batch norm's means of its own share."""
        if self.world > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def told(self, value: int) -> int:
        """Return the first process's value, in every process."""
        return int(self.sum(torch.tensor(int(value) if self.rank == 0 else 0, device=self.device)))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value


def steady() -> None:
    """Make a GPU give the same bytes for the same run, and compute in all of float32's digits where that is asked.

    Every process of a job calls it before it computes.
    """
    # The fastest kernels add in no fixed order; where there are none that do, torch warns.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Convolutions would round float32 to 10 bits of mantissa.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def multiplies_bf16(device: torch.device) -> bool:
    """Say whether a device multiplies bf16 itself; where torch imitates that, float32 is several times as fast."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # An older torch does not tell what a processor can do; there float32 is slower at worst.
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(kernels and (can.get("avx512_bf16") or can.get("bf16")))


def describe_device(device: torch.device, threads: int, processes: int = 1) -> str:
    """Return in words what the exact bytes of a result depend on, beside the software."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    return name if processes == 1 else f"{name}, {processes} processes"


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Compute with so many threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_with_parent() -> None:
    """End this worker process as soon as the process that started it has ended, even if it was killed.

    A pool's queue would never tell, and the worker would hold its memory, a GPU's too, for ever.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
