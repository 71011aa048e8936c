#!/usr/bin/env bash
# Lint and tests; makes an environment first where there is none. Arguments go to pytest: bash tests/run.sh -k latency
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
use_environment tests/requirements.txt torch torchvision numpy PIL simplejpeg scipy tqdm matplotlib pytest xdist ruff hypothesis
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest tests -m "not slow" -n 2 --dist loadfile "$@"
