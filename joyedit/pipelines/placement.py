"""Where a pipeline's networks are: on a device, in main memory until they run, or within a budget; and what
follows from it, such as graphs, which need them to stay.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Self, TypeVar

import torch

from joyedit import parallel
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.sizes import parse_size, written_size
from joyedit.graphs import GraphedCalls
from joyedit.memory import (
    BlockStreaming,
    Watched,
    at_rest,
    enough_for_work,
    least_budget,
    room_on,
    stream_blocks,
    visit,
)
from joyedit.pipelines import together

log = logging.getLogger("joyedit")

Part = TypeVar("Part", bound=Network)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Placed:
    """What pipelines do with all their networks at once, as far as it is about places."""

    networks: dict[str, Network]
    denoiser: Any
    _offload_device: torch.device | None = None  # where networks come to when they run
    _room: Watched | None = None  # within the budget
    _graphs: GraphedCalls | None = None

    def placement(self) -> dict[str, str]:
        """What is set, in words."""
        facts = {}
        if self._offload_device is not None:
            facts["offloaded from"] = str(self._offload_device)
        if self._room is not None:
            facts["memory"] = f"{self._room.total:,} bytes"
        if self._graphs is not None:
            facts["graphs"] = f"{len(self._graphs)} recorded"
        if (mesh := self.mesh) is not None:
            facts["parallel"] = f"cfg={mesh.cfg}, sequence={mesh.sequence}, process {mesh.rank}"
        return facts

    def in_use(self) -> set[str]:
        """Which settings of `together.py` are on."""
        offloaded = self._offload_device is not None or any(
            BlockStreaming.is_attached(network) for network in self.networks.values()
        )
        modules = (module for network in self.networks.values() for module in network.modules())
        states = {
            "memory": self._room is not None,
            "offload": self._room is None and offloaded,
            "graphs": self._graphs is not None,
            "parallel": self.mesh is not None,
            "compile": any(module._compiled_call_impl is not None for module in modules),
        }
        return {name for name, on in states.items() if on}

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        resting = (at_rest(network) for network in self.networks.values())
        return self._offload_device or next(resting, torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the networks to a device, a dtype, or both, as `torch.nn.Module.to`.

        Raises ValueError while the pipeline is offloaded.
        """
        if self._offload_device is not None:
            raise ValueError("the pipeline is offloaded: call disable_offload() before moving it")
        if self._graphs is not None:
            self._graphs.clear()
        for network in self.networks.values():
            network.to(*args, **kwargs)
        return self

    def set_offload(self, offload: str, device: torch.device | str | None = None) -> None:
        """ "none", "model" (one network on the device at a time) or "sequential" (one block at a time).

        Raises ValueError for another word, and for offloading with graphs.
        """
        check_offload(offload)
        if offload != "none":
            together.check("offload", f"offload={offload!r}", self.in_use() - {"memory"})
        self.disable_offload()
        if offload == "none":
            return
        accelerator = torch.device(device) if device is not None else accelerator_device()
        if accelerator is None:
            log.info("offload=%r has no effect without an accelerator", offload)
            return
        self._offload_device = accelerator
        for network in self.networks.values():
            network.to("cpu")
        if offload == "sequential":
            stream_blocks(self.networks.values(), accelerator)

    def set_memory(self, memory: int | str, device: torch.device | str | None = None) -> None:
        """Hold at most `memory` where the pipeline computes: bytes, "12G" (12 * 1024**3) or "12GB"
        (12 * 1000**3). None ends that.

        Of a GPU it is the memory that PyTorch takes there; of a CPU the process's resident set, mapped files
        included. The networks wait in main memory, on a CPU in their files, and come block by block; as many
        blocks as there is room for stay while their network runs. The results are those without.
        device: an accelerator if there is one, unless this names another or the pipeline is on one.

        Raises ValueError for other sizes, for less than the networks need block by block, naming what is
        enough for a small picture, for devices other than CUDA's, ROCm's and Linux' CPUs, and with graphs. A
        call that takes more than the budget warns of it.
        """
        total = None if memory is None else parse_size(memory)
        if total is not None:
            together.check("memory", f"memory={memory!r}", self.in_use() - {"offload"})
        where = self.device if device is None else torch.device(device)
        if where.type == "cpu" and device is None:
            where = accelerator_device() or where
        if total is None:
            return self.disable_offload()
        room = room_on(where, total)
        self._refuse_too_little(memory, total, where)
        self.disable_offload()
        if where.type != "cpu":
            for network in self.networks.values():
                network.to("cpu")
            self._offload_device = where
        self._room = room
        stream_blocks(self.networks.values(), where, self._room)

    def _refuse_too_little(self, memory: Any, total: int, where: torch.device) -> None:
        least, why = least_budget(self.networks, where)
        if total < least:
            enough = written_size(enough_for_work(least))
            raise ValueError(
                f"memory={memory!r} is too little: {why}; the smallest that works is memory={enough!r}"
            )

    def disable_offload(self) -> None:
        """Keep the networks in main memory from now on, until they are moved."""
        self._offload_device = self._room = None
        for network in self.networks.values():
            BlockStreaming.detach(network)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the networks in main memory and bring one at a time to the accelerator."""
        self.set_offload("model", device if device is not None else gpu_device(gpu_id))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the networks in main memory and bring one block at a time to the accelerator: least memory,
        slowest."""
        self.set_offload("sequential", device if device is not None else gpu_device(gpu_id))

    def enable_graphs(self) -> None:
        """Record what a step of the denoiser launches, the first time with such arguments, and replay it from
        then on: for networks whose steps take Python longer to launch than the GPU to compute.

        The results are those without. Adapters, weights and settings may change at any time: what a graph was
        not recorded with is recorded anew. The graphs keep the memory of a step, and of its inputs. Raises
        ValueError where the pipeline does not compute on a CUDA or ROCm device, or is offloaded.
        """
        together.check("graphs", "enable_graphs()", self.in_use())
        if self.device.type != "cuda":
            raise ValueError(
                f"enable_graphs: graphs need a CUDA or ROCm device, and this pipeline is on {self.device}"
            )
        if self._graphs is None:
            self._graphs = GraphedCalls()

    def disable_graphs(self) -> None:
        """Launch every step by itself again, and free the graphs' memory."""
        if self._graphs is not None:
            self._graphs.clear()
        self._graphs = None

    def graphed(self, network: Network, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """A function of the network, replayed from graphs if these are enabled; see `GraphedCalls`."""
        return function if self._graphs is None else functools.partial(self._graphs, network, function)

    @property
    def mesh(self) -> parallel.Mesh | None:
        """The processes among which the denoiser is divided; see `parallelize`."""
        return parallel.mesh_of(self.denoiser)

    def parallelize(self, cfg: int = 1, sequence: int = 1) -> None:
        """Divide the denoiser among cfg x sequence processes, one for each GPU; 1 and 1 end that.

        cfg: 2 computes the branches of the guidance at once. sequence: among how many processes the tokens
        of a branch are divided, of which the heads of attention are a multiple. The processes are those of
        the group that is there, else those that `torchrun` has started. From then on each makes the same
        calls with the same arguments and seeds, one call at a time, and gets the whole result; the first
        one shows the progress. `pipe.transformer(...)` takes and gives whole tensors, and its gradients are
        those of one process. A group that this makes stays until `torch.distributed.destroy_process_group()`.

        Raises ValueError for a mesh that does not fit the processes or the network, for pipelines without a
        transformer that can be divided (DiffEdit), and for a pipeline that is not on this process's GPU, or
        is set to what excludes it. With cfg=2 calls without guidance raise ValueError.
        """
        if (cfg, sequence) == (1, 1):
            return None if self.denoiser is None else parallel.undo(self.denoiser)
        network = parallel.checked(self.denoiser, cfg, sequence)
        asked = f"parallelize(cfg={cfg}, sequence={sequence})"
        together.check("parallel", asked, self.in_use() - {"parallel"})
        parallel.divide(network, parallel.meet(cfg, sequence, self.device))

    def begin_together(self, guidance_scale: float) -> None:
        """A call of all processes among which the denoiser is divided begins, if it is: they draw the same.
        Raises ValueError where there is no second branch for those that would compute it, and where the
        pipeline has been moved."""
        if (mesh := self.mesh) is None:
            return
        if self.device.type != mesh.device.type:
            raise ValueError(
                f"the pipeline went from {mesh.device.type} to {self.device.type} since it was divided among "
                "processes: call parallelize() again"
            )
        if mesh.cfg == 2 and guidance_scale <= 1:
            raise ValueError(
                f"guidance_scale={guidance_scale:g} turns guidance off, and cfg=2 divides its branches: call "
                f"parallelize(sequence={mesh.size}), or give a guidance_scale above 1"
            )
        mesh.same_draws()

    @contextlib.contextmanager
    def on_device(self, network: Part) -> Iterator[Part]:
        """The network, on the device that computes while the block runs. Other calls may run it meanwhile."""
        if network is None:  # what needs a part has said so by its name
            raise ValueError("this needs a network that the pipeline does not have")
        visited = visit(network, None if BlockStreaming.is_attached(network) else self._offload_device)
        room = self._room
        with visited, contextlib.nullcontext() if room is None else room.visit(type(network).__name__):
            yield network


def check_offload(offload: str) -> None:
    if offload not in ("none", "model", "sequential"):
        raise ValueError(f"offload={offload!r}: must be 'none', 'model' or 'sequential'")


def accelerator_device() -> torch.device | None:
    """The first CUDA or ROCm device, else Apple's, else none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else None


def gpu_device(gpu_id: int | None) -> torch.device | None:
    device = accelerator_device()
    return device if device is None or gpu_id is None else torch.device(device.type, gpu_id)
