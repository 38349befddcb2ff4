# Make a virtual environment in .venv; quickstart.sh and test.sh source this file.
#
#     make_environment requirements.txt     install the file unless .venv already has it
#
# PYTHON names the interpreter of .venv (default: python3).

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
        echo ".venv has $(.venv/bin/python --version), $python is $("$python" --version):" \
            "remove .venv to make it anew" >&2
        return 1
    fi
    source .venv/bin/activate

    # The stamp holds a checksum of the installed requirements, so that changes are noticed.
    stamp=.venv/installed-$requirements
    sum=$(cat requirements.txt "$requirements" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
        echo "installing $requirements"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        echo "$sum" >"$stamp"
    fi
}
