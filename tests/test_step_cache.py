"""The step cache in the networks: which steps are computed, and what the others give.

Every expectation is computed here by the formula, with the networks' own blocks called one by one.
"""

import math

import pytest
import torch

from joyedit import ChronoEditTransformer3DModel, JoyImageEditTransformer3DModel, UNet2DConditionModel
from joyedit.models.sd_unet import Conditions
from joyedit.step_cache import StepCache, distance

STEPS = 6
TIMES = torch.tensor([900.0, 700, 699.9, 699.5, 400, 399.9])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def filled(network, seed=0):
    """Random weights with which every block changes what passes."""
    generator = seeded(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
    return network.eval().requires_grad_(False)


def joyimage(layers=4):
    config = {"hidden_size": 24, "num_attention_heads": 2, "rope_dim_list": (4, 4, 4), "text_dim": 10}
    return filled(JoyImageEditTransformer3DModel.from_config(**config, num_layers=layers, in_channels=4))


def chronoedit(layers=4):
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 6, "out_channels": 4}
    config |= {"ffn_dim": 40, "text_dim": 10, "image_dim": 14, "added_kv_proj_dim": 24, "freq_dim": 16}
    return filled(ChronoEditTransformer3DModel.from_config(**config, num_layers=layers))


def unet(kinds):
    up = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    config = {"block_out_channels": (8, 16, 24)[: len(kinds)], "layers_per_block": 1, "norm_num_groups": 4}
    config |= {"cross_attention_dim": 10, "attention_head_dim": 2}
    config |= {"down_block_types": kinds, "up_block_types": tuple(up[kind] for kind in reversed(kinds))}
    return filled(UNet2DConditionModel.from_config(**config))


def drift(*shape, seed=0):
    """Inputs of the steps of a run: first they change much, then little."""
    start, change = torch.randn(shape, generator=seeded(seed)), torch.randn(shape, generator=seeded(seed + 1))
    return [start + size * change for size in (0.0, 1.0, 1.02, 1.05, 1.5, 1.52)]


class JoyImage:
    """Two branches with texts of their own, of several images each, beside reference tokens."""

    def __init__(self):
        self.network = network = joyimage()
        self.targets = [network.embed_image(x) for x in drift(2, 4, 1, 6, 4)]
        self.references = network.embed_image(torch.randn(2, 4, 1, 6, 4, generator=seeded(5)))
        self.texts = [
            network.embed_text(torch.randn(2, n, 10, generator=seeded(n)) * scale)
            for n, scale in ((3, 0.1), (5, 3.0))
        ]
        self.times = network.embed_time(TIMES)
        self.grid = (2, 3, 2)
        self.rope = network.rope(self.grid)

    def predict(self, i, caches=None):
        args = (self.targets[i], self.references, self.texts, self.times[i], self.rope, self.grid)
        return self.network.predict_branches(*args, **({"caches": caches} if caches else {}))

    def begun(self, i, branch):
        """Target tokens before and after the first block."""
        img = torch.cat((self.targets[i], self.references), dim=1)
        after, _ = self.network.double_blocks[0](img, self.texts[branch], self.times[i][None], self.rope)
        count = self.targets[i].shape[1]
        return img[:, :count], after[:, :count]

    def ended(self, i, branch):
        img, txt = torch.cat((self.targets[i], self.references), dim=1), self.texts[branch]
        for block in self.network.double_blocks:
            img, txt = block(img, txt, self.times[i][None], self.rope)
        return img[:, : self.targets[i].shape[1]]

    def head(self, i, tokens):
        normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        return self.network.unpatchify(self.network.proj_out(normed), (1, 3, 2))


