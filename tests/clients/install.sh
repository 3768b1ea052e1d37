#!/usr/bin/env bash
# Installs the clients of clients.txt, each into a folder of its own, and the Python that runs the tests:
#   tests/clients/install.sh DIR
#   RUDDER_CLIENTS=DIR DIR/python/bin/python -m pytest tests/clients
# What is there in the right version is left alone. A client that cannot be installed does not stop the others:
# its reason goes to DIR/NAME/failed, where the tests find it and say so. Fails only if the tests cannot run.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:?usage: install.sh DIR}"
dir=$(cd "$1" && pwd)

install_npm() { npm install --prefix . --ignore-scripts --no-audit --no-fund --no-save --loglevel=error "$1@$2"; }
install_pip() { python3 -m venv . && bin/python -m pip install -q --disable-pip-version-check "$1==$2" "${@:3}"; }

while read -r name registry package version more; do
    [[ $name == \#* || -z $name ]] && continue
    folder=$dir/$name
    [[ $(cat "$folder/version" 2>/dev/null) == "$version" ]] && continue
    rm -rf "$folder" && mkdir -p "$folder" && cd "$folder" || exit 1
    # npm takes a folder with a package.json for the root, and looks further up without one.
    [[ $registry == npm ]] && echo '{}' >package.json
    # shellcheck disable=SC2086  # several packages are several words
    if "install_$registry" "$package" "$version" $more </dev/null >install.log 2>&1; then
        echo "$version" >version && echo "$name $version: installed"
    else
        tail -n 1 install.log >failed && echo "$name $version: NOT installed: $(tail -n 1 install.log)"
    fi
done <"$here/clients.txt"

python3 -m venv "$dir/python" && "$dir/python/bin/python" -m pip install -q --disable-pip-version-check -r "$here/requirements.txt"
