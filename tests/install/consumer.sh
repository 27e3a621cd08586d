#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: consumer.sh find_package|pkg_config|add_subdirectory|headers SOURCE_DIR BUILD_DIR COMPILER
# Builds and runs the first C++ block of the README against the installed library, or its sources.
set -euo pipefail
way=$1 source=$2 build=$3 compiler=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

awk '/^```cpp/ { inside = 1; next } /^```/ && inside { exit } inside' "$source/README.md" > "$work/main.cc"
[ -s "$work/main.cc" ] || { echo "README.md has no C++ block" >&2; exit 1; }

if [ "$way" != add_subdirectory ]; then
  cmake --install "$build" --prefix "$work/prefix" > "$work/install.log"
fi
# A sanitizer build's archive needs the sanitizer's run-time in its consumer too.
flags=$(sed -n 's/^CMAKE_CXX_FLAGS:STRING=//p' "$build/CMakeCache.txt")

consumer_project() {
  cat > "$work/CMakeLists.txt" <<EOF
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
$1
add_executable(consumer main.cc)
target_link_libraries(consumer PRIVATE moeops::moeops)
EOF
  cmake -S "$work" -B "$work/build" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" \
        -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$work/prefix" \
        > "$work/configure.log" || { cat "$work/configure.log"; exit 1; }
  cmake --build "$work/build" --target consumer
  "$work/build/consumer"
}

case $way in
  find_package) consumer_project 'find_package(moeops 0.1 REQUIRED)' ;;
  add_subdirectory) consumer_project "add_subdirectory($source moeops)" ;;
  pkg_config)
    export PKG_CONFIG_PATH
    PKG_CONFIG_PATH=$(dirname "$(find "$work/prefix" -name moeops.pc)")
    # Unquoted: each of them is a list of flags.
    # shellcheck disable=SC2046,SC2086
    "$compiler" -std=c++20 $flags "$work/main.cc" -o "$work/consumer" \
      $(pkg-config --static --cflags --libs moeops)
    "$work/consumer"
    ;;
  headers)
    cd "$work/prefix/include"
    find moeops -name '*.h' | while read -r header; do
      echo "$header"
      echo "#include <$header>" > "$work/alone.cc"
      "$compiler" -std=c++20 -fsyntax-only -Wall -Wextra -Wconversion -Werror -I. "$work/alone.cc"
    done
    ;;
esac
