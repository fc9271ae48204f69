#!/usr/bin/env bash
# On a rented machine without a network: unpacks what the folder carry/ holds, then runs `python -m bench gpu` with the options given.
# usage: bench/rented.sh [--minutes N] [--folder FOLDER] [--archive FILE] ...        see docs/gpu_hour.md
set -euo pipefail
cd "$(dirname "$0")/.."
carry=${CARRY:-carry} site=${SITE:-/tmp/patchlight_site} python=${PYTHON:-python3}
mkdir -p "$site" "$site.dali"
shopt -s nullglob
wheels=("$carry"/*.whl) parts=("$carry"/dali.part.*)
if [ ${#wheels[@]} -gt 0 ] && [ ! -e "$site/.wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${wheels[@]}"
  touch "$site/.wheels"
fi
[ ${#parts[@]} -eq 0 ] || cp "${parts[@]}" "$site.dali"
parts=("$site.dali"/dali.part.*)
if [ ${#parts[@]} -gt 0 ] && [ ! -e "$site/.dali" ]; then
  if cat "${parts[@]}" | tar xJ -C "$site" 2>/dev/null; then touch "$site/.dali"; else echo "rented: DALI's parts are not complete yet"; fi
fi
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1
export PYTHONPATH="$site:$PWD/ssl:$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m bench gpu "$@"
