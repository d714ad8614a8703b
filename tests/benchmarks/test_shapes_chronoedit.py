"""The small ChronoEdit: where its training starts, what it is taught, and how it is judged."""

import copy

import numpy as np
import pytest
import torch

import joyedit
from benchmarks.shapes import chronoedit, evaluate, evaluate_chronoedit, scenes, wan_vae
from benchmarks.shapes.init_chronoedit import SLOWER, initialize_editor
from benchmarks.shapes.init_vae import initialize_vae
from benchmarks.shapes.vocabulary import instructions, umt5_tokenizer
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.wan_vae import AutoencoderKLWan
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.text.t5_tokenizer import T5TokenizerFast
from joyedit.training import losses
from joyedit.training.optimisers import RatedAdamW

# What ChronoEdit never asks for: the last layer of the vision tower, and what follows it.
UNUSED = ("encoder.layers.1.", "post_layernorm.")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(wan_vae.CONFIG)
    initialize_vae(vae, torch.cat([wan_vae.crops(-i, 6) for i in range(1, 5)]))
    return vae


@pytest.fixture(scope="module")
def tokenizer():
    return umt5_tokenizer(instructions(1000))


@pytest.fixture(scope="module")
def made(tokenizer):
    """The untrained networks and the shares of their learning rates."""
    return chronoedit.make_editor(tokenizer, gate_steps=120)


@pytest.fixture(scope="module")
def pools(vae, tokenizer):
    """A few edits, and a few films."""
    edits = chronoedit.Pool(vae, tokenizer, 1000, chronoedit.EDIT_FRAMES, size=32, samples=5.0)
    films = chronoedit.Pool(vae, tokenizer, 1000, chronoedit.REASONING_FRAMES, size=3, samples=5.0)
    edits.renew(32)
    films.renew(3)
    return edits, films


def some_edits(kind, count=3):
    return [scenes.make_edit(i, "held-out", (kind,), (1, 2)) for i in range(count)]


# Where it starts


@pytest.mark.parametrize("frames", (2, 8))
@pytest.mark.parametrize("sigma", (1.0, 0.75, 0.4))
def test_the_untrained_editor_returns_the_photograph_in_every_frame(made, frames, sigma):
    transformer = made[0].transformer
    source, grey = torch.randn(2, 16, 1, 12, 8), torch.randn(1, 16, 1, 12, 8)
    target, noise = torch.randn(2, 2, 16, frames, 12, 8).unbind(0)
    condition = chronoedit.condition_of(source.expand(-1, -1, frames, -1, -1), grey, 4)
    prompt, seen = torch.randn(2, 7, chronoedit.CONFIG.text_dim), torch.randn(2, 5, 32)
    noisy = torch.lerp(target, noise, sigma)
    with torch.no_grad():
        velocity = transformer(
            torch.cat((noisy, condition), dim=1), torch.tensor([1000 * sigma]), prompt, seen
        ).sample
    # x0 = x - sigma v is the photograph, whatever the target was
    error = (noisy - sigma * velocity - source).square().mean((0, 1, 3, 4))
    assert error.shape == (frames,) and error.max() < 0.06 * source.var()


def test_the_untrained_pipeline_makes_films_in_which_nothing_happens(made, vae, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate_chronoedit, "REASONING_FRAMES", 9)
    pipe = chronoedit.assemble(made[0], vae, tokenizer)
    (edit,) = some_edits("remove", 1)
    (picture,) = evaluate_chronoedit.run(pipe, [edit], steps=2)
    (film,) = evaluate_chronoedit.films(pipe, [edit], steps=2)
    still = np.broadcast_to(scenes.draw(edit.source), film.shape)
    (copied,) = evaluate_chronoedit.through_vae(pipe, [still])
    assert film.shape == copied.shape == (9, 96, 96, 3)
    assert np.abs(picture - copied[-1]).mean() < 0.02
    assert np.abs(film[::4] - copied[::4]).mean() < 0.02


def test_however_much_padding_there_is_words_are_seen_alike(made, pools):
    batch = pools[0].draw(4)
    noise, one = torch.randn_like(batch.frames), torch.ones(4)

    def velocity(batch):
        conditioning = chronoedit.read(made[0], batch)
        return losses.chronoedit_velocity(made[0].transformer, noise, conditioning, one)

    with torch.no_grad():
        few, many = (velocity(batch._replace(padding=count)) for count in (1, 500))
        said_otherwise = velocity(batch._replace(tokens=batch.tokens.roll(1, 0), mask=batch.mask.roll(1, 0)))
    assert (few - many).abs().mean() < 0.05 * (few - said_otherwise).abs().mean()


