#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: tools/test.sh [ctest arguments]
# Installs what is missing, builds, and runs every test.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/common.sh
build
ctest --test-dir build --output-on-failure --parallel "$(nproc)" "$@"
