from __future__ import annotations

import json

from mmbackdoor import recipe_files
from mmbackdoor.config import parse


def test_every_reader_reads_every_picture(tmp_path, capsys):
    recipe = recipe_files.load("benchmark_speed")
    smoke = recipe_files.folders()["recipes"] / "configs/smoke/benchmark_speed.yaml"
    cfg = parse(recipe.Config, ["--config", str(smoke), "--output_dir", str(tmp_path / "run")])
    recipe.run(cfg)
    content = json.loads((tmp_path / "run/speed.json").read_text())
    assert content["samples"] == 64 and content["samples_per_second"]["1"].keys() == {"ours", "webdataset", "open_clip"}
    assert "ours / the faster other" in capsys.readouterr().out
    for reader in recipe.READERS.values():
        assert sum(reader(cfg, sorted(map(str, (tmp_path / "run/shards").glob("*.tar"))), 1)) == 64