class ChronoEdit:
    def __init__(self):
        self.network = network = chronoedit()
        self.latents = drift(2, 6, 2, 6, 4)
        self.texts = [
            network.embed_text(torch.randn(2, n, 10, generator=seeded(n)) * scale)
            for n, scale in ((3, 0.1), (5, 3.0))
        ]
        self.image = network.embed_image(torch.randn(1, 3, 14, generator=seeded(6)))
        self.times = network.embed_time(TIMES)
        self.rope = network.rope((2, 3, 2))

    def predict(self, i, caches=None):
        args = (self.latents[i], self.times[i], self.texts, self.image, self.rope)
        return self.network.predict_branches(*args, **({"caches": caches} if caches else {}))

    def through(self, x, i, branch, numbers):
        for n in numbers:
            vec = self.times[i][None, :6]
            x = self.network.blocks[n](x, vec, self.texts[branch][n], self.image[n], self.rope)
        return x

    def begun(self, i, branch):
        before = self.network.patch_embedding(self.latents[i])
        return before, self.through(before, i, branch, [0])

    def ended(self, i, branch):
        return self.through(self.network.patch_embedding(self.latents[i]), i, branch, range(4))

    def head(self, i, tokens):
        shift, scale = (self.network.scale_shift_table + self.times[i][None, 6:]).unbind(1)
        normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        patches = self.network.proj_out(normed * (1 + scale[:, None]) + shift[:, None])
        return self.network.unpatchify(patches, (2, 3, 2))


def relative(now, then):
    """mean |now - then| / mean |then| of each image in fp64, the largest."""
    now, then = now.double(), then.double()
    return max(((a - b).abs().mean() / b.abs().mean()).item() for a, b in zip(now, then, strict=True))


def by_the_formula(case, threshold):
    """Results of all steps, and which branches were computed in each."""
    kept, results, computed = {}, [], []
    for i in range(STEPS):
        results.append([])
        computed.append(set())
        for branch in range(2):
            before, after = case.begun(i, branch)
            first = after - before
            last = i == STEPS - 1
            if branch not in kept or last or relative(first, kept[branch][0]) >= threshold:
                tokens = case.ended(i, branch)
                kept[branch] = first, tokens - after
                computed[-1].add(branch)
            else:
                tokens = after + kept[branch][1]
            results[-1].append(case.head(i, tokens))
    return results, computed


def run(case, threshold, steps=STEPS):
    """Results of all steps, and how many were computed after each."""
    cache = StepCache(threshold, steps)
    caches, results, counts = [cache.branch(), cache.branch()], [], []
    for i in range(steps):
        cache.begin(i)
        results.append(case.predict(i, caches))
        counts.append(cache.computed)
    return results, counts


