"""The messages that the prediction of several GPUs is made of: recorded without memory, by formula, and by
real processes."""

import json

import pytest
import torch

from benchmarks import scaling, tables
from benchmarks.scaling import EDITS, MESHES, Edit, Shape, sent_by_formula, work_of
from joyedit import parallel
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from tests.lora_layers import JOY, WAN, filled

# Numbers of tokens that 2 and 4 do not divide.
JOY_CONFIG = JoyImageEditTransformer3DModel.Config.from_dict(
    {**JOY, "num_attention_heads": 4, "rope_dim_list": [4, 4, 4], "num_layers": 3}
)
WAN_CONFIG = ChronoEditTransformer3DModel.Config.from_dict(
    {**WAN, "num_attention_heads": 4, "added_kv_proj_dim": 48}
)


def picture(network, device="meta"):
    latents = torch.zeros(1, 1, 16, 1, 6, 10, dtype=torch.bfloat16, device=device)
    vec = network.embed_time(torch.zeros(1, device=device))
    texts = [network.embed_text(torch.zeros(1, n, 20, dtype=torch.bfloat16, device=device)) for n in (7, 5)]
    tokens, rope, grid = network.embed_image(latents), network.rope((2, 3, 5), device), (2, 3, 5)
    return lambda: network.predict_branches(tokens, tokens, texts, vec[0], rope, grid)


def film(network, device="meta"):
    latents = torch.zeros(1, 6, 3, 6, 10, device=device)
    vec = network.embed_time(torch.zeros(1, device=device))
    texts = [network.embed_text(torch.zeros(1, n, 10, dtype=torch.bfloat16, device=device)) for n in (7, 5)]
    image = network.embed_image(torch.zeros(1, 3, 14, dtype=torch.bfloat16, device=device))
    rope = network.rope((3, 3, 5), device)
    return lambda: network.predict_branches(latents, vec[0], texts, image, rope)


SMALL = {
    "picture": Edit(
        JoyImageEditTransformer3DModel, JOY_CONFIG, picture, Shape((15, 15), (7, 5), 48, 3, 64, True)
    ),
    "film": Edit(ChronoEditTransformer3DModel, WAN_CONFIG, film, Shape((45,), (0, 0), 48, 2, 16, False)),
}
SMALL_MESHES = [(2, 1), (1, 2), (2, 2), (1, 4), (2, 4)]


def sent(edit, *mesh):
    work = work_of(edit, *mesh)
    return work.together, work.everyone


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("mesh", SMALL_MESHES, ids=str)
def test_what_is_recorded_is_what_the_formula_says(kind, mesh):
    for rank in range(mesh[0] * mesh[1]):
        together, everyone = sent(SMALL[kind], *mesh, rank)
        assert sum(together) + sum(everyone) == sent_by_formula(SMALL[kind].shape, *mesh, rank), rank
        branches = 2 // mesh[0]
        assert len(together) == (2 * SMALL[kind].shape.layers * branches + (mesh[0] == 1)) * (mesh[1] > 1)
        assert len(everyone) == (mesh[0] == 2)


def really_sent(kind, mesh):
    edit = SMALL[kind]
    network = filled(edit.network(edit.config)).to(torch.bfloat16)
    recorded = scaling.recording(parallel.meet(*mesh, torch.device("cpu")))
    parallel.divide(network, recorded)
    with torch.no_grad():
        edit.step(network, "cpu")()
    return recorded.together.sent, recorded.everyone.sent


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", SMALL)
def test_real_processes_send_the_same(workers, kind, mesh):
    found = workers.run(really_sent, kind, mesh, count=mesh[0] * mesh[1])
    assert found == [sent(SMALL[kind], *mesh, rank) for rank in range(len(found))]


@pytest.mark.parametrize("name", EDITS)
def test_the_committed_figures_are_those_of_the_released_networks(name):
    found = json.loads((tables.RESULTS / "scaling.json").read_text(encoding="utf-8"))["edits"][name]
    assert list(found) == [f"{cfg}x{sequence}" for cfg, sequence in MESHES]
    for cfg, sequence in MESHES:
        row = found[f"{cfg}x{sequence}"]
        assert row["bytes"] == sent_by_formula(EDITS[name].shape, cfg, sequence)
        alone = found["1x1"]["operations"] / (cfg * sequence)
        # A text of more tokens than the other, and shares that are not even.
        assert alone <= row["operations"] <= 1.01 * alone


@pytest.mark.slow
def test_the_code_of_today_gives_the_committed_figures():
    found = json.loads((tables.RESULTS / "scaling.json").read_text(encoding="utf-8"))["edits"]
    for name, edit in list(EDITS.items())[:2]:
        work, row = work_of(edit, 2, 4), found[name]["2x4"]
        assert sum(work.together) + sum(work.everyone) == row["bytes"]
        assert work.tally.operations == row["operations"]
        for gpu in scaling.LINKS:
            assert work.seconds(gpu, (2, 4)) == pytest.approx(
                (row["computing"][gpu], row["sending"][gpu]), abs=1e-5
            )


def test_links_of_pairs_and_of_all():
    """Seven links of 64: to one other process one of them carries all, to seven each a seventh."""
    link = scaling.LINKS["MI300X"]
    slow, quick = (scaling.sent_in(10**9, count, link) - scaling.BEGINNING for count in (2, 8))
    assert slow == pytest.approx(1 / 64 / scaling.LINK_SHARE) and quick == pytest.approx(slow / 7)
