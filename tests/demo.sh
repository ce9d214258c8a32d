#!/usr/bin/env bash
# Shows what meshlb does, step by step, in network namespaces: here where the kernel has IPVS and you are root, elsewhere
# in a VM that is booted for it. What is missing is installed, and named (tests/vm/setup.sh). Exits with 1 if any step is not
# as it should be. The story itself: tests/kernel/demo.rs.
#
#   tests/demo.sh [--vm|--host]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command -v cargo >/dev/null || [ ! -e "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
command -v cargo >/dev/null || { echo "demo: there is no cargo here: install Rust (https://rustup.rs) first" >&2; exit 1; }
exec "$here/kernel/run.sh" "$@" --demo
