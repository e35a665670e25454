"""benchmarks/heads_on_states.py: trains heads and nothing else, on the states of the run that it is given."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from nextvec.config import AutoencoderRun, AutoregressiveHeadConfig, CalmConfig, CalmRun, DataSettings
from nextvec.model.calm import Calm
from nextvec.model.init import initialise
from nextvec.rundir import load_run, save_run
from nextvec.text.prepare import prepare
from sampling_models import BACKBONE, TOKENIZER, calm_config

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "heads_on_states.py"


@pytest.mark.slow
def test_heads_are_trained_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for index in range(40):
        (tmp_path / "text" / f"{index}.md").write_text(f"{index} and {index + 1} are numbers. " * 60)
    prepare([str(tmp_path / "text")], TOKENIZER, tmp_path / "shards", valid_fraction=0.2, workers=1)
    sizes = calm_config(4).autoencoder
    model = Calm(CalmConfig(autoencoder=sizes, backbone=BACKBONE, head=AutoregressiveHeadConfig()))
    initialise(model, torch.Generator().manual_seed(0), 0.1)
    data = DataSettings(path="unused")
    save_run(tmp_path / "multi", CalmRun(data=data, model=model.config), model, TOKENIZER)
    save_run(tmp_path / "autoencoder", AutoencoderRun(data=data, model=sizes), model.autoencoder, TOKENIZER)
    module = runpy.run_path(str(SCRIPT))
    words = ["--run", str(tmp_path / "multi"), "--autoencoder", str(tmp_path / "autoencoder"), "--data"]
    module["main"]([*words, str(tmp_path / "shards"), "--seconds", "0.3", "--steps", "2", "--documents", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed[2:]] == [
        "| autoregressive, trained with the backbone",
        "| flow, predicts velocity",
        "| flow, predicts latent",
    ]
    assert all(re.search(r"\| 0\.3 \| [1-9]\d* \| -?\d", line) for line in printed[3:])
    with pytest.raises(SystemExit, match="is no CALM with the autoregressive head"):
        module["main"](["--run", str(tmp_path / "autoencoder"), *words[2:], str(tmp_path / "shards")])


def test_the_backbone_stays_and_the_head_learns(tmp_path: Path) -> None:
    module = runpy.run_path(str(SCRIPT))
    sizes = calm_config(4).autoencoder
    trained = Calm(CalmConfig(autoencoder=sizes, backbone=BACKBONE, head=AutoregressiveHeadConfig()))
    initialise(trained, torch.Generator().manual_seed(0), 0.1)
    run = AutoencoderRun(data=DataSettings(path="unused"), model=sizes)
    save_run(tmp_path / "autoencoder", run, trained.autoencoder, TOKENIZER)
    kept = load_run(tmp_path / "autoencoder").model.state_dict()
    model = module["around"](trained, module["HEADS"]["latent"], tmp_path / "autoencoder")
    state = torch.randn(64, BACKBONE.width, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.randint(4, sizes.vocab_size, (64, 4), generator=torch.Generator().manual_seed(2))

    def loss() -> float:
        return float(model.loss(state.float(), ids, torch.Generator().manual_seed(3))[0].detach())

    initialise(model.head, torch.Generator().manual_seed(0), 0.1)
    before = loss()
    assert module["teach"](model, state, ids, 1.0, 0) > 1
    assert loss() < 0.9 * before
    for name, tensor in trained.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor)
    for name, tensor in kept.items():
        assert torch.equal(model.autoencoder.state_dict()[name], tensor)
