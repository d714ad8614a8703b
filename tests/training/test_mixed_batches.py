"""Batches of prompts of several lengths and references of several numbers and sizes: what a step makes of
them, one form after the other, is the gradient of the mean over all samples."""

import json
import shutil

import pytest
import torch
from diffusers import JoyImageEditPlusTransformer3DModel as ReferenceTransformer
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import joyedit
from joyedit.loading.layouts import ASSETS
from joyedit.pipelines.made_for import MadeFor
from joyedit.training import loop, losses
from joyedit.training.cache import Cache
from joyedit.training.first_pass import kept_of
from joyedit.training.joyimage import JoyImage
from joyedit.training.plan import make_plan
from joyedit.training.run import Run
from joyedit.training.settings import Settings
from joyedit.training.systems import Drawing, Sample
from tests.parity.same_weights import difference, with_weights_of
from tests.parity.test_joyimage_mmdit import TINY, randomize
from tests.parity.test_joyimage_plus import from_patches, patches

# Of each sample: the sizes of target and references in tokens, the length of its prompt, its noise level.
SAMPLES = [
    (((3, 4), (4, 2), (2, 5)), 7, 0.9),
    (((3, 4), (5, 1)), 4, 0.6),
    (((3, 4),), 6, 0.3),
    (((3, 4), (5, 1)), 4, 0.2),
    (((3, 4), (5, 1)), 6, 0.5),
]


def accumulated(system, network, samples):
    """As the loop does it."""
    for part in loop.parts(samples, len(samples)):
        (system.loss(network, part, Drawing()).sum() / len(samples)).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_a_mixed_batch_is_one_that_the_reference_pads_and_masks():
    source = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(shape, generator=source)

    theirs = randomize(ReferenceTransformer.from_config(dict(TINY)))
    ours = with_weights_of(theirs, joyedit.JoyImageEditTransformer3DModel)
    theirs.requires_grad_(True)
    ours.requires_grad_(True)
    samples, rows, wanted = [], [], []
    for (_, *others), length, sigma in SAMPLES:
        latents, noise, prompt = drawn(16, 1, 6, 8), drawn(16, 1, 6, 8), drawn(length, 20)
        references = [drawn(16, 1, 2 * h, 2 * w) for h, w in others]
        given = {f"reference_{i}": one for i, one in enumerate(references)}
        samples.append(Sample(latents, noise, torch.tensor(sigma), {"prompt": prompt, **given}))
        noisy = (1 - sigma) * latents + sigma * noise
        rows.append(torch.cat([patches(one) for one in (noisy, *references)]))
        wanted.append(noise - latents)
    lengths = [length for _, length, _ in SAMPLES]
    (velocities,) = theirs(
        pad_sequence(rows, batch_first=True),
        timestep=1000 * torch.stack([sample.sigma for sample in samples]),
        encoder_hidden_states=pad_sequence([s.given["prompt"] for s in samples], batch_first=True),
        encoder_hidden_states_mask=torch.tensor(
            [[i < n for i in range(max(lengths))] for n in lengths]
        ).long(),
        shape_list=[[(1, h, w) for h, w in sizes] for sizes, _, _ in SAMPLES],
        return_dict=False,
    )
    (from_patches(velocities, (1, 3, 4)) - torch.stack(wanted)).square().mean().backward()
    truth = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}

    assert [len(part) for part in loop.parts(samples, 8)] == [1, 2, 1, 1]
    found = accumulated(JoyImage(MadeFor(), {}), ours, samples)
    assert set(found) <= set(truth) and len(found) > 50
    for name, gradient in truth.items():
        # The reference also computes what becomes of references and words after the last block.
        if name in found:
            assert difference(found[name], gradient) < 1e-5, name
        else:
            assert (gradient == 0).all(), name


@pytest.mark.slow
def test_a_step_of_the_loop_is_the_mean_of_single_samples(tmp_path, monkeypatch):
    """Edit-Plus, targets and references of several shapes, one prompt left out: gradients that reach the
    optimiser are those of samples alone."""
    plus = shutil.copytree(ASSETS / "tiny-joyimage", tmp_path / "plus")
    index = json.loads((plus / "model_index.json").read_text())
    (plus / "model_index.json").write_text(json.dumps({**index, "_class_name": "JoyImageEditPlusPipeline"}))
    words = ["Make it blue.", "Make the red circle blue.", "Make it blue.", "Turn it into grayscale."]
    words.append("Make it blue.")
    sizes = [
        ((96, 96), (96, 96)),
        ((96, 160), (96, 96)),
        ((96, 96), (96, 96), (64, 128)),
        ((96, 96), (96, 96)),
        ((96, 96), (96, 96)),
    ]
    for i, (text, (target, *references)) in enumerate(zip(words, sizes, strict=True)):
        for place, size in (
            ("target/{}", target),
            *((f"control/{{}}_{k}", s) for k, s in enumerate(references)),
        ):
            path = tmp_path / "set" / f"{place.format(i)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_mandelbrot(size, (-2, -1.5, 1 + i / 4, 1.5), 40).convert("RGB").save(path)
        (tmp_path / "set" / "target" / f"{i}.txt").write_text(text)
    given = Settings(
        data=str(tmp_path / "set"), model=str(plus), device="cpu", full=True, checkpointing=False, steps=1,
        batch=5, basesize=(96,), dropout=0.3, seed=3, sample_every=0, valid_every=0,
    )  # fmt: skip
    caught = {}

    def update(run, clip):
        caught.update({name: p.grad.clone() for name, p in run.parameters.items() if p.grad is not None})
        run.step += 1

    monkeypatch.setattr(Run, "update", update)
    monkeypatch.setattr(loop.Trained, "write", lambda *_: None)
    loop.train(given, tmp_path / "run", disable_progress=True)

    plan, _ = make_plan(given, tmp_path / "run" / "cache")
    network = joyedit.load(plus, device="cpu", dtype="float32").transformer.requires_grad_(True)
    cache, how = Cache(tmp_path / "run" / "cache"), Drawing(shift=3.0)
    order = [example.pair.name for example in plan.examples]
    forms = set()
    for place, example in enumerate(ordered(plan, cache, given)):
        sample = loop.draw(plan, kept_of(cache, example), how, loop.generator(3, 0, place), 0.3)
        forms.add(loop.form_of({**sample.given, "latents": sample.latents}))
        references = [sample.given[n][None] for n in sorted(sample.given) if n.startswith("reference")]
        conditioning = losses.JoyImageConditioning(sample.given["prompt"][None], tuple(references))
        one = losses.joyimage(
            network, sample.latents[None], conditioning, sample.noise[None], sample.sigma[None]
        )
        one.sum().backward()
    assert 3 <= len(forms) < 5 and sorted(order) == ["0", "1", "2", "3", "4"]
    for name, p in network.named_parameters():
        if p.grad is not None:
            assert difference(caught[f"transformer.{name}"], p.grad / 5) < 1e-4, name


def ordered(plan, cache, settings):
    known = [kept_of(cache, example) for example in plan.examples]
    forms = [loop.form_of({**kept, "prompt": said.words}) for kept, said in known]
    return [plan.examples[i] for i in loop.Order(forms, settings.batch, settings.seed)[0]]
