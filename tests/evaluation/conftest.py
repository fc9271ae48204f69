"""What several tests of evaluation read."""

import json

import pytest
from engine.tiny_run import tiny_run, tiny_trainer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An untrained run of a small model, with a checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    trainer = tiny_trainer(tiny_run(folder))
    trainer.save()
    (folder / "run.json").write_text(json.dumps(trainer.run.to_dict()))
    return folder
