"""The drawn world, what judges edits in it, and the training of the small checkpoints."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.shapes import evaluate, joyimage, scenes, train, training, wan_vae
from benchmarks.shapes.init_mmdit import initialize_editor
from benchmarks.shapes.init_vae import initialize_vae, linear_ceiling
from benchmarks.shapes.training import Log, parameters_of
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration
from joyedit.models.wan_vae import AutoencoderKLWan
from joyedit.training import losses
from joyedit.training.optimisers import RatedAdamW
from joyedit.training.run import Run

LEVEL = 1 / 255


def edits(kind, count=6, split="held-out", counts=(1, 2, 3, 4)):
    return [scenes.make_edit(i, split, (kind,), counts) for i in range(count)]


# The world


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind):
    for edit in edits(kind):
        source, target = scenes.draw(edit.source), scenes.draw(edit.target)
        for picture in (source, target):
            assert picture.shape == (96, 96, 3) and picture.dtype == np.float32
            assert picture.min() >= 0 and picture.max() <= 1
        assert edit.changed().any() and edit.target.box is None
        touched = np.zeros((96, 96), bool)
        for pair in edit.pairs:
            for thing in pair:
                if thing is not None and pair[0] != pair[1]:
                    touched |= scenes.coverage(thing) > 0
        if kind == "move":
            box = edit.box
            around = scenes.Thing("square", "", box.x, box.y, 1.4 * box.half, (0, 0, 0))
            touched |= scenes.coverage(around) > 0
            row, column = (int((c + 1) * 48) for c in (box.y - box.half, box.x))
            assert source[row, column] == pytest.approx(scenes.BOX_COLOUR, abs=0.15)
            (moved,) = edit.subjects()
            assert (moved.x, moved.y) == (box.x, box.y)
        if kind in scenes.LOCAL:
            assert (edit.changed() <= touched).all()
        if kind == "background":
            things = np.any([scenes.coverage(t) == 1 for t in edit.target.things], axis=0)
            assert not (edit.changed() & things).any() and edit.changed()[~things].mean() > 0.9


def test_tones_are_those_of_the_whole_picture():
    for edit in edits("negative"):
        assert np.abs(1 - scenes.draw(edit.source) - scenes.draw(edit.target)).max() < 1e-6
    for edit in edits("grey"):
        grey = np.asarray(Image.fromarray(scenes.to_levels(scenes.draw(edit.source))).convert("L")) / 255
        assert np.abs(scenes.draw(edit.target) - grey[..., None]).max() < 1.5 * LEVEL


@pytest.mark.parametrize("kind", ["recolour", "remove", "move", "replace"])
def test_instructions_name_one_shape_of_the_scene(kind):
    for edit in edits(kind, 20):
        named = [t for t in edit.source.things if f"the {t.name}" in edit.instruction]
        assert len(named) == 1
        changed = [before for before, after in edit.pairs if before != after]
        assert changed == named


def test_move_speaks_as_joyai_does():
    (edit,) = edits("move", 1)
    (it,) = [before for before, after in edit.pairs if before != after]
    assert edit.instruction == f"Move the {it.name} into the red box and finally remove the red box."


def test_worlds_can_be_drawn_again_and_the_held_out_ones_are_others():
    world = [scenes.make_edit(i) for i in range(40)]
    assert world == [scenes.make_edit(i) for i in range(40)]
    held_out = [scenes.make_edit(i, "held-out") for i in range(40)]
    places = {(t.x, t.y) for e in world for t in e.source.things if t.radius != scenes.ADDED_RADIUS}
    assert not places & {(t.x, t.y) for e in held_out for t in e.source.things}
    assert {e.kind for e in world} == set(scenes.KINDS)


@pytest.mark.parametrize("frames", [5, 29])
@pytest.mark.parametrize("kind", ["move", "replace", "remove", "background"])
def test_a_clip_goes_smoothly_from_source_to_target(kind, frames):
    (edit,) = edits(kind, 1)
    clip = scenes.clip(edit, frames)
    assert clip.shape == (frames, 96, 96, 3)
    assert np.array_equal(clip[0], scenes.draw(edit.source))
    assert np.array_equal(clip[-1], scenes.draw(edit.target))
    whole = np.abs(clip[-1] - clip[0]).mean()
    steps = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
    assert steps.max() < 0.75 * whole and steps.min() > 0


def test_shapes_cover_their_own_pixels_and_not_each_others():
    covers = {}
    for shape in scenes.SHAPES:
        thing = scenes.Thing(shape, "red", 0.1, -0.2, 0.3, (1, 0, 0))
        covers[shape] = scenes.coverage(thing) > 0.5
        middle = scenes.coverage(thing, 480)
        assert abs(middle.mean() - scenes.coverage(thing).mean()) < 0.02 * middle.mean()
        assert middle[int(0.4 * 480), int(0.55 * 480)] == 1 and middle[:100].max() == 0
    for a, b in itertools.combinations(covers.values(), 2):
        assert (a & b).sum() < 0.95 * (a | b).sum()


def test_caption_pairs_differ_where_the_region_says():
    for i in range(8):
        pair = scenes.make_caption_pair(i)
        assert pair.source_caption != pair.target_caption
        differs = np.abs(scenes.draw(pair.source) - scenes.draw(pair.target)).max(-1)
        assert differs[pair.region].mean() > 0.1 and differs[~pair.region].mean() < 0.02
    assert scenes.caption(scenes.make_edit(0).source).endswith(" background")


# Judging


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_the_truth_succeeds_and_doing_nothing_does_not(kind):
    for edit in edits(kind):
        assert evaluate.judge(edit, scenes.draw(edit.target)).ok
        if kind not in ("grey", "background"):
            assert not evaluate.judge(edit, scenes.draw(edit.source)).ok


@pytest.mark.parametrize("kind", ["add", "replace", "move"])
def test_a_blob_of_the_right_colour_fails(kind):
    for edit in edits(kind):
        (thing,) = edit.subjects()
        for wrong in ("circle", "square"):
            if thing.shape == wrong:
                continue
            target = edit.target
            swapped = tuple(t._replace(shape=wrong) if t == thing else t for t in target.things)
            score = evaluate.judge(edit, scenes.draw(target._replace(things=swapped)))
            assert not score.ok and score.overlap < 0.95


def test_a_spoilt_bystander_fails():
    edit = next(e for e in edits("remove", 20) if len(e.target.things) > 1)
    picture = scenes.draw(edit.target)
    blurred = np.where(edit.changed()[..., None], picture, np.roll(picture, 3, axis=1))
    assert not evaluate.judge(edit, blurred).ok


def test_a_summary_counts_by_kind():
    scores = [evaluate.Score("add", ok, 0.1, 30.0, None) for ok in (True, False)]
    summary = evaluate.summarize([*scores, evaluate.Score("grey", True, 0.2, None, 0.8)])
    assert summary["kinds"]["add"] == {"edits": 2, "ok": 0.5, "inside": 0.1, "outside": 30.0, "overlap": None}
    assert summary["ok"] == pytest.approx(2 / 3, abs=1e-3)


# Initialisations


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(wan_vae.CONFIG)
    initialize_vae(vae, torch.cat([wan_vae.crops(-i, 4) for i in range(1, 9)]))
    return vae


@pytest.fixture(scope="module")
def editor():
    torch.manual_seed(0)
    transformer = JoyImageEditTransformer3DModel(joyimage.CONFIG)
    return transformer, initialize_editor(transformer, gate_steps=100)


def test_the_untrained_vae_is_a_transform_codec(vae):
    pictures = wan_vae.test_pictures(4)
    assert linear_ceiling(vae, pictures) > 25
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
    assert 0.3 < latents.std() < 3


def test_the_untrained_editor_copies_its_reference(editor):
    transformer, _ = editor
    reference, noise = torch.randn(2, 16, 1, 12, 8), torch.randn(2, 16, 1, 12, 8)
    target, prompt = torch.randn(2, 16, 1, 12, 8), torch.randn(2, 7, joyimage.CONFIG.text_dim)
    for sigma in (1.0, 0.6):
        noisy = torch.lerp(target, noise, sigma)
        items = torch.stack((reference, noisy), dim=1)
        with torch.no_grad():
            velocity = transformer(items, torch.tensor([1000 * sigma]), prompt).sample[:, 1]
        # x0 = x - sigma v is the reference, whatever the target was
        assert (noisy - sigma * velocity - reference).square().mean() < 0.15 * reference.var()


# Training


def gradients(parameters):
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in parameters if p.requires_grad}


@pytest.mark.parametrize("stage", wan_vae.SAMPLES)
def test_every_stage_of_the_vae_reaches_its_weights_alone(vae, stage):
    vae = copy.deepcopy(vae)
    for p in vae.parameters():
        p.requires_grad_(True)
    pictures = wan_vae.test_pictures(1)
    before = vae.encode(pictures).latent_dist.mean.detach()
    optimizer = wan_vae.make_optimizer(wan_vae.trained(vae, stage), 1e-2)
    pixels = wan_vae.some_clips(2, 1) if stage == "clips" else wan_vae.crops(0, 2)
    loss, parts = wan_vae.reconstruction_loss(vae, pixels, stage)
    loss.backward()
    assert set(parts) == {"squared", "absolute", "kl"}
    missed = [name for name, reached in gradients(vae.named_parameters()).items() if not reached]
    assert not missed
    optimizer.step()
    same = torch.equal(vae.encode(pictures).latent_dist.mean, before)
    assert same == (stage != "pictures")  # pictures keep their latents to the bit


@pytest.fixture(scope="module")
def parts(vae, editor, tmp_path_factory):
    """A pool of edits and the untrained networks."""
    torch.manual_seed(0)
    processor = joyimage.make_processor(tmp_path_factory.mktemp("tokenizer"))
    pool = joyimage.Pool(vae, processor, 1000, size=32)
    pool.fill(0)
    transformer, rates = editor
    encoder = Qwen3VLForConditionalGeneration(joyimage.encoder_config(processor.tokenizer))
    joyimage.initialize_encoder(encoder)
    return pool, transformer, rates, encoder


def test_words_of_the_world_are_one_token_each(parts):
    tokenizer = parts[0].processor.tokenizer
    for edit in (scenes.make_edit(i, "held-out") for i in range(30)):
        words = edit.instruction.removesuffix(".").split()
        assert len(tokenizer.encode(edit.instruction)) == len(words) + 1
        assert tokenizer.decode(tokenizer.encode(edit.instruction)) == edit.instruction
    assert len(tokenizer.encode("<|im_start|>user\n<|vision_start|><|image_pad|>")) == 5


def test_training_reads_prompts_as_the_pipeline_does(parts, vae):
    pool, transformer, _, encoder = parts
    pipe = joyimage.assemble(transformer, encoder, vae, pool.processor)
    edit = scenes.make_edit(5)
    embeds, _ = pipe.encode_prompt_multiple_images(edit.instruction, images=joyimage.as_image(edit.source))
    prefix = torch.tensor([pool.prefix])
    seen = pool.processor.image_processor([joyimage.as_image(edit.source)])
    with torch.no_grad():
        images = encoder.encode_images(seen["pixel_values"], seen["image_grid_thw"])
        read = encoder.prefill(prefix, keep_from=pool.dropped)
        rest = encoder.hidden_states(pool.encode_text(edit.instruction)[None], images=images, prefix=read)
    states = torch.cat((read.states, rest), dim=1)
    assert torch.allclose(states, embeds, atol=1e-5)


def test_the_pool_holds_what_was_drawn_and_can_be_filled_again(parts, vae):
    pool = parts[0]
    again = joyimage.Pool(vae, pool.processor, 1000, size=32)
    again.fill(10)
    other = joyimage.Pool(vae, pool.processor, 1000, size=32)
    other.fill(0)
    other.renew(10)
    for name in ("target", "reference", "weight", "pixels", "lengths"):
        assert torch.equal(getattr(again, name), getattr(other, name)), name
    assert all(torch.equal(a, b) for a, b in zip(again.tokens, other.tokens, strict=True))
    batch = pool.draw(6)
    assert batch.target.shape == batch.reference.shape == (6, 16, 1, 12, 12)
    assert len(set(batch.weight.unique().tolist()) | {1.0, joyimage.WEIGHT}) == 2


def test_cells_of_shapes_count_more():
    (edit,) = edits("background", 1, counts=(1,))
    weights = joyimage.cell_weights(edit, 12)[0, 0]
    (thing,) = edit.source.things
    row, column = (int((c + 1) * 6) for c in (thing.y, thing.x))
    assert weights[row, column] == joyimage.WEIGHT and (weights == 1).float().mean() > 0.6


@pytest.mark.slow
def test_editing_reaches_every_weight_that_takes_part_and_learns(parts):
    pool, transformer, rates, encoder = parts
    transformer, encoder = copy.deepcopy(transformer), copy.deepcopy(encoder)
    networks = (transformer, encoder)
    named = [item for network in networks for item in network.named_parameters()]
    shares = {p: rates[name] for name, p in transformer.named_parameters() if name in rates}
    optimizer = RatedAdamW([p for _, p in named if p.requires_grad], shares, lr=3e-4)
    batch = pool.draw(16)
    seen = []
    for _ in range(8):
        torch.manual_seed(1)
        loss = joyimage.editing_loss(transformer, encoder, batch)
        loss.backward()
        reached = gradients(named)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    last = f"double_blocks.{joyimage.CONFIG.num_layers - 1}."
    unused = [last + part for part in ("txt_mlp", "attn.txt_attn_proj", "attn.txt_attn_q_norm")]
    missed = [n for n, was in reached.items() if not was and not n.startswith(tuple(unused))]
    assert not missed
    assert seen[-1] < 0.9 * seen[0], seen


def test_the_loss_wants_the_way_to_the_truth_also_from_its_own_answers(parts, monkeypatch):
    """A network that answers pure noise with the reference, and knows the way from everywhere else."""
    batch, encoder = parts[0].draw(16), parts[3]
    asked = []

    def velocity(transformer, noisy, conditioning, sigma):
        asked.append((noisy, sigma))
        sigma = sigma.view(-1, 1, 1, 1, 1)
        wrong = noisy - batch.reference
        return torch.where(sigma == 1, wrong, (noisy - batch.target) / sigma)

    monkeypatch.setattr(losses, "joyimage_velocity", velocity)
    plain = joyimage.editing_loss(None, encoder, batch)
    (first, at), error = asked[0], batch.weight * (batch.reference - batch.target).square()
    assert 2 <= (at == 1).sum() <= 14
    assert torch.allclose(plain, error[at == 1].sum() / error.numel(), rtol=1e-4)
    own = joyimage.editing_loss(None, encoder, batch, own=1.0)
    _, (noise, _), (noisy, at) = asked
    assert torch.equal(noise[at == 1], noisy[at == 1]) and not torch.equal(noise, first)
    low = at < 1
    started = torch.lerp(batch.reference, noise, at.view(-1, 1, 1, 1, 1))
    assert torch.allclose(noisy[low], started[low], atol=1e-5)
    assert torch.allclose(own, error[~low].sum() / error.numel(), rtol=1e-4)


def test_the_checkpoint_is_an_ordinary_one(parts, vae, tmp_path):
    pool, transformer, _, encoder = parts
    pipe = joyimage.assemble(transformer, encoder, vae, pool.processor)
    copy.deepcopy(pipe).to(torch.bfloat16).save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 12e6
    opened = joyedit.load(tmp_path)
    (edit,) = edits("add", 1)
    (result,) = evaluate.run(opened, [edit], steps=2)
    assert result.shape == (96, 96, 3)
    (copied,) = evaluate.through_vae(opened, [scenes.draw(edit.source)])
    assert np.abs(result - copied).mean() < 0.03  # untrained, it copies

    out = tmp_path / "scores.json"
    evaluate.main([str(tmp_path), "--out", str(out), "--edits", "1", "--kinds", "add", "grey"])
    report = json.loads(out.read_text())
    assert list(report) == ["model", "nothing", "ceiling"] and out.with_suffix(".png").is_file()
    assert report["nothing"]["kinds"]["add"]["outside"] > 90 and report["nothing"]["kinds"]["add"]["ok"] == 0


def test_one_shape_comes_before_several():
    assert joyimage.plan(0, 1000).counts == (1,)
    assert max(joyimage.plan(999, 1000).counts) == 4
    assert joyimage.plan(500, 1000).own == 0 < joyimage.plan(999, 1000).own < 1
    assert set(joyimage.plan(0, 1000).kinds) == set(scenes.KINDS)


# Runs


def small_run(folder):
    """Three samples a step; the loss of a step is its number."""
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 4)
    parameters = parameters_of({"it": network})
    run = Run(folder, parameters, torch.optim.Adam(network.parameters(), 0.1), decay=0.9)
    return run, Log(run, 3)


def advance(run, log, until):
    while run.step < until:
        run.parameters["it.weight"].square().mean().backward()
        run.update(1.0)
        log.add(loss=float(run.step), other=1.0)


def test_metrics_have_mean_losses_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(training.time, "process_time", lambda: 600.0)
    run, log = small_run(tmp_path)
    monkeypatch.setattr(training.time, "process_time", lambda: 630.0)  # half a minute later
    advance(run, log, 100)
    run.save()
    advance(run, log, 200)  # comes to nothing
    again, log = small_run(tmp_path)
    monkeypatch.setattr(training.time, "process_time", lambda: 645.0)
    assert log.samples == 300
    advance(again, log, 150)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "samples", "cpu_minutes", "loss", "other")
    assert [[line[key] for key in keys] for line in lines] == [
        [50, 150, 0.5, 25.5, 1.0],
        [100, 300, 0.5, 75.5, 1.0],
        [150, 450, 0.75, 125.5, 1.0],
    ]


def test_the_command_trains_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(wan_vae, "write", lambda vae, folder: vae.save_pretrained(folder))
    monkeypatch.setattr(wan_vae, "initialize_vae", lambda vae, pictures: None)
    monkeypatch.setattr(wan_vae, "judge", lambda vae, test: {"psnr": 0.0})
    for _ in range(2):  # the second time there is nothing left to do
        train.main(["wan-vae", "--out", str(tmp_path), "--stages", "pictures", "--scale", "0.0006"])
    assert (tmp_path / "pictures" / "state.pt").is_file()
    opened = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert opened.config.dim_mult == wan_vae.CONFIG.dim_mult
    with pytest.raises(SystemExit):
        train.main(["joyimage", "--out", str(tmp_path)])