def test_only_the_arranged_parts_learn_slowly(made):
    transformer, rates = made[0].transformer, made[1]
    parameters = dict(transformer.named_parameters())
    for name, share in rates.items():
        assert share.expand_as(parameters[name]).min() >= SLOWER, name
    assert {name.split(".")[1] for name in rates if name.startswith("blocks.")} == {"0"}
    again = ChronoEditTransformer3DModel(chronoedit.CONFIG)
    initialize_editor(again, gate_steps=0)  # the same seed, so the same weights where nothing is fitted
    for name, parameter in again.named_parameters():
        fitted = name.startswith(("condition_embedder.time_embedder", "condition_embedder.time_proj"))
        assert torch.equal(parameter, parameters[name]) != fitted, name


# What it is taught


@pytest.mark.parametrize("trained", (False, True))
def test_a_later_latent_frame_is_the_code_of_the_last_of_its_four_frames(vae, trained):
    """So that films need no encoding of films, and the last frame of an edit is a picture's."""
    if trained:  # as the decoder's temporal parts are, with the encoder left as it is
        vae = copy.deepcopy(vae)
        wan_vae.trained(vae, "clips")
        loss, _ = wan_vae.reconstruction_loss(vae, wan_vae.some_clips(0, 1), "clips")
        loss.backward()
        for name, p in vae.named_parameters():
            if name.startswith("decoder.") and p.grad is not None:
                p.data -= 0.05 * p.grad.sign()
    (edit,) = some_edits("move", 1)
    clip = wan_vae.to_tensor(scenes.clip(edit, 9)[None])
    with torch.no_grad():
        film = vae.encode(clip).latent_dist.mode()
        pictures = torch.cat([vae.encode(clip[:, :, i : i + 1]).latent_dist.mode() for i in (0, 4, 8)], dim=2)
    assert torch.allclose(film, pictures, atol=1e-4)
    assert not torch.allclose(film[:, :, 1], film[:, :, 0], atol=0.1)


def test_the_pool_holds_what_the_pipeline_would_encode(vae, pools, tokenizer):
    for pool, frames in zip(pools, (5, 29), strict=True):
        edit = scenes.make_edit(pool.first, "train", *chronoedit.plan(0, 1000)[:2])
        clip = wan_vae.to_tensor(scenes.to_levels(scenes.clip(edit, frames))[None] / np.float32(255))
        coder = FrameCoder(vae)
        with torch.no_grad():
            latents = (vae.encode(clip).latent_dist.mode() - coder.mean) / coder.std
            condition = coder.condition(clip[:, :, :1], frames)
        slot = pool.frames[:1].float()
        assert torch.allclose(slot, latents, atol=5e-3)  # kept in half precision
        assert torch.allclose(chronoedit.condition_of(slot, pool.grey, 4), condition, atol=5e-3)
        assert tokenizer.decode(pool.tokens[0].tolist(), skip_special_tokens=True) == edit.instruction
    assert pools[0].frames.shape[2] == 2 and pools[1].frames.shape[2] == 8


def test_the_pool_can_be_filled_again(vae, tokenizer, pools):
    again, other = (chronoedit.Pool(vae, tokenizer, 1000, 5, 32, 5.0) for _ in range(2))
    again.fill(10)
    other.fill(0)
    other.renew(10)
    for name in ("frames", "weight", "pixels"):
        assert torch.equal(getattr(again, name), getattr(other, name)), name
    assert all(torch.equal(a, b) for a, b in zip(again.tokens, other.tokens, strict=True))
    assert not torch.equal(again.frames, pools[0].frames)


def test_cells_that_shapes_pass_count_more_and_the_first_frame_does_not():
    (edit,) = some_edits("move", 1)
    way = [edit.between(s) for s in (0, 0.5, 1)]
    weights = chronoedit.cell_weights(edit, way, 12)[0]
    assert weights.shape == (3, 12, 12) and (weights[0] == 1).all()
    (thing,) = (a for a, b in edit.pairs if a != b)
    for scene in way:
        (at,) = (t for t in scene.things if t.name == thing.name)
        row, column = (int((c + 1) * 6) for c in (at.y, at.x))
        assert (weights[1:, row, column] == chronoedit.WEIGHT).all()
    assert (weights[1:] == 1).any()


