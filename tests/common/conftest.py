"""
The library's own tests, which its source distribution holds: `make common-tests` unpacks it and names the folder.

Some modules that they import are not in the distribution. Here stands what they take of them: nothing that tests our classes,
which generate no tokens and whose export has tests of its own.
"""

import os
import sys
import types
from pathlib import Path


def _prepare(folder: Path) -> None:
    (folder / "tests" / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    for name, contents in {
        "utils": {},
        "utils.test_configuration_utils": {
            "config_common_kwargs": {"return_dict": False, "output_hidden_states": True}
        },
        "exporters": {},
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation": {},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    }.items():
        module = types.ModuleType(f"tests.{name}")
        module.__dict__.update(contents)
        sys.modules[f"tests.{name}"] = module
    # It names files that the tests of the library fetch; ours need none.
    fetching = types.ModuleType("fetch_hub_objects_for_ci")
    fetching.url_to_local_path = lambda url, return_url_if_not_found=True: url
    sys.modules[fetching.__name__] = fetching


if "TRANSFORMERS_TESTS" in os.environ:
    _prepare(Path(os.environ["TRANSFORMERS_TESTS"]))
