"""`recipes` lists what `--config recipe:NAME` takes, and prints it."""

import pytest

from srpo_lightning.cli import main
from srpo_lightning.config.shipped import RECIPES, recipes
from tests.refusals import refused


def test_every_recipe_has_its_line_with_what_it_trains_and_the_memory_that_it_states(capsys):
    main(["recipes"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert list(lines) == [*(n for n in recipes() if "/" not in n), *(n for n in recipes() if "/" in n)]
    assert all(len(line.split()) > 1 for line in lines.values())
    words = "flux_srpo_qlora FLUX.1-dev: SRPO, QLoRA, 512 px 16 GiB of one GPU with 24 GB"
    assert lines["flux_srpo_qlora"].split() == words.split()
    assert lines["flux_refl"].endswith("35 GiB per GPU of 8 GPUs with 80 GB")
    assert lines["emoji_srpo_offline"].endswith("emoji-flux: SRPO, all weights, 64 px, on real pictures")
    assert lines["families/z_image"].split(maxsplit=1)[1] == "Z-Image, 6 B"
    assert lines["forms/host_offload"].endswith(
        "beside a recipe for one GPU: the transformer's weights stay in the machine's memory"
    )


@pytest.mark.parametrize("name", ["flux_srpo_lora", "recipe:families/z_image"])
def test_a_recipe_is_printed_as_it_is(name, capsys):
    main(["recipes", name])
    assert capsys.readouterr().out == (RECIPES / f"{name.removeprefix('recipe:')}.yaml").read_text()


def test_a_recipe_that_there_is_not_is_refused_with_the_nearest(capsys):
    refused(
        ["recipes", "flux_srpo_qlroa"], "flux_srpo_qlroa: there is no such recipe; did you mean flux_srpo_qlora", capsys
    )
