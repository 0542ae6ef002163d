"""Exports that were mutated in any way are loaded, or refused in one sentence; see tests/search/test_mutated_files.py."""

from __future__ import annotations

import json
import shutil

from hypothesis import given
from hypothesis import strategies as st

from secateur.search.export.files import ONNX, POLICY, check_files, read_export
from secateur.search.export.load import load_compressed
from tests.search.mutations import broken, changed_bytes, changed_values, example


@example(30)
@given(st.data())
def test_exports(exported, tmp_path, data):
    folder = tmp_path / "export"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(exported, folder)
    name = data.draw(st.sampled_from((POLICY, POLICY, POLICY, "model.safetensors", ONNX)))
    path = folder / name
    content = path.read_bytes()
    if name == POLICY and data.draw(st.booleans()):
        content = json.dumps(data.draw(changed_values(json.loads(content)))).encode()
    else:
        content = data.draw(changed_bytes(content))
    path.write_bytes(content)
    assert broken(lambda: check_files(folder, read_export(folder))) == ""
    assert broken(lambda: load_compressed(folder)) == ""