def same(a, b, tolerance=0.0):
    return all(
        (x - y).abs().max() <= tolerance * (1 + y.abs().max())
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("system", [JoyImage, ChronoEdit])
@pytest.mark.parametrize("threshold", [0.035, 0.075, 1e6])
def test_transformers_go_by_the_formula(system, threshold):
    case = system()
    wanted, computed = by_the_formula(case, threshold)
    found, counts = run(case, threshold)
    assert same(found, wanted, 1e-5)
    assert counts == [sum(map(bool, computed[: i + 1])) for i in range(STEPS)]
    if threshold == 1e6:
        assert [len(branches) for branches in computed] == [2, 0, 0, 0, 0, 2]
        assert not same(found, [case.predict(i) for i in range(STEPS)], 1e-2)  # and it makes a difference
    else:
        assert 2 <= counts[-1] < STEPS


@pytest.mark.parametrize("system", [JoyImage, ChronoEdit])
def test_branches_are_decided_apart(system):
    case = system()
    changes = []
    for branch in range(2):
        then, now = ([b - a for a, b in [case.begun(i, branch)]][0] for i in (1, 2))
        changes.append(relative(now, then))
    threshold = sum(changes) / 2  # of the third step, of which one branch is computed
    wanted, computed = by_the_formula(case, threshold)
    assert len(computed[1]) == 2 and len(computed[2]) == 1
    found, counts = run(case, threshold)
    assert same(found, wanted, 1e-5) and counts[:3] == [
        1,
        2,
        3,
    ]  # a step counts that one branch is computed in


@pytest.mark.parametrize("system", [JoyImage, ChronoEdit])
def test_a_run_that_reuses_nothing_is_the_exact_one_bit_for_bit(system):
    case = system()
    assert same(run(case, 1e-30)[0], [case.predict(i) for i in range(STEPS)])


@pytest.mark.parametrize("make", [joyimage, chronoedit])
def test_of_one_block_there_is_nothing_to_leave_out(make, monkeypatch):
    monkeypatch.setitem(globals(), make.__name__, lambda: make(1))
    case = {"joyimage": JoyImage, "chronoedit": ChronoEdit}[make.__name__]()
    assert same(run(case, 1e6)[0], [case.predict(i) for i in range(STEPS)], 1e-6)


KINDS = {
    "as released": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "branches part below the first level": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "one level": ("CrossAttnDownBlock2D",),
}


class DiffEdit:
    """Two branches of two images each, in one batch."""

    def __init__(self, kinds):
        self.network = network = unet(kinds)
        self.samples = drift(2, 4, 6, 10)
        self.texts = [torch.randn(1, n, 10, generator=seeded(3)) * scale for n, scale in ((5, 0.1), (5, 3.0))]
        self.both = network.embed_context(torch.cat(self.texts))
        self.times = network.embed_time(TIMES)

    def predict(self, i, caches=None):
        args = (self.samples[i], self.times[i], self.both, 2)
        return self.network.predict(*args, **({"caches": caches} if caches else {})).chunk(2)

    def begun(self, i, branch):
        """Of one branch by itself: what the first convolution gives, what the first level makes of that, and
        what the last up block needs: conditions and skips."""
        network, x = self.network, self.network.conv_in(self.samples[i])
        widths = [resnet.width for resnet in network.resnets()]
        times = dict(zip(network.resnets(), self.times[i][None].split(widths, dim=1), strict=True))
        conditions = Conditions(times, network.embed_context(self.texts[branch]), 2)
        skips = [x]
        result = network.down_blocks[0](x, conditions, skips)
        return x, skips[1], result, conditions, skips

    def run(self, threshold):
        kept, results, computed = {}, [], []
        for i in range(STEPS):
            results.append([])
            computed.append(set())
            for branch in range(2):
                before, after, x, conditions, skips = self.begun(i, branch)
                first, own = after - before, skips[:2]
                if branch not in kept or i == STEPS - 1 or relative(first, kept[branch][0]) >= threshold:
                    for block in self.network.down_blocks[1:]:
                        x = block(x, conditions, skips)
                    x = self.network.mid_block(x, conditions)
                    for block in self.network.up_blocks[:-1]:
                        x = block(x, conditions, skips)
                    kept[branch] = first, x
                    computed[-1].add(branch)
                x = self.network.up_blocks[-1](kept[branch][1], conditions, own)
                results[-1].append(self.network.conv_out(self.network.conv_norm_out(x)))
        return results, computed


@pytest.mark.parametrize(
    "kinds", [next(iter(KINDS)), *(pytest.param(k, marks=pytest.mark.slow) for k in [*KINDS][1:])]
)
def test_the_unet_reuses_what_lies_below_its_first_level(kinds):
    case = DiffEdit(KINDS[kinds])
    exact = [case.predict(i) for i in range(STEPS)]
    # Bit for bit; but for layers that two branches share without a cache.
    assert same(run(case, 1e-30)[0], exact, 1e-5 if "part below" in kinds else 0.0)
    changes = []
    for branch in range(2):
        then, now = (after - before for before, after, *_ in (case.begun(i, branch) for i in (1, 2)))
        changes.append(relative(now, then))
    for threshold in (sum(changes) / 2, 3 * max(changes), 1e6):
        wanted, computed = case.run(threshold)
        found, counts = run(case, threshold)
        assert same(found, wanted, 1e-5)
        assert counts == [sum(map(bool, computed[: i + 1])) for i in range(STEPS)]
        if threshold == 1e6:
            assert counts[-1] == 2 and not same(found, exact, 1e-3)
        elif "part below" not in kinds:  # there the first level is the same for both
            assert threshold > max(changes) or len(computed[2]) == 1


def test_images_that_run_together_are_decided_by_the_one_that_changed_most():
    then = torch.tensor([[1.0, -1.0], [10.0, 10.0]])
    now = torch.tensor([[1.5, -1.0], [10.0, 11.0]])
    assert distance(now, then) == pytest.approx(0.25)  # 0.5 / 2, and 1 / 20
    assert distance(now.bfloat16(), then.bfloat16()) == pytest.approx(0.25)
    assert math.isnan(distance(torch.zeros(1, 3), torch.zeros(1, 3)))


def test_first_and_last_step_and_one_that_nothing_is_known_of_are_computed():
    cache = StepCache(1e9, 4)
    branch, zero, one = cache.branch(), torch.zeros(1, 3), torch.ones(1, 3)
    due = []
    for i, first in enumerate([zero, one, one, one]):
        cache.begin(i)
        due.append(branch.is_due(first))
    assert due == [True, True, False, True] and cache.computed == 3
    assert StepCache(None, 4).branch() is None