@torch.no_grad()
def test_training_sees_what_the_pipeline_gives(made, vae, tokenizer, pools):
    """Prompts padded to 512 tokens, the condition, what CLIP sees: all of it through the pipeline itself."""
    editor = copy.deepcopy(made[0])
    for block in editor.transformer.blocks:
        block.attn2.to_out[0].weight *= 10  # to see what CLIP says
    pipe = chronoedit.assemble(editor, vae, tokenizer)
    pool = pools[0]
    edit = scenes.make_edit(pool.first, "train", *chronoedit.plan(0, 1000)[:2])
    photo = chronoedit.as_image(edit.source)
    embeds, _ = pipe.encode_prompt(edit.instruction, None, False, max_sequence_length=512)
    pixels = wan_vae.to_tensor(np.asarray(photo)[None, None] / np.float32(255))
    noise, condition = pipe.prepare_latents(1, 1, 96, 96, 5, torch.Generator(), pixels=pixels)
    with torch.no_grad():
        latents = torch.cat((noise, condition), dim=1)
        expected = pipe.transformer(latents, torch.tensor([1000.0]), embeds, pipe.encode_image(photo)).sample
        batch = pool.draw(1)._replace(
            frames=pool.frames[:1].float(),
            condition=chronoedit.condition_of(pool.frames[:1].float(), pool.grey, 4),
            tokens=pool.tokens[0][None],
            mask=torch.ones(1, len(pool.tokens[0]), dtype=torch.long),
            padding=512 - len(pool.tokens[0]),
            pixels=pool.pixels[:1].float(),
        )
        conditioning = chronoedit.read(editor, batch)
        velocity = losses.chronoedit_velocity(editor.transformer, noise, conditioning, torch.ones(1))
    assert (velocity - expected).abs().max() < 0.01  # pools are in half precision


@pytest.mark.slow
def test_editing_reaches_every_weight_that_takes_part_and_learns(made, pools):
    editor, rates = copy.deepcopy(made)
    named = [(n, p) for network in editor for n, p in network.named_parameters()]
    frozen = {n for n, p in named if not p.requires_grad}
    assert frozen and all(name.startswith(UNUSED) for name in frozen)
    shares = {p: rates[n] for n, p in editor.transformer.named_parameters() if n in rates}
    optimizer = RatedAdamW([p for _, p in named if p.requires_grad], shares, lr=1e-4)
    edits, films = pools[0].draw(8), pools[1].draw(1)._replace(padding=3)
    seen = []
    for _ in range(6):
        torch.manual_seed(1)
        loss = chronoedit.editing_loss(editor, edits) + chronoedit.editing_loss(editor, films)
        loss.backward()
        missed = [n for n, p in named if p.requires_grad and (p.grad is None or not p.grad.any())]
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert not missed
    assert seen[-1] < 0.9 * seen[0], seen


def test_the_loss_wants_the_way_to_the_truth_also_from_its_own_answers(made, pools, monkeypatch):
    """A network that answers pure noise with the photograph, and nearly knows the way from elsewhere."""
    batch = pools[0].draw(16)
    source = batch.frames[:, :, :1].expand_as(batch.frames)
    asked = []

    def velocity(transformer, noisy, conditioning, sigma):
        asked.append((noisy, sigma))
        sigma = sigma.view(-1, 1, 1, 1, 1)
        return torch.where(sigma == 1, noisy - source, (noisy - batch.frames) / sigma + 0.5)

    monkeypatch.setattr(losses, "chronoedit_velocity", velocity)
    plain = chronoedit.editing_loss(made[0], batch)
    (first, at), error = asked[0], batch.weight * (source - batch.frames).square()
    off = 0.25 * batch.weight.expand_as(error)
    assert 2 <= (at == 1).sum() <= 14
    assert torch.allclose(plain, (error[at == 1].sum() + off[at < 1].sum()) / error.numel(), rtol=1e-4)
    own = chronoedit.editing_loss(made[0], batch, own=1.0)
    _, (noise, _), (noisy, at) = asked
    assert torch.equal(noise[at == 1], noisy[at == 1]) and not torch.equal(noise, first)
    low = at < 1
    started = torch.lerp(source, noise, at.view(-1, 1, 1, 1, 1))
    assert torch.allclose(noisy[low], started[low], atol=1e-5)
    off = 1.5 * at.view(-1, 1, 1, 1, 1).square() * off
    assert torch.allclose(own, (error[~low].sum() + off[low].sum()) / error.numel(), rtol=1e-4)


