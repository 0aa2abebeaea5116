import pytest

from srpo_lightning.rewards import HPSv2
from srpo_lightning.rewards.hps import FILENAME, SGPHPS

V2 = "HPS_v2_compressed.pt"


@pytest.fixture
def file(tmp_path):
    (tmp_path / V2).write_bytes(b"weights")
    return tmp_path / V2


@pytest.mark.parametrize("reward", [HPSv2, SGPHPS])
def test_a_filename_that_would_be_passed_over_is_refused(models, file, reward):
    """Beside a converted folder, which has one kind of weights, or beside a file."""
    with pytest.raises(ValueError, match=rf"^filename is {V2}, but pretrained is a folder that `convert` wrote"):
        reward(str(models.clip), V2)
    with pytest.raises(ValueError, match=r"^filename is other.pt, but pretrained is a file itself .*: leave filename"):
        reward(str(file), "other.pt", processor=str(models.clip))


def test_the_default_and_a_files_own_name_are_no_contradiction(models, file):
    for pretrained, filename in ((models.clip, FILENAME), (file, FILENAME), (file, V2), (file.parent, V2)):
        HPSv2(str(pretrained), filename, processor=str(models.clip))
