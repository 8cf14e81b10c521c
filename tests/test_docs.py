"""The examples in docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import transformers_autogaze


MODULES = sorted(
    module.name for module in pkgutil.walk_packages(transformers_autogaze.__path__, "transformers_autogaze.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if name == "transformers_autogaze.app.page":
        pytest.importorskip("gradio")
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert result.failed == 0
