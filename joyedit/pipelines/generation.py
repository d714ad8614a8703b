"""Text from Qwen3-VL, token by token: which comes next is chosen from the logits of all tokens before it.

The prompt is read at once and its keys and values are kept, so that each new token costs one pass over one
token. Its rotary position counts on from the prompt's, which images have made shorter than its tokens are
many.

V vocabulary
Source: transformers `generation/logits_process.py`; nucleus sampling, arXiv 1904.09751; the penalty of
repetition, arXiv 1909.05858.
"""

import dataclasses
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from joyedit.models.qwen3_vl import ImageFeatures, Prefix, Qwen3VLForConditionalGeneration
from joyedit.pipelines.checks import check_count, check_number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How many tokens are made at most, and how each is chosen. Raises ValueError for values out of range.

    temperature: 0 takes the most likely token. Others draw: above 1 more evenly, below 1 less. A draw is
    among the top_k most likely (0: all), and of these among the most likely that have a share of top_p.
    repetition_penalty: above 1, tokens that the prompt or the answer holds become less likely.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0)):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least))
        for name in ("temperature", "top_p", "repetition_penalty"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature!r}: must be 0 (the most likely token) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: must be above 0, and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty!r}: must be above 0")


def generate(
    encoder: Qwen3VLForConditionalGeneration,
    prompt: list[int],
    images: ImageFeatures | None,
    sampling: Sampling,
    stops: Collection[int],
    device: torch.device,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens that follow `prompt`, at most `max_new_tokens`; one of `stops` is the last.

    use_cache=False reads all tokens again for each new one, with the same result up to rounding. Raises
    ValueError for logits that are not finite.
    """
    head = encoder.lm_head.weight.to(device)
    tokens, unread = list(prompt), list(prompt)
    prefix: Prefix | None = None
    for _ in range(sampling.max_new_tokens):
        ids = torch.tensor([unread], device=device)
        prefix = encoder.prefill(ids, images if prefix is None else None, len(unread) - 1, prefix)
        logits = encoder.next_logits(prefix.states, head)[0, -1].float()  # (V,)
        if not logits.isfinite().all():
            raise ValueError(
                f"the text encoder gives logits that are not finite, as {encoder.dtype} may with weights "
                "of a wider range: load it with dtype='bfloat16' or 'float32'"
            )
        token = choose(logits, tokens, sampling, generator)
        yield token
        if token in stops:
            return
        tokens.append(token)
        unread = [token]
        if not use_cache:
            prefix, unread = None, tokens


def choose(logits: Tensor, tokens: list[int], sampling: Sampling, generator: torch.Generator | None) -> int:
    """The next token. logits (V,) fp32; tokens: all before it."""
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[torch.tensor(tokens, device=logits.device)] = True
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / sampling.temperature  # the same shares, and nothing overflows
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        logits = nucleus(logits, sampling.top_p)
    shares = logits.softmax(0)
    if generator is not None:
        shares = shares.to(generator.device)
    return int(shares.multinomial(1, generator=generator))


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The logits (V,) of the fewest most likely tokens that together have a share of `top_p`, others -inf.
    Summed from the least likely on, as in the reference, of which ties and roundings are part."""
    ascending, order = logits.sort()
    out = ascending.softmax(0).cumsum(0) <= 1 - top_p
    out[-1] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(0, order, out), -torch.inf)