# Words


def test_words_of_the_world_are_one_token_each(tokenizer, tmp_path):
    for edit in (scenes.make_edit(i, "held-out") for i in range(30)):
        words = edit.instruction.removesuffix(".").split()
        ids = tokenizer.encode(edit.instruction)
        assert len(ids) == len(words) + 2 and ids[-1] == tokenizer.eos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == edit.instruction
    assert tokenizer.encode("") == [1] and tokenizer.convert_tokens_to_ids("<pad>") == 0
    spelled = tokenizer.encode("Move the zebra\u00e9")
    assert len(spelled) > 8 and tokenizer.convert_tokens_to_ids("<unk>") not in spelled
    tokenizer.save_pretrained(tmp_path)
    again = T5TokenizerFast.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) < 500
    assert again("Make it red.", padding="max_length", max_length=8) == tokenizer(
        "Make it red.", padding="max_length", max_length=8
    )


# How it is judged


def test_the_checkpoint_is_an_ordinary_one(made, vae, tokenizer, tmp_path):
    pipe = chronoedit.assemble(made[0], vae, tokenizer)
    copy.deepcopy(pipe).to(torch.bfloat16).save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 10.3e6
    opened = joyedit.load(tmp_path, dtype="bfloat16", device="cpu")
    time = opened.transformer.condition_embedder.time_embedder
    assert time.linear_1.weight.dtype == torch.float32  # as the reference loads it
    assert opened.transformer.proj_out.weight.dtype == torch.bfloat16
    (edit,) = some_edits("add", 1)
    (result,) = evaluate_chronoedit.run(opened, [edit], steps=2)
    (copied,) = evaluate_chronoedit.through_vae(pipe, [scenes.draw(edit.source)[None]])
    assert result.shape == (96, 96, 3) and np.abs(result - copied[0]).mean() < 0.03


@pytest.mark.slow
def test_doing_nothing_fails_and_films_are_compared_frame_by_frame(made, vae, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate_chronoedit, "REASONING_FRAMES", 9)
    pipe = chronoedit.assemble(made[0], vae, tokenizer)
    kinds = ("add", "grey")
    report, picture = evaluate_chronoedit.evaluate(pipe, 1, (1,), kinds, steps=1, reasoning=1)
    assert list(report) == ["model", "reasoning", "nothing", "ceiling", "way"]
    assert report["nothing"]["kinds"]["add"]["outside"] > 90 and report["nothing"]["kinds"]["add"]["ok"] == 0
    assert picture.width > 2 * 3 * scenes.SIZE
    way = report["way"]
    assert way["films"] == 2 and len(way["nothing"]["key_frames"]) == 3
    nothing, ceiling = way["nothing"]["key_frames"], way["ceiling"]["key_frames"]
    assert nothing[0] > 90 and nothing == sorted(nothing, reverse=True)
    assert nothing[-1] < 30 and 10 < ceiling[-1] < 90  # of an untrained autoencoder


def test_the_way_is_measured_where_it_is(vae, made, tokenizer, monkeypatch):
    pipe = chronoedit.assemble(made[0], vae, tokenizer)
    monkeypatch.setattr(evaluate_chronoedit, "through_vae", lambda pipe, clips: clips)
    edits = evaluate.held_out(1, (2,), ("move", "negative"))
    films = [scenes.clip(edit, 9) for edit in edits]
    off = np.zeros(9, np.float32)
    off[4], off[5] = 0.1, 0.01  # 20 dB at a key frame, 40 dB between two
    bad = [film + off[:, None, None, None] for film in films]
    report = evaluate_chronoedit.way(edits, bad, pipe)
    assert report["model"]["key_frames"] == [100.0, 20.0, 100.0]
    assert report["model"]["between"] == pytest.approx((40 + 5 * 100) / 6, abs=0.1)
    assert report["ceiling"]["between"] == 100.0
    page = evaluate_chronoedit.film_grid(edits, bad)
    assert page.size == (3 * 96, 4 * 96)
