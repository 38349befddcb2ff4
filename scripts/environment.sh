# Sourced by quickstart.sh and test.sh: a virtual environment in .venv, made if need be.
#
#     make_environment requirements.txt     installs that file unless .venv has it already
#
# PYTHON chooses the interpreter that .venv is made with (python3).

make_environment() {
    local requirements=$1 python=${PYTHON:-python3} stamp sum
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "Python 3.10 or newer is needed: set PYTHON to one ($python is" \
                "$("$python" --version 2>&1 || true))" >&2
            return 1
        }
        echo "making a virtual environment in .venv with $python"
        "$python" -m venv .venv
    elif [ -n "${PYTHON:-}" ] && [ "$("$python" --version)" != "$(.venv/bin/python --version)" ]; then
        echo ".venv is of $(.venv/bin/python --version), $python is $("$python" --version):" \
            "remove .venv to have it made anew" >&2
        return 1
    fi
    source .venv/bin/activate

    # The stamp holds what was installed, so that changed requirements are noticed.
    stamp=.venv/installed-$requirements
    sum=$(cat requirements.txt "$requirements" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
        echo "installing $requirements"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        echo "$sum" >"$stamp"
    fi
}
