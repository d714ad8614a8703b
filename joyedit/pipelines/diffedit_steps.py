"""What DiffEdit does in every step of inversion and denoising: a prediction before it, callbacks after it.

B images   C latent channels   h, w latent size   P prompts   T steps taken
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from joyedit import ops
from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.pipelines.checks import check_count
from joyedit.pipelines.diffedit_request import Repaint, Run
from joyedit.pipelines.pipeline import DENOISED, Pipeline
from joyedit.step_cache import StepCache, as_argument


class AfterStep(Protocol):
    def __call__(
        self, i: int, t: Tensor, latents: Tensor, x0: Tensor, work: Repaint | None = None, /
    ) -> Tensor:
        """The latents to go on with after step i. x0: what the step headed for; work: what is repainted."""
        ...


@contextlib.contextmanager
def denoiser(
    pipe: Pipeline, network: UNet2DConditionModel, run: Run, label: str
) -> Iterator[Callable[[int, Tensor], Tensor]]:
    """A function: what the UNet predicts at run.steps[i] for x (B, C, h, w), guided if there are negatives,
    as long as no callback ends it. A prompt serves B / P samples in a row."""
    positive, negative = run.embeds
    pair = None if negative is None or torch.equal(negative, positive) else (negative, positive)
    pipe._num_timesteps, pipe._steps_computed = len(run.steps), 0
    cache = StepCache(run.step_cache, len(run.steps))
    caches = [cache.branch(), cache.branch()]  # of the positive prompts alone, the second
    with (
        pipe.on_device(network) as unet,
        pipe.adapters_scaled(run.adapter_scale),
        pipe.progress_bar(len(run.steps), label) as bar,
    ):
        times = unet.embed_time(run.steps)
        both = None if pair is None else unet.embed_context(torch.cat(pair))
        alone = unet.embed_context(positive) if pair is None else None
        step = pipe.graphed(unet, unet.predict)

        def predict(i: int, x: Tensor) -> Tensor:
            nonlocal alone
            bar.update()
            pipe._current_timestep = run.steps[i]
            cache.begin(i)
            if both is not None and pipe.do_classifier_free_guidance:
                uncond, cond = step(x, times[i], both, branches=2, **as_argument(caches)).chunk(2)
                output = ops.guide(cond, uncond, pipe.guidance_scale)
            else:
                alone = alone or unet.embed_context(positive)
                output = step(x, times[i], alone, branches=1, **as_argument(caches[1:]))
            pipe._steps_computed = cache.computed
            return output

        yield predict
    pipe._current_timestep = None


def after_step(
    pipe: Pipeline,
    legacy: Callable | None,
    every: Any,
    on_step_end: Callable | None,
    names: Sequence[str],
) -> AfterStep:
    """Calls the callbacks of both kinds. What they see as denoised is, outside the mask, the photograph's."""
    names = pipe.check_callback(on_step_end, names)
    every = check_count("callback_steps", every)

    def run(i: int, t: Tensor, latents: Tensor, x0: Tensor, work: Repaint | None = None, /) -> Tensor:
        tensors: dict[str, Tensor | None] = {"latents": latents}
        if DENOISED in names:
            tensors[DENOISED] = x0 if work is None else torch.where(work.mask, x0, work.levels[:, -1])
        latents = pipe.call_back(on_step_end, names, i, t, tensors)["latents"]
        if legacy is not None and i % every == 0:
            legacy(i, t, latents)
        return latents

    return run
