import numpy as np
import pytest

pytest.importorskip("resvg_py")

from tools.emoji import icons


def squares(*sizes_px: int, red: int = 0) -> icons.Pictures:
    """One concept: in each of five styles a centred square of the given size."""
    pictures = np.zeros((1, 5, 64, 64, 4), np.uint8)
    for style, size in enumerate(sizes_px):
        edge = (64 - size) // 2
        pictures[0, style, edge : 64 - edge, edge : 64 - edge] = (red, 0, 0, 255)
    return pictures


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("red-apple", True),
        ("cat", True),
        ("cat-face", False),
        ("three-oclock", False),
        ("beach-with-big-umbrella", False),
        ("1st-place-medal", False),
    ],
)
def test_only_short_names_of_things_are_plain(name: str, plain: bool):
    assert icons.is_plain(name) is plain


def test_a_concept_must_fill_a_fair_part_of_the_square_in_every_style():
    concepts = np.concatenate([squares(40, 40, 40, 40, 40), squares(40, 40, 40, 40, 8), squares(40, 40, 40, 40, 64)])
    assert icons.is_well_drawn(concepts).tolist() == [True, False, False]


def test_agreement_is_the_mean_overlap_of_the_silhouettes():
    assert icons.agreement(squares(40, 40, 40, 40, 40))[0] == pytest.approx(1)
    # Four of the ten pairs compare a square of 20 pixels with one of 40: a quarter of it.
    assert icons.agreement(squares(40, 40, 40, 40, 20))[0] == pytest.approx((6 + 4 * 0.25) / 10)


def test_of_two_look_alikes_the_familiar_name_stays():
    pictures = np.concatenate([squares(*[40] * 5), squares(*[40] * 5), squares(*[40] * 5, red=255)])
    assert icons.choose(["small-black-box", "box", "red-tile"], pictures) == [1, 2]


def test_a_third_concept_of_the_same_kind_is_left_out():
    pictures = np.concatenate([squares(*[40] * 5, red=red) for red in (0, 128, 255)])
    assert len(icons.choose(["bullet-train", "light-train", "trains"], pictures)) == 2


def test_a_transparent_picture_is_white_paper():
    blended = icons.on_white(squares(32, 32, 32, 32, 32))
    assert blended[0, 0, 0, 0].tolist() == [1, 1, 1]
    assert blended[0, 0, 32, 32].tolist() == [0, 0, 0]


def test_an_icon_is_drawn_in_the_given_box():
    drawn = icons.render('<rect width="16" height="32" fill="currentColor"/>', 32, 32)
    assert drawn.shape == (64, 64, 4)
    assert drawn[32, 16].tolist() == [0, 0, 0, 255]
    assert drawn[32, 48, 3] == 0
