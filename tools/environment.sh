# Sourced by example.sh and tests/run.sh: sets $python to an interpreter that has what a requirements file asks for.
# An interpreter that has it already is taken as it is: $PYTHON, an active environment, or .venv from an earlier run.
# Otherwise .venv is made and the requirements are installed into it.
use_environment() { # use_environment REQUIREMENTS_FILE MODULE...
    local requirements=$1 candidate imports
    shift
    imports="import $(IFS=,; echo "$*")"
    for candidate in "${PYTHON:-}" .venv/bin/python python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c "$imports" >/dev/null 2>&1; then
            python=$candidate
            return
        fi
    done
    echo "Making a virtual environment in .venv with $requirements"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --requirement "$requirements"
    python=.venv/bin/python
}

# GNU OpenMP's threads wait for each other by spinning. Where another program keeps a core busy, that makes steps of a few
# threads many times slower; after so few turns they sleep, which costs nothing where all cores are free.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
