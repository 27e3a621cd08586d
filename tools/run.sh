#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: tools/run.sh [opbench arguments]
# Installs what is missing, builds, and runs opbench: by default grouped_matmul on a real model's
# shapes, and then on the choices of a real model's router. Under two minutes, once it is built.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/common.sh
build opbench
if [ $# -gt 0 ]; then
  exec build/bench/opbench "$@"
fi
build/bench/opbench --op grouped_matmul
build/bench/opbench --op grouped_matmul --problem gpt-oss-20b --tokens 512 \
  --routing trace:tests/data/tinymoe/routing_layer0.csv
