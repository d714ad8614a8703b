"""What networks have because users of diffusers and transformers type it: counts, single files, compilation.

Source: diffusers `models/modeling_utils.py`, `loaders/single_file_model.py`; transformers
`modeling_utils.py`.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from joyedit.checkpoints.config_spellings import ConfigSpellings
from joyedit.checkpoints.missing import NETWORKS, lacking
from joyedit.checkpoints.recomputing import keep_all, members, recompute
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.quantised import is_scale

log = logging.getLogger("joyedit")

# Table of a network -> what its tensors' names begin with in the file of a whole model.
WHOLE_MODEL_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "sd_unet": ("model.diffusion_model.",),
    "sd_vae": ("first_stage_model.", "vae."),
    "wan_vae": ("first_stage_model.", "vae."),
    "joyimage_mmdit": ("model.diffusion_model.",),
    "chronoedit_dit": ("model.diffusion_model.", "diffusion_model."),
}


class NetworkSpellings(ConfigSpellings, nn.Module):
    """A network's methods that its own code never calls."""

    config_name = "config.json"
    missing: ClassVar[Mapping[str, str]] = NETWORKS
    recomputed_lists: ClassVar[frozenset[str]]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self.missing:
                raise
            raise lacking(type(self), name) from None

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The count of weights."""
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        left_out = {id(table.weight) for table in tables} if exclude_embeddings else set()
        named = (p for name, p in self.named_parameters() if not is_scale(name))
        wanted = (p for p in named if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in wanted if id(p) not in left_out)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, and of the buffers."""
        buffers = self.buffers() if return_buffers else ()
        return sum(tensor.nbytes for tensors in (self.parameters(), buffers) for tensor in tensors)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the repeated blocks in place, with the arguments of `torch.compile`. Pipelines call a
        network part by part, so that compiling its `forward` would change nothing."""
        for block in repeated_blocks(self):
            block.compile(*args, **options)

    def compile_repeated_blocks(self, *args: Any, **options: Any) -> None:
        """`compile`, under the name that diffusers gives it."""
        self.compile(*args, **options)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        log.info("xformers is not used: joyedit.ops.attention is memory efficient by itself")

    def disable_xformers_memory_efficient_attention(self) -> None:
        log.info("xformers is not used: joyedit.ops.attention is memory efficient by itself")

    def enable_gradient_checkpointing(self) -> None:
        """From now on, keep of each block what goes into it alone, and compute the rest once more when a
        gradient comes back: the same gradients at a fraction of the memory, for another forward pass.

        Raises ValueError for a network that is no denoiser.
        """
        if not self.recomputed_lists:
            raise ValueError(f"enable_gradient_checkpointing: {type(self).__name__} has no blocks for it")
        recompute(self, self.recomputed_lists)

    def disable_gradient_checkpointing(self) -> None:
        """Keep all again."""
        keep_all(self, self.recomputed_lists)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any("forward" in block.__dict__ for block in members(self, self.recomputed_lists))

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        log.info("attention is not sliced: joyedit.ops.attention does not hold the matrix of scores")

    def register_forward_hook(self, hook: Callable, **options: Any) -> Any:
        _warn_of_hook(type(self).__name__)
        return super().register_forward_hook(hook, **options)

    def register_forward_pre_hook(self, hook: Callable, **options: Any) -> Any:
        _warn_of_hook(type(self).__name__)
        return super().register_forward_pre_hook(hook, **options)


@functools.cache
def _warn_of_hook(name: str) -> None:
    log.warning(
        "a forward hook on a whole %s runs when you call it, but not in a pipeline, which calls a network "
        "part by part: hook its blocks instead",
        name,
    )


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists."""
    lists = [child for child in network.modules() if isinstance(child, nn.ModuleList)]
    inner = {id(m) for one in lists for block in one for m in block.modules() if m is not block}
    return [block for one in lists for block in one if id(block) not in inner]


def tensors_of_one(files: TensorFiles, table: str) -> TensorFiles:
    """The tensors of one network out of the file of a whole model, without their prefix; of a file of one
    network all tensors."""
    for prefix in WHOLE_MODEL_PREFIXES.get(table, ()):
        names = {name.removeprefix(prefix): name for name in files if name.startswith(prefix)}
        if names:
            return files.renamed(names)
    return files


def local_file(path: str | Path) -> Path:
    """A weight file as `from_single_file` takes it. Raises FileNotFoundError for one that is not here."""
    if not Path(path).is_file():
        advice = "; fetch it with hf_hub_download(repo, file)" if "//" in str(path) else ""
        raise FileNotFoundError(f"{path} is not a file here{advice}")
    return Path(path)
