# Sourced by demo.sh and test.sh: makes .venv if it is missing, installs what a requirements file
# names, and activates it. A second run finds everything in place.
#   source scripts/setup.sh requirements.txt

requirements=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
  # Not 3.14: there is no megatron-core for it to install (requirements.txt).
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "${python:-}" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 on the PATH; install one and run this again" >&2
    exit 2
  fi
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

# pip takes seconds to find that nothing is missing; a stamp of the files' content takes none.
stamp=.venv/.installed-$(basename "$requirements" .txt)
wanted=$(cat requirements.txt "$requirements" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing $requirements into .venv"
  # pip would compile to bytecode on one core, which takes longer than all else that it does. What
  # cannot be compiled is for a newer Python.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r "$requirements"
  .venv/bin/python -m compileall -qq -j 0 .venv/lib || true
  echo "$wanted" >"$stamp"
fi
source .venv/bin/activate
