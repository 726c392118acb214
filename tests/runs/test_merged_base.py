"""What lies where a run would merge an adapter is not removed, unless such a run has put it there."""

import json

import pytest

from hfllm.errors import InputError
from hfllm.models.loading.adapters import SavedAdapter
from hfllm.outputs.files import MERGED_FROM
from hfllm.runs import models as models_module

ADAPTER = SavedAdapter("org/adapter", {"base_model_name_or_path": "org/model"}, {})
NAMED = models_module.NamedModel("org/adapter", "v1", trains_adapter=True)


@pytest.fixture
def merged(monkeypatch):
    """The folders that were written, in place of the models in them."""
    written = []
    monkeypatch.setattr(models_module, "write_merged", lambda adapter, folder: written.append(folder))
    return written


@pytest.mark.parametrize("files", [["config.json"], [MERGED_FROM, "report.json"]])
def test_a_folder_of_the_user_is_kept(tmp_path, merged, files):
    place = tmp_path / "base"
    place.mkdir()
    for name in files:
        (place / name).write_text("{}")
    with pytest.raises(InputError, match="base is where the adapter 'org/adapter' would be merged, and holds"):
        models_module.on_merged_base(ADAPTER, NAMED, str(tmp_path))
    assert sorted(path.name for path in place.iterdir()) == sorted(files) and not merged


@pytest.mark.parametrize("left", ["nothing", "the same", "another adapter's"])
def test_what_such_a_run_left_is_replaced_if_it_is_another_adapters(tmp_path, merged, left):
    place, record = tmp_path / "base", models_module.merge_record(ADAPTER)
    if left != "nothing":
        place.mkdir()
        record |= {} if left == "the same" else {"adapter": "org/another"}
        (place / MERGED_FROM).write_text(json.dumps(record))
    base = models_module.on_merged_base(ADAPTER, NAMED, str(tmp_path))
    assert (base.name, base.revision) == (str(place), "main")
    assert merged == ([] if left == "the same" else [place])
