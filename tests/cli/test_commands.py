from pathlib import Path
from srpo_lightning.cli import main
from tests import tiny

def test_fit(models, features, tmp_path):
    main(["fit", "--config", str(tiny.write_config(models, tmp_path/"run", features))])
    print(sorted(str(p) for p in tmp_path.rglob("*")))
    assert 0
