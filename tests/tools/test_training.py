import pytest
import torch
from torch import Tensor, nn

from tools.emoji import flux
from tools.emoji.training import Trainee, fit, read_ema


class Line(Trainee):
    """Fits a fixed linear map; what it draws shows in its weights."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Embedding(2, 2)), steps, seed=7, muon_lr=1e-2, adam_lr=1e-2)
        self.drawn: list[float] = []

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        x = torch.randn(5, 3, generator=draw)
        self.drawn.append(x[0, 0].item())
        return {"loss": (self.net[0](x) - x.sum(1, keepdim=True)).square().mean() + self.net[1].weight.square().mean()}


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_stopped_goes_on_as_if_it_never_had(tmp_path):
    whole, first, second = Line(12), Line(12), Line(12)
    fit(whole, tmp_path / "whole", save_every=4)
    with pytest.MonkeyPatch.context() as patch:
        real = first.loss

        def stop_at_nine(draw: torch.Generator) -> dict[str, Tensor]:
            if first.global_step == 9:
                raise RuntimeError("killed")
            return real(draw)

        patch.setattr(first, "loss", stop_at_nine)
        with pytest.raises(RuntimeError, match="killed"):
            fit(first, tmp_path / "halved", save_every=4)
    fit(second, tmp_path / "halved", save_every=4)
    assert second.drawn == whole.drawn[8:]
    for name, value in read_ema(tmp_path / "whole").items():
        assert torch.equal(value, read_ema(tmp_path / "halved")[name]), name


def test_matrices_go_to_muon_and_everything_else_to_adam():
    adam, muon = Line(2).configure_optimizers()
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(4, 3)]
    assert [tuple(p.shape) for p in adam.param_groups[0]["params"]] == [(4,), (2, 2)]


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    line = Line(1000)
    assert [round(line.lr_factor(step), 3) for step in (0, 99, 500, 850, 1000)] == [0.01, 1, 1, 0.5, 0]


def test_packing_is_undone_by_unpacking():
    latents = torch.randn(2, 16, 8, 8)
    assert flux.pack(latents).shape == (2, 16, 64)
    assert torch.equal(flux.unpack(flux.pack(latents)), latents)


def test_each_caption_form_is_drawn_as_often_as_the_recipe_says():
    table = flux.CaptionTable.of(["cat", "red apple"])
    pictures = torch.full((20_000,), 7)  # the second concept in the third style
    rows = table.draw(pictures, torch.Generator().manual_seed(0))
    counts = {table.captions[row]: float((rows == row).float().mean()) for row in rows.unique().tolist()}
    wanted = {"ink. red apple": 0.55, "red apple": 0.30, "ink": 0.05, "": 0.10}
    assert counts == pytest.approx(wanted, abs=0.015)
