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
EXTRAS = ("lmms_eval", "vllm", "gradio", "ray")  # packages that modules for them need


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    if ".serving.vllm_" in name:
        pytest.importorskip("vllm")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed")
    result = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert result.failed == 0
