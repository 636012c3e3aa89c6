#!/usr/bin/env bash
# Make .venv with the project and everything its commands need; quick when there is nothing to do.
# `make demo` and `make test` call it. PYTHON=/path/to/python chooses the interpreter of a new .venv.
# `setup.sh slurm` installs the system packages of `make test-slurm` instead, and nothing else; `setup.sh chromium` the
# browser of `make slow`; `setup.sh lowest` makes .venv-lowest, with the oldest versions that pyproject.toml allows, for
# `make test-lowest` (LOWEST_PYTHON=/path/to/python chooses its interpreter).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly LOWEST=.venv-lowest
readonly STAMP=$VENV/.installed
readonly EXTRAS=ffcv,slurm,report,parquet,demo,dev

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$@" >&2; exit 1; }

# What .venv was made from: the pins, and the folder, since an environment cannot be moved.
fingerprint() {
    { cat pyproject.toml requirements.txt scripts/setup.sh; pwd; } | cksum
}

# Succeed if this interpreter is new enough for the project.
is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
        if [[ $candidate == "${PYTHON:-}" ]]; then
            die "PYTHON = $PYTHON: no Python 3.11 or newer that runs; name another one, or unset PYTHON"
        fi
    done
    die "no Python 3.11 or newer found (tried python3, python3.11 to python3.14)" \
        "install one (Debian 12 and newer: apt-get install python3), or name it: make setup PYTHON=/path/to/python"
}

uv_works() { command -v "$1" >/dev/null && "$1" --version >/dev/null 2>&1; }

# --- System packages: what FFCV's build needs, and what this Python lacks ---------------------------------

missing_for_python() {  # the interpreter's path -> Debian's names, one a line
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    command -v pkg-config >/dev/null || echo pkg-config
    command -v g++ >/dev/null || echo g++
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo "python$version-dev"
    if ! uv_works uv && ! uv_works $VENV/bin/uv; then
        "$1" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    fi
}

missing_for_slurm() {
    local PATH=$PATH:/usr/sbin:/sbin
    { command -v slurmctld && command -v slurmd && command -v sbatch; } >/dev/null || echo slurm-wlm
    command -v munged >/dev/null || echo munge
}

missing_for_chromium() {
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo chromium
}

install_packages() {  # a command that prints the missing packages
    local packages=() as_root=()
    mapfile -t packages < <("$@")
    (( ${#packages[@]} )) || return 0
    if ! command -v apt-get >/dev/null; then
        die "missing system packages (Debian's names): ${packages[*]}" \
            "install them with your package manager, then repeat the command"
    fi
    if (( EUID != 0 )); then
        if ! { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }; then
            die "system packages are missing, and installing them needs root; run this, then repeat the command:" \
                "    sudo sh -c 'apt-get update && apt-get install -y ${packages[*]}'"
        fi
        as_root=(sudo -n)
    fi
    say "installing system packages: ${packages[*]}"
    local log apt=(apt-get -o DPkg::Lock::Timeout=300 -qq)
    log=$(mktemp)
    if ! {
        "${as_root[@]}" "${apt[@]}" update &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${packages[@]}"
    } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "apt-get could not install: ${packages[*]}" "all of its output is in $log"
    fi
    rm -f "$log"
    mapfile -t packages < <("$@")
    (( ${#packages[@]} == 0 )) || die "apt-get installed its packages, but this is still missing: ${packages[*]}"
}

# --- The environment --------------------------------------------------------------------------------------

make_venv() {
    local python=$1
    if [[ -e $VENV ]] && ! is_new_enough $VENV/bin/python; then
        say "$VENV does not work any more; making a new one"
        rm -rf $VENV
    fi
    if [[ ! -e $VENV ]]; then
        say "making $VENV with $("$python" --version) ($python)"
        if uv_works uv; then
            uv venv --quiet --python "$python" $VENV
        else
            "$python" -m venv $VENV
        fi
    fi
}

find_uv() {
    if uv_works $VENV/bin/uv; then
        UV=$VENV/bin/uv
    elif uv_works uv; then
        UV=uv
    else
        say "installing uv into $VENV"
        $VENV/bin/python -m pip --version >/dev/null 2>&1 || $VENV/bin/python -m ensurepip >/dev/null
        $VENV/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
        UV=$VENV/bin/uv
    fi
}

main() {
    local python started=$SECONDS
    if [[ -f $STAMP && $(<$STAMP) == "$(fingerprint)" ]] && is_new_enough $VENV/bin/python; then
        return 0
    fi
    if [[ -e $VENV ]] && is_new_enough $VENV/bin/python; then
        python=$VENV/bin/python
    else
        python=$(find_python)
    fi
    install_packages missing_for_python "$python"
    make_venv "$python"
    find_uv
    rm -f $STAMP
    say "installing the project and its pinned dependencies into $VENV (3 GB to download the first time)"
    # The pins are also for building ffcv and the project (setuptools).
    "$UV" pip install --python $VENV/bin/python --build-constraints requirements.txt \
        -r requirements.txt --editable ".[$EXTRAS]"
    fingerprint >$STAMP
    say "done in $((SECONDS - started)) s"
}

# Python 3.12, which the oldest torch's GPU images have; any other that works if it is not there.
find_lowest_python() {
    local candidate
    for candidate in ${LOWEST_PYTHON:+"$LOWEST_PYTHON"} python3.12 ~/.pyenv/versions/3.12.*/bin/python; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    find_python
}

lowest() {
    local python started=$SECONDS marks
    marks="$({ cat pyproject.toml scripts/setup.sh; pwd; } | cksum)"
    if [[ -f $LOWEST/.installed && $(<$LOWEST/.installed) == "$marks" ]]; then
        return 0
    fi
    main
    find_uv
    python=$(find_lowest_python)
    install_packages missing_for_python "$python"
    say "making $LOWEST with $("$python" --version) and the oldest versions that pyproject.toml allows (3 GB the first time)"
    "$UV" venv --quiet --clear --python "$python" $LOWEST
    "$UV" pip install --quiet --python $LOWEST/bin/python --build-constraints requirements.txt \
        --resolution lowest-direct --editable ".[$EXTRAS]"
    echo "$marks" >$LOWEST/.installed
    say "done in $((SECONDS - started)) s"
}

case "$*" in
    "") main ;;
    lowest) lowest ;;
    slurm) install_packages missing_for_slurm ;;
    chromium) install_packages missing_for_chromium ;;
    *) die "'$*': expected nothing, lowest, slurm or chromium" ;;
esac
